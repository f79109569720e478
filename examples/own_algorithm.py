"""An algorithm of your own, without a line changed in the package: REINFORCE with a batch-mean baseline.

    cd examples && dvpo train ../configs/demo_ppo.yaml algorithm=own_algorithm:reinforce output=runs/reinforce

A row answers four questions. Which critic? None. What are the advantages and the critic's targets? The return of
the response less the mean return of the step, on every token; no targets. What is the actor's loss? -log p * A. And
the critic's? There is none. Everything else (sampling, noise, KL, optimiser, checkpoints, logs) is the trainer's.
"""

from torch import Tensor

from dvpo.algorithms import Algorithm, Signals
from dvpo.config import Config


def batch_mean_baseline(signals: Signals, config: Config) -> tuple[Tensor, Tensor]:
    """Return less the mean return of the responses that have a reward; no targets (L = 0)."""
    returns_B = signals.rewards_BT.sum(dim=-1)
    trains_B = signals.mask_BT.any(dim=-1) & signals.rewarded_B
    baseline = returns_B[trains_B].sum() / trains_B.sum().clamp(min=1)
    advantages_BT = (returns_B - baseline).unsqueeze(-1) * signals.mask_BT * trains_B.unsqueeze(-1)
    return advantages_BT, signals.rewards_BT.new_zeros(*signals.mask_BT.shape, 0)


def reinforce_loss(
    logprobs_K: Tensor, old_logprobs_K: Tensor, advantages_K: Tensor, config: Config
) -> tuple[Tensor, Tensor]:
    """-log p * A, and no token is ever clipped."""
    return -logprobs_K * advantages_K, logprobs_K.detach() * 0


reinforce = Algorithm(
    name="reinforce",
    paper="Williams 1992, Simple statistical gradient-following algorithms",
    critic="none",
    estimate=batch_mean_baseline,
    actor_loss=reinforce_loss,
    # One update a step: without ratios a second one would be off-policy.
    defaults={"update": {"minibatches": 1}, "advantage": {"whiten": False}},
)
