"""What follows from a diagnosis: settings, each with its reason in a sentence.

The reasons are the mathematics of docs/method.md and docs/noise.md, and the thresholds are choices. What pays in
training is not shown by any of it: an advice says where to begin, with its baseline beside it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import getitem
from typing import Any

from dvpo.algorithms import find_algorithm
from dvpo.config import Config, differences, to_plain
from dvpo.diagnosis import ErrorRate, Findings
from dvpo.errors import InputError
from dvpo.faults import BROKEN
from dvpo.loading import load_config
from dvpo.nested import merge
from dvpo.noise_rates import ENOUGH, MOST
from dvpo.plain_text import percent

NEARLY_ALL = 0.9
"""Of the prompts that have signal with all samples, so many shall have it."""
SILENT = 0.5
"""From this share of prompts without signal on they are worth replacing."""
OFTEN = 0.05
"""Share of missing scores or of cut answers from which on something is said."""
FAR = 10.0
"""An outlier, in scaled median deviations: a normal law has none in any sample that fits on a disk."""
MOST_SAMPLES, USUAL_SAMPLES = 64, 8


@dataclass(frozen=True)
class Advice:
    """One sentence with its reason, and the settings that it means; none where no setting can help."""

    sentence: str
    settings: Mapping[str, Any] = field(default_factory=dict)


def advise(findings: Findings, config: Config) -> list[Advice]:
    """All that follows, the reward's own troubles first.

    Args:
        findings: of a diagnosis.
        config: that it was made with; what it has already is neither contradicted nor said again.
    """
    if findings.faults == 1:  # nothing else was seen
        return [Advice(f"Your function fails on every answer: {findings.fault}; fix it first.")]
    missing = _missing(findings, config)
    if findings.missing == 1:
        return missing
    noise = _about_noise(findings, config)
    chosen = settings(noise).get("algorithm", config.algorithm)
    has_quantiles = find_algorithm(chosen).uses_critic_terms
    advice = [
        *missing,
        *_cuts(findings, config),
        *noise,
        *(_kappa(findings.spread, config) if has_quantiles else []),
        *_samples(findings, config),
    ]
    # What the config's own row sets goes with it where another row is advised.
    going = {} if chosen == config.algorithm else find_algorithm(config.algorithm).defaults
    advice = [replace(one, settings=_changes(one.settings, config, going)) for one in advice]
    if refusal := _refusal(settings(advice), config):
        advice.append(
            Advice(f"Change your config first, because dvpo train would refuse it with these settings: {refusal}.")
        )
    return advice


def settings(advice: list[Advice]) -> dict[str, Any]:
    """The settings of all, nested as a config is."""
    return reduce(merge, (one.settings for one in advice), {})


def _changes(advised: Mapping[str, Any], section: Any, going: Mapping[str, Any]) -> dict[str, Any]:
    """Of the advised settings those that a section of the config does not hold already, or whose default is going."""
    found: dict[str, Any] = {}
    for name, value in advised.items():
        if isinstance(value, Mapping):
            if inner := _changes(value, getattr(section, name), going.get(name, {})):
                found[name] = inner
        elif value != getattr(section, name) or name in going:
            found[name] = value
    return found


def _refusal(advised: Mapping[str, Any], config: Config) -> str:
    """What `dvpo train` has against the config with the advised settings; nothing if it takes them.

    The user's own settings are taken to be those that differ from the defaults of task and algorithm.
    """
    plain = to_plain(config)
    base: dict[str, Any] = {"task": plain["task"], "algorithm": config.algorithm}
    try:
        for key in differences(config, load_config(base)):
            *sections, name = key.split(".")
            section = reduce(lambda outer, inner: outer.setdefault(inner, {}), sections, base)
            section[name] = reduce(getitem, key.split("."), plain)
        load_config(merge(base, advised))
    except InputError as error:
        return str(error)
    return ""


def known_rates(findings: Findings) -> tuple[ErrorRate, ErrorRate] | None:
    """The rates of false verdicts if enough answers of each kind were seen to act on them."""
    p, q = findings.false_positive, findings.false_negative
    return (p, q) if p and q and min(p.seen, q.seen) >= ENOUGH else None


def kept(findings: Findings) -> float:
    """The share 1 - p - q of a reward's gap that false verdicts leave; 1 where none of them is certain."""
    rates = known_rates(findings)
    return 1 - rates[0].tally.rate - rates[1].tally.rate if rates and _certain(*rates) else 1.0


def _certain(p: ErrorRate, q: ErrorRate) -> bool:
    return p.low + q.low > 0


def _missing(findings: Findings, config: Config) -> list[Advice]:
    found = []
    if findings.faults:
        kind = (findings.fault or "").partition(":")[0]
        stay = findings.faults_stay or kind in BROKEN
        again = "" if stay else ", or let it be tried again"
        same = ", the same answers each time" if findings.faults_stay else ""
        found.append(
            Advice(
                f"Mend the reward function{again}, because {percent(findings.faults)} of scores were lost to "
                f"faults{same}, the first of them {findings.fault}.",
                {} if stay or config.reward.retries else {"reward": {"retries": 2}},
            )
        )
    if (unsaid := findings.missing - findings.faults) > OFTEN:
        nothing = findings.missing == 1
        left = "nothing is left to learn from" if nothing else "if it is the bad ones, what is left flatters"
        found.append(
            Advice(
                f"Find out which answers have no reward, since {percent(unsaid)} have none by the reward's own word: "
                f"{left}."
            )
        )
    return found


def _cuts(findings: Findings, config: Config) -> list[Advice]:
    if findings.truncated <= OFTEN:
        return []
    length = 2 * config.sampling.max_completion_length
    return [
        Advice(
            f"Allow {length} tokens if the model's context does, because {percent(findings.truncated)} of the "
            "answers were cut and a reward judges their length instead of their content.",
            {"sampling": {"max_completion_length": length}},
        )
    ]


def _about_noise(findings: Findings, config: Config) -> list[Advice]:
    if findings.judged_by_truth:
        return [
            Advice(
                "Name the reward that you will really use, since here the task's own verifier judges and its errors "
                "cannot be seen against itself."
            )
        ]
    rates = known_rates(findings)
    if rates is not None and _certain(*rates):
        return _about_false_verdicts(findings, config, *rates)
    found = [] if rates else [_about_truth(findings)]
    if findings.outlier > FAR:
        groups = config.sampling.samples_per_prompt > 1
        found.append(
            Advice(
                f"Take a bounded advantage, because one reward lies {findings.outlier:.0f} scaled median deviations "
                "from the median and would rule a mean: the rank of a return in its predicted law cannot exceed 1/2. "
                "It was measured at lambda 1, against PPO with one sample a prompt; where you know how far right and "
                "wrong are apart, a clip there (`ppo_delta_clip`) does as well (docs/results.md)."
                + (" In groups `reward.norm=group` with any row takes most of an outlier out." if groups else ""),
                {"algorithm": "dvpo", "advantage": {"lam": 1.0}},
            )
        )
    elif findings.repeat_equal is not None and findings.repeat_equal < 1 and not findings.binary:
        found.append(
            Advice(
                f"Take a critic, because one answer's scores deviate by {findings.repeat_deviation:.3g} from each "
                "other and a value pools many answers where a group's mean has only its own few; nothing shows that "
                "a law of them does better than their mean.",
                {"algorithm": "ppo"},
            )
        )
    elif rates is not None or findings.repeat_equal == 1:
        found.append(
            Advice(
                "Begin with the plain baseline (`ppo` is another row of the same trainer: one setting, nothing else "
                "changes), because no noise was found that a robust algorithm could take out "
                "(errors that repeat themselves show against the truth only).",
                {"algorithm": "ppo"},
            )
        )
    return found


def _about_truth(findings: Findings) -> Advice:
    p, q = findings.false_positive, findings.false_negative
    if p and q:
        return Advice(
            f"Diagnose with more --prompts, because {_scored(p.seen)} truly wrong and {_scored(q.seen)} truly right, "
            f"and a rate from fewer than {ENOUGH} is a guess."
        )
    if findings.silent_truth is not None:
        return Advice(
            "Give a reward and a truth of 0 and 1 if you want rates of false verdicts, because the truth is known but "
            "some rewards or truths are neither, and those that are would be chosen by what is to be counted."
        )
    return Advice(
        "Name a verified reward for some prompts (task.truth with your own files), because false verdicts that repeat "
        "themselves show against the truth only, and no correction or tail can be set without their rates."
    )


def _scored(count: int) -> str:
    """Of answers with a score and a truth, how many were."""
    return f"{count or 'no'} scored answer{'s were' if count > 1 else ' was'}"


def _about_false_verdicts(findings: Findings, config: Config, p: ErrorRate, q: ErrorRate) -> list[Advice]:
    left = kept(findings)
    if left <= 1 - MOST:
        return [
            Advice(
                f"Mend the reward before any training, because false verdicts leave {left:.2f} of the gap between "
                f"right and wrong, and taking them out would multiply the noise by {1 / max(left, 0.01):.0f}."
            )
        ]
    found = [
        Advice(
            "Begin with the plain baseline, because false verdicts shrink the gap between right and wrong for every "
            "row alike: told these rates, a corrected reward, a denoised value and a trimmed law ended level with it "
            "(docs/log.md, attempt 22).",
            {"algorithm": "ppo"},
        )
    ]
    if not config.reward.mix and config.advantage.law.functional != "denoised":
        given = {"false_positive": _rounded(p.tally.rate), "false_negative": _rounded(q.tally.rate)}
        # What a row trusts by default goes with the row, for another one is advised.
        by_default = find_algorithm(config.algorithm).defaults.get("reward", {}).get("trusted", 0.0)
        rates: dict[str, Any] = {}
        if config.reward.trusted == by_default:
            rates = {"rates": given, **({"trusted": 0.0} if by_default else {})}
        found.append(
            Advice(
                f"Correct the reward for these rates, because they leave {left:.2f} of the gap, and what is logged and "
                "predicted then means the truth; expect no gain in accuracy. Rows that divide by a group's deviation, "
                "and any reward.norm, undo it.",
                {"reward": {"correction": "backward", **rates, "norm": "none"}},
            )
        )
    return found


def _kappa(spread: float, config: Config) -> list[Advice]:
    kappa = _rounded(0.1 * spread)
    if kappa in (0, config.critic.kappa):
        return []
    return [
        Advice(
            f"Set kappa to {kappa:g}, a tenth of the rewards' spread of {spread:.3g}, because a Huber zone as wide as "
            "the rewards makes expectiles of the quantiles.",
            {"critic": {"kappa": kappa}},
        )
    ]


def _samples(findings: Findings, config: Config) -> list[Advice]:
    """The least number that gives nearly all prompts signal, more of them as noise and missing scores take theirs."""
    differ = "differ in their reward" if findings.silent_truth is None else "differ by the truth"
    if not findings.signal or not findings.signal[-1]:
        return [
            Advice(
                "Take other prompts, a stronger model or a higher temperature, because no prompt's answers "
                f"{differ} and nothing can be learnt from them."
            )
        ]
    enough = next(k for k, share in enumerate(findings.signal, 2) if share >= NEARLY_ALL * findings.signal[-1])
    most_known = len(findings.signal) + 1  # answers with a score that some prompt has
    left = max(kept(findings), 1 - MOST)
    count = min(MOST_SAMPLES, math.ceil(enough / left**2 / max(1 - findings.missing, 0.1)))
    more = "; noise wants 1 / (1 - p - q)^2 times as many for the same precision" if left < 1 else ""
    shares = findings.signal[enough - 2], findings.signal[-1]
    least = f"with {enough} the answers to {percent(shares[0])} of the prompts {differ}"
    most = f", with {most_known} {percent(shares[1])}" if enough < most_known else ""
    if most and count == enough:
        fewer, points = 1 - enough / most_known, 100 * (shares[1] - shares[0])
        most += f": {100 * fewer:.0f}% fewer samples for {points:.1f} points less signal"
    chosen = Advice(
        f"Sample {count} answers a prompt, because {least}{most}{more}.",
        {"sampling": {"samples_per_prompt": count}},
    )
    own = config.sampling.samples_per_prompt
    if max(count, findings.samples) < own:
        chosen = Advice(
            f"Ask again with --samples {max(own, USUAL_SAMPLES)}, because only {findings.samples} answers a prompt "
            f"were sampled, which cannot show that fewer than the {own} of your config would do."
        )
    found = [chosen]
    if findings.silent >= SILENT and not config.sampling.resample_rounds:
        found.append(
            Advice(
                f"Replace prompts without signal, because {percent(findings.silent)} of them would fill a step with "
                "answers that teach a group's baseline nothing.",
                {"sampling": {"resample_rounds": 3}},
            )
        )
    return found


def _rounded(value: float) -> float:
    """Three digits: no rate is known to more."""
    return float(f"{value:.3g}")
