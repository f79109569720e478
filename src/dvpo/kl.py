"""The coefficient of the KL penalty: fixed, or steered so that the policy stays about as far off as is asked."""

import math
from typing import Any

from dvpo.settings_learning import KLConfig

LARGEST_ERROR = 0.2


class KLController:
    """beta <- beta * (1 + e * responses / horizon),  e = clip(KL / target - 1, -0.2, 0.2)

    Without a target beta stays what it is. One step's own beta does not depend on what it samples.

    Source: Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences", arXiv 1909.08593, section 2.2,
    whose KL is that of whole responses; here it is a token's, as everywhere in this package.
    """

    def __init__(self, settings: KLConfig) -> None:
        self.settings, self.coef = settings, settings.coef

    @property
    def adaptive(self) -> bool:
        return self.settings.target is not None

    def observe(self, divergence: float, responses: int) -> None:
        """Steer the next step's coefficient.

        Args:
            divergence: estimated KL(sampling policy, starting policy) in nats a token; NaN on a step that trains
                nothing, which says nothing.
            responses: of the step.
        """
        if self.settings.target is None or math.isnan(divergence):
            return
        error = min(max(divergence / self.settings.target - 1, -LARGEST_ERROR), LARGEST_ERROR)
        self.coef *= 1 + error * responses / self.settings.horizon

    def state_dict(self) -> dict[str, Any]:
        return {"coef": self.coef, "began_at": self.settings.coef}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the coefficient where it stood, unless the config has another to begin with now."""
        if state.get("began_at", self.settings.coef) == self.settings.coef:
            self.coef = state["coef"]
