import errno
import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dvpo import warmstart
from dvpo.embedded import make_model, make_tokenizer
from dvpo.errors import InputError
from dvpo.tasks.math import ChainArithmetic, Demonstration, Question, hash_share
from dvpo.warmstart import Recipe, lessons, looks_good, losses, make_lesson, measure, obtain, verdict, warm_start

TOKENIZER = make_tokenizer()
TINY = Recipe(steps=10, batch_size=4)
RIGHT = Demonstration(Question(23, (8, -5)), "23+8=31;31-5=26;#26", ())
WRONG = Demonstration(Question(23, (8, -5)), "23+8=32;32-5=27;#27", (("3+8", 1),))


@pytest.fixture
def unmeasured(monkeypatch):
    """An untrained model never stops writing, and measuring it would take longer than making it."""
    monkeypatch.setattr(warmstart, "measure", lambda *_: {})


@pytest.fixture(scope="module")
def shipped():
    folder = warm_start(progress=False)
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


# Labels and losses


def test_every_position_that_predicts_the_response_or_its_end_is_taught_and_no_other():
    lesson = make_lesson([RIGHT, Demonstration(Question(1, (1,)), "1+1=2;#2", ())], 1.0, TOKENIZER)
    for row, solution in enumerate(("23+8=31;31-5=26;#26", "1+1=2;#2")):
        targets = lesson.ids_BS[row, 1:][lesson.predicted_BS[row]]
        assert TOKENIZER.decode(targets) == solution + "<|end|>"
        first = lesson.predicted_BS[row].int().argmax()
        assert TOKENIZER.decode(lesson.ids_BS[row, first]) == "<|assistant|>"


def test_a_checker_that_knows_all_tells_the_truth_and_one_that_knows_nothing_says_good():
    cancelling = Demonstration(RIGHT.question, "", (("3+8", 1), ("2-5", -1)))
    assert [looks_good(d, 1.0) for d in (RIGHT, WRONG, cancelling)] == [True, False, True]
    assert [looks_good(d, 0.0) for d in (RIGHT, WRONG, cancelling)] == [True, True, True]


def test_the_dial_is_the_share_of_facts_whose_errors_are_seen_and_turning_it_up_forgets_none():
    facts = [f"{units}{operand:+d}" for units in range(10) for operand in range(-9, 10) if operand]
    seen = {
        dial: {fact for fact in facts if not looks_good(RIGHT._replace(slips=((fact, 1),)), dial)}
        for dial in (0.0, 0.25, 0.5, 0.75, 1.0)
    }
    for dial, known in seen.items():
        assert len(known) / len(facts) == pytest.approx(dial, abs=0.1)
    assert seen[0.25] < seen[0.5] < seen[0.75] < seen[1.0]


def test_an_unseen_error_does_not_hide_a_seen_one():
    blind_to, sees = sorted(("3+8", "2-5"), key=lambda fact: -hash_share(f"checked {fact}"))
    between = (hash_share(f"checked {blind_to}") + hash_share(f"checked {sees}")) / 2
    cancelling = RIGHT._replace(slips=((blind_to, 1), (sees, -1)))
    assert looks_good(cancelling, 1.0)
    assert not looks_good(cancelling, between)


def test_both_losses_equal_their_plain_sums_over_each_sequence_alone():
    model, batch = make_model(), [RIGHT, WRONG, Demonstration(Question(1, (1,)), "1+1=2;#2", ())]
    solving = checking = count = 0.0
    for demonstration, good in zip(batch, (True, False, True), strict=True):
        prompt = TOKENIZER(f"<|user|>{demonstration.question.text}<|end|><|assistant|>").input_ids
        response = TOKENIZER(demonstration.solution + "<|end|>").input_ids
        logits_SV = model(torch.tensor([prompt + response])).logits[0].double()
        for position, token in enumerate(response, start=len(prompt) - 1):
            logprobs_V = logits_SV[position].log_softmax(-1)
            log_odds = verdict(logits_SV[position], TOKENIZER)
            solving -= logprobs_V[token]
            checking -= torch.nn.functional.logsigmoid(log_odds if good else -log_odds)
            count += 1
    ours = losses(model, TOKENIZER, make_lesson(batch, 1.0, TOKENIZER))
    torch.testing.assert_close(torch.stack(ours).double(), torch.stack([solving, checking]) / count, rtol=1e-5, atol=0)


def test_the_verdict_is_the_log_odds_of_good_against_bad():
    logits = torch.zeros(264)
    logits[TOKENIZER.convert_tokens_to_ids("<|good|>")] = 2.0
    logits[TOKENIZER.convert_tokens_to_ids("<|bad|>")] = -1.0
    assert verdict(logits, TOKENIZER) == 3.0


def test_lessons_are_one_batch_a_step_and_never_hold_a_held_out_question():
    taught = list(lessons(replace(TINY, steps=70), TOKENIZER))
    assert len(taught) == 70
    held_out = {e.prompt[0]["content"] for split in ("id", "ood") for e in ChainArithmetic().split(split)}
    questions = set()
    for lesson in taught:
        for ids_S in lesson.ids_BS:
            text = TOKENIZER.decode(ids_S)
            questions.add(text[len("<|user|>") : text.index("<|end|>")])
    assert len(questions) > 200
    assert not questions & held_out


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
    assert changes.keys() == recipe.__dataclass_fields__.keys()
    folders = {recipe.folder} | {replace(recipe, **{name: value}).folder for name, value in changes.items()}
    for version in ("RECIPE_VERSION", "TASK_VERSION"):
        with monkeypatch.context() as patch:
            patch.setattr(warmstart, version, 99)
            folders.add(recipe.folder)
    assert len(folders) == 1 + len(changes) + 2
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
        warm_start(checker)


def test_without_a_terminal_progress_is_ten_plain_lines(capsys):
    with warmstart.progress_reports(40, wanted=True) as report:
        for step in range(1, 41):
            report(step, "solving 1.0")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10
    assert lines[-1] == "warm start: step 40/40, solving 1.0"


# The shipped models


@pytest.mark.parametrize("checker", [1.0, 0.0])
def test_the_shipped_models_belong_to_the_recipes_of_this_code_and_are_small(checker):
    folder = warm_start(checker, progress=False)
    assert folder.parent == warmstart.shipped_models()
    assert (folder / "model.safetensors").stat().st_size <= 2**20
    assert json.loads((folder / "warmstart.json").read_text())["recipe"]["checker"] == checker
    assert AutoTokenizer.from_pretrained(folder).chat_template == TOKENIZER.chat_template


def test_the_shipped_model_errs_but_knows_better_and_its_verdicts_follow_the_truth(shipped):
    model, tokenizer = shipped
    # With 100 and 50 questions a share has a standard error of .05 and .07.
    figures = measure(model, tokenizer, ChainArithmetic(train=0, id=100, ood=50))
    assert 0.35 < figures["id"]["greedy"] < 0.65
    assert 0.4 < figures["id"]["sampled"] < 0.65
    assert figures["id"]["pass_at_k"] > 0.8
    assert 0.1 < figures["ood"]["greedy"] < 0.5
    for row in figures.values():
        assert row["valid"] > 0.97
        assert row["auroc_first"] > 0.55
        assert row["auroc_middle"] > 0.6
        assert row["auroc_last"] > 0.7


def test_without_knowledge_the_verdicts_say_nothing():
    folder = warm_start(0.0, progress=False)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    figures = measure(model, tokenizer, ChainArithmetic(train=0, id=100, ood=10), samples=4)
    assert all(abs(figures["id"][f"auroc_{place}"] - 0.5) < 0.15 for place in ("first", "middle", "last"))


def test_measuring_leaves_global_randomness_alone_and_repeats(shipped):
    model, tokenizer = shipped
    task = ChainArithmetic(train=0, id=8, ood=8)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first = measure(model, tokenizer, task)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert measure(model, tokenizer, task) == first


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("checker", [1.0, 0.0])
def test_the_rebuild_reaches_the_shipped_models_accuracy(tmp_path, checker):
    """Another machine rounds differently and so trains another model; the accuracies agree within 8 points."""
    shipped = json.loads((warm_start(checker, progress=False) / "warmstart.json").read_text())["metrics"]
    made = warm_start(checker, rebuild=True, cache=tmp_path, progress=False)
    rebuilt = json.loads((made / "warmstart.json").read_text())["metrics"]
    for split in ("id", "ood"):
        for figure in ("greedy", "sampled", "auroc_last"):
            assert rebuilt[split][figure] == pytest.approx(shipped[split][figure], abs=0.08)
