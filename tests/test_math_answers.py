r"""The reward `math_verify`: one boxed answer, values compared, and a hang that costs one sample its reward."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from dvpo import scoring
from dvpo.errors import InputError
from dvpo.loading import load_config
from dvpo.math_answers import boxed_answer, math_verify
from dvpo.rewards import GuardedReward
from dvpo.scoring import MATH_VERIFY, open_reward
from dvpo.trainer import Trainer
from runs import Parity, run_config


def score(completion: str, answer: object) -> float | None:
    return math_verify([completion], [answer])[0]


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (r"so it is \boxed{3}.", "3"),
        (r"$\boxed{3}$", 3),
        (r"\boxed{x = 3}", "3"),
        (r"\boxed{f(x) = 3}", "3"),
        (r"\boxed{0.5}", r"\frac{1}{2}"),
        (r"\boxed{1/2}", r"$\frac12$"),
        (r"\boxed{\frac{1}{2}}", 0.5),
        (r"\boxed{1{,}000}", "1000"),
        (r"\boxed{3 \text{ apples}}", "3"),
        (r"\boxed{(1, 2)}", r"\boxed{(1,2)}"),
        (r"\boxed{x + x}", "2x"),
        (r"\boxed{x > 3}", "x>3"),
        (r"\boxed{A}", "A"),
        (r"<think>\boxed{2}? No, \boxed{3}.</think> The answer is \boxed{3}", "3"),
        (r"\boxed{2}? No.</think> \boxed{3}", "3"),  # the template opened the thought
    ],
)
def test_equal_values_are_right_however_they_are_written(completion: str, answer: object) -> None:
    assert score(completion, answer) == 1


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "3",
        "1 2 3",  # math-verify takes it for 3
        r"\boxed{2}",
        r"\boxed{}",
        r"\boxed{3",
        r"\boxed 3",
        r"\boxed{2} or \boxed{3}",
        r"\boxed{3} \boxed{3}",
        r"\boxed{2} \fbox{3}",
        r"\boxed{1 2 3}",
        r"\boxed{1, 2, 3}",
        r"\boxed{2 \text{ or } 3}",
        r"\boxed{4=3}",  # and these four, too
        r"\boxed{x = y = 3}",
        r"\boxed{\ge 3}",
        r"\boxed{2 \mid 3}",
        r"\boxed{2 \\ 3}",
        r"\boxed{2 \to 3}",
        r"\boxed{\pm 3}",
        r"<think>\boxed{3}",
        r"<think>\boxed{3}</think>",
        r"<think>\boxed{3}</think> \boxed{2}",
        r"<think></think> \boxed{2} \boxed{3}",
        rf"\boxed{{{'0' * 400}3}}",
    ],
)
def test_what_is_not_one_boxed_answer_is_wrong(completion: str) -> None:
    assert score(completion, "3") == 0


def test_two_numbers_side_by_side_are_no_product() -> None:
    assert score(r"\boxed{2 3}", "6") == 0
    assert score(r"\boxed{2 \cdot 3}", "6") == 1


@pytest.mark.parametrize("relation", [r"\iff", r"\implies", r"\rightarrow", r"\Leftrightarrow", r"\lor", r"\cup", "&"])
def test_a_choice_of_two_answers_is_none(relation: str) -> None:
    assert score(rf"\boxed{{2 {relation} 3}}", "3") == 0


def test_a_missing_reference_answer_leaves_the_response_unjudged() -> None:
    assert math_verify([r"\boxed{7}", r"\boxed{None}", r"\boxed{nan}"], [None, None, float("nan")]) == [None] * 3


def test_a_reference_answer_that_says_nothing_leaves_the_response_unjudged() -> None:
    assert score(r"\boxed{3}", "") is None
    assert score("no box at all", " ") is None


def test_the_box_is_found_through_braces_within_and_escaped_ones() -> None:
    assert boxed_answer(r"a \boxed{\frac{1}{2}} b {") == r"\frac{1}{2}"
    assert boxed_answer(r"\boxed{\{1\}}") == r"\{1\}"
    assert boxed_answer(r"\boxed {4}") == "4"
    assert boxed_answer(r"\boxedness{4}") is None


def test_messages_count_with_the_policys_words_alone() -> None:
    talk = [
        {"role": "assistant", "content": "let me think"},
        {"role": "user", "content": r"is it \boxed{3}?"},
        {"role": "assistant", "content": r"\boxed{4}"},
    ]
    assert math_verify([talk], ["4"]) == [1]


def test_a_hang_is_killed_within_the_limit_and_costs_only_its_own_sample() -> None:
    completions = [r"\boxed{3}", r"\boxed{9^{9^{9}}}", r"\boxed{4}"]
    with GuardedReward(MATH_VERIFY, timeout=3.0, columns=["answer"]) as reward:
        scores = reward(["?"] * 3, completions, [[1]] * 3, {"answer": ["3"] * 3})
    assert scores.rewards == [1.0, None, 0.0]
    assert [(fault.kind, fault.index) for fault in scores.faults] == [("timeout", 1)]


def test_a_run_trains_on_it_and_on_a_mix_with_it(tmp_path: Path) -> None:
    for place, setting in enumerate(
        ("reward.function=math_verify", "reward.mix=[{function: math_verify}, {function: task, weight: .1}]")
    ):
        trainer = Trainer(run_config(tmp_path / str(place), "algorithm=ppo", "steps=1", setting), task=Parity())
        figures = trainer.train_step()
        trainer.close()
        assert (figures["reward/faults"], figures["reward/missing"]) == (0, 0)


def test_data_without_answers_and_a_missing_package_are_said_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unanswered(Parity):
        def split(self, name: str) -> list:  # type: ignore[type-arg]
            return [SimpleNamespace(prompt="?", columns={}) for _ in super().split(name)]

    config = load_config(None, ["reward.function=math_verify"])
    with pytest.raises(InputError, match="missing a required argument: 'answer'"):
        open_reward(config, Unanswered())
    monkeypatch.setattr(scoring.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"reward\.function = math_verify needs the extra math: pip install"):
        open_reward(config, Parity())


def test_the_package_is_not_loaded_by_a_run_that_does_not_ask_for_it() -> None:
    import subprocess

    code = "import sys, dvpo.trainer; sys.exit('math_verify' in sys.modules or 'reasoning_gym' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
