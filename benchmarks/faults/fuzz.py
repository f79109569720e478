"""Mutated configs and data: each is accepted or refused in one sentence; nothing raises, hangs or is half-written.

    python benchmarks/faults/fuzz.py        # 2,000 configs and 2,000 lines of data

A mutation deletes, doubles, swaps or overwrites characters, lines, words and values of a sound file, and likes what
often goes wrong: aliases that double themselves, dates that do not exist, halves of surrogate pairs, infinities,
numbers of 5,000 digits, NUL, deep nesting, byte-order marks. A refused config must leave no file behind. An
accepted one must be read back equal from its own YAML. Every fifth accepted one is run for a step, and so is every
fifth accepted data set: that run may be refused as well, in one sentence and before it has made its folder.
"""

import json
import os
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from outcome import ROOT, conclude

from dvpo.config import Config, to_yaml
from dvpo.embedded import make_tokenizer
from dvpo.encoding import ChatEncoder, fit_prompts
from dvpo.errors import InputError, RunStoppedError
from dvpo.loading import load_config
from dvpo.noise import read_labels
from dvpo.preferences import read_pairs
from dvpo.tasks.files import FilesTask
from dvpo.trainer import Trainer
from runs import SETTINGS, Parity, model_folder

CASES, SECONDS, RUN_EVERY = 2000, 20, 5
LONGEST_REFUSAL = 2000
NASTY_YAML = [
    *(
        "null",
        "true",
        "[]",
        "{}",
        "''",
        "-1",
        "0",
        "1e400",
        ".nan",
        "-.inf",
        "2001-13-45",
        "0b",
        "1_0",
        "~",
        "!!binary x",
    ),
    *(
        '"\\0"',
        '"\\ud800"',
        "!!python/object/apply:os.system [ls]",
        "!!set {a}",
        "&a [*a]",
        "*b",
        "9" * 5000,
        "x" * 400,
    ),
    *("[" * 3000, "{a: " * 300, "? [1]", "1:2:3", "<<: {seed: 1}", "- 1", "\t", "é", "math", "1.5", "[1, 2, 3]", "10"),
]
NASTY_JSON = [
    *("null", "true", "[]", "{}", '""', "-1", "1e400", "NaN", "Infinity", "9" * 5000, '"\\ud800"', '"\\u0000"', '"é"'),
    *("[" * 3000, '{"a":' * 300, '"x' * 3, "[1, [2]]", '[{"role": "user"}]', '[{"role": 1, "content": []}]', "1.5"),
    *('[{"role": "nobody", "content": "?"}]', '"\\u2028"', '{"role": "user", "content": "q"}', '"' + "y" * 5000 + '"'),
]
BOMB = "".join(f"{'abcdefghij'[i]}: &{'abcdefghij'[i]} [{', '.join(['*' + 'abcdefghij'[i - 1]] * 9) if i else 1}]\n"
               for i in range(10))  # fmt: skip
ROWS = [
    {"prompt": "What is 7 times 8?", "answer": "56", "level": 1},
    {"prompt": [{"role": "user", "content": "What is 6 times 9?"}], "answer": "54", "level": 2.5},
    {"id": "a", "prompt": "Hello", "answer": None, "tags": ["x", {"y": 1}]},
    {"prompt": "Which?", "chosen": "this one", "rejected": "that one", "swapped": False},
    {"prompt": "Two?", "id": "b", "chosen": [{"role": "assistant", "content": "2"}], "rejected": "3", "answer": 2},
]


class HangError(Exception):
    """Something took longer than anything may."""


def mutated(text: str, nasty: list[str], draws: random.Random) -> bytes:
    """The text after one to three mutations."""
    for _ in range(draws.choice([1, 1, 1, 2, 3])):
        text = draws.choice(MUTATIONS)(text, nasty, draws)
    data = text.encode("utf-8", "surrogatepass")
    if draws.random() < 0.05 and data:
        at = draws.randrange(len(data))
        data = data[:at] + draws.choice([b"", b"\x00", b"\xff", b"\xef\xbb\xbf", b"\r\n", b"\n"]) + data[at + 1 :]
    return draws.choice([b"\xef\xbb\xbf", b"\xff\xfe"]) + data if draws.random() < 0.03 else data


def _value(text: str, nasty: list[str], draws: random.Random) -> str:
    """Another value behind one of the colons."""
    colons = [i for i, c in enumerate(text) if c == ":"]
    if not colons:
        return draws.choice(nasty)
    at = draws.choice(colons) + 1
    ends = [i for i in range(at, len(text)) if text[i] in ",\n}#"] or [len(text)]
    return f"{text[:at]} {draws.choice(nasty)}{text[ends[0] :]}"


def _cut(text: str, nasty: list[str], draws: random.Random) -> str:
    one, other = sorted(draws.choices(range(len(text) + 1), k=2))
    return text[:one] + text[min(other, one + 20) :]


def _double(text: str, nasty: list[str], draws: random.Random) -> str:
    lines = text.splitlines(keepends=True) or [""]
    line = draws.choice(lines)
    lines.insert(draws.randint(0, len(lines)), line)
    return "".join(lines)


def _character(text: str, nasty: list[str], draws: random.Random) -> str:
    at = draws.randrange(len(text) + 1)
    return text[:at] + draws.choice("{}[]:,\"'#&*!|>%@`\\ \n\t0-aé\u2028\U0001f600") + text[at + 1 :]


def _digit(text: str, nasty: list[str], draws: random.Random) -> str:
    digits = [i for i, c in enumerate(text) if c.isdigit()]
    if not digits:
        return text
    at = draws.choice(digits)
    return text[:at] + draws.choice(["0", "1", "7", "00", "-1", "9e9", "5.5", "true", ""]) + text[at + 1 :]


def _swap(text: str, nasty: list[str], draws: random.Random) -> str:
    words = text.split(" ")
    one, other = draws.randrange(len(words)), draws.randrange(len(words))
    words[one], words[other] = words[other], words[one]
    return " ".join(words)


def _bomb(text: str, nasty: list[str], draws: random.Random) -> str:
    return BOMB + text if draws.random() < 0.2 else text + "\n" + draws.choice(nasty)


MUTATIONS: list[Callable[[str, list[str], random.Random], str]] = [
    *(_value, _value, _cut, _double, _character, _character, _digit, _digit, _digit, _swap, _bomb),
]


def outcome(action: Callable[[], Any]) -> tuple[str, Any]:
    """`accepted` and the result, `refused` and the sentence, or what it should never be."""

    def hang(*_: object) -> None:
        raise HangError

    signal.signal(signal.SIGALRM, hang)
    signal.alarm(SECONDS)
    try:
        return "accepted", action()
    except InputError as error:
        sentence = str(error)
        clear = 10 < len(sentence) < LONGEST_REFUSAL
        return ("refused" if clear else "unclear"), sentence[:LONGEST_REFUSAL]
    except HangError:
        return "hang", ""
    except Exception as error:
        return "traceback", f"{type(error).__name__}: {error}"[:500]
    finally:
        signal.alarm(0)


def one_step(config: Config, task: Any = None) -> None:
    with suppress(RunStoppedError):  # at a bound that the mutation set
        Trainer(config, task=task).train()


def small(values: str) -> list[str]:
    """Overrides that make a run of any config one of milliseconds."""
    return [
        *("steps=1", f"model.path={model_folder()}", f"output={values}", "device=cpu", "update.microbatch_size=64"),
        *("sampling.prompts_per_step=2", "sampling.samples_per_prompt=3", "sampling.max_completion_length=8"),
        *("sampling.max_prompt_length=256", "evaluation.prompts=2", "evaluation.samples=0", "critic.num_quantiles=8"),
        *("critic.num_heads=1", "update.epochs=1", "critic.epochs=1", "critic.replay=0", "model.dtype=float32"),
        *("advantage.target_atoms=8", "log.tensorboard=false", "reward.overlong=0"),
    ]


def fuzz_configs(count: int, seed: int, folder: Path) -> dict[str, Any]:
    """Each mutated config is loaded as by the command line; some of the accepted ones are run."""
    draws, tally, failures = random.Random(seed), Counter[str](), []
    sources = [path.read_text() for path in sorted((ROOT / "configs").glob("*.yaml"))] + [
        to_yaml(load_config(SETTINGS))
    ]
    for number in range(count):
        file, output = folder / "config.yaml", folder / f"run-{number}"
        file.write_bytes(mutated(draws.choice(sources), NASTY_YAML, draws))
        names = set(os.listdir(folder))
        what, result = outcome(lambda file=file: load_config(file))
        if what == "accepted":
            what, again = outcome(lambda result=result, file=file: _read_back(result, file.with_name("again.yaml")))
            what = what if again else "not read back"
        if what == "accepted" and tally["accepted"] % RUN_EVERY == 0:
            run = outcome(lambda file=file, output=output: one_step(load_config(file, small(str(output))), Parity()))
            tally[f"run {run[0]}"] += 1
            half = run[0] == "refused" and output.exists()
            if half or run[0] not in ("accepted", "refused"):
                failures.append({"case": number, "what": "half-written" if half else run[0], "said": str(run[1])})
        tally[what] += 1
        if set(os.listdir(folder)) - names - {"again.yaml", output.name}:
            what = "half-written"
        if what not in ("accepted", "refused"):
            failures.append({"case": number, "what": what, "said": str(result)[:300]})
    return {"cases": count, "seed": seed, "outcomes": dict(sorted(tally.items())), "failures": failures}


def _read_back(config: Config, file: Path) -> bool:
    file.write_text(to_yaml(config))
    same = load_config(file) == config
    file.unlink()
    return same


def fuzz_lines(count: int, seed: int, folder: Path) -> dict[str, Any]:
    """Each mutated line, among sound ones, is read as prompts and tokenised, as pairs, and as labels."""
    draws, tally, failures = random.Random(seed), Counter[str](), []
    encoder, sampling = ChatEncoder(make_tokenizer()), load_config(SETTINGS).sampling
    file = folder / "lines.jsonl"

    def prompts() -> FilesTask:
        task = FilesTask(file)
        fit_prompts(task.split("train"), encoder, sampling, 2048)
        return task

    for number in range(count):
        line = mutated(json.dumps(draws.choice(ROWS)), NASTY_JSON, draws)
        rows = [json.dumps(row).encode() for row in draws.sample(ROWS[:2], 2)]
        rows.insert(draws.randint(0, 2), line)
        file.write_bytes(b"\n".join(rows))
        found = {"prompts": outcome(prompts)}
        file.write_bytes(line)
        found |= {"pairs": outcome(lambda: read_pairs(file)), "labels": outcome(lambda: read_labels(file))}
        if found["prompts"][0] == "accepted" and tally["prompts accepted"] % RUN_EVERY == 0:
            output = folder / f"lines-{number}"
            config, task = load_config(SETTINGS, small(str(output))), found["prompts"][1]
            task.knows_truth, task.true_reward = True, Parity().true_reward
            found["run"] = outcome(lambda config=config, task=task: one_step(config, task))
        for name, (what, said) in found.items():
            tally[f"{name} {what}"] += 1
            if what not in ("accepted", "refused"):
                failures.append(
                    {"case": number, "what": f"{name}: {what}", "said": str(said), "line": repr(line[:200])}
                )
    return {"cases": count, "seed": seed, "outcomes": dict(sorted(tally.items())), "failures": failures}


def main() -> None:
    began, home = time.monotonic(), os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # what a mutated path names lies here
        configs = fuzz_configs(CASES, 0, Path(folder))
        lines = fuzz_lines(CASES, 1, Path(folder))
        os.chdir(home)
    passed = not configs["failures"] and not lines["failures"]
    conclude("fuzz", began, passed, {"configs": configs, "lines": lines})


if __name__ == "__main__":
    main()
