"""Which generators of reasoning-gym a policy may be trained on, and why not the others.

    python benchmarks/gym_allow_list.py            # writes src/dvpo/assets/gym.json; some minutes on one core

A policy finds every hole in a verifier. So a generator is on the list only if its own answers score 1, nothing else
that was tried does, the verdict follows from the column `answer` alone, and all of that goes quickly. Each generator is
tried in a process of its own, since some hang in C code, where no alarm reaches them, and some run the response as a
program.
"""

import json
import multiprocessing
import random
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dvpo.tasks.gym import accepts, make_generator

RESULT = Path(__file__).parents[1] / "src" / "dvpo" / "assets" / "gym.json"
FORK = multiprocessing.get_context("fork")
ITEMS = 40
SECONDS = 10
"""Of processor time for one generator."""
SECONDS_A_QUESTION = 0.01
SECONDS_A_VERDICT = 0.05
HOSTILE = (
    "9**9**9**9",
    "__import__('os')._exit(3)",
    "(" * 5_000,
    "[" * 5_000,
    "1" * 100_000,
    "\x00",
    "½",
    "∞ ≠ 0",
    "nan",
    "inf",
    "None",
    "null",
    "True",
    "{}",
    "[]",
    "''",
    "0",
    "1",
    "-1",
    "1e308",
    ".",
    ",",
    "-",
)


def wrong_answers(answer: str) -> Iterator[str]:
    """What no verifier may take for the answer."""
    yield from (answer + " junk", "junk " + answer, f"it is {answer} or not", answer + answer, answer + "\n" + answer)
    yield from (answer[:-1], answer[1:], answer[: len(answer) // 2], answer + "0", "9" + answer, "-" + answer)
    yield from (answer + "é", answer + " " * 10 + "x" * 10_000, " ".join([answer] * 50), answer[::-1])
    if answer.lstrip("-").isdigit():
        yield from (str(int(answer) + 1), str(int(answer) - 1), str(10 * int(answer) + 3))
    yield from HOSTILE


def fault(name: str, harder: bool, items: int = ITEMS, timed: bool = True) -> str:
    """The first reason against a generator, empty if there is none; without `timed`, none that a busy machine makes."""
    generator = make_generator(name, seed=7, size=items, harder=harder)
    if harder and _same_settings(generator.config, make_generator(name, seed=7, size=items).config):
        return "its curriculum leads nowhere"
    generator[0]  # imports what the generator needs, which is no part of a question
    started = time.process_time()
    drawn = [generator[i] for i in range(items)]
    if timed and time.process_time() - started > SECONDS_A_QUESTION * items + 0.5:
        return "its questions take too long to make"
    if not all(isinstance(item["answer"], str) and item["answer"].strip() for item in drawn):
        return "it has no answer of its own"
    if len({item["question"] for item in drawn}) < 0.8 * items:
        return "its questions repeat"
    return next(_faults_of_verdicts(generator, drawn, timed), "")


def _faults_of_verdicts(generator: Any, drawn: list[dict[str, Any]], timed: bool) -> Iterator[str]:
    answers = [item["answer"] for item in drawn]
    rng = random.Random(0)
    for answer in answers:
        if not accepts(generator, answer.strip(), answer):
            yield "its own answer does not score 1 by itself, without the rest of the item"
        for final in (*wrong_answers(answer), *rng.sample(answers, min(8, len(answers)))):
            started = time.process_time()
            if final.strip() and _canonical(final) != _canonical(answer) and accepts(generator, final.strip(), answer):
                yield f"it takes {final[:30]!r} for {answer[:30]!r}"
            if timed and time.process_time() - started > SECONDS_A_VERDICT:
                yield f"its verdict on {final[:30]!r} takes too long"


def _canonical(text: str) -> str:
    """Equal for answers that a verifier may well take for each other: numbers of one value, texts but for case."""
    with suppress(ValueError):
        return str(float(text))
    return " ".join(text.split()).casefold()


def _same_settings(one: Any, other: Any) -> bool:
    return asdict(one) == asdict(other)


def tried_apart(name: str, harder: bool) -> str:
    """`fault` in a process that can be killed; a fork, so that reasoning-gym is imported once."""
    ours, theirs = FORK.Pipe(duplex=False)
    process = FORK.Process(target=_report, args=(name, harder, theirs))
    process.start()
    theirs.close()
    process.join(30 * SECONDS)
    process.kill()
    process.join()
    if process.exitcode == -signal.SIGXCPU:
        return f"it was not done within {SECONDS} s"
    if process.exitcode == 3:
        return "it runs the response as a program"
    return f"it ends the process ({process.exitcode})" if process.exitcode else str(ours.recv())


def _report(name: str, harder: bool, pipe: Any) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 5))
    try:
        found = fault(name, harder)
    except Exception as error:
        found = f"it fails ({type(error).__name__}: {str(error)[:60]})"
    pipe.send(found)


def main() -> None:
    from reasoning_gym.factory import CURRICULA, DATASETS

    generators = {}
    for name in sorted(DATASETS):
        reason = tried_apart(name, harder=False)
        harder = not reason and name in CURRICULA and not tried_apart(name, harder=True)
        generators[name] = {"reason": reason, "harder": harder}
        print(name, reason or "ok", "(and harder)" if harder else "", flush=True)
    result = {"reasoning_gym": version("reasoning-gym"), "items": ITEMS, "generators": generators}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
