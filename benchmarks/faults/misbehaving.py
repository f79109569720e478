"""Reward functions that pay 1, but misbehave for a fifth of their samples or calls. No torch: workers import this."""

import asyncio
import ctypes
import hashlib
import os
import re
import sys
import time
from collections.abc import Callable
from typing import Any

SHARE = 1 / 5
ENTRIES = {
    "None": None,
    "NaN": float("nan"),
    "+inf": float("inf"),
    "-inf": -float("inf"),
    "text for a number": "good",
    "list of 99 for a response": [1.0] * 99,
}
"""What stands in the answer where a number should."""
CALLS = {"one entry too few": lambda rewards: rewards[:-1], "None for the list": lambda rewards: None}
"""What is answered by a call that is bad as a whole."""


def is_bad(*texts: str) -> bool:
    """A hash of the texts says so: to the function, and to whoever counts."""
    return hashlib.blake2b("\0".join(("worse", *texts)).encode()).digest()[0] < 256 * SHARE


def misbehaving(manner: str) -> Callable[..., Any]:
    """A reward function with one of the manners of rewards.py."""
    seen: set[str] = set()

    def reward(prompts: Any, completions: Any, completion_ids: Any, **columns: Any) -> Any:
        nonlocal seen
        texts = list(map(text_of, completions))
        if manner in CALLS:
            return CALLS[manner]([1.0] * len(texts)) if is_bad(*texts) else [1.0] * len(texts)
        bad = [text for text in texts if is_bad(text)]
        if manner in ENTRIES:
            return [ENTRIES[manner] if text in bad else 1.0 for text in texts]
        if manner == "raises the first time" and bad and len(texts) == 1:  # in a batch always, alone every other time
            seen ^= set(bad)
            bad = [text for text in bad if text in seen]
        return misbehave(manner, len(texts)) if bad else [1.0] * len(texts)

    async def async_reward(prompts: Any, completions: Any, completion_ids: Any, **columns: Any) -> Any:
        if is_bad(text_of(completions[0])):
            if manner == "async raises":
                raise RuntimeError("this one is bad")
            await asyncio.sleep(600)
        return [1.0]

    return async_reward if manner.startswith("async") else reward


def misbehave(manner: str, size: int) -> list[float]:
    match manner:
        case "raises" | "raises the first time":
            raise RuntimeError("this one is bad")
        case "sys.exit":
            sys.exit(3)
        case "sleeps":
            time.sleep(600)
        case "spins in C":
            re.match("(a*)*b", "a" * 50)
        case "os._exit":
            os._exit(3)
        case "segmentation fault":
            ctypes.string_at(0)
        case "prints 20 MB":
            print("flood " * 3_500_000)
        case "returns 2 MB":
            return [1.0] * 500_000
    return [1.0] * size


def text_of(completion: Any) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]
