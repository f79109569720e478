"""Settings of how a run learns, what it watches and what it keeps."""

from typing import Annotated, Literal

from pydantic import Field

from dvpo.settings import Count, CountOrZero, Finite, Positive, Rate, Seconds, Share, Tail, Weight, section


@section
class LawConfig:
    """How an algorithm with a distribution makes a number of the law of the return."""

    functional: Literal["mean", "rank", "cvar", "upper_mean", "trimmed", "wang", "tv_worst_case", "denoised"] = "mean"
    """`mean` is the paper's; `rank` compares the target law with the predicted one (docs/method.md, section 6c);
    `denoised` trims the law by the estimated rates of false rewards (section 6b), and is for scalar critics too."""
    width: Weight = 0.0
    """rank: half-width of the step in units of the reward; 0 = the rank itself."""
    floor: Rate = 0.0
    """rank: mass of the lower tail in which all returns count alike; 0 = none."""
    lower: Share = 0.1
    """cvar: mass of the lower tail; trimmed: mass dropped below."""
    upper: Share = 0.1
    """upper_mean: mass of the upper tail; trimmed: mass dropped above."""
    eta: Finite = 0.75
    """wang: > 0 pessimistic, < 0 optimistic."""
    radius: Share = 0.1
    """tv_worst_case: radius of the total-variation ball."""

    def __post_init__(self) -> None:
        if self.floor > 0 and self.functional != "rank":
            raise ValueError(
                f"advantage.law.floor = {self.floor:g} is that of a rank, and advantage.law.functional = "
                f"{self.functional}: set it to 0, or take rank"
            )
        if self.functional == "trimmed" and self.lower + self.upper >= 1:
            raise ValueError(
                f"advantage.law.lower + upper = {self.lower + self.upper:g} trims everything: their sum must be below 1"
            )


@section
class AdvantageConfig:
    """Returns, targets and what becomes of sequences without a clean end or a reward."""

    gamma: Share = 1.0
    """Discount a policy token."""
    lam: Share = 0.95
    """lambda of the advantages: 1 trusts the return alone, 0 the next value alone."""
    critic_lam: Share | None = None
    """lambda of the critic's targets; None: the same as `lam`."""
    target: Literal["indexwise", "mixture"] = "indexwise"
    """Target law of a quantile critic: lambda-mixture index by index (the paper), or of the laws themselves."""
    target_atoms: Count = 32
    """mixture: number of target atoms L."""
    law: LawConfig = LawConfig()
    delta_clip: Positive | None = None
    """Clip every temporal difference of the actor's advantage to [-c, c] in units of the reward; None = off."""
    recentre: bool = False
    """Shift all values of a step by one constant, so that the last temporal differences of what came to an end are 0 in
    the mean: an end costs nothing merely because the critic is wrong in the mean. Without a critic there is nothing to
    shift."""
    reward_trust: Share = 1.0
    """Share of a response's last temporal difference that the actor believes: 1 takes the observed reward, 0 what the
    critic says of the finished response in its place; the critic learns from the observed reward whatever it is. Rows
    without a critic believe all of it."""
    doubt_steps: Count | None = None
    """Let `reward_trust` grow to 1 over so many steps, those of a critic's warm-up included; None: it stays."""
    whiten: bool = True
    """Give the advantages of a step mean 0 and deviation 1."""
    truncation: Literal["terminal", "bootstrap", "mask"] = "terminal"
    """After a cut by the length limit: worth 0, worth what the critic says, or the response leaves the step."""
    missing_reward: Literal["mask", "bootstrap"] = "mask"
    """A response without a reward leaves the step, or the critic's opinion of it stands. It never counts as 0."""

    def __post_init__(self) -> None:
        if self.doubt_steps is not None and self.reward_trust == 1:
            raise ValueError(
                f"advantage.doubt_steps = {self.doubt_steps} lets advantage.reward_trust grow to 1, where it stands: "
                "lower reward_trust, or drop doubt_steps"
            )


@section
class TermWeights:
    """Weights of the critic's extra terms; 0 switches a term off."""

    risk: Weight = 0.0
    """Quantile loss that weighs lower levels more."""
    cvar: Weight = 0.0
    """Mean of the lower tail."""
    gain: Weight = 0.0
    """Mean of the upper tail."""
    shift: Weight = 0.0
    """Mean, pushed up where it lies below the target."""
    shape: Weight = 0.0
    """Variance of the tails: less below, no less above."""
    curvature: Weight = 0.0
    """Tails that bend the wrong way."""
    consistency: Weight = 0.0
    """Distance between the heads."""

    def needs_tails(self) -> bool:
        return any((self.risk, self.cvar, self.gain, self.shape, self.curvature))


@section
class HistogramConfig:
    """The support of a categorical critic's law."""

    bins: Annotated[int, Field(ge=2)] = 51
    """Bins from `low` to `high`; a few more on either side make room for the smoothing."""
    low: Finite = 0.0
    """Least return in units of the reward; targets outside are clipped, and counted in `critic/outside`."""
    high: Finite = 1.0
    """Greatest return."""
    sigma: Positive = 0.75
    """Deviation of the smoothing in widths of a bin."""

    def __post_init__(self) -> None:
        if self.low >= self.high:
            raise ValueError(
                f"critic.histogram.low = {self.low:g} is not below critic.histogram.high = {self.high:g}: "
                "give the least and the greatest return"
            )


@section
class CriticLoraConfig:
    """Adapters of the critic's own trunk, in a run whose policy has them (`model.lora`)."""

    rank: CountOrZero | None = None
    """None: the policy's; 0 = none, the whole trunk learns."""
    alpha: Positive | None = None
    """None: the policy's."""
    targets: tuple[str, ...] | None = None
    """None: the policy's."""


@section
class CriticConfig:
    """The value model."""

    trunk: Literal["own", "frozen", "shared"] = "own"
    """Own copy of the starting policy's trunk; the same but frozen; or the policy's trunk, read without gradient."""
    num_heads: Count = 3
    """N, heads of the ensemble."""
    num_quantiles: Count = 32
    """M, quantiles a head; 200 for large models."""
    levels: Literal["midpoint", "paper"] = "midpoint"
    """Where the quantiles stand: (j - 1/2) / M, or j / M."""
    monotone: bool = True
    """Heads whose quantiles cannot cross."""
    kappa: Weight = 0.1
    """Width of the Huber zone in units of the reward."""
    eta: Weight = 2.0
    """How much more `weights.risk` heeds lower levels."""
    alpha: Tail = 0.1
    """Mass of the lower tail."""
    beta: Tail = 0.1
    """Mass of the upper tail."""
    weights: TermWeights = TermWeights()
    tail_targets: Literal["sample", "law"] = "sample"
    """What cvar, gain, shift and shape compare with: the sampled return (the paper's), or the law that it comes from
    (docs/method.md, section 4)."""
    adaptive_risk: bool = False
    """alpha, beta and the terms' weights follow the estimated rates of false rewards; until there are any, they stay
    as they are set here."""
    histogram: HistogramConfig = HistogramConfig()
    value_clip: Positive | None = 0.5
    """Clip range of scalar value losses in units of the reward; None = off. Quantile losses are not clipped."""
    cql_weight: Weight = 0.1
    """cql_ppo: weight of logsumexp_a Q - Q(taken). The default is that of trlX's ILQL."""
    epochs: Count | None = None
    """Passes of the critic over the responses of a step; None: as many as `update.epochs`."""
    replay: CountOrZero = 0
    """Earlier steps whose responses the critic goes through once more in every step."""
    features: bool = False
    """The heads read the policy's log-prob of the token before and its entropy there as well."""
    path: str | None = None
    """Folder of a reward model that the trunk starts as, instead of the policy's, while the heads start afresh; or
    `critic/` of an earlier run's checkpoint, which the whole critic starts as."""
    start: Literal["random", "verdict"] = "random"
    """`verdict`: the value begins as the starting model's own verdict, the sigmoid of two logits' difference."""
    verdict_tokens: tuple[str, str] = ("<|good|>", "<|bad|>")
    """Texts of one token each, for success and for failure."""
    verdict_only_steps: CountOrZero = 0
    """First steps in which the critic learns the verdict's scale and bias alone."""
    privileged: str | None = None
    """A column (`answer`, say) that the critic reads in front of its prompt and the policy does not."""
    lora: CriticLoraConfig = CriticLoraConfig()
    """As `model.lora`, for a trunk of the critic's own. The heads always learn whole."""

    def __post_init__(self) -> None:
        if self.verdict_only_steps and self.start != "verdict":
            raise ValueError(
                f"critic.verdict_only_steps = {self.verdict_only_steps}, but there is no verdict to fit: "
                "set critic.start to verdict, or the steps to 0"
            )
        if self.path is not None and self.trunk == "shared":
            raise ValueError(
                f"critic.path = {self.path} starts a trunk of the critic's own, and critic.trunk = shared reads the "
                "policy's: drop one of them"
            )
        if self.privileged is not None and self.trunk != "own":
            raise ValueError(
                f"critic.privileged = {self.privileged} must be learnt by a trunk of the critic's own, "
                f"but critic.trunk = {self.trunk}: set it to own"
            )


@section
class KLConfig:
    """Penalty for leaving the starting policy."""

    coef: Weight = 0.0
    """0 = no penalty, and no copy of the starting policy."""
    place: Literal["reward", "loss"] = "loss"
    """`reward`: k1 is taken from each token's reward; `loss`: the estimator below is added to the actor's loss."""
    estimator: Literal["k1", "k2", "k3"] = "k3"
    """Of the loss. k1's gradient there is the score, whose mean is zero: it adds noise and draws nowhere. k2's is in
    the mean that of KL(policy, starting policy), k3's that of KL(starting policy, policy)."""
    target: Positive | None = None
    """KL(policy, starting policy) in nats a token that `coef` is steered towards, beginning with the one above (Ziegler
    et al. 2019); None = `coef` stays."""
    horizon: Count = 10_000
    """Responses over which `coef` adapts: an error of 20% or more changes it by 20% * responses of a step / horizon."""

    def __post_init__(self) -> None:
        if self.target is not None and not self.coef:
            raise ValueError(
                f"actor.kl.target = {self.target:g} steers a coefficient that is 0 and would stay so: "
                "set actor.kl.coef, to 0.1 say"
            )


@section
class ActorConfig:
    """The policy's loss."""

    clip_low: Share = 0.2
    """PPO's clip: a token's probability ratio is held above 1 - clip_low."""
    clip_high: Weight = 0.2
    """And below 1 + clip_high."""
    aggregation: Literal["token_mean", "seq_mean_token_mean", "seq_sum_fixed_length"] = "token_mean"
    """All tokens alike, all responses alike, or sums over a fixed length (Dr. GRPO)."""
    kl: KLConfig = KLConfig()
    entropy_coef: Weight = 0.0
    """Weight of an entropy bonus."""


@section
class OptimiserConfig:
    """AdamW and its schedule, one for the policy and one for the critic."""

    lr: Weight = 3e-4
    """Learning rate, for the embedded model; about 1e-6 for a large one."""
    betas: tuple[Rate, Rate] = (0.9, 0.999)
    """AdamW's decay rates."""
    eps: Positive = 1e-8
    """AdamW's constant below the fraction."""
    weight_decay: Weight = 0.0
    """Decoupled from the gradient."""
    max_grad_norm: Positive = 1.0
    """Each module's gradient is clipped to this norm by itself."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up: stay, or fall to 0, which a step behind the last would reach."""
    warmup_steps: CountOrZero = 0
    """Steps over which the rate rises from 0."""


@section
class CriticOptimiserConfig(OptimiserConfig):
    """The same with the critic's rate."""

    lr: Weight = 1e-3
    """For the embedded model; about 1e-5 for a large one."""


@section
class UpdateConfig:
    """How often the sampled responses are used. `minibatches` optimiser steps an epoch."""

    epochs: Count = 1
    """Passes over the responses of a step."""
    minibatches: Count = 2
    """Optimiser steps an epoch: the responses are cut into so many parts."""
    microbatch_size: Count = 64
    """Sequences in one forward and backward pass: memory only, the result does not depend on it."""
    max_tokens_per_microbatch: CountOrZero = 0
    """Also bound its tokens, padding included; sequences of like length then go together. 0 = no bound."""
    actor_warmup_steps: CountOrZero = 0
    """First steps in which the critic learns alone."""
    max_skipped: CountOrZero = 0
    """End the run after so many optimiser steps of one module in a row whose loss or gradient was not finite; 0 = go on
    for ever."""


@section
class DistributedConfig:
    """How the models stand on the processes that torchrun starts. No result depends on it beyond rounding."""

    strategy: Literal["ddp", "fsdp"] = "ddp"
    """`ddp`: every process holds all models whole. `fsdp`: each holds its share of the weights, gradients and moments
    of each model, and layers are gathered as they run."""
    cpu_offload: bool = False
    """fsdp: the shares stay in host memory, and so does the optimiser's work."""
    patience: Seconds = 1800.0
    """Seconds that a process waits for a slower one, besides what rewards may take; then the run ends."""

    def __post_init__(self) -> None:
        if self.cpu_offload and self.strategy != "fsdp":
            raise ValueError(
                f"distributed.cpu_offload = true moves shares of weights, but distributed.strategy = {self.strategy} "
                "has none: set it to fsdp"
            )


@section
class AlarmsConfig:
    """When to ring; a bound of 0 switches an alarm off. `dvpo.alarms` says what each of them means."""

    entropy: Share = 0.05
    """entropy: rings when `actor/entropy` is below this share of its mean over the first `window` steps."""
    kl: Weight = 1.0
    """kl: rings above so many nats a token of `actor/kl`, the way of one step up to its last update."""
    kl_reference: Weight = 0.0
    """kl: rings above so many nats a token of `actor/kl_reference`, the way from the start."""
    value: Weight = 10.0
    """value: rings when `critic/value_error` is more than so many times the largest `critic/return_size` so far."""
    reach: Share = 0.1
    """reach: rings when `actor/reward_reach` is below this share; at lambda .95 from 200 tokens a response on."""
    mismatch: Weight = 0.1
    """mismatch: rings above so many nats of `actor/sampler_mismatch`."""
    window: Annotated[int, Field(ge=0, le=10_000)] = 20
    """hacking: so many steps are held against the so many before them. entropy: so many are the start."""
    stop: tuple[Literal["entropy", "kl", "value", "reach", "mismatch", "hacking"], ...] = ()
    """These end the run, after a checkpoint."""

    def __post_init__(self) -> None:
        off = {
            "entropy": not (self.entropy and self.window),
            "kl": not (self.kl or self.kl_reference),
            "value": not self.value,
            "reach": not self.reach,
            "mismatch": not self.mismatch,
            "hacking": not self.window,
        }
        if silent := [name for name in self.stop if off[name]]:
            raise ValueError(f"alarms.stop names {silent[0]}, which is switched off by 0: set its bound, or drop it")
        if self.window == 1:
            raise ValueError("alarms.window = 1 shows no spread to hold a change against: take 2 or more, or 0 for off")


@section
class EvaluationConfig:
    """True reward on held-out prompts, greedy and with `samples` draws."""

    every: CountOrZero = 0
    """Steps between evaluations during training (0 = only before and after)."""
    prompts: Count = 128
    """Prompts of each split, the first ones (of your own files in an order by hash, not the file's)."""
    samples: CountOrZero = 0
    """Draws a prompt at the sampling temperature, for pass@k (0 = greedy only)."""


@section
class CheckpointConfig:
    every: CountOrZero = 50
    """Steps between checkpoints (0 = only at the end)."""
    keep: Count = 2
    """So many of the newest stay on the disk."""
    keep_best: bool = False
    """Also write and keep the one with the highest `eval/id/reward` (mean over the tasks of a mix); best.json names
    it."""


@section
class LogConfig:
    tensorboard: bool = False
    """Figures also as TensorBoard events, in the run folder's `tensorboard/`."""
    wandb: bool = False
    """Figures also to Weights & Biases."""
    trackio: bool = False
    """Figures also to trackio, on this machine unless its own variables name a Space or a server."""
    project: str = "dvpo"
    """Of W&B and trackio."""
    name: str | None = None
    """Of the run there; None: its folder's name."""
    offline: bool = False
    """W&B needs no network and no key: it writes to the run folder's `wandb/`, which `wandb sync` sends later."""
    completions: CountOrZero = 4
    """Completions written to completions.jsonl a step, one of each prompt before any second (0 = none)."""
    tokens: CountOrZero = 2
    """Responses written to tokens.jsonl token by token, in the steps 1, 2, 4, 8, ... and the last (0 = none)."""
