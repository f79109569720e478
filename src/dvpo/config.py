"""Every setting of a run: frozen dataclasses, validated when made; YAML in, YAML out.

A config is made of, from weak to strong: the defaults below, those of the embedded task, the defaults of the chosen
algorithm's row, the YAML file, `key.sub=value` overrides of the command line.
"""

import dataclasses
import difflib
import functools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, dataclass_transform

import yaml
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from dvpo.algorithms import find_algorithm
from dvpo.errors import InputError
from dvpo.nested import all_keys, checked, deep_copy, merge, one_sentence, read_yaml, set_dotted
from dvpo.noise import PARAMETERS

Share = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(ge=0, lt=1)]
Tail = Annotated[float, Field(gt=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
T = TypeVar("T")


def _noise_kind(kind: str) -> str:
    if kind not in PARAMETERS:
        near = difflib.get_close_matches(kind, PARAMETERS, n=1)
        raise ValueError(f"did you mean {near[0]}?" if near else f"take one of {', '.join(PARAMETERS)}")
    return kind


TASK_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "dialogue": {"sampling": {"max_prompt_length": 128, "max_completion_length": 256}},
    "reasoning_gym": {"sampling": {"max_prompt_length": 1024, "max_completion_length": 1024}},
}
"""Tasks that the defaults below do not fit: a conversation is longer than an answer."""


@dataclass_transform(kw_only_default=True, frozen_default=True)
def section(kind: type[T]) -> type[T]:
    """A frozen dataclass that pydantic validates whenever one is made."""
    return dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))(kind)  # type: ignore[return-value]


@section
class OneTaskConfig:
    """One task."""

    name: str = "math"
    """`math`, `science`, `dialogue` (embedded), `files` (your own data), `reasoning_gym`, or `my_module:make_task`,
    called with this section."""
    path: str | None = None
    """files: training data, a .jsonl or .parquet file or a folder saved by `datasets`."""
    id_path: str | None = None
    """files: held-out data of the same kind; without it a share of the training data is held out."""
    ood_path: str | None = None
    """files: held-out data of another kind."""
    prompt_column: str = "prompt"
    """files: holds a string, or a list of messages."""
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """files: share of the training data held out when there is no `id_path`."""
    truth: str | None = None
    """files: `my_module:my_function`, the verified reward where you have one; logged beside the observed reward."""
    answer_pattern: str | None = None
    """files: regular expression of the final answer in a response, for `dvpo label`: its last match, or that match's
    first group; None: the whole response."""
    generators: tuple[str, ...] = ()
    """reasoning_gym: what `train` and `id` are drawn from; docs/tasks.md has the list."""
    ood_generators: tuple[str, ...] = ()
    """reasoning_gym: what `ood` is drawn from; none: `generators` at the top of their curriculum."""


@section
class MixedTaskConfig(OneTaskConfig):
    """One task of several."""

    weight: Positive = 1.0
    """Prompts are drawn in proportion."""


@section
class TaskConfig(OneTaskConfig):
    """What is learnt. Besides what one task may be, `name` may be `mix`."""

    mix: tuple[MixedTaskConfig, ...] = ()
    """mix: the tasks, with weights."""


@section
class ModelConfig:
    """The policy's starting point."""

    path: str = "embedded"
    """`embedded` (a tiny Qwen3 made and warm-started here), a local model folder, or a hub name."""
    weights: Literal["pretrained", "random"] = "pretrained"
    """`random`: make the model from the folder's config.json instead of loading weights."""
    checker: Share = 1.0
    """embedded: how much the warm start taught the model about checking solutions; 0 = nothing."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute type. Master weights, heads, losses and advantages are float32 either way."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""


@section
class SamplingConfig:
    """How responses are drawn. One step samples `prompts_per_step * samples_per_prompt` responses."""

    prompts_per_step: Count = 16
    samples_per_prompt: Count = 8
    temperature: Positive = 1.0
    top_p: Tail = 1.0
    top_k: CountOrZero = 0
    """0 = off. Recorded log-probs are those of the untruncated distribution whatever top_p and top_k."""
    max_prompt_length: Count = 256
    """Tokens, those of the chat template included."""
    long_prompts: Literal["error", "skip", "truncate"] = "error"
    """A prompt above the limit: refuse to start, leave it out, or keep its last `max_prompt_length` tokens."""
    max_completion_length: Count = 64
    """Tokens after the prompt, those of the environment included."""
    stop: tuple[str, ...] = ()
    """Further strings that end a turn; each stays in the sampled tokens."""
    batch_size: Count = 256
    """Sequences generated side by side: memory only, every sequence draws for itself."""
    resample_rounds: CountOrZero = 0
    """Dynamic sampling: prompts whose responses all earn the same, or fewer than two of them anything, are replaced by
    the next ones, in at most so many rounds a step; 0 = off."""

    def __post_init__(self) -> None:
        if self.resample_rounds and self.samples_per_prompt == 1:
            raise ValueError(
                f"sampling.resample_rounds = {self.resample_rounds} compares the responses to one prompt, but "
                "sampling.samples_per_prompt = 1: raise it, or set the rounds to 0"
            )


@section
class RatesConfig:
    """Rates of false rewards that you know: then nothing is estimated."""

    false_positive: Rate | None = None
    """Probability that a wrong response is taken for a right one."""
    false_negative: Rate | None = None
    """Probability that a right response is taken for a wrong one; `reward.correction: forward` needs no other."""

    @property
    def given(self) -> bool:
        return (self.false_positive, self.false_negative) != (None, None)

    def __post_init__(self) -> None:
        p, q = self.false_positive or 0.0, self.false_negative or 0.0
        if p + q >= 1:
            raise ValueError(
                f"reward.rates.false_positive + reward.rates.false_negative = {p + q:g} leaves no signal: "
                "their sum must be below 1"
            )


@section
class RewardPartConfig:
    """One of several rewards that are added up."""

    function: str
    """As `reward.function`."""
    weight: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    """What the part is multiplied by; a penalty has a negative one."""
    name: str = ""
    """In the log; empty: the function's own name, or the folder's."""

    @property
    def label(self) -> str:
        return self.name or re.split(r"[:/.]", self.function.rstrip("/"))[-1]


@section
class RewardConfig:
    """Where the observed reward comes from."""

    function: str = "task"
    """`task` (the task's own verifier), `math_verify` (one boxed answer, compared with the column `answer`),
    `my_module:my_function` with TRL's signature, or `path:FOLDER`, a reward model."""
    mix: tuple[RewardPartConfig, ...] = ()
    """Instead of one function several, whose rewards are multiplied by their weights and added up."""
    timeout: Positive = 30.0
    """Seconds that one call may take before its worker process is killed."""
    workers: Count = 1
    """Processes that run the function; they share a batch, the responses to one prompt staying together."""
    concurrency: CountOrZero = 0
    """Call an `async def` function for each response by itself, so many at a time, each with the time limit to itself;
    0 = one call for the batch."""
    retries: CountOrZero = 0
    """Further attempts for a response whose reward alone raised, timed out or ended its process."""
    on_fault: Literal["abstain", "stop"] = "abstain"
    """A response whose reward failed has none, or ends the run."""
    max_fault_share: Share = 1.0
    """abstain: end the run when more than this share of a step's responses lost their reward to a fault."""
    norm: Literal["none", "group", "group_robust", "batch"] = "none"
    """Normalise returns before any critic or baseline sees them: by mean and deviation of the prompt's responses, by
    their median and median deviation, or by mean and deviation of the step."""
    clip: Positive | None = None
    """Then clip every reward to [-clip, clip]; None = off."""
    overlong: CountOrZero = 0
    """Before `norm` and `clip`, take up to 1 from the return of a response that uses the last so many tokens below
    `sampling.max_completion_length`, in proportion (DAPO's soft punishment); 0 = off."""
    trusted: Share = 0.0
    """Share of the training prompts whose true reward the estimator of the noise's rates sees; 0 = off."""
    rates: RatesConfig = RatesConfig()
    """Instead of estimated rates those that you know."""
    correction: Literal["none", "backward", "forward"] = "none"
    """A binary return r becomes (r - p) / (1 - p - q), or `forward` r - (1 - q), with the rates of false positives p
    and false negatives q; before `norm` and `clip`."""

    def __post_init__(self) -> None:
        if self.mix and self.function != "task":
            raise ValueError(
                f"reward.function = {self.function} stands beside reward.mix: make it a part of the mix, or drop one"
            )
        labels = [part.label for part in self.mix]
        if double := sorted({label for label in labels if labels.count(label) > 1}):
            raise ValueError(f"reward.mix has two parts named {double[0]}: give each a name of its own")
        if bad := [label for label in labels if not re.fullmatch(r"[\w-]+", label)]:
            raise ValueError(f"reward.mix: {bad[0]!r} is no name for the log: set name to letters and digits")
        if self.rates.given and self.trusted:
            raise ValueError(
                f"reward.rates are given and reward.trusted = {self.trusted:g} would estimate them: "
                "set reward.trusted to 0, or drop reward.rates"
            )
        if self.on_fault == "stop" and self.max_fault_share < 1:
            raise ValueError(
                f"reward.on_fault = stop ends the run at the first fault, so reward.max_fault_share = "
                f"{self.max_fault_share:g} has no say: take one of them away"
            )


@section
class NoiseModelConfig:
    """One noise model. A kind takes some of the parameters and needs all that it takes; docs/noise.md has the table."""

    kind: Annotated[str, AfterValidator(_noise_kind)] = "none"
    rate: Share | None = None
    """Probability that a reward is hit; persistent: share of the prompts."""
    false_positive: Share | None = None
    """asymmetric: probability that a wrong response is taken for a right one."""
    false_negative: Share | None = None
    """asymmetric: probability that a right response is taken for a wrong one."""
    accuracy: Annotated[float, Field(gt=0.5, le=1)] | None = None
    """Reward models: probability that a right response scores above a wrong one."""
    sd: Weight | None = None
    """gaussian, spikes: deviation in units of the reward."""
    df: Annotated[float, Field(ge=1, allow_inf_nan=False)] | None = None
    """student_t: degrees of freedom; 1 = Cauchy."""
    scale: Weight | None = None
    """student_t: what the draw is multiplied by, in units of the reward."""
    offset_sd: Weight | None = None
    """affine: deviation of a prompt's offset in units of the reward."""
    scale_sd: Annotated[float, Field(ge=0, le=10)] | None = None
    """affine: deviation of the logarithm of a prompt's scale."""
    path: str | None = None
    """pseudo_labels: JSONL file with `id` and `answer`."""
    low: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    """Reward of a wrong response."""
    high: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    """Reward of a right one. A flip turns r into low + high - r, also where r is outside the two."""
    seed: int | None = None
    """None: the run's seed."""

    def __post_init__(self) -> None:
        takes = PARAMETERS[self.kind]
        if missing := [name for name in takes if getattr(self, name) is None]:
            raise ValueError(f"{self.kind} needs {' and '.join(missing)}: set it")
        if self.low >= self.high:
            raise ValueError(f"low = {self.low} is not below high = {self.high}: give the lower bound first")
        if self.kind == "none":  # switched off, by an override say: what the file says besides may stay
            return
        defaults = {field.name: field.default for field in dataclasses.fields(NoiseModelConfig)}
        given = [name for name in defaults.keys() - {"kind", "seed"} if getattr(self, name) != defaults[name]]
        if foreign := sorted(set(given) - set(takes)):
            what = "takes " + ", ".join(takes) if takes else "takes nothing"
            raise ValueError(f"{self.kind} has no {' and no '.join(foreign)}, it {what}: leave the others out")


@section
class NoiseConfig(NoiseModelConfig):
    """Noise injected into the observed reward; the true one is kept beside it."""

    then: tuple[NoiseModelConfig, ...] = ()
    """Further models, each applied to what the one before observed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(model.kind == "pseudo_labels" for model in self.then):
            raise ValueError("pseudo_labels come first, what follows acts on them: move them from then to noise.kind")


@section
class LawConfig:
    """How an algorithm with a distribution makes a number of the law of the return."""

    functional: Literal["mean", "rank", "cvar", "upper_mean", "trimmed", "wang", "tv_worst_case", "denoised"] = "mean"
    """`mean` is the paper's; `rank` compares the target law with the predicted one (docs/method.md, section 6c);
    `denoised` trims the law by the estimated rates of false rewards (section 6b), and is for scalar critics too."""
    width: Weight = 0.0
    """rank: half-width of the step in units of the reward; 0 = the rank itself."""
    lower: Share = 0.1
    """cvar: mass of the lower tail; trimmed: mass dropped below."""
    upper: Share = 0.1
    """upper_mean: mass of the upper tail; trimmed: mass dropped above."""
    eta: Annotated[float, Field(allow_inf_nan=False)] = 0.75
    """wang: > 0 pessimistic, < 0 optimistic."""
    radius: Share = 0.1
    """tv_worst_case: radius of the total-variation ball."""

    def __post_init__(self) -> None:
        if self.functional == "trimmed" and self.lower + self.upper >= 1:
            raise ValueError(
                f"advantage.law.lower + upper = {self.lower + self.upper:g} trims everything: their sum must be below 1"
            )


@section
class AdvantageConfig:
    """Returns, targets and what becomes of sequences without a clean end or a reward."""

    gamma: Share = 1.0
    lam: Share = 0.95
    critic_lam: Share | None = None
    """lambda of the critic's targets; None: the same as `lam`."""
    target: Literal["indexwise", "mixture"] = "indexwise"
    target_atoms: Count = 32
    """mixture: number of target atoms L."""
    law: LawConfig = LawConfig()
    delta_clip: Positive | None = None
    """Clip every temporal difference of the actor's advantage to [-c, c] in units of the reward; None = off."""
    whiten: bool = True
    """Give the advantages of a step mean 0 and deviation 1."""
    truncation: Literal["terminal", "bootstrap", "mask"] = "terminal"
    """After a cut by the length limit: worth 0, worth what the critic says, or the response leaves the step."""
    missing_reward: Literal["mask", "bootstrap"] = "mask"
    """A response without a reward leaves the step, or the critic's opinion of it stands. It never counts as 0."""


@section
class TermWeights:
    """Weights of the critic's extra terms; 0 switches a term off."""

    risk: Weight = 0.0
    cvar: Weight = 0.0
    gain: Weight = 0.0
    shift: Weight = 0.0
    shape: Weight = 0.0
    curvature: Weight = 0.0
    consistency: Weight = 0.0

    def needs_tails(self) -> bool:
        return any((self.risk, self.cvar, self.gain, self.shape, self.curvature))


@section
class HistogramConfig:
    """The support of a categorical critic's law."""

    bins: Annotated[int, Field(ge=2)] = 51
    """Bins from `low` to `high`; a few more on either side make room for the smoothing."""
    low: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    """Least return in units of the reward; targets outside are clipped, and counted in `critic/outside`."""
    high: Annotated[float, Field(allow_inf_nan=False)] = 1.0
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
class CriticConfig:
    """The value model."""

    trunk: Literal["own", "frozen", "shared"] = "own"
    """Own copy of the starting policy's trunk; the same but frozen; or the policy's trunk, read without gradient."""
    num_heads: Count = 3
    num_quantiles: Count = 32
    levels: Literal["midpoint", "paper"] = "midpoint"
    monotone: bool = True
    kappa: Weight = 0.1
    """Width of the Huber zone in units of the reward."""
    eta: Weight = 2.0
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
    start: Literal["random", "verdict"] = "random"
    """`verdict`: the value begins as the starting model's own verdict, the sigmoid of two logits' difference."""
    verdict_tokens: tuple[str, str] = ("<|good|>", "<|bad|>")
    """Texts of one token each, for success and for failure."""
    verdict_only_steps: CountOrZero = 0
    """First steps in which the critic learns the verdict's scale and bias alone."""
    privileged: str | None = None
    """A column (`answer`, say) that the critic reads in front of its prompt and the policy does not."""

    def __post_init__(self) -> None:
        if self.verdict_only_steps and self.start != "verdict":
            raise ValueError(
                f"critic.verdict_only_steps = {self.verdict_only_steps}, but there is no verdict to fit: "
                "set critic.start to verdict, or the steps to 0"
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
    clip_high: Weight = 0.2
    aggregation: Literal["token_mean", "seq_mean_token_mean", "seq_sum_fixed_length"] = "token_mean"
    kl: KLConfig = KLConfig()
    entropy_coef: Weight = 0.0


@section
class OptimiserConfig:
    """AdamW and its schedule, one for the policy and one for the critic."""

    lr: Weight = 3e-4
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    eps: Positive = 1e-8
    weight_decay: Weight = 0.0
    max_grad_norm: Positive = 1.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up: stay, or fall to 0, which a step behind the last would reach."""
    warmup_steps: CountOrZero = 0


@section
class UpdateConfig:
    """How often the sampled responses are used. `minibatches` optimiser steps an epoch."""

    epochs: Count = 1
    """Passes over the responses of a step."""
    minibatches: Count = 2
    microbatch_size: Count = 64
    """Sequences in one forward and backward pass: memory only, the result does not depend on it."""
    actor_warmup_steps: CountOrZero = 0
    """First steps in which the critic learns alone."""
    max_skipped: CountOrZero = 0
    """End the run after so many optimiser steps of one module in a row whose loss or gradient was not finite; 0 = go on
    for ever."""


@section
class AlarmsConfig:
    """When to ring; a bound of 0 switches an alarm off. `dvpo.alarms` says what each of them means."""

    entropy: Share = 0.05
    """entropy: rings when `actor/entropy` is below this share of its mean over the first `window` steps."""
    kl: Weight = 1.0
    """kl: rings above so many nats a token of `actor/kl`, the way of one step."""
    kl_reference: Weight = 0.0
    """kl: rings above so many nats a token of `actor/kl_reference`, the way from the start."""
    value: Weight = 10.0
    """value: rings when `critic/value_error` is more than so many times the largest `critic/return_size` so far."""
    mismatch: Weight = 0.1
    """mismatch: rings above so many nats of `actor/sampler_mismatch`."""
    window: Annotated[int, Field(ge=0, le=10_000)] = 20
    """hacking: so many steps are held against the so many before them. entropy: so many are the start."""
    stop: tuple[Literal["entropy", "kl", "value", "mismatch", "hacking"], ...] = ()
    """These end the run, after a checkpoint."""

    def __post_init__(self) -> None:
        if self.window == 1:
            raise ValueError("alarms.window = 1 shows no spread to hold a change against: take 2 or more, or 0 for off")


@section
class EvaluationConfig:
    """True reward on held-out prompts, greedy and with `samples` draws."""

    every: CountOrZero = 0
    """Steps between evaluations during training (0 = only before and after)."""
    prompts: Count = 128
    """Prompts of each split."""
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
    completions: CountOrZero = 4
    """Completions written to completions.jsonl a step (0 = none)."""
    tokens: CountOrZero = 2
    """Responses written to tokens.jsonl token by token, in the steps 1, 2, 4, 8, ... and the last (0 = none)."""


@section
class Config:
    """One run."""

    output: str = "runs/default"
    """The run's folder."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    algorithm: str = "dvpo"
    """A row of `dvpo.algorithms.ALGORITHMS`, or `my_module:row`."""
    steps: Count = 100
    device: str = "auto"
    """`auto` (a GPU if there is one), `cpu`, `cuda`, `cuda:1` ..."""
    task: TaskConfig = TaskConfig()
    model: ModelConfig = ModelConfig()
    sampling: SamplingConfig = SamplingConfig()
    reward: RewardConfig = RewardConfig()
    noise: NoiseConfig = NoiseConfig()
    advantage: AdvantageConfig = AdvantageConfig()
    actor: ActorConfig = ActorConfig()
    critic: CriticConfig = CriticConfig()
    policy_optimiser: OptimiserConfig = OptimiserConfig()
    critic_optimiser: OptimiserConfig = OptimiserConfig(lr=1e-3)
    update: UpdateConfig = UpdateConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    alarms: AlarmsConfig = AlarmsConfig()

    def __post_init__(self) -> None:
        row = find_algorithm(self.algorithm)
        tails = row.uses_critic_terms and self.critic.weights.needs_tails()
        if tails and self.critic.num_quantiles < 3:
            raise ValueError(
                f"critic.num_quantiles = {self.critic.num_quantiles} is too few for tail terms: "
                "take at least 3, or set the tail weights under critic.weights to 0"
            )
        learns = {"vocabulary": "one of tokens", "categorical": "a histogram"}.get(row.critic)
        if learns and self.critic.start == "verdict":
            raise ValueError(
                f"critic.start = verdict is a value of states, and algorithm = {self.algorithm} learns {learns}: "
                "set it to random"
            )
        if self.critic.adaptive_risk and not row.uses_critic_terms:
            raise ValueError(
                f"critic.adaptive_risk = true moves the tail terms, which algorithm = {self.algorithm} does not have: "
                "set it to false"
            )
        batch = self.sampling.prompts_per_step * self.sampling.samples_per_prompt
        if batch < self.update.minibatches:
            raise ValueError(
                f"update.minibatches = {self.update.minibatches} exceeds the {batch} responses of a step: "
                "lower it, or raise sampling.prompts_per_step or sampling.samples_per_prompt"
            )
        if self.actor.kl.target is not None and self.actor.kl.horizon < batch:
            raise ValueError(
                f"actor.kl.horizon = {self.actor.kl.horizon} is shorter than a step of {batch} responses: raise it"
            )
        if self.update.actor_warmup_steps and not row.has_critic:
            raise ValueError(
                f"update.actor_warmup_steps = {self.update.actor_warmup_steps} lets the critic learn alone, "
                f"but algorithm = {self.algorithm} has no critic: set it to 0"
            )
        if self.reward.overlong > self.sampling.max_completion_length:
            raise ValueError(
                f"reward.overlong = {self.reward.overlong} exceeds sampling.max_completion_length = "
                f"{self.sampling.max_completion_length}: lower it"
            )
        self._check_tasks()
        if self.checkpoint.keep_best and not self.evaluation.every:
            raise ValueError(
                "checkpoint.keep_best = true chooses among evaluations, but evaluation.every = 0 makes none during "
                "training: set it, to 10 say, or keep_best to false"
            )
        self._check_corrections()
        for key in ("truncation", "missing_reward"):
            if getattr(self.advantage, key) == "bootstrap" and not row.has_critic:
                raise ValueError(
                    f"advantage.{key} = bootstrap asks a critic, but algorithm = {self.algorithm} has none: "
                    "set it to mask"
                )
        if self.advantage.delta_clip is not None and row.has_law and self.advantage.law.functional == "rank":
            raise ValueError(
                f"advantage.delta_clip = {self.advantage.delta_clip:g} clips nothing in a rank, which is bounded: "
                "set it to null, or take another advantage.law.functional"
            )

    def _check_tasks(self) -> None:
        """A task of files has a file, and a mix is a list of tasks."""
        name, mix = self.task.name, self.task.mix
        if any(task.name == "files" and not task.path for task in (self.task, *mix)):
            raise ValueError("task.path is empty: name the file with your prompts (task.path=my_prompts.jsonl)")
        if mix and name != "mix":
            raise ValueError(f"task.mix holds several tasks, but task.name = {name}: set it to mix")
        if name == "mix" and not mix:
            raise ValueError("task.mix is empty: list the tasks of the mix, each with its name and weight")
        if any(task.name == "mix" for task in mix):
            raise ValueError("task.mix holds a mix: list all tasks in one task.mix")

    def _check_corrections(self) -> None:
        """Rates have to come from somewhere, and noise is taken out once, of rewards that are 0 or 1."""
        reward, rates = self.reward, self.reward.rates
        denoised = self.advantage.law.functional == "denoised"
        if reward.correction != "none" and denoised:
            raise ValueError(
                f"reward.correction = {reward.correction} and advantage.law.functional = denoised both take the noise "
                "out: keep one of them"
            )
        users = {
            "advantage.law.functional = denoised": denoised,
            f"reward.correction = {reward.correction}": reward.correction != "none",
            "critic.adaptive_risk = true": self.critic.adaptive_risk,
        }
        using = [setting for setting, on in users.items() if on]
        if using and not (reward.trusted or rates.given):
            raise ValueError(
                f"{using[0]} needs rates: set reward.trusted, to 0.05 say, and they are estimated, or give reward.rates"
            )
        if rates.given and not using:
            raise ValueError(
                "reward.rates are used by nothing: set reward.correction, advantage.law.functional or "
                "critic.adaptive_risk, or drop them"
            )
        forward_alone = using == ["reward.correction = forward"]
        wanted = ("false_negative",) if forward_alone else ("false_positive", "false_negative")
        if rates.given and (unknown := [name for name in wanted if getattr(rates, name) is None]):
            raise ValueError(f"{using[0]} needs reward.rates.{unknown[0]} too: set it, to 0 if there are none")
        if not denoised:
            return
        shaped = {
            f"reward.overlong = {reward.overlong}": reward.overlong > 0,
            f"reward.norm = {reward.norm}": reward.norm != "none",
            f"reward.clip = {reward.clip}": reward.clip is not None,
            "actor.kl.place = reward": self.actor.kl.place == "reward" and self.actor.kl.coef > 0,
        }
        if changed := [setting for setting, on in shaped.items() if on]:
            raise ValueError(
                f"advantage.law.functional = denoised reads a value as the probability of an observed 1, which "
                f"{' and '.join(changed)} would change: switch that off"
            )


def load_config(source: str | Path | Mapping[str, Any] | None = None, overrides: Iterable[str] = ()) -> Config:
    """Make a validated `Config`.

    Args:
        source: a YAML file, a nested mapping, or None for the defaults.
        overrides: `key.sub=value` strings, values read as YAML; the last one wins.

    Raises:
        InputError: unreadable file, unknown key (with the nearest known one), value out of range.
    """
    values = read_yaml(source) if isinstance(source, str | Path) else deep_copy(source or {})
    for override in overrides:
        set_dotted(values, override)
    values = checked(values, Config, Config)
    name = values.get("algorithm", Config.algorithm)
    if not isinstance(name, str):
        raise InputError(f"algorithm = {name!r} is not a name: take a row such as dvpo or ppo")
    merged = merge(merge(_task_defaults(values.get("task", {})), find_algorithm(name).defaults), values)
    try:
        return TypeAdapter(Config).validate_python(merged)
    except ValidationError as error:
        raise InputError(one_sentence(error)) from None


def _task_defaults(task: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of a mix: the largest of each length limit."""
    if task.get("name") != "mix" or not isinstance(task.get("mix"), list):
        return TASK_DEFAULTS.get(str(task.get("name")), {})
    parts = [part.get("name") for part in task["mix"] if isinstance(part, Mapping)]
    limits = [TASK_DEFAULTS.get(str(name), {}).get("sampling", {}) for name in parts]
    lengths = ("max_prompt_length", "max_completion_length")
    return {"sampling": {key: max(own.get(key, getattr(SamplingConfig, key)) for own in limits) for key in lengths}}


def to_yaml(config: Config) -> str:
    """YAML text that `load_config` reads back to an equal config."""
    return yaml.safe_dump(TypeAdapter(Config).dump_python(config, mode="json"), sort_keys=False)


def differences(one: Config, other: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted keys in which two configs differ, each with both values."""
    found = {}
    for key in all_keys(Config):
        values = [functools.reduce(getattr, key.split("."), config) for config in (one, other)]
        if values[0] != values[1]:
            found[key] = (values[0], values[1])
    return found
