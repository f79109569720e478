"""Seeds by name: what is drawn is keyed by what it is for, so order, batch size and resume do not matter."""

import hashlib
import json


def derive_seed(*key: str | int) -> int:
    """A 63-bit seed that is the same for the same key on every machine and in every version of Python."""
    digest = hashlib.blake2b(json.dumps(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def derive_uniform(*key: str | int) -> float:
    """A number in [0, 1), uniform over keys."""
    return (derive_seed(*key) >> 10) * 2.0**-53
