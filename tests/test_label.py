"""Pseudo-labels: the vote by hand, who may vote, keys, the file that the noise reads, and what is refused."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from scipy.stats import binomtest

from dvpo import Trainer
from dvpo import label as label_module
from dvpo.cli import main
from dvpo.config import Config
from dvpo.errors import InputError
from dvpo.label import Label, Labeller, label_file, print_summary, terciles, vote
from dvpo.loading import load_config
from dvpo.noise import read_labels
from dvpo.runlog import read_rows
from dvpo.sampling import Episode
from dvpo.tasks import HasFinalAnswer
from dvpo.tasks.dialogue import SlotFilling
from dvpo.tasks.files import FilesTask
from dvpo.tasks.math import ChainArithmetic
from dvpo.tasks.science import Science
from runs import model_folder

SETTINGS: dict[str, Any] = {
    "sampling": {"prompts_per_step": 4, "samples_per_prompt": 2, "max_completion_length": 28},
    "evaluation": {"prompts": 2},
    "checkpoint": {"every": 0},
}


def embedded(*overrides: str) -> Config:
    return load_config(SETTINGS, ["device=cpu", *overrides])


def written(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def quiet() -> Console:
    return Console(file=io.StringIO(), width=120)


# The vote


@pytest.mark.parametrize(
    ("answers", "winner"),
    [
        ([1, 2, 2], (2, 2)),
        ([3, 1, 1, 3], (3, 2)),  # a tie: the first seen
        ([1, 3, 3, 1], (1, 2)),
        ([None, None, None, "7"], ("7", 1)),  # who says nothing does not vote
        ([None, None], (None, 0)),
    ],
)
def test_the_most_frequent_answer_wins_and_of_equally_frequent_ones_the_first_seen(answers: Any, winner: Any):
    assert vote(answers) == winner


class Scripted(Labeller):
    """Samples are texts of a script; `|` behind one: cut by the length limit."""

    def __init__(self, task: HasFinalAnswer, texts: list[str]) -> None:
        self.task, self.samples, self.knows_truth = task, len(texts), True
        self.texts, self.answerer = texts, self
        self.example = ChainArithmetic(train=1).split("train")[0]

    def episodes(self) -> list[Episode]:
        episodes = [Episode(self.example, 0, i, [1]) for i in range(self.samples)]
        for episode, text in zip(episodes, self.texts, strict=True):
            episode.terminated = not text.endswith("|")
            episode.messages.append({"role": "assistant", "content": text.removesuffix("|")})
        return episodes

    def true_returns(self, episodes: list[Episode]) -> list[float]:
        answers = [self.example.columns["answer"]] * len(episodes)
        return self.task.true_reward([], [e.text for e in episodes], [], answer=answers)


def test_a_label_counts_votes_leaves_out_what_was_cut_and_is_judged_by_the_verifier():
    right = ChainArithmetic(train=1).split("train")[0].columns["answer"]
    other = right + 1
    texts = [f"#{other}", f"1+1=2;#{right}", "no answer", f"#{right}", f"#{other}|", f"#{other}|"]
    script = Scripted(ChainArithmetic(train=1), texts)
    label = script._label(script.episodes())
    # Whole answers: other, right, right; with the cut ones `other` would have won by 3 to 2.
    assert label == Label(script.example.id, right, votes=2, samples=6, correct=True)
    assert label.agreement == 2 / 6
    wrong = Scripted(ChainArithmetic(train=1), [f"#{other}", f"#{other}", f"#{right}"])
    assert wrong._label(wrong.episodes()).correct is False


@pytest.mark.parametrize(
    ("pattern", "text", "answer"),
    [
        (None, "  so it is 7 \n", "so it is 7"),
        (None, " \n", None),
        (r"\\boxed\{(.*?)\}", r"\boxed{3}, no: \boxed{4}", "4"),  # the last one, its group
        (r"\d+", "6 times 7 is 42", "42"),
        (r"\d+", "many", None),
        (r"yes|(no)", "yes", None),  # the group took no part
    ],
)
def test_a_files_task_finds_the_final_answer(tmp_path: Path, pattern: str | None, text: str, answer: str | None):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    assert FilesTask(tmp_path / "prompts.jsonl", answer_pattern=pattern).final_answer(text) == answer


@pytest.mark.parametrize(
    ("column", "text", "answer"),
    [
        ([82, 83, None], "#82", 82),
        ([82, 83], "#82.5", None),
        ([82, 0.5], "#82", 82.0),
        ([True, False], "#true", True),
        ([82, "83"], "#82", "82"),  # of two types: text, as ever
        (["82", "83"], "#", None),
    ],
)
def test_a_files_answer_has_the_type_of_its_column(tmp_path: Path, column: list[Any], text: str, answer: Any):
    rows = [{"prompt": f"p{i}", "answer": value} for i, value in enumerate(column)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = FilesTask(tmp_path / "prompts.jsonl", answer_pattern="#(.*)", held_out=0).final_answer(text)
    assert (given, type(given)) == (answer, type(answer))


def test_math_and_science_answers_have_the_form_of_their_column_and_a_dialogue_has_none():
    for task in (ChainArithmetic(train=1, id=0, ood=0), Science(train=1, id=0, ood=0)):
        answer = task.split("train")[0].columns["answer"]
        assert isinstance(task, HasFinalAnswer)
        assert task.final_answer(f"#{answer}") == answer
        assert task.final_answer("nothing") is None
    assert not isinstance(SlotFilling(), HasFinalAnswer)


# The summary


def labels_of(*counts: tuple[int, bool | None]) -> list[Label]:
    return [Label(str(i), votes or None, votes, 8, correct) for i, (votes, correct) in enumerate(counts)]


def test_terciles_never_part_equal_agreement():
    # Votes 1 2 3 4 4 4 4 8 8: a third of them lies at or below 3, two thirds at or below 4.
    groups = terciles(labels_of(*((votes, True) for votes in (4, 8, 1, 4, 3, 8, 4, 2, 4))))
    assert [sorted(label.votes for label in group) for group in groups] == [[1, 2, 3], [4, 4, 4, 4], [8, 8]]
    assert len(terciles(labels_of(*[(8, True)] * 5))) == 1
    # Of five different ones two are the first that make a third, four the first that make two.
    assert list(map(len, terciles(labels_of(*[(votes, True) for votes in range(1, 6)])))) == [2, 2, 1]


def test_the_summary_prints_agreement_unanswered_and_accuracy_with_a_wilson_interval():
    console = quiet()
    # Agreement (2 + 4 + 6 + 8 + 0) / 40 = 50%; one of five has no answer; two of four labels are right.
    print_summary(labels_of((2, False), (4, True), (6, False), (8, True), (0, None)), console)
    text = console.file.getvalue()
    low, high = binomtest(2, 4).proportion_ci(method="wilson")
    assert "agreement 50.0% in the mean, 20.0% without an answer" in text
    assert f"50.0 [{100 * low:.0f}, {100 * high:.0f}]" in text
    assert [name in text for name in ("least agreed", "middle", "most agreed")] == [True] * 3


def test_nothing_is_said_of_accuracy_where_the_truth_is_not_known():
    console = quiet()
    print_summary(labels_of((2, None), (4, None)), console)
    assert "accuracy" not in console.file.getvalue()


# The command


def test_the_labels_of_a_prompt_depend_on_the_seed_alone_not_on_the_prompts_beside_it():
    labeller = Labeller(embedded(), samples=3)
    together = labeller.label(0, 6)
    assert labeller.label(4, 6) == together[4:]
    assert Labeller(embedded("seed=1"), samples=3).label(0, 6) != together


def test_labels_of_the_shipped_model_are_read_by_the_noise_and_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(json.dumps(SETTINGS))
    assert main(["label", "run.yaml", "--samples", "4", "--prompts", "6", "device=cpu"]) == 0
    rows = written(tmp_path / "labels.jsonl")
    assert [set(row) for row in rows] == [{"id", "answer", "votes", "samples", "agreement", "correct"}] * 6
    train = {e.id: e.columns["answer"] for e in ChainArithmetic().split("train")}
    for row in rows:
        assert row["agreement"] == row["votes"] / 4
        assert row["correct"] == (None if row["answer"] is None else row["answer"] == train[row["id"]])
    assert read_labels("labels.jsonl") == {row["id"]: row["answer"] for row in rows if row["answer"] is not None}

    # With every training prompt unlabelled but those six, a step over all of them judges just these.
    class Six(ChainArithmetic):
        def split(self, name: str) -> Any:
            return [e for e in super().split(name) if name != "train" or e.id in {row["id"] for row in rows}]

    config = embedded("noise.kind=pseudo_labels", "noise.path=labels.jsonl", "steps=1", "sampling.prompts_per_step=6")
    Trainer(config, task=Six()).train()
    (step,) = [row for row in read_rows(tmp_path / config.output / "metrics.jsonl") if "reward/observed" in row]
    assert step["reward/missing"] == sum(row["answer"] is None for row in rows) / 6
    assert step["reward/observed"] > 0  # a right label is met, an integer like the verifier's own


def test_an_unknown_truth_leaves_the_row_without_a_verdict(tmp_path: Path):
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"id": "{i}", "prompt": "{i}+{i}="}}\n' for i in range(9)))
    files = ["task.name=files", f"task.path={tmp_path / 'prompts.jsonl'}", f"model.path={model_folder()}"]
    label_file(embedded(*files), 2, 3, tmp_path / "labels.jsonl", quiet())
    rows = written(tmp_path / "labels.jsonl")
    assert [set(row) for row in rows] == [{"id", "answer", "votes", "samples", "agreement"}] * 3


def test_a_kill_leaves_the_old_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "labels.jsonl"
    file.write_text("old\n")

    def interrupted(self: Any, first: int, last: int) -> list[Label]:
        raise KeyboardInterrupt

    monkeypatch.setattr(label_module.Labeller, "label", interrupted)
    with pytest.raises(KeyboardInterrupt):
        label_file(embedded(), 2, 3, file, quiet())
    assert [path.name for path in tmp_path.iterdir()] == ["labels.jsonl"]
    assert file.read_text() == "old\n"


@pytest.mark.parametrize(
    ("overrides", "samples", "prompts", "output", "words"),
    [
        (["task.name=dialogue"], 2, 2, "l.jsonl", "task.name = dialogue cannot be labelled"),
        ([], 0, 2, "l.jsonl", "--samples = 0 is too few: take at least 1"),
        ([], 2, 0, "l.jsonl", "--prompts = 0 is too few: take at least 1"),
        ([], 2, 2, "none/l.jsonl", "there is no folder"),
        ([], 2, 2, ".", "--output = . is a folder"),
        (["task.name=files", "task.path=p.jsonl", "task.answer_pattern=(a"], 2, 2, "l.jsonl", "no regular expression"),
    ],
)
def test_a_mistake_ends_in_one_sentence_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: Any, samples: int, prompts: int, output: str, words: str
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    with pytest.raises(InputError, match=words.replace("(", r"\(")):
        label_file(embedded(*overrides), samples, prompts, output, quiet())
    assert [path.name for path in tmp_path.iterdir()] == ["p.jsonl"]
