"""reasoning-gym as a task: what is on the list passes the checks, splits are apart, only a full score counts."""

import json
import re
import sys
from pathlib import Path

import pytest

from dvpo.errors import InputError
from dvpo.loading import load_config
from dvpo.tasks import HasFinalAnswer
from dvpo.tasks import gym as gym_module
from dvpo.tasks.gym import ReasoningGym, accepts, allow_list, make_generator
from dvpo.tasks.named import make_task
from dvpo.trainer import Trainer
from runs import run_config

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import gym_allow_list

ROOT = Path(__file__).parents[2]

ALLOWED = [name for name, entry in allow_list().items() if not entry["reason"]]
SPLITS = ("train", "id", "ood")


@pytest.fixture(scope="module")
def task() -> ReasoningGym:
    return ReasoningGym(["chain_sum", "letter_counting"], train=60, id=20, ood=20)


def judged(task: ReasoningGym, completion: str, answer: str = "56", generator: str = "chain_sum") -> float:
    (reward,) = task.true_reward(["?"], [completion], [[1]], answer=[answer], generator=[generator])
    assert isinstance(reward, float)
    return reward


# The list


def test_the_committed_list_knows_every_generator_and_why_it_is_refused() -> None:
    from reasoning_gym.factory import DATASETS

    assert set(allow_list()) == set(DATASETS)
    assert len(ALLOWED) > 30
    reasons = [allow_list()[name]["reason"] for name in ("rubiks_cube", "quantum_lock", "polynomial_multiplication")]
    for reason, words in zip(reasons, ("it has no answer", "junk' for", "it was not done within"), strict=True):
        assert words in reason


@pytest.mark.parametrize("name", ALLOWED)
def test_an_allowed_generator_takes_its_own_answer_and_nothing_else(name: str) -> None:
    assert gym_allow_list.fault(name, harder=False, items=3, timed=False) == ""


@pytest.mark.slow
def test_the_committed_list_is_what_the_script_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gym_allow_list, "RESULT", tmp_path / "gym.json")
    gym_allow_list.main()
    made = json.loads((tmp_path / "gym.json").read_text())["generators"]
    # Who is refused for its time, and who has a harder form that is quick enough, depends on the machine and its load.
    reasons = {name: entry["reason"] + made[name]["reason"] for name, entry in allow_list().items()}
    slow = {name for name, reason in reasons.items() if "too long" in reason or "not done within" in reason}
    assert {name for name, entry in made.items() if not entry["reason"]} - slow == set(ALLOWED) - slow
    assert len(slow) < 30


class Lenient:
    """A verifier as some are: part of the score for a substring, all of it for a number."""

    def __init__(self, name: str) -> None:
        self.name = name

    def score_answer(self, answer: str, entry: dict[str, str]) -> float:
        if answer == entry["answer"]:
            return 0.0 if self.name == "deaf" else 1.0
        if self.name == "numbers":
            return float(answer == "-1")
        if self.name == "substring":
            return float(entry["answer"] in answer)
        if self.name == "raises":
            raise ValueError(answer)
        return len(entry["answer"]) / len(answer) if entry["answer"] in answer else 0.0


@pytest.mark.parametrize(
    ("name", "sound"), [("partial", True), ("raises", True), ("numbers", False), ("substring", False), ("deaf", False)]
)
def test_the_checks_find_verifiers_that_pay_for_nonsense_or_not_for_the_answer(name: str, sound: bool) -> None:
    items = [{"answer": answer} for answer in ("41", "word", "3 4")]
    assert (next(gym_allow_list._faults_of_verdicts(Lenient(name), items, timed=False), "") == "") == sound


def test_the_page_lists_what_is_allowed() -> None:
    prose = (ROOT / "docs" / "tasks.md").read_text().split("## reasoning-gym")[1].split("\n## ")[0]
    listed = set(re.findall(r"`(\w+)`\*?", prose.split("<!-- allowed -->")[1].split("<!-- /allowed -->")[0]))
    assert listed == set(ALLOWED)


# Splits


def test_splits_are_apart_as_large_as_asked_for_and_the_same_every_time(task: ReasoningGym) -> None:
    ids = {name: [example.id for example in task.split(name)] for name in SPLITS}
    assert {name: len(of) for name, of in ids.items()} == {"train": 60, "id": 20, "ood": 20}
    assert len({i for of in ids.values() for i in of}) == 100
    again = ReasoningGym(["chain_sum", "letter_counting"], train=60, id=20, ood=20)
    assert [again.split(name) for name in SPLITS] == [task.split(name) for name in SPLITS]
    assert task.split("test") == ()


def test_every_generator_has_its_share(task: ReasoningGym) -> None:
    assert [e.columns["generator"] for e in task.split("train")] == ["chain_sum", "letter_counting"] * 30


def test_without_ood_generators_ood_is_the_top_of_the_curriculum() -> None:
    task = ReasoningGym(["chain_sum"], train=50, id=1, ood=50)
    mean = {s: sum(len(e.prompt[0]["content"]) for e in task.split(s)) / 50 for s in ("train", "ood")}  # type: ignore[index]
    assert mean["ood"] > 1.2 * mean["train"]


def test_ood_generators_are_held_out() -> None:
    task = ReasoningGym(["chain_sum"], ["gcd"], train=5, id=5, ood=5)
    found = {name: {e.columns["generator"] for e in task.split(name)} for name in SPLITS}
    assert found == {"train": {"chain_sum"}, "id": {"chain_sum"}, "ood": {"gcd"}}


def test_a_generator_that_repeats_itself_gives_fewer_questions_and_none_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Few:
        def __getitem__(self, index: int) -> dict[str, str]:
            return {"question": str(index % 7), "answer": "1"}

    monkeypatch.setattr(gym_module, "make_generator", lambda *arguments: Few())
    task = ReasoningGym(["chain_sum"], train=5, id=5, ood=5)
    assert [len(task.split(name)) for name in SPLITS] == [5, 2, 0]


# The verdict


def test_the_oracle_is_right_everywhere_and_wrong_without_the_marks(task: ReasoningGym) -> None:
    for name in SPLITS:
        examples = task.split(name)
        columns = {key: [e.columns[key] for e in examples] for key in ("answer", "generator")}
        for template, reward in (("so <answer>{}</answer>", 1.0), ("it is {}", 0.0)):
            said = [template.format(answer) for answer in columns["answer"]]
            assert task.true_reward(["?"] * 20, said, [[1]] * 20, **columns) == [reward] * len(said)


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        ("<answer>56</answer>", True),
        ("7 times 8 <answer>\n 56 </answer>.", True),
        ("<answer>57</answer>", False),
        ("<answer>56 or 57</answer>", False),  # its verifier pays 2/8 for it
        ("<answer></answer>", False),
        ("56", False),
        ("<answer>56", False),
        ("</answer>56<answer>", False),
        ("<answer>57</answer><answer>56</answer>", False),
        ("<answer><answer>56</answer>", False),
    ],
)
def test_only_the_one_answer_between_the_marks_counts_and_only_with_a_full_score(
    task: ReasoningGym, completion: str, right: bool
) -> None:
    assert judged(task, completion) == float(right)


def test_pseudo_labels_take_the_answers_place(task: ReasoningGym) -> None:
    assert isinstance(task, HasFinalAnswer)
    assert judged(task, "<answer>57</answer>", answer="57") == 1
    assert judged(task, "<answer>56</answer>", answer="57") == 0


def test_an_answer_that_its_verifier_cannot_read_is_wrong() -> None:
    assert not accepts(Lenient("raises"), "x", "56")


# Names


@pytest.mark.parametrize(
    ("generators", "ood", "words"),
    [
        ([], [], "task.generators is empty: name generators of reasoning-gym"),
        (["chain_sums"], [], "chain_sums cannot be used (reasoning-gym has none of that name): take chain_sum"),
        (["rubiks_cube"], [], "rubiks_cube cannot be used (it has no answer of its own): take"),
        (["chain_sum"], ["puzzle24"], "task.ood_generators: puzzle24 cannot be used"),
        (["chain_sum", "gcd"], ["gcd"], "gcd is in task.generators too"),
    ],
)
def test_a_name_off_the_list_is_answered_with_the_reason_and_names_near_it(
    generators: list[str], ood: list[str], words: str
) -> None:
    with pytest.raises(InputError) as caught:
        ReasoningGym(generators, ood)
    assert words in str(caught.value)


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(InputError, match=r"needs the package reasoning-gym: install the extra, pip install"):
        make_generator("chain_sum")


# A run


def test_a_run_trains_on_it_and_is_evaluated_on_both_splits(tmp_path: Path) -> None:
    names = ("task.name=reasoning_gym", "task.generators=[simple_equations]", "sampling.max_prompt_length=400")
    config = run_config(tmp_path / "run", "algorithm=dvpo", *names)
    task = make_task(config.task)
    assert len(task.split("train")) > 1000
    trainer = Trainer(config, task=ReasoningGym(["simple_equations"], train=20, id=2, ood=2))
    figures = trainer.train()[2]
    assert figures["eval/id/items"] == figures["eval/ood/items"] == 2


def test_the_defaults_leave_room_for_a_question_and_its_solution() -> None:
    sampling = load_config({"task": {"name": "reasoning_gym", "generators": ["gcd"]}}).sampling
    assert min(sampling.max_prompt_length, sampling.max_completion_length) >= 1000
