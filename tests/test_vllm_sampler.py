"""The contract with a vLLM server: its weights are the trainer's, its log-probs too, and what goes wrong with it is
mended or told."""

import errno
import gc
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dvpo.checkpoint import latest_checkpoint
from dvpo.errors import InputError, RunStoppedError
from dvpo.loading import load_config
from dvpo.policy import Policy, open_policy
from dvpo.sampling import HuggingFaceSampler, Turn
from dvpo.settings import SamplingConfig, VllmConfig
from dvpo.trainer import Trainer
from dvpo.vllm_sampler import AwayError, VllmSampler, VllmServer, open_sampler, refuse_absent_server, side_by_side
from fake_vllm import FakeVllm, FaultError, slowly
from responses import assert_same
from runs import Parity, farthest, model_folder, rows, run_config, trained, weights
from tiny_models import response_logprobs, tiny_policy

CONTEXTS = [[2, 65, 66], [70] * 9, [2, 80], [2, 65, 66], [90, 3, 4, 5]]
BUDGETS = [12, 5, 12, 1, 8]
SEEDS = [11, 12, 2**62, 14, 15]


@pytest.fixture
def fake():
    with FakeVllm(model_folder()) as server:
        yield server


@pytest.fixture
def policy() -> Policy:
    return open_policy(model_folder(), torch.device("cpu"))


class Run:
    """A policy and the sampler of a run that uses the server."""

    def __init__(
        self, fake: FakeVllm, policy: Policy, folder: Path, how: dict[str, Any] | None = None, **settings: Any
    ):
        self.settings = SamplingConfig(
            engine="vllm", vllm=VllmConfig(**{"address": fake.address, "patience": 60, **(how or {})}), **settings
        )
        self.policy, self.updates = policy, 0
        self.server = VllmServer(self.settings, policy, lambda: self.updates, folder)
        self.sampler = VllmSampler(self.server, self.settings, policy)

    def sample(self) -> list[Turn]:
        return self.sampler.sample(CONTEXTS, BUDGETS, SEEDS)

    def expected(self) -> list[Turn]:
        return HuggingFaceSampler(self.policy, self.settings).sample(CONTEXTS, BUDGETS, SEEDS)

    def update(self, count: bool = True) -> None:
        with torch.no_grad():
            for parameter in self.policy.model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        self.updates += count


# Tokens, log-probs, weights


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.6}, {"stop": ("a", "<|user|>")}])
@torch.no_grad()
def test_turns_are_those_of_the_seed_and_their_logprobs_the_trainers(fake, policy, tmp_path, settings):
    run = Run(fake, policy, tmp_path, **settings)
    turns = run.sample()
    assert_same(turns, run.expected())
    assert {turn.finished for turn in turns} == {True, False}
    for context, turn in zip(CONTEXTS, turns, strict=True):
        own_T = response_logprobs(policy, context, turn.tokens, run.settings.temperature)
        torch.testing.assert_close(torch.tensor(turn.logprobs), own_T, rtol=1e-5, atol=1e-5)


def test_after_an_update_the_server_draws_by_the_new_weights_and_not_again_by_the_old(fake, policy, tmp_path):
    run = Run(fake, policy, tmp_path)
    before = run.sample()
    run.update()
    after = run.sample()
    assert_same(after, run.expected())
    assert [turn.logprobs for turn in after] != [turn.logprobs for turn in before]
    run.update(count=False)  # nobody says that the weights changed: the old ones draw, which the comparison would show
    assert_same(run.sample(), after)
    with pytest.raises(AssertionError):
        assert_same(after, run.expected())


def test_weights_are_brought_when_they_changed_and_no_copy_is_left(fake, policy, tmp_path):
    run = Run(fake, policy, tmp_path)
    run.sample()
    run.sample()
    assert fake.asked.count("/collective_rpc") == 1
    run.update()
    run.sample()
    assert fake.asked.count("/collective_rpc") == fake.asked.count("/reset_prefix_cache") == 2
    assert run.sampler.figures() | {"time/push_weights": 0} == {
        "sampler/pushes": 2,
        "sampler/repeats": 0,
        "time/push_weights": 0,
    }
    assert len(list((tmp_path / "vllm-weights").iterdir())) == 1
    run.sampler.close()
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_of_weights_whose_writing_was_interrupted(fake, policy, tmp_path, monkeypatch):
    run = Run(fake, policy, tmp_path)
    run.sample()
    run.update()
    with monkeypatch.context() as patch:
        patch.setattr(type(policy.model), "save_pretrained", half_written(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            run.sample()
    assert len(list((tmp_path / "vllm-weights").iterdir())) == 2  # the server may still map the last ones
    run.sampler.close()
    assert list(tmp_path.iterdir()) == []


def half_written(error: BaseException) -> Callable[..., None]:
    def save(model: object, folder: Path, **_: Any) -> None:
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"half")
        raise error

    return save


def test_a_start_that_fails_leaves_no_weights(fake, tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise InputError("later")

    monkeypatch.setattr("dvpo.trainer.Collector", fail)
    config = run_config(tmp_path / "run", "sampling.engine=vllm", f"sampling.vllm.address={fake.address}")
    with pytest.raises(InputError, match="later"):
        Trainer(config, task=Parity())
    gc.collect()
    assert fake.asked.count("/collective_rpc") == 1
    assert list((tmp_path / "run").iterdir()) == []


def test_weights_are_laid_in_the_compute_type_and_tied_ones_once(fake, tmp_path):
    policy = tiny_policy()
    run = Run(fake, Policy(policy.model, policy.tokenizer, torch.bfloat16), tmp_path)
    run.server._lay(tmp_path / "laid")
    back = load_file(tmp_path / "laid" / "model.safetensors")
    own = {name: value.to(torch.bfloat16) for name, value in policy.model.state_dict().items()}
    assert back.keys() <= own.keys()
    assert all(torch.equal(value, own[name]) for name, value in back.items())


def test_a_run_on_the_server_is_the_run_on_transformers(fake, tmp_path):
    """Sampling, updates, greedy evaluations: the draws are keyed alike, and the fake server draws by transformers."""
    how = ("sampling.engine=vllm", f"sampling.vllm.address={fake.address}", "steps=3", "evaluation.every=1")
    served = trained(tmp_path / "served", *how)
    alone = trained(tmp_path / "alone", "steps=3", "evaluation.every=1")
    assert farthest(weights(served), weights(alone)) < 1e-4
    texts = [[row["completion"] for row in rows(run, "completions")] for run in (served, alone)]
    assert texts[0] == texts[1]
    assert {request["temperature"] for request in fake.requests} == {0.0, 1.2}
    logged = rows(served)
    assert all(row["actor/sampler_mismatch"] < 1e-5 and row["sampler/pushes"] == 1 for row in logged)
    assert all(0 <= row["actor/sampler_kl"] < 1e-9 for row in logged)
    assert not (served.folder / "vllm-weights").exists()


# What goes wrong with the server


def test_a_turn_that_takes_too_long_is_asked_for_again(fake, policy, tmp_path):
    run = Run(fake, policy, tmp_path, how={"timeout": 1.0})
    fake.intercept = slowly(fake, "/v1/completions", 2.0)
    assert_same(run.sample(), run.expected())
    assert run.sampler.figures()["sampler/repeats"] >= 1  # on a busy machine others may be late, too


def at_completion(number: int, act: Callable[[], object]) -> Callable[[str], None]:
    """An `intercept` that acts once, before the answer to that request for a turn."""
    seen = [0]

    def intercept(path: str) -> None:
        seen[0] += path == "/v1/completions"
        if path == "/v1/completions" and seen[0] == number:
            act()

    return intercept


def test_a_server_that_starts_anew_is_given_the_weights_before_anything_is_drawn(fake, policy, tmp_path):
    run = Run(fake, policy, tmp_path)
    run.update()
    run.sample()
    fake.forget()  # between two steps
    assert_same(run.sample(), run.expected())
    assert run.sampler.figures()["sampler/pushes"] == 2


def test_what_a_server_draws_after_a_restart_in_the_middle_is_drawn_again(fake, policy, tmp_path):
    run = Run(fake, policy, tmp_path, how={"concurrency": 1})
    run.update()
    fake.intercept = at_completion(3, fake.forget)
    assert_same(run.sample(), run.expected())
    figures = run.sampler.figures()
    assert (figures["sampler/pushes"], figures["sampler/repeats"]) == (2, 3)  # turns 3, 4 and 5


def test_a_server_that_is_away_for_a_while_is_waited_for(fake, policy, tmp_path):
    run = Run(fake, policy, tmp_path, how={"concurrency": 2})
    run.update()

    def die() -> None:
        threading.Thread(target=fake.stop).start()
        raise ConnectionAbortedError

    fake.intercept = at_completion(2, die)
    timer = threading.Timer(0.7, fake.start)
    timer.start()
    assert_same(run.sample(), run.expected())
    timer.join()
    assert run.sampler.figures()["sampler/pushes"] == 2


def test_a_run_whose_server_stays_away_stops_itself_and_goes_on_when_it_is_back(fake, tmp_path):
    how = (
        "sampling.engine=vllm",
        f"sampling.vllm.address={fake.address}",
        "sampling.vllm.patience=0.2",
        "steps=3",
    )
    uninterrupted = trained(tmp_path / "whole", *how)

    class Unlucky(Trainer):
        def train_step(self) -> dict[str, float]:
            if self.step == 1:
                fake.stop()
            return super().train_step()

    with pytest.raises(RunStoppedError, match=rf"{fake.address} has given no answer for .*patience = 0.2 .*--resume"):
        trained(tmp_path / "run", *how, kind=Unlucky)
    fake.start()
    resumed = Trainer(run_config(tmp_path / "run", *how), task=Parity(), resume=True)
    assert resumed.step == 1
    resumed.train()
    assert farthest(weights(resumed), weights(uninterrupted)) == 0


def test_a_run_without_room_for_the_weights_makes_some_and_writes_a_checkpoint(fake, tmp_path, monkeypatch):
    class Unlucky(Trainer):
        def train_step(self) -> dict[str, float]:
            with monkeypatch.context() as patch:
                if self.step == 1:
                    full = half_written(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
                    patch.setattr(type(self.policy.model), "save_pretrained", full)
                return super().train_step()

        def save(self) -> None:
            assert not (self.folder / "vllm-weights").exists()
            super().save()

    how = ("sampling.engine=vllm", f"sampling.vllm.address={fake.address}")
    with pytest.raises(RunStoppedError, match=r"disk is full: .*vllm-weights: free some space, .*--resume$"):
        trained(tmp_path / "run", *how, kind=Unlucky)
    assert latest_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-1"


def test_a_refusal_ends_the_run_with_the_servers_own_words(fake, policy, tmp_path):
    run = Run(fake, policy, tmp_path)

    def refuse(path: str) -> None:
        if path == "/v1/completions":
            raise FaultError(400, "the prompt is too long")

    fake.intercept = refuse
    with pytest.raises(RunStoppedError, match="refuses: /v1/completions: 400 the prompt is too long"):
        run.sample()


def test_two_runs_on_one_server_do_not_mix_up_their_weights(fake, policy, tmp_path):
    one = Run(fake, policy, tmp_path / "one")
    other = Run(fake, open_policy(model_folder(), torch.device("cpu")), tmp_path / "other")
    other.update()
    for _ in range(2):
        assert_same(one.sample(), one.expected())
        assert_same(other.sample(), other.expected())
    assert one.sampler.figures()["sampler/pushes"] == 2


# RefusedError before long work


def settings_for(address: str, **settings: Any) -> SamplingConfig:
    return SamplingConfig(engine="vllm", vllm=VllmConfig(address=address), **settings)


def test_no_server_is_told_before_the_model_is_opened(fake, tmp_path):
    fake.stop()
    config = run_config(
        tmp_path / "run", "sampling.engine=vllm", f"sampling.vllm.address={fake.address}", "model.path=./nowhere"
    )
    with pytest.raises(InputError, match=rf"{fake.address}: no vLLM server answers there .*examples/vllm/serve.sh"):
        Trainer(config, task=Parity())
    assert not (tmp_path / "run").exists()


def test_a_server_without_its_development_routes_is_refused(fake):
    fake.dev_mode = False
    with pytest.raises(InputError, match=r"no vLLM server of version 0.33 or later with its development routes \(/wei"):
        refuse_absent_server(settings_for(fake.address))


def test_a_server_with_too_little_room_is_refused(fake):
    fake.context = 100
    with pytest.raises(InputError, match=r"= 320, .* context of 100 tokens: start it with --max-model-len 320"):
        refuse_absent_server(settings_for(fake.address))


def test_a_server_of_another_model_is_refused(policy, tmp_path):
    other = tmp_path / "other"
    tiny_policy(vocabulary=272).save(other)
    with (
        FakeVllm(other) as fake,
        pytest.raises(InputError, match=r"does not take this run's weights .*/collective_rpc: 500"),
    ):
        open_sampler(settings_for(fake.address), policy, lambda: 0, tmp_path)


def test_a_server_that_ignores_the_weights_is_refused(policy, fake, tmp_path):
    with torch.no_grad():
        policy.model.get_input_embeddings().weight += 1.0
    fake.reload = lambda folder: {"results": [None]}
    with pytest.raises(InputError, match=r"log-probs lie .* nats from the trainer's on average"):
        open_sampler(settings_for(fake.address), policy, lambda: 0, tmp_path)


def test_logprobs_before_the_temperature_are_refused(tmp_path):
    policy = tiny_policy()
    policy.save(tmp_path / "model")
    for processed in (True, False):
        with FakeVllm(tmp_path / "model", processed) as fake:
            settings = settings_for(fake.address, temperature=0.5)
            if processed:
                assert open_sampler(settings, policy, lambda: 0, tmp_path)(False).sample([[2]], [1], [0])
            else:
                with pytest.raises(InputError, match="--logprobs-mode processed_logprobs"):
                    open_sampler(settings, policy, lambda: 0, tmp_path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sampling.top_p=0.9", "set top_p to 1 and top_k to 0"),
        ("sampling.top_k=20", "set top_p to 1 and top_k to 0"),
        ("sampling.vllm.address=localhost:8000", "is no address of a server: write it as http://localhost:8000"),
    ],
)
def test_settings_that_the_server_could_not_honour_are_refused(override, message):
    with pytest.raises(InputError, match=message):
        load_config(None, ["sampling.engine=vllm", override])


# Correction for the difference


class Biased:
    """A sampler whose log-probs are too low by a constant: it seems to have drawn every token less often."""

    def __init__(self, plain: Any, bias: float) -> None:
        self.plain, self.bias = plain, bias

    def sample(self, *arguments: Any) -> list[Turn]:
        turns = self.plain.sample(*arguments)
        return [Turn(turn.tokens, [x - self.bias for x in turn.logprobs], turn.finished) for turn in turns]


def first_step(folder: Path, bias: float, *overrides: str) -> dict[str, float]:
    trainer = Trainer(run_config(folder, "update.minibatches=1", *overrides), task=Parity())
    trainer.collector.sampler = Biased(trainer.collector.sampler, bias)
    figures = trainer.train_step()
    trainer.close()
    return figures


def test_the_correction_weighs_every_token_by_the_truncated_ratio(tmp_path):
    """A constant ratio of 1.5 multiplies the gradient by 1.5, or by a lower cap; uncorrected it is clipped."""
    bias, corrected = torch.tensor(1.5).log().item(), "sampling.correction.kind=truncated"
    exact = first_step(tmp_path / "exact", 0.0)
    loose = first_step(tmp_path / "loose", bias, corrected)
    tight = first_step(tmp_path / "tight", bias, corrected, "sampling.correction.cap=1.2")
    off = first_step(tmp_path / "off", bias)
    assert loose["actor/grad_norm"] == pytest.approx(1.5 * exact["actor/grad_norm"], rel=1e-4)
    assert tight["actor/grad_norm"] == pytest.approx(1.2 * exact["actor/grad_norm"], rel=1e-4)
    assert (loose["actor/correction"], tight["actor/correction"]) == pytest.approx((1.5, 1.2))
    assert (loose["actor/correction_capped"], tight["actor/correction_capped"]) == (0, 1)
    assert loose["actor/clip_share"] == 0  # the ratio is against the trainer's own log-probs
    assert off["actor/clip_share"] > 0.2
    assert "actor/correction" not in off
    for figures in (loose, tight, off):
        assert figures["actor/sampler_mismatch"] == pytest.approx(bias, rel=1e-4)
        assert figures["actor/sampler_kl"] == pytest.approx(1.5 - 1 - bias, rel=1e-3)


# Threads


def test_results_stand_in_the_order_of_the_items_whoever_ends_first():
    def slow(x: int) -> int:
        time.sleep(0.02 * (3 - x % 4))
        if x == 5:
            raise AwayError("five")
        return 10 * x

    results = side_by_side(slow, range(8), workers=3)
    assert [r for r in results if not isinstance(r, AwayError)] == [0, 10, 20, 30, 40, 60, 70]
    assert isinstance(results[5], AwayError)
    with pytest.raises(ZeroDivisionError):
        side_by_side(lambda x: 1 // x, [1, 0], workers=2)


def test_a_signal_ends_the_wait_for_a_server_that_hangs(fake, policy, tmp_path):
    class Signal(BaseException):
        pass

    def arrive(*_: object) -> None:
        raise Signal

    run = Run(fake, policy, tmp_path)
    fake.intercept = slowly(fake, "/v1/completions", 20.0, times=5)
    before = signal.signal(signal.SIGALRM, arrive)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    started = time.monotonic()
    try:
        with pytest.raises(Signal):
            run.sample()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - started < 10


def test_the_fields_of_a_request_are_those_that_the_server_knows(fake, policy, tmp_path):
    """The fake refuses unknown ones; this is the form that was compared with vLLM's source."""
    Run(fake, policy, tmp_path).sample()
    request = next(request for request in fake.requests if request["seed"] == SEEDS[0])
    assert re.fullmatch(r"dvpo-[0-9a-f]{12}-0", fake.version)
    assert request["prompt"] == CONTEXTS[0]
    assert (request["logprobs"], request["return_token_ids"], request["return_weight_versions"]) == (0, True, True)
    assert (request["top_p"], request["top_k"], request["min_p"], request["repetition_penalty"]) == (1, 0, 0, 1)
