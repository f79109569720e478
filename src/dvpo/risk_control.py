"""Risk that follows the noise: the critic's tails as heavy as the false rewards in them, its terms as strong."""

from dataclasses import asdict, replace

from dvpo.config import Config
from dvpo.shaping import NO_RATES, Rates

KEPT = "consistency"
"""The one term that is about the heads and not about a tail."""


def matched_to_noise(config: Config, rates: Rates) -> Config:
    """The config whose tail terms are matched to the noise, if `critic.adaptive_risk` asks for it.

        alpha_t = max(q, 1/M),   beta_t = max(p, 1/M),   weight_t = weight * min(1, (p + q) / (alpha + beta))

    False negatives put the mass q at the bottom of a state's law, false positives the mass p at its top: these are the
    tails that the terms are meant for. The terms pay for their robustness with bias: without noise they fade, and with
    as much as the configured tails hold they have their configured weights. Until enough responses are counted all
    stays as configured.

    Args:
        config: of the run.
        rates: p and q as estimated so far, both 0 while too few responses are counted.
    """
    critic = config.critic
    if not critic.adaptive_risk or _unknown(config, rates):
        return config
    least = 1 / critic.num_quantiles
    scale = _scale(config, rates)
    weights = {name: weight * (1 if name == KEPT else scale) for name, weight in asdict(critic.weights).items()}
    adapted = replace(
        critic,
        alpha=max(rates.false_negative, least),
        beta=max(rates.false_positive, least),
        weights=replace(critic.weights, **weights),
    )
    return replace(config, critic=adapted)


def risk_figures(config: Config, rates: Rates) -> dict[str, float]:
    """alpha, beta and the factor of the weights as they stand; nothing unless `critic.adaptive_risk` is on."""
    if not config.critic.adaptive_risk:
        return {}
    critic = matched_to_noise(config, rates).critic
    scale = 1.0 if _unknown(config, rates) else _scale(config, rates)
    return {"critic/alpha": critic.alpha, "critic/beta": critic.beta, "critic/term_scale": scale}


def _unknown(config: Config, rates: Rates) -> bool:
    """Rates of 0 are no rates yet, unless the user has given them."""
    return rates == NO_RATES and not config.reward.rates.given


def _scale(config: Config, rates: Rates) -> float:
    return min(1.0, (rates.false_positive + rates.false_negative) / (config.critic.alpha + config.critic.beta))
