"""Injected noise: the promised rates and distributions, and a pure function of its key."""

import json
import math
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from dvpo.errors import InputError
from dvpo.loading import load_config
from dvpo.noise import Noise, make_noise
from dvpo.noise_models import PARAMETERS
from dvpo.seeding import derive_uniform
from dvpo.settings import NoiseConfig
from dvpo.tasks import Example, Reward

Sample = tuple[Reward, str, int, int, list[int]]
"""Reward, prompt, visit, sample index, response tokens."""

SAMPLES: list[Sample] = [
    (float((p + v + s) % 2), f"prompt-{p}", v, s, [p % 7, 10 * v + s])
    for p in range(500)
    for v in range(3)
    for s in range(8)
]
"""12,000 responses, half of them right; no text stands twice for one prompt."""

SETTINGS: dict[str, dict[str, Any]] = {
    "none": {},
    "flip": {"rate": 0.3},
    "persistent": {"rate": 0.3},
    "asymmetric": {"false_positive": 0.1, "false_negative": 0.4},
    "reward_model": {"accuracy": 0.72},
    "response_reward_model": {"accuracy": 0.72},
    "gaussian": {"sd": 0.5},
    "student_t": {"df": 2.5, "scale": 0.5},
    "spikes": {"rate": 0.1, "sd": 10.0},
    "missing": {"rate": 0.3},
    "random": {},
    "affine": {"offset_sd": 1.0, "scale_sd": 0.5},
}
OFF: dict[str, dict[str, Any]] = {
    "none": {},
    "flip": {"rate": 0},
    "persistent": {"rate": 0},
    "asymmetric": {"false_positive": 0, "false_negative": 0},
    "reward_model": {"accuracy": 1},
    "response_reward_model": {"accuracy": 1},
    "gaussian": {"sd": 0},
    "student_t": {"df": 2.5, "scale": 0},
    "spikes": {"rate": 0, "sd": 10},
    "missing": {"rate": 0},
    "affine": {"offset_sd": 0, "scale_sd": 0},
}
PER_PROMPT, PER_RESPONSE = {"persistent", "affine"}, {"response_reward_model"}

every_kind = pytest.mark.parametrize("kind", SETTINGS)


def noise_of(kind: str, seed: int = 0, **settings: Any) -> Noise:
    return make_noise(NoiseConfig(kind=kind, **settings), seed)


def usual(kind: str, seed: int = 0) -> Noise:
    return noise_of(kind, seed, **SETTINGS[kind])


def observe(noise: Noise, samples: list[Sample] = SAMPLES) -> list[Reward]:
    return noise(*(list(column) for column in zip(*samples, strict=True)))


def one(noise: Noise, reward: Reward) -> Reward:
    return noise([reward], ["p"], [0], [0], [[1, 2]])[0]


def all_with(reward: Reward, samples: list[Sample] = SAMPLES) -> list[Sample]:
    return [(reward, *key) for _, *key in samples]


def flipped(noise: Noise, samples: list[Sample] = SAMPLES) -> list[bool]:
    return [seen == 1 - true for seen, (true, *_) in zip(observe(noise, samples), samples, strict=True)]


def within_binomial_bounds(count: int, size: int, rate: float) -> bool:
    """Five standard deviations: a right rate fails once in two million seeds."""
    return abs(count - size * rate) <= 5 * math.sqrt(size * rate * (1 - rate))


def follows(values: list[Any], law: Any) -> bool:
    """A Kolmogorov-Smirnov test that a right distribution fails once in ten thousand seeds."""
    return stats.kstest(values, law.cdf).pvalue > 1e-4


def correlation(x: list[Any], y: list[Any]) -> float:
    return float(stats.pearsonr(x, y).statistic)


# Keys


def order_matters(noise: Callable[..., list[Reward]]) -> bool:
    """Does the noise of a sample change when the batch is shuffled, or cut into batches of 7?"""
    samples = SAMPLES[:3000]
    numbers = random.Random(0).sample(range(len(samples)), len(samples))
    at_once = observe(noise, samples)  # type: ignore[arg-type]
    shuffled = observe(noise, [samples[i] for i in numbers])  # type: ignore[arg-type]
    in_batches = [seen for i in range(0, len(samples), 7) for seen in observe(noise, samples[i : i + 7])]  # type: ignore[arg-type]
    return [at_once[i] for i in numbers] != shuffled or at_once != in_batches


@every_kind
def test_noise_depends_on_neither_order_nor_batch_size(kind: str) -> None:
    assert not order_matters(usual(kind))


def test_a_stateful_generator_would_fail_the_order_test() -> None:
    generator = random.Random(0)

    def stateful(true_rewards: list[float], *key: object) -> list[Reward]:
        return [1 - r if generator.random() < 0.3 else r for r in true_rewards]

    assert order_matters(stateful)


@pytest.mark.parametrize("kind", [kind for kind in SETTINGS if kind != "none"])
def test_a_kind_depends_on_those_fields_of_its_key_that_it_names_and_on_no_other(kind: str) -> None:
    """Prompt noise: the prompt. Sample noise: prompt, visit and index. Response noise: prompt and tokens."""
    start = all_with(1.0, SAMPLES[:400])
    fields = {
        "prompt": [(r, p + "'", v, s, t) for r, p, v, s, t in start],
        "visit": [(r, p, v + 3, s, t) for r, p, v, s, t in start],
        "sample": [(r, p, v, s + 8, t) for r, p, v, s, t in start],
        "tokens": [(r, p, v, s, [*t, 1]) for r, p, v, s, t in start],
        "token": [(r, p, v, s, [t[1], t[0]]) for r, p, v, s, t in start],  # the same tokens in another order
    }
    seen = observe(usual(kind), start)
    changing = {name for name, samples in fields.items() if observe(usual(kind), samples) != seen}
    if kind in PER_PROMPT:
        assert changing == {"prompt"}
    elif kind in PER_RESPONSE:
        assert changing == {"prompt", "tokens", "token"}
    else:
        assert changing == {"prompt", "visit", "sample"}
    assert observe(usual(kind, seed=1), start) != seen


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
    assert [noise_of("flip", rate=rate)([1.0], ["prompt-0"], [0], [0], [[]]) for rate in (0.267, 0.268)] == [[1], [0]]
    bound = derive_uniform("noise", "persistent", 3, "prompt-0")
    assert bound == 0.6276122256454243
    around = [noise_of("persistent", 3, rate=bound + e) for e in (-1e-9, 1e-9)]
    assert [noise([1.0], ["prompt-0"], [9], [9], [[]]) for noise in around] == [[1], [0]]


@pytest.mark.parametrize("kind", ["flip", "persistent", "missing", "spikes"])
def test_seeds_differ_and_lower_rates_are_nested_in_higher_ones(kind: str) -> None:
    def hit(rate: float, seed: int) -> list[bool]:
        rest = {"sd": 5.0} if kind == "spikes" else {}
        return [seen != 1.0 for seen in observe(noise_of(kind, seed, rate=rate, **rest), all_with(1.0))]

    low, high, other = hit(0.1, 5), hit(0.3, 5), hit(0.3, 6)
    assert all(h for lo, h in zip(low, high, strict=True) if lo)
    size = len(SAMPLES) // (24 if kind == "persistent" else 1)  # persistent noise has one draw a prompt
    both = sum(a and b for a, b in zip(high, other, strict=True)) * size // len(SAMPLES)
    assert within_binomial_bounds(both, size, 0.09)


# Rates and distributions


@pytest.mark.parametrize("rate", [0.05, 0.4, 0.72])
def test_flips_have_the_rate_asked_for_over_samples_visits_and_prompts(rate: float) -> None:
    wrong = flipped(noise_of("flip", rate=rate))
    assert within_binomial_bounds(sum(wrong), len(SAMPLES), rate)
    for part in range(3):  # which field of the key varies: one visit, one sample index, one half of the prompts
        chosen = [w for w, s in zip(wrong, SAMPLES, strict=True) if (s[2], s[3], int(s[1][7:]) // 250)[part] == 1]
        assert within_binomial_bounds(sum(chosen), len(chosen), rate)


def test_flips_of_the_samples_of_one_prompt_are_independent() -> None:
    # With rate .3, two samples of a visit are both wrong in .09 of the pairs; persistent noise would give .3.
    for kind, independent in (("flip", True), ("persistent", False)):
        wrong = flipped(noise_of(kind, seed=1, rate=0.3))
        pairs = [wrong[i] and wrong[i + 1] for i in range(0, len(wrong), 2)]
        assert within_binomial_bounds(sum(pairs), len(pairs), 0.09) == independent


def test_persistent_labels_are_wrong_for_all_samples_of_a_share_of_the_prompts() -> None:
    prompts: list[Sample] = [(1.0, f"prompt-{p}", 0, 0, []) for p in range(10_000)]
    noise = noise_of("persistent", seed=3, rate=0.25)
    wrong = flipped(noise, prompts)
    assert within_binomial_bounds(sum(wrong), len(prompts), 0.25)
    assert flipped(noise, [(0.0, prompt, 17, 5, [3]) for _, prompt, *_ in prompts]) == wrong


def test_asymmetric_flips_have_their_two_rates() -> None:
    noise = noise_of("asymmetric", false_positive=0.1, false_negative=0.4)
    for true, rate in ((0.0, 0.1), (1.0, 0.4)):
        wrong = flipped(noise, all_with(true))
        assert within_binomial_bounds(sum(wrong), len(wrong), rate)
    one_sided = noise_of("asymmetric", false_positive=0, false_negative=1)
    assert [one(one_sided, reward) for reward in (0.0, 0.5, 0.75, 1.0)] == [0.0, 0.5, 0.25, 0.0]


@pytest.mark.parametrize("kind", ["reward_model", "response_reward_model"])
@pytest.mark.parametrize(("low", "high", "seed"), [(0.0, 1.0, 0), (0.0, 1.0, 1), (-1.0, 3.0, 2)])
def test_the_72_percent_reward_model_orders_72_percent_of_20000_pairs(
    kind: str, low: float, high: float, seed: int
) -> None:
    # One right and one wrong response to each prompt; standard error sqrt(.72 * .28 / 20,000) = .32%.
    ids, size = [f"q{i}" for i in range(20_000)], 20_000
    model = noise_of(kind, seed, accuracy=0.72, low=low, high=high)
    right = model([high] * size, ids, [0] * size, [0] * size, [[5]] * size)
    wrong = model([low] * size, ids, [0] * size, [1] * size, [[6]] * size)
    share = sum(r > w for r, w in zip(right, wrong, strict=True)) / size  # type: ignore[operator]
    assert abs(share - 0.72) < 0.01


def test_the_scale_of_a_reward_model_is_the_closed_form() -> None:
    # Phi(1 / (sigma sqrt 2)) = .72  <=>  sigma = 1 / (sqrt 2 * .582842) = 1.21319
    model = noise_of("reward_model", accuracy=0.72)
    errors = [seen - true for seen, (true, *_) in zip(observe(model), SAMPLES, strict=True)]  # type: ignore[operator]
    assert follows(errors, stats.norm(scale=1.21319))
    assert not follows(errors, stats.norm(scale=1.21319 / math.sqrt(2)))  # one Gaussian a pair instead of two


def test_the_same_text_always_gets_the_same_score_of_the_response_reward_model_and_only_of_it() -> None:
    for kind, fixed in (("response_reward_model", True), ("reward_model", False)):
        scores = usual(kind)([0.0] * 4, ["p"] * 4, [0, 0, 1, 9], [0, 1, 0, 7], [[5, 6]] * 4)
        assert (len(set(scores)) == 1) == fixed  # type: ignore[arg-type]


def test_a_response_reward_model_can_be_exploited_and_an_independent_one_cannot() -> None:
    # The best of 50 wrong texts by its score, judged again: N(0, 1.21^2) has a maximum of 2.25 * 1.21 = 2.7 among 50.
    texts, size = [[i] for i in range(50)], 50
    again: dict[str, list[Any]] = {"response_reward_model": [], "reward_model": []}
    for kind in again:
        for prompt in map(str, range(200)):
            scores: list[Any] = usual(kind)([0.0] * size, [prompt] * size, [0] * size, list(range(size)), texts)
            best = scores.index(max(scores))
            again[kind] += usual(kind)([0.0], [prompt], [1], [best], [texts[best]])
    assert 2.4 < stats.tmean(again["response_reward_model"]) < 3.0
    assert abs(stats.tmean(again["reward_model"])) < 0.45  # five standard errors: 5 * 1.21 / sqrt(200)


@pytest.mark.parametrize(
    ("kind", "settings", "law"),
    [
        ("gaussian", {"sd": 0.5}, stats.norm(scale=0.5)),
        ("student_t", {"df": 1.0, "scale": 2.0}, stats.cauchy(scale=2.0)),
        ("student_t", {"df": 2.5, "scale": 0.5}, stats.t(2.5, scale=0.5)),
        ("student_t", {"df": 300.0, "scale": 1.0}, stats.norm()),
    ],
)
def test_added_noise_has_its_distribution(kind: str, settings: dict[str, float], law: Any) -> None:
    errors = [seen - true for seen, (true, *_) in zip(observe(noise_of(kind, **settings)), SAMPLES, strict=True)]  # type: ignore[operator]
    assert follows(errors, law)
    assert not follows(errors, stats.norm(scale=0.55))
    assert abs(stats.kendalltau(errors[:-1], errors[1:]).statistic) < 0.03  # 5 standard deviations of 12,000 pairs


def test_a_gaussian_reward_stays_finite_at_the_ends_of_the_uniform(monkeypatch: pytest.MonkeyPatch) -> None:
    for uniform in (0.0, 1 - 2.0**-53):
        monkeypatch.setattr("dvpo.noise_models.derive_uniform", lambda *key, u=uniform: u)
        assert all(math.isfinite(one(usual(kind), 1.0) or 0.0) for kind in SETTINGS)  # type: ignore[arg-type]
        assert math.isfinite(one(noise_of("student_t", df=1, scale=1), 1.0))  # type: ignore[arg-type]


def test_spikes_hit_their_share_and_have_their_deviation() -> None:
    seen = observe(noise_of("spikes", rate=0.1, sd=10.0), all_with(1.0))
    spikes = [s - 1 for s in seen if s != 1.0]  # type: ignore[operator]
    assert within_binomial_bounds(len(spikes), len(SAMPLES), 0.1)
    assert follows(spikes, stats.norm(scale=10))


def test_missing_rewards_have_their_share_and_the_others_are_untouched() -> None:
    seen = observe(noise_of("missing", rate=0.3))
    assert within_binomial_bounds(seen.count(None), len(SAMPLES), 0.3)
    assert all(s is None or s == true for s, (true, *_) in zip(seen, SAMPLES, strict=True))
    for reward in (0.0, 1.0):  # whatever the response was worth
        assert within_binomial_bounds(observe(noise_of("missing", rate=0.3), all_with(reward)).count(None), 12_000, 0.3)


def test_a_random_reward_is_a_fair_coin_that_knows_nothing_of_the_response() -> None:
    seen = observe(noise_of("random", low=-1.0, high=2.0))
    assert set(seen) == {-1.0, 2.0}  # type: ignore[arg-type]
    assert within_binomial_bounds(seen.count(2.0), len(SAMPLES), 0.5)
    assert observe(noise_of("random", low=-1.0, high=2.0), all_with(0.7)) == seen


def test_affine_noise_has_one_offset_and_one_positive_scale_a_prompt() -> None:
    prompts = [f"q{i}" for i in range(10_000)]
    noise, zeros = noise_of("affine", offset_sd=2.0, scale_sd=0.5), [0] * len(prompts)
    at_0, at_1, at_3 = (noise([r] * len(prompts), prompts, zeros, zeros, [[]] * len(prompts)) for r in (0.0, 1.0, 3.0))
    scales = [b - a for a, b in zip(at_0, at_1, strict=True)]  # type: ignore[operator]
    assert follows(at_0, stats.norm(scale=2.0))
    assert follows(scales, stats.lognorm(0.5))
    assert [c - a for a, c in zip(at_0, at_3, strict=True)] == pytest.approx([3 * s for s in scales])  # type: ignore[operator]
    assert abs(correlation(at_0, scales)) < 0.05
    elsewhere = noise([1.0] * len(prompts), prompts, [4] * len(prompts), [3] * len(prompts), [[8]] * len(prompts))
    assert elsewhere == at_1


def test_prompts_of_one_kind_share_offset_and_scale() -> None:
    train = [Example(f"q{i}", "?", {"kind": "even" if i % 2 == 0 else "odd"}) for i in range(100)]
    prompts = [example.id for example in train]
    noise = make_noise(NoiseConfig(kind="affine", offset_sd=2.0, scale_sd=0.5, by="kind"), 0, train)
    at_0, at_1 = (noise([r] * 100, prompts, [0] * 100, [0] * 100, [[]] * 100) for r in (0.0, 1.0))
    assert len(set(at_0)) == len(set(at_1)) == 2  # type: ignore[arg-type]
    assert at_0[::2] == [at_0[0]] * 50
    assert at_1[1::2] == [at_1[1]] * 50


def test_a_column_that_the_data_does_not_have_is_refused_with_those_that_it_has() -> None:
    settings = NoiseConfig(kind="affine", offset_sd=1.0, scale_sd=0.5, by="domain")
    with pytest.raises(InputError, match=r"noise.by = domain is no column .* 'q0', which has kind: name one"):
        make_noise(settings, 0, [Example("q0", "?", {"kind": "even"})])
    with pytest.raises(InputError, match=r"noise\.by = .* is a column of the training examples"):
        make_noise(settings, 0)


# Reductions


@pytest.mark.parametrize("kind", OFF)
def test_switched_off_it_is_the_identity_bit_for_bit(kind: str) -> None:
    rewards: list[Any] = [0.0, -0.0, 1.0, 0.1 + 0.2, -7.5, 1e300, 5e-324, [0.25, -0.0, None, 0.1], [], None]
    size = len(rewards)
    seen = noise_of(kind, **OFF[kind])(rewards, [f"p{i}" for i in range(size)], [0] * size, [0] * size, [[1]] * size)
    assert repr(seen) == repr(rewards)
    assert OFF.keys() | {"random"} == SETTINGS.keys() == PARAMETERS.keys() - {"pseudo_labels"}
    assert observe(usual(kind)) != observe(noise_of(kind, **OFF[kind])) or kind == "none"


@pytest.mark.parametrize("kind", ["flip", "persistent"])
def test_rate_one_turns_all(kind: str) -> None:
    assert all(flipped(noise_of(kind, rate=1.0)))


@every_kind
def test_a_missing_reward_stays_missing_and_is_never_made_a_label(kind: str) -> None:
    rewards: list[Reward] = [None, float("nan"), [None, 1.0, float("nan")]]
    observed: list[Any] = usual(kind)(rewards, ["a", "b", "c"], [0, 0, 0], [0, 1, 2], [[1]] * 3)
    assert observed[:2] == [None, None]
    assert (observed[2][0], observed[2][2]) == (None, None)


@every_kind
def test_the_last_entry_of_a_list_is_its_verdict_and_gets_the_noise_of_a_scalar(kind: str) -> None:
    turns = observe(usual(kind), all_with([0.0, 0.0, 1.0], SAMPLES[:2000]))
    scalars = observe(usual(kind), all_with(1.0, SAMPLES[:2000]))
    assert turns == [[0.0, 0.0, verdict] for verdict in scalars]
    assert one(usual(kind), []) == []


def test_earlier_entries_stay_except_where_the_whole_return_is_meant() -> None:
    # affine scales the return: with the prompt's offset o and scale s, [.5, 1] becomes [.5 s, o + s].
    offset: Any = one(usual("affine"), 0.0)
    scale = one(usual("affine"), 1.0) - offset  # type: ignore[operator]
    assert one(usual("affine"), [0.5, 1.0]) == pytest.approx([0.5 * scale, offset + scale])
    # random: a reward that stood in an earlier turn would tell of the response.
    assert one(usual("random"), [0.5, 1.0]) == [0.0, one(usual("random"), 1.0)]
    for kind in SETTINGS.keys() - {"affine", "random"}:
        assert one(usual(kind), [0.5, 1.0])[0] == 0.5  # type: ignore[index]


def test_general_bounds_mirror_the_reward_at_their_middle_also_outside_of_them() -> None:
    noise = noise_of("flip", rate=1.0, low=-1.0, high=3.0)
    assert [one(noise, reward) for reward in (-1.0, 0.5, 3.0, 10.0, -4.0)] == [3.0, 1.5, -1.0, -8.0, 6.0]  # 2 - r
    assert one(noise_of("flip", rate=1.0), -1.0) == 2.0  # 1 - r: no reward ends a run


# Several


def then(first: dict[str, Any], *others: dict[str, Any]) -> Noise:
    return make_noise(load_config({"noise": {**first, "then": list(others)}}).noise, seed=0)


def test_models_act_in_the_order_of_the_list() -> None:
    # Flip all, then r -> 2 r + .5 (one prompt's draw stands in for the numbers): (1 - r) first, or last.
    flip, affine = {"kind": "flip", "rate": 1}, {"kind": "affine", "offset_sd": 1, "scale_sd": 1}
    noise = then({"kind": "none"}, affine)
    offset: Any = one(noise, 0.0)
    scale = one(noise, 1.0) - offset  # type: ignore[operator]
    assert one(then(flip, affine), 0.25) == pytest.approx(offset + scale * 0.75)
    assert one(then({"kind": "none"}, affine, flip), 0.25) == pytest.approx(1 - (offset + scale * 0.25))


def test_what_an_earlier_model_made_missing_stays_missing() -> None:
    noise = then({"kind": "missing", "rate": 0.3}, {"kind": "random"}, {"kind": "gaussian", "sd": 1})
    seen = observe(noise)
    assert [s is None for s in seen] == [s is None for s in observe(noise_of("missing", rate=0.3))]


def test_two_models_of_one_kind_are_independent() -> None:
    # Two flips at .3: wrong with .3 * .7 + .7 * .3 = .42; with one and the same draw the second would undo the first.
    flip = {"kind": "flip", "rate": 0.3}
    for second in (flip, {**flip, "seed": 0}):  # the place in the list enters the key, whoever's seed it is
        assert within_binomial_bounds(sum(flipped(then(flip, second))), len(SAMPLES), 0.42)
    gaussian = {"kind": "gaussian", "sd": 1}
    first, both = (observe(noise, all_with(0.0)) for noise in (noise_of("gaussian", sd=1.0), then(gaussian, gaussian)))
    second_alone = [b - a for a, b in zip(first, both, strict=True)]  # type: ignore[operator]
    assert abs(correlation(first, second_alone)) < 0.05


def test_the_first_model_is_the_same_with_and_without_others_behind_it() -> None:
    flip = {"kind": "flip", "rate": 0.3}
    assert observe(then(flip, {"kind": "gaussian", "sd": 0})) == observe(noise_of("flip", rate=0.3))


def test_a_seed_of_one_s_own_parts_the_noise_from_the_run_s_seed() -> None:
    fixed = NoiseConfig(kind="flip", rate=0.3, seed=7)
    assert observe(make_noise(fixed, 0)) == observe(make_noise(fixed, 1)) == observe(noise_of("flip", 7, rate=0.3))
    later = load_config({"noise": {"then": [{"kind": "flip", "rate": 0.3}]}}).noise
    assert observe(make_noise(later, 0)) != observe(make_noise(later, 1))  # the run's, where it has none
