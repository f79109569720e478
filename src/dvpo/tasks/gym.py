"""reasoning-gym as a task: questions without end from its generators, judged by the generators' own verifiers.

Not every generator may be used. Some score 0 on their own answer, some give part of the score for a substring, some
evaluate the response as a program. `assets/gym.json` says which passed the checks of `benchmarks/gym_allow_list.py`,
and why each of the others did not. What passed judges by the column `answer` alone, so that pseudo-labels can stand in
for it.
"""

import difflib
import hashlib
import importlib
import json
import re
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import resources
from itertools import islice
from typing import Any

from dvpo.errors import InputError
from dvpo.tasks import Example, Prompt, Reward, SplitTask

CORRECT = 0.99
"""A score from here on is a right answer: below it generators pay for a part of one."""
SEEDS = {"train": 0, "id": 1_000_000, "ood": 2_000_000}
"""Question i of a split is drawn with seed + i: no split reaches the next."""
REPEATS = 4
"""So many questions are drawn for one that is wanted before a generator counts as exhausted."""
INSTRUCTION = "\n\nGive the final answer alone between <answer> and </answer>."
ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


class ReasoningGym(SplitTask):
    """Questions of reasoning-gym's generators, as many of each; only a full score counts.

    `train` and `id` come from the generators as they are, with different seeds, and no question of `train` is in
    another split. `ood` comes from `ood_generators`; where none are named, from the same generators at the top of their
    curriculum, as far as that passed the checks too.

    Args:
        generators: of `train` and `id`.
        ood_generators: of `ood`; none of `generators`.
        train: number of training questions; fewer where a generator repeats itself.
        id: number of held-out questions of the same generators.
        ood: number of questions of the other kind.

    Raises:
        InputError: reasoning-gym is not installed, or a generator is not on the list.
    """

    name = "reasoning_gym"

    def __init__(
        self,
        generators: Sequence[str],
        ood_generators: Sequence[str] = (),
        train: int = 4096,
        id: int = 256,
        ood: int = 256,
    ) -> None:
        if not generators:
            raise InputError("task.generators is empty: name generators of reasoning-gym, [chain_sum, gcd] say")
        _refuse_unlisted("task.generators", generators)
        _refuse_unlisted("task.ood_generators", ood_generators)
        if both := sorted(set(generators) & set(ood_generators)):
            raise InputError(f"task.ood_generators: {both[0]} is in task.generators too: keep it in one of them")
        self._judges = {name: make_generator(name) for name in (*generators, *ood_generators)}
        harder = not ood_generators
        others = ood_generators or [name for name in generators if allow_list()[name]["harder"]]
        seen: set[str] = set()
        self._splits = {
            "train": _examples("train", generators, train, seen),
            "id": _examples("id", generators, id, seen),
            "ood": _examples("ood", others, ood, seen, harder),
        }

    def final_answer(self, text: str) -> str | None:
        """What stands between the one `<answer>` and the one `</answer>` of a response; None if that is not so."""
        if text.count("<answer>") != 1 or text.count("</answer>") != 1:
            return None
        match = ANSWER.search(text)
        return match[1].strip() or None if match else None

    def true_reward(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        **columns: Sequence[Any],
    ) -> list[Reward]:
        """1.0 where the generator's verifier gives the final answer a full score against the column `answer`."""
        del prompts, completion_ids
        return [
            float(self._is_right(text, answer, name))
            for text, answer, name in zip(completions, columns["answer"], columns["generator"], strict=True)
        ]

    def _is_right(self, text: str, answer: str, generator: str) -> bool:
        final = self.final_answer(text)
        return final is not None and accepts(self._judges[generator], final, answer)


def accepts(generator: Any, final: str, answer: str) -> bool:
    """Whether a generator's verifier gives the final answer a full score; one that it cannot read is wrong."""
    try:
        score = generator.score_answer(final, {"question": "", "answer": answer, "metadata": {}})
    except Exception:
        return False
    return bool(score >= CORRECT)


def make_generator(name: str, seed: int = 0, size: int = 1, harder: bool = False) -> Any:
    """A generator's data set as it is by default, or at the top of its curriculum."""
    gym = _reasoning_gym()
    if not harder:
        return gym.create_dataset(name, seed=seed, size=size)
    factory = importlib.import_module("reasoning_gym.factory")
    base = importlib.import_module("reasoning_gym.coaching.base_curriculum")
    curriculum = factory.create_curriculum(name)
    for attribute, definition in curriculum.attributes.items():
        curriculum.set_attr_level(attribute, len(definition.levels) - 1)
    context = base.DefaultCurriculumContext(mode=base.RangeAttributeMode.UPPER_BOUND)
    kind, _ = factory.DATASETS[name]
    return kind(curriculum.generate_configuration({"seed": seed, "size": size}, context=context))


@cache
def allow_list() -> dict[str, dict[str, Any]]:
    """Generator -> `reason` it is refused for (empty: allowed), and whether the top of its curriculum is `harder`."""
    text = resources.files("dvpo").joinpath("assets/gym.json").read_text(encoding="utf-8")
    listed: dict[str, dict[str, Any]] = json.loads(text)["generators"]
    return listed


def _examples(
    split: str, generators: Sequence[str], count: int, seen: set[str], harder: bool = False
) -> tuple[Example, ...]:
    """As many of each generator, in turn; `seen` holds the ids that are taken, and grows."""
    shares = [len(range(place, count, len(generators))) for place in range(len(generators))]
    columns = [
        list(islice(_fresh(name, split, share, seen, harder), share))
        for name, share in zip(generators, shares, strict=True)
    ]
    longest = max(shares, default=0)
    return tuple(column[i] for i in range(longest) for column in columns if i < len(column))


def _fresh(name: str, split: str, count: int, seen: set[str], harder: bool) -> Iterator[Example]:
    """Questions that stand in no split yet."""
    drawn = make_generator(name, SEEDS[split], REPEATS * count, harder)
    for i in range(REPEATS * count):
        item = drawn[i]
        key = hashlib.sha256(f"{name}\n{item['question']}".encode()).hexdigest()[:16]
        if key not in seen:
            seen.add(key)
            prompt = [{"role": "user", "content": item["question"] + INSTRUCTION}]
            yield Example(key, prompt, {"answer": str(item["answer"]), "generator": name})


def _refuse_unlisted(field: str, names: Sequence[str]) -> None:
    allowed = [name for name, entry in allow_list().items() if not entry["reason"]]
    for name in names:
        if name in allowed:
            continue
        near = difflib.get_close_matches(name, allowed, n=3, cutoff=0.3) or allowed[:3]
        why = allow_list()[name]["reason"] if name in allow_list() else "reasoning-gym has none of that name"
        raise InputError(f"{field}: {name} cannot be used ({why}): take {', '.join(near)} or another of docs/tasks.md")


def _reasoning_gym() -> Any:
    try:
        return importlib.import_module("reasoning_gym")
    except ImportError:
        raise InputError(
            "task.name = reasoning_gym needs the package reasoning-gym: install the extra, pip install 'dvpo[gym]'"
        ) from None
