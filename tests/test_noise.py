"""Injected noise: right rates, and a pure function of its key."""

import json
import math
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dvpo.errors import InputError
from dvpo.noise import Noise, make_noise
from dvpo.seeding import derive_uniform
from dvpo.tasks import Reward

Sample = tuple[Reward, str, int, int]
SAMPLES: list[Sample] = [
    (float((p + v + s) % 2), f"prompt-{p}", v, s) for p in range(400) for v in range(3) for s in range(8)
]


def observe(noise: Noise, samples: list[Sample]) -> list[Reward]:
    return noise(*(list(column) for column in zip(*samples, strict=True)))


def flipped(noise: Noise, samples: list[Sample]) -> list[bool]:
    return [seen == 1 - true for seen, (true, *_) in zip(observe(noise, samples), samples, strict=True)]


def within_binomial_bounds(count: int, size: int, rate: float) -> bool:
    """Five standard deviations: a right rate fails once in two million seeds."""
    return abs(count - size * rate) <= 5 * math.sqrt(size * rate * (1 - rate))


def order_matters(noise: Callable[..., list[Reward]]) -> bool:
    """Does the noise of a sample change when the batch is shuffled, or cut into batches of 7?"""
    shuffled = random.Random(0).sample(SAMPLES, len(SAMPLES))
    at_once = dict(zip(SAMPLES, observe(noise, SAMPLES), strict=True))
    other_order = dict(zip(shuffled, observe(noise, shuffled), strict=True))
    in_batches = [seen for i in range(0, len(SAMPLES), 7) for seen in observe(noise, SAMPLES[i : i + 7])]
    return at_once != other_order or list(at_once.values()) != in_batches


@pytest.mark.parametrize("rate", [0.05, 0.4, 0.72])
def test_flips_have_the_rate_asked_for_over_samples_visits_and_prompts(rate: float) -> None:
    wrong = flipped(make_noise("flip", rate, seed=0), SAMPLES)
    assert within_binomial_bounds(sum(wrong), len(SAMPLES), rate)
    for part in range(3):  # which field of the key varies: one visit, one sample index, one half of the prompts
        chosen = [w for w, s in zip(wrong, SAMPLES, strict=True) if (s[2], s[3], int(s[1][7:]) // 200)[part] == 1]
        assert within_binomial_bounds(sum(chosen), len(chosen), rate)


def test_flips_of_the_samples_of_one_prompt_are_independent() -> None:
    # With rate .3, two samples of a visit are both wrong in .09 of the pairs; persistent noise would give .3.
    wrong = flipped(make_noise("flip", 0.3, seed=1), SAMPLES)
    pairs = [wrong[i] and wrong[i + 1] for i in range(0, len(wrong), 2)]
    assert within_binomial_bounds(sum(pairs), len(pairs), 0.09)
    persistent = flipped(make_noise("persistent", 0.3, seed=1), SAMPLES)
    pairs = [persistent[i] and persistent[i + 1] for i in range(0, len(wrong), 2)]
    assert not within_binomial_bounds(sum(pairs), len(pairs), 0.09)


def test_persistent_labels_are_wrong_for_all_samples_of_a_share_of_the_prompts() -> None:
    prompts = [(1.0, f"prompt-{p}", 0, 0) for p in range(4000)]
    noise = make_noise("persistent", 0.25, seed=3)
    wrong = flipped(noise, prompts)
    assert within_binomial_bounds(sum(wrong), len(prompts), 0.25)
    again = flipped(noise, [(0.0, prompt, 17, 5) for _, prompt, _, _ in prompts])
    assert again == wrong


@pytest.mark.parametrize("kind", ["none", "flip", "persistent"])
def test_noise_depends_on_neither_order_nor_batch_size(kind: str) -> None:
    assert not order_matters(make_noise(kind, 0.3, seed=0))


def test_a_stateful_generator_would_fail_the_order_test() -> None:
    generator = random.Random(0)

    def stateful(true_rewards: list[float], *key: object) -> list[Reward]:
        return [1 - r if generator.random() < 0.3 else r for r in true_rewards]

    assert order_matters(stateful)


def test_python_s_own_hash_would_not_do_and_the_key_is_the_same_in_another_process() -> None:
    keys = [["noise", "flip", 0, "naïve prompt", 1, 2], ["a", "b"], ["ab", ""]]
    script = f"""
import json, sys
sys.path.insert(0, {str(Path(__file__).parents[1] / "src")!r})
from dvpo.seeding import derive_uniform
print(json.dumps([[derive_uniform(*k) for k in {keys!r}], hash("prompt")]))
"""
    command = [sys.executable, "-c", script]
    outputs = [subprocess.check_output(command, env={"PYTHONHASHSEED": hash_seed}) for hash_seed in ("1", "2")]
    runs = [json.loads(output) for output in outputs]
    assert runs[0][0] == runs[1][0] == [derive_uniform(*key) for key in keys]
    assert runs[0][1] != runs[1][1]
    assert derive_uniform("a", "b") != derive_uniform("ab", "")


def test_the_key_s_value_is_pinned_since_checkpoints_and_published_runs_rely_on_it() -> None:
    # blake2b, 8 bytes, of '["noise", "flip", 0, "prompt-0", 0, 0]', big-endian, top 53 bits / 2^53.
    assert derive_uniform("noise", "flip", 0, "prompt-0", 0, 0) == 0.2670725234117659


def test_seeds_differ_and_lower_rates_are_nested_in_higher_ones() -> None:
    low, high = (flipped(make_noise("flip", rate, seed=5), SAMPLES) for rate in (0.1, 0.3))
    assert all(h for lo, h in zip(low, high, strict=True) if lo)
    other = flipped(make_noise("flip", 0.3, seed=6), SAMPLES)
    both = sum(a and b for a, b in zip(high, other, strict=True))
    assert within_binomial_bounds(both, len(SAMPLES), 0.09)


@pytest.mark.parametrize("kind", ["none", "flip", "persistent"])
def test_rate_zero_is_the_identity_and_rate_one_turns_all_but_none(kind: str) -> None:
    assert not any(flipped(make_noise(kind, 0.0, seed=0), SAMPLES))
    assert all(flipped(make_noise(kind, 1.0, seed=0), SAMPLES)) == (kind != "none")


@pytest.mark.parametrize("kind", ["none", "flip", "persistent"])
def test_a_missing_reward_stays_missing_and_is_never_made_a_label(kind: str) -> None:
    rewards: list[Reward] = [None, float("nan"), [None, 1.0, float("nan")]]
    observed = make_noise(kind, 1.0, seed=0)(rewards, ["a", "b", "c"], [0, 0, 0], [0, 1, 2])
    assert observed == [None, None, [None, 1.0, None]]


def test_the_last_entry_of_a_list_is_its_verdict_and_gets_the_noise_of_a_scalar() -> None:
    turns: list[Sample] = [([0.0, 0.0, 1.0], f"p{i}", 0, 0) for i in range(2000)]
    for kind in ("flip", "persistent"):
        noise = make_noise(kind, 0.3, seed=2)
        scalars = observe(noise, [(1.0, *key) for _, *key in turns])
        assert observe(noise, turns) == [[0.0, 0.0, verdict] for verdict in scalars]
        assert within_binomial_bounds(scalars.count(0.0), 2000, 0.3)
        assert noise([[]], ["p"], [0], [0]) == [[]]


def test_general_bounds_mirror_the_reward_at_their_middle() -> None:
    noise = make_noise("flip", 1.0, seed=0, low=-1.0, high=3.0)
    assert noise([-1.0, 0.5, 3.0], ["a", "b", "c"], [0] * 3, [0] * 3) == [3.0, 1.5, -1.0]  # 2 - r


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "flop"}, "^noise.kind: there is no noise 'flop'; did you mean 'flip'"),
        ({"kind": "zzz"}, "choose one of none, flip, persistent"),
        ({"rate": -0.1}, "^noise.rate: -0.1 is no probability"),
        ({"rate": 1.5}, "^noise.rate: 1.5"),
        ({"rate": float("nan")}, "^noise.rate: nan"),
        ({"rate": "0.2"}, "^noise.rate: '0.2'"),
        ({"low": 1.0, "high": 1.0}, "^noise.low, noise.high: 1.0 and 1.0"),
        ({"high": float("inf")}, "^noise.low, noise.high: 0.0 and inf"),
    ],
)
def test_wrong_settings_are_input_errors(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_noise(**{"kind": "flip", "rate": 0.2, "seed": 0, **arguments})  # type: ignore[arg-type]


def test_a_reward_outside_the_bounds_is_an_input_error_not_a_silent_reflection() -> None:
    with pytest.raises(InputError, match=r"the reward -1.0 of prompt 'p' is outside \[0.0, 1.0\]"):
        make_noise("flip", 0.0, seed=0)([-1.0], ["p"], [0], [0])
    assert make_noise("none", 0.0, seed=0)([-1.0], ["p"], [0], [0]) == [-1.0]
