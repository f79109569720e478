"""Several tasks in one run: ids, verifiers, environments, shares, figures, lengths, errors, resume."""

import json
from collections import Counter
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dvpo.config import to_yaml
from dvpo.errors import InputError
from dvpo.evaluate import evaluate_checkpoint
from dvpo.loading import load_config
from dvpo.prompts import MixedPrompts, open_prompts
from dvpo.runlog import read_rows
from dvpo.study_results import result_row
from dvpo.tasks import Example, Reward
from dvpo.tasks.dialogue import SlotFilling
from dvpo.tasks.files import FilesTask
from dvpo.tasks.math import ChainArithmetic
from dvpo.tasks.mixture import Mixture, each_of_its_tasks, held_out
from dvpo.tasks.named import make_task
from dvpo.trainer import Trainer
from runs import Parity, farthest, rows, run_config, trained, weights


class Strict(Parity):
    """Judges by length, and insists on the columns of its own examples."""

    name = "strict"

    def true_reward(self, prompts: Any, completions: Any, completion_ids: Any, **columns: Any) -> list[Reward]:
        assert columns.keys() == {"answer"}
        return [float(len(text)) for text in completions]


@cache
def math() -> ChainArithmetic:
    return ChainArithmetic(train=20, id=4, ood=3)


def mixture(*weights: float) -> Mixture:
    return Mixture([math(), Strict()], weights or (1.0, 1.0))


def test_ids_are_unique_and_splits_hold_the_examples_of_all_tasks_or_of_one() -> None:
    mixed = mixture()
    train = mixed.split("train")
    assert len({e.id for e in train}) == len(train) == 36
    assert [e.id for e in train[:20]] == [f"math/{e.id}" for e in math().split("train")]
    assert {e.columns["task"] for e in train} == {"math", "strict"}
    assert [e.id for e in mixed.split("strict/id")] == ["strict/id 0", "strict/id word 1"]
    assert len(mixed.split("ood")) == 5
    assert mixed.split("nothing") == ()
    assert held_out(mixed) == ["math/id", "math/ood", "strict/id", "strict/ood"]
    assert held_out(math()) == ["id", "ood"]


def test_each_response_is_judged_by_its_own_task_with_its_own_columns() -> None:
    mixed = mixture()
    sums, words = mixed.split("math/train")[:2], mixed.split("strict/train")[:2]
    examples = [words[0], sums[0], words[1], sums[1]]  # interleaved
    texts = ["four", f"#{sums[0].columns['answer']}", "sixsix", "#x"]
    columns = {name: [e.columns.get(name) for e in examples] for name in ("answer", "operations", "task")}
    assert mixed.true_reward([e.prompt for e in examples], texts, [[]] * 4, **columns) == [4.0, 1.0, 6.0, 0.0]


def test_the_environment_is_that_of_the_original_example() -> None:
    dialogue = SlotFilling(train=3, id=1, ood=1)
    mixed = Mixture([math(), dialogue], [1, 1])
    (example, *_) = mixed.split("dialogue/train")
    conversation = mixed.environment(example)
    assert conversation.reset() == dialogue.split("train")[0].prompt
    assert not conversation.step("nonsense").done


def files(folder: Path, name: str = "mine") -> FilesTask:
    """A task whose splits count their own examples from 0."""
    for split in ("train", "id", "ood"):
        lines = [{"id": i, "prompt": f"{name} {split} {i}"} for i in range(2)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return FilesTask(folder / "train.jsonl", id_path=folder / "id.jsonl", ood_path=folder / "ood.jsonl")


def test_examples_of_one_id_in_several_splits_keep_their_own_prompts(tmp_path: Path) -> None:
    mixed = Mixture([math(), files(tmp_path)], [1, 1])
    for split in ("train", "id", "ood"):
        examples = mixed.split(f"train/{split}")
        assert sorted(example.id for example in examples) == ["train/0", "train/1"]
        for example in examples:
            place = example.id.removeprefix("train/")
            assert mixed.environment(example).reset() == example.prompt == f"mine {split} {place}"


def test_two_files_of_one_name_are_told_apart_by_a_label(tmp_path: Path) -> None:
    tasks = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        tasks.append(files(tmp_path / name, name))
    with pytest.raises(InputError, match="two tasks are called train: give each a label of its own"):
        Mixture(tasks, [1, 1])
    mixed = Mixture(tasks, [1, 1], ["", "second"])
    assert held_out(mixed) == ["train/id", "train/ood", "second/id", "second/ood"]
    example = mixed.split("second/id")[1]
    assert (example.id, example.columns["task"]) == ("second/1", "second")
    assert mixed.environment(example).reset() == "other id 1"


def test_a_split_of_a_mixture_is_that_of_each_task_where_it_has_one() -> None:
    assert each_of_its_tasks(mixture(), "id") == ["math/id", "strict/id"]
    assert each_of_its_tasks(mixture(), "math/id") == ["math/id"]
    assert each_of_its_tasks(mixture(), "nothing") == ["nothing"]
    assert each_of_its_tasks(math(), "id") == ["id"]


def order(prompts: MixedPrompts, count: int) -> list[tuple[str, int]]:
    return [(example.id, visit) for example, visit in prompts.next(count)]


@pytest.mark.parametrize("shares", [(1.0, 1.0), (3.0, 1.0), (0.1, 0.7)])
def test_at_every_moment_each_task_is_within_one_draw_of_its_share(shares: Sequence[float]) -> None:
    mixed = mixture(*shares)
    drawn = order(open_prompts(mixed, mixed.split("train"), seed=0), 200)
    counts = accumulate(int(name.startswith("math/")) for name, _ in drawn)
    share = shares[0] / sum(shares)
    assert all(abs(count - share * (i + 1)) < 1 for i, count in enumerate(counts))
    seen: Counter[str] = Counter()
    for name, visit in drawn:
        assert visit == seen[name]
        seen[name] += 1


def test_the_state_is_one_number_and_the_order_is_the_seeds() -> None:
    mixed = mixture(3.0, 1.0)
    train = mixed.split("train")
    whole, stopped, other = (open_prompts(mixed, train, seed) for seed in (0, 0, 1))
    expected = order(whole, 90)
    assert order(stopped, 41) == expected[:41]
    state = stopped.state_dict()
    assert state["drawn"] == 41
    again = open_prompts(mixed, train, seed=0)
    order(again, 7)
    again.load_state_dict(state)
    assert order(again, 49) == expected[41:]
    assert order(other, 90) != expected
    with pytest.raises(InputError, match="the training prompts are not those of the checkpoint"):
        open_prompts(mixture(), train[:-1], seed=0).load_state_dict(state)


def test_a_run_logs_and_evaluates_each_task_and_resumes_exactly(tmp_path: Path) -> None:
    task = Mixture([math(), SlotFilling(train=10, id=2, ood=2)], [1, 1])
    lengths = ["sampling.max_prompt_length=256", "sampling.max_completion_length=40", "checkpoint.every=2"]
    settings = [*lengths, "noise.kind=flip", "noise.rate=0.4"]
    whole = trained(tmp_path / "whole", *settings, "steps=4", task=task)
    for row in rows(whole):
        both = [row["reward/true/math"], row["reward/true/dialogue"]]
        assert row["reward/true"] == pytest.approx(sum(both) / 2)  # one prompt of each a step
    first, *_, last = read_rows(whole.folder / "metrics.jsonl")
    assert {"eval/math/id/accuracy", "eval/math/ood/accuracy", "eval/dialogue/id/tcr"} <= first.keys()
    assert "eval/math/id/tcr" not in first
    names = dict.fromkeys(("task", "noise", "algorithm", "seed", "config_hash"))
    row = result_row(SimpleNamespace(folder=whole.folder, config=whole.config, **names))
    assert row["id_true"] == (last["eval/math/id/accuracy"] + last["eval/dialogue/id/accuracy"]) / 2
    trained(tmp_path / "parts", *settings, "steps=2", task=task)
    parts = trained(tmp_path / "parts", *settings, "steps=4", task=task, resume=True)
    assert rows(parts) == rows(whole)
    assert farthest(weights(parts), weights(whole)) == 0


MIX = {"name": "mix", "mix": [{"name": "math", "weight": 2}, {"name": "dialogue"}]}


def test_a_config_names_the_mix_and_its_limits_are_the_largest(tmp_path: Path) -> None:
    config = load_config({"task": MIX})
    assert [(part.name, part.weight) for part in config.task.mix] == [("math", 2.0), ("dialogue", 1.0)]
    assert (config.sampling.max_prompt_length, config.sampling.max_completion_length) == (256, 256)
    assert load_config({"task": MIX}, ["sampling.max_completion_length=99"]).sampling.max_completion_length == 99
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "config.yaml") == config
    made = make_task(config.task)
    assert made.weights == {"math": 2.0, "dialogue": 1.0}


def test_a_checkpoint_of_a_mix_is_evaluated_task_by_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mix = "task.mix=[{name: math}, {name: science}]"
    short = "sampling.max_completion_length=12"
    Trainer(run_config(tmp_path / "run", "task.name=mix", mix, short, "steps=1")).train()
    file = evaluate_checkpoint(tmp_path / "run", [], None, 0, None)
    assert [json.loads(line)["split"] for line in file.read_text().splitlines()] == [
        split for split in ("math/id", "math/ood", "science/id", "science/ood") for _ in range(2)
    ]
    assert "science/ood" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("task", "sentence"),
    [
        ({"mix": [{"name": "math"}]}, r"task.mix holds several tasks, but task.name = math: set it to mix"),
        ({"name": "mix"}, r"task.mix is empty: list the tasks"),
        ({"name": "mix", "mix": [{"name": "mix"}]}, r"task.mix holds a mix: list all tasks in one"),
        ({"name": "mix", "mix": [{"name": "math", "weight": 0}]}, r"task.mix.0.weight = 0 is not valid"),
        ({"name": "mix", "mix": [{"name": "files"}]}, r"task.path is empty"),
        ({"name": "mix", "mix": [{"nam": "math"}]}, r"unknown config key task.mix.0.nam"),
    ],
)
def test_what_is_no_mix_is_refused_in_one_sentence(task: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        load_config({"task": task})


class Columned(Parity):
    column = "task"

    def split(self, name: str) -> Sequence[Example]:
        return [Example("1", "x", {self.column: "y"})]


class WithSelf(Columned):
    column = "self"


class Empty(Parity):
    def split(self, name: str) -> Sequence[Example]:
        return []


def test_tasks_that_do_not_mix_are_refused_in_one_sentence(tmp_path: Path) -> None:
    for tasks, sentence in (
        ([math(), math()], "two tasks are called math"),
        ([math(), Columned()], "parity has a column `task`, which a mix needs for itself: rename it"),
        ([math(), WithSelf()], "parity has a column `self`, which a mix needs for itself: rename it"),
        ([math(), Empty()], "parity has no training example"),
    ):
        with pytest.raises(InputError, match=sentence):
            Mixture(tasks, [1.0, 1.0])
    short = ["sampling.max_prompt_length=12", "sampling.long_prompts=skip"]
    with pytest.raises(InputError, match=r"task.mix: no prompt of dialogue fits sampling.max_prompt_length: raise it"):
        Trainer(run_config(tmp_path, *short), task=Mixture([math(), SlotFilling(train=2, id=1, ood=1)], [1, 1]))
    with pytest.raises(InputError, match=r"no embedded model for task.name = mix: set model.path"):
        Trainer(load_config({"task": MIX, "output": str(tmp_path / "run")}))
