"""The example of a conversation of one's own: it can be won, and it trains, from Python and by its name."""

from pathlib import Path
from typing import Any

import pytest

from dvpo.loading import load_config
from dvpo.tasks.named import make_task
from dvpo.trainer import Trainer
from runs import model_folder

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(EXAMPLES)
    import own_environment

    return own_environment


def tiny(folder: Path) -> list[str]:
    return [
        f"model.path={model_folder()}",
        f"output={folder}",
        "steps=2",
        "critic.num_quantiles=8",
        "log.completions=8",
    ]


def bisect(task: Any, example: Any) -> tuple[float, int]:
    """The reward of halving what is left, and the guesses it took."""
    environment = task.environment(example)
    low, _, high = environment.reset()[0]["content"].removesuffix("?").partition("..")
    left = list(range(int(low), int(high) + 1))
    for guesses in range(1, 10):
        guess = left[len(left) // 2]
        step = environment.step(f"my guess: {guess}")
        if step.done:
            return step.reward, guesses
        assert step.reward is None
        left = [n for n in left if (n > guess) == (step.messages[0]["content"] == "higher") and n != guess]
    raise AssertionError("it never ends")


def test_halving_wins_every_game_within_its_guesses_and_stubbornness_none(own: Any) -> None:
    task = own.GuessingTask()
    games = [bisect(task, example) for split in ("train", "id", "ood") for example in task.split(split)]
    assert {reward for reward, _ in games} == {1.0}
    assert max(guesses for _, guesses in games) == own.GUESSES
    environment = task.environment(task.split("id")[0])
    environment.reset()
    assert [environment.step("no number").done for _ in range(own.GUESSES)] == [False] * (own.GUESSES - 1) + [True]


def test_a_random_model_trains_on_it_in_several_turns(own: Any, tmp_path: Path) -> None:
    trainer = Trainer(load_config(None, tiny(tmp_path / "run")), task=own.GuessingTask())
    episodes = trainer.collect()[1].episodes
    assert any(e.terminated and max(e.turns) == own.GUESSES - 1 for e in episodes)
    trainer.train()
    assert trainer.step == 2


def test_the_example_runs_as_it_says_and_is_found_by_its_name(own: Any, tmp_path: Path) -> None:
    own.main(*tiny(tmp_path / "run"))
    assert (tmp_path / "run" / "checkpoint-2").is_dir()
    task = make_task(load_config({"task": {"name": "own_environment:make_task"}}).task)
    assert [e.id for e in task.split("ood")] == [e.id for e in own.GuessingTask().split("ood")]
