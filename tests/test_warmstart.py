import errno
import json
import os
import signal
from dataclasses import asdict, replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dvpo import warmstart
from dvpo.embedded import make_model, make_tokenizer
from dvpo.errors import InputError
from dvpo.interrupt import Interrupted
from dvpo.lessons import SOURCES, Demonstrated, question_and_answer
from dvpo.loading import load_config
from dvpo.policy import Policy
from dvpo.tasks.math import ChainArithmetic
from dvpo.verdicts import measure, verdict
from dvpo.warmstart import Recipe, lessons, losses, make_lesson, obtain, starting_model, warm_start

TOKENIZER = make_tokenizer()
TINY = Recipe(steps=10, batch_size=4)
RIGHT = question_and_answer("23+8-5=", "23+8=31;31-5=26;#26", good=True)
WRONG = question_and_answer("23+8-5=", "23+8=32;32-5=27;#27", good=False)
SHORT = question_and_answer("1+1=", "1+1=2;#2", good=True)
TALK = Demonstrated(
    (
        {"role": "system", "content": "s"},
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "ask c"},
        {"role": "tool", "content": "d"},
        {"role": "assistant", "content": "e"},
    ),
    good=True,
)
SHIPPED = {
    ("math", 1.0): "math-checker1-seed0-ca72c8416b00",
    ("math", 0.0): "math-checker0-seed0-73ad66cfb7a9",
    ("science", 1.0): "science-checker1-seed0-3a75126157cf",
    ("science", 0.0): "science-checker0-seed0-052adb060bdb",
    ("dialogue", 1.0): "dialogue-checker1-seed0-051ddc6d1e97",
    ("dialogue", 0.0): "dialogue-checker0-seed0-c8c8b0ae533d",
}
"""Task and dial -> the folder, by a name that later versions of the code must not change."""


@pytest.fixture
def unmeasured(monkeypatch):
    """An untrained model never stops writing, and measuring it would take longer than making it."""
    monkeypatch.setattr(warmstart, "measure", lambda *_: {})


@pytest.fixture(scope="module")
def shipped():
    return load(warm_start(progress=False))


def load(folder):
    return Policy(AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder))


# Labels and losses


def test_every_position_that_predicts_the_assistants_words_or_their_end_is_taught_and_no_other():
    lesson = make_lesson([RIGHT, SHORT, TALK], TOKENIZER)
    learnt = ("23+8=31;31-5=26;#26<|end|>", "1+1=2;#2<|end|>", "ask c<|end|>e<|end|>")
    for row, words in enumerate(learnt):
        places = lesson.predicted_BS[row].nonzero()[:, 0]
        assert TOKENIZER.decode(lesson.ids_BS[row, places + 1]) == words
        assert TOKENIZER.decode(lesson.ids_BS[row, places[0]]) == "<|assistant|>"


def test_both_losses_equal_their_plain_sums_over_each_sequence_alone():
    model, batch = make_model(), [RIGHT, WRONG, SHORT]
    solving = checking = count = 0.0
    for (question, answer), good in batch:
        prompt = TOKENIZER(f"<|user|>{question['content']}<|end|><|assistant|>").input_ids
        response = TOKENIZER(answer["content"] + "<|end|>").input_ids
        logits_SV = model(torch.tensor([prompt + response])).logits[0].double()
        for position, token in enumerate(response, start=len(prompt) - 1):
            logprobs_V = logits_SV[position].log_softmax(-1)
            log_odds = verdict(logits_SV[position], TOKENIZER)
            solving -= logprobs_V[token]
            checking -= torch.nn.functional.logsigmoid(log_odds if good else -log_odds)
            count += 1
    ours = losses(model, TOKENIZER, make_lesson(batch, TOKENIZER))
    torch.testing.assert_close(torch.stack(ours).double(), torch.stack([solving, checking]) / count, rtol=1e-5, atol=0)


def test_lessons_are_one_batch_a_step():
    assert len(list(lessons(replace(TINY, steps=70), TOKENIZER))) == 70


# Cache


def test_a_model_is_made_once_and_then_reused(tmp_path, unmeasured):
    folder = obtain(TINY, cache=tmp_path, progress=False)
    made = (folder / "model.safetensors").stat().st_mtime_ns
    assert obtain(TINY, cache=tmp_path, progress=False) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == made
    assert json.loads((folder / "warmstart.json").read_text())["recipe"]["steps"] == 10
    obtain(TINY, cache=tmp_path, progress=False, rebuild=True)
    assert (folder / "model.safetensors").stat().st_mtime_ns > made
    assert [path.name for path in tmp_path.iterdir()] == [TINY.folder]


def test_the_cache_is_where_the_environment_says(tmp_path, unmeasured, monkeypatch):
    monkeypatch.setenv("DVPO_CACHE", str(tmp_path / "here"))
    assert obtain(TINY, progress=False) == tmp_path / "here" / TINY.folder


def test_every_field_and_both_versions_change_the_key(monkeypatch):
    recipe = Recipe()
    changes = {"checker": 0.5, "seed": 1, "steps": 9, "batch_size": 9, "learning_rate": 9.0, "verdict_weight": 9.0}
    changes["task"] = "science"
    assert changes.keys() == recipe.__dataclass_fields__.keys()
    keys = {recipe.folder[-12:]} | {replace(recipe, **{name: value}).folder[-12:] for name, value in changes.items()}
    with monkeypatch.context() as patch:
        patch.setattr(warmstart, "RECIPE_VERSION", 99)
        keys.add(recipe.folder[-12:])
    with monkeypatch.context() as patch:
        patch.setitem(warmstart.SOURCES, "math", replace(SOURCES["math"], version=99))
        keys.add(recipe.folder[-12:])
    assert len(keys) == 1 + len(changes) + 2
    assert Recipe(checker=1).folder == Recipe(checker=1.0).folder


def test_making_the_same_recipe_twice_gives_the_same_weights_and_leaves_global_randomness_alone(tmp_path, unmeasured):
    torch.manual_seed(7)
    state = torch.get_rng_state()
    files = [obtain(TINY, cache=tmp_path / name, progress=False) / "model.safetensors" for name in "ab"]
    other = obtain(replace(TINY, seed=1), cache=tmp_path, progress=False) / "model.safetensors"
    assert torch.equal(torch.get_rng_state(), state)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert files[0].read_bytes() != other.read_bytes()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_build_leaves_nothing_behind(tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(warmstart, "measure", fail)
    with pytest.raises(error):
        obtain(TINY, cache=tmp_path, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_build_that_is_ended_by_sigterm_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(warmstart, "train", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted, match="SIGTERM"):
        warmstart.main(["--rebuild", "--out", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named_in_one_sentence_and_leaves_nothing_behind(tmp_path, unmeasured, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(warmstart, "flush_file", fail)
    with pytest.raises(InputError, match=r"the disk is full: .*; free some space"):
        obtain(TINY, cache=tmp_path, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_was_faster_keeps_its_model(tmp_path, unmeasured, monkeypatch):
    def meanwhile(*_):
        (tmp_path / TINY.folder).mkdir()
        (tmp_path / TINY.folder / "theirs").touch()
        return {}

    monkeypatch.setattr(warmstart, "measure", meanwhile)
    folder = obtain(TINY, cache=tmp_path, progress=False)
    assert [path.name for path in folder.iterdir()] == ["theirs"]


def test_the_command_says_where_the_model_is_and_refuses_a_bad_dial_with_exit_code_2(capsys):
    warmstart.main(["--checker", "0"])
    assert Recipe(checker=0.0).folder in capsys.readouterr().out.replace("\n", "")
    with pytest.raises(SystemExit) as exit_:
        warmstart.main(["--checker", "2"])
    assert exit_.value.code == 2
    assert "checker is 2.0" in capsys.readouterr().err


@pytest.mark.parametrize("checker", [-0.1, 1.1, float("nan")])
def test_a_dial_outside_its_range_is_refused_in_one_sentence(checker):
    with pytest.raises(InputError, match=f"checker is {checker}, .* from 0 to 1"):
        warm_start(checker=checker)


def test_a_task_without_an_embedded_model_is_refused_in_one_sentence_that_names_the_models_path():
    config = load_config({"task": {"name": "reasoning_gym"}})
    with pytest.raises(
        InputError, match=r"^model.path = embedded, .* task.name = reasoning_gym: set model.path to .*[^.]$"
    ):
        starting_model(config)


@pytest.mark.parametrize("task", [{"name": "files", "path": "mine.jsonl"}, {"name": "my_task:make_task"}])
def test_data_and_tasks_of_ones_own_start_from_the_model_of_sums_which_is_said(task):
    with pytest.warns(UserWarning, match="knows chains of sums .* and nothing else"):
        assert starting_model(load_config({"task": task})) == warm_start("math")


def test_without_a_terminal_progress_is_ten_plain_lines(capsys):
    with warmstart.progress_reports(40, wanted=True) as report:
        for step in range(1, 41):
            report(step, "solving 1.0")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10
    assert lines[-1] == "warm start: step 40/40, solving 1.0"


# The shipped models


@pytest.mark.parametrize(("task", "checker"), SHIPPED)
def test_the_shipped_models_are_found_by_their_recipes_without_building_and_are_small(monkeypatch, task, checker):
    monkeypatch.setattr(warmstart, "build", lambda *_, **__: pytest.fail("built"))
    folder = warm_start(task, checker)
    assert folder == warmstart.shipped_models() / SHIPPED[task, checker]
    assert (folder / "model.safetensors").stat().st_size <= 2**20
    assert {"task": "math", **json.loads((folder / "warmstart.json").read_text())["recipe"]} == asdict(
        Recipe.of(task, checker, 0)
    )
    assert AutoTokenizer.from_pretrained(folder).chat_template == TOKENIZER.chat_template


def test_every_shipped_model_has_a_task_and_a_dial_that_lead_to_it():
    assert {path.name for path in warmstart.shipped_models().iterdir() if path.is_dir()} == set(SHIPPED.values())


def test_math_and_the_whole_dial_are_the_defaults():
    assert warm_start().name == SHIPPED["math", 1.0]


@pytest.mark.parametrize("task", sorted({task for task, _ in SHIPPED}))
def test_a_run_starts_from_the_model_of_its_task(task):
    assert starting_model(load_config({"task": {"name": task}})).name == SHIPPED[task, 1.0]


def test_the_shipped_math_model_errs_but_knows_better_and_its_verdicts_follow_the_truth(shipped):
    # With 100 and 50 questions a share has a standard error of .05 and .07.
    figures = measure(shipped, ChainArithmetic(train=0, id=100, ood=50))
    assert 0.35 < figures["id"]["greedy"] < 0.65
    assert 0.4 < figures["id"]["sampled"] < 0.65
    assert figures["id"]["pass_at_k"] > 0.8
    assert 0.1 < figures["ood"]["greedy"] < 0.5
    for row in figures.values():
        assert row["finished"] > 0.97
        assert row["auroc_first"] > 0.55
        assert row["auroc_middle"] > 0.6
        assert row["auroc_last"] > 0.7


def test_without_knowledge_the_verdicts_say_nothing():
    figures = measure(load(warm_start(checker=0.0)), ChainArithmetic(train=0, id=100, ood=10), samples=4)
    assert all(abs(figures["id"][f"auroc_{place}"] - 0.5) < 0.15 for place in ("first", "middle", "last"))


def test_measuring_leaves_global_randomness_alone_and_repeats(shipped):
    task = ChainArithmetic(train=0, id=8, ood=8)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first = measure(shipped, task)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert measure(shipped, task) == first


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("task", "checker"), [at for at in SHIPPED if at[0] == "math" or at[1]])  # 10 to 20 min each
def test_the_rebuild_reaches_the_shipped_models_accuracy(tmp_path, task, checker):
    """Another machine rounds differently and so trains another model; the accuracies agree within 8 points."""
    shipped = json.loads((warm_start(task, checker) / "warmstart.json").read_text())["metrics"]
    made = warm_start(task, checker, rebuild=True, cache=tmp_path, progress=False)
    rebuilt = json.loads((made / "warmstart.json").read_text())["metrics"]
    for split in ("id", "ood"):
        for figure in ("greedy", "sampled", "auroc_last"):
            assert rebuilt[split][figure] == pytest.approx(shipped[split][figure], abs=0.08)  # or both are None
