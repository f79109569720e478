"""Settings of what a run is given: task, model, sampling, reward, noise. And what a section of a config is."""

import dataclasses
import difflib
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar, dataclass_transform

from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic.dataclasses import dataclass

from dvpo.noise_models import OPTIONAL, PARAMETERS


def _counted(what: str) -> WrapValidator:
    """Says what a number counts where one is refused."""

    def validate(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError as error:
            raise ValueError(f"{error.errors()[0]['msg']} ({what})") from None

    return WrapValidator(validate)


Share = Annotated[float, Field(ge=0, le=1), _counted("a share: 20% is 0.2")]
Rate = Annotated[float, Field(ge=0, lt=1)]
Tail = Annotated[float, Field(gt=0, le=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Seconds = Annotated[float, Field(gt=0, le=1e7), _counted("a number of seconds")]
"""A time limit, of 116 days at most: what the system's clocks and pipes take, several times over."""
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
T = TypeVar("T")


@dataclass_transform(kw_only_default=True, frozen_default=True)
def section(kind: type[T]) -> type[T]:
    """A frozen dataclass that pydantic validates whenever one is made."""
    return dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))(kind)  # type: ignore[return-value]


def _noise_kind(kind: str) -> str:
    if kind not in PARAMETERS:
        near = difflib.get_close_matches(kind.lower(), PARAMETERS, n=1)
        raise ValueError(f"did you mean {near[0]}?" if near else f"take one of {', '.join(PARAMETERS)}")
    return kind


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
    ood: Literal["unseen", "untrained"] = "unseen"
    """science, dialogue: `ood` holds what the embedded starting model has never met, or a part of what it has met,
    which is then kept from training (docs/tasks.md)."""
    ood_generators: tuple[str, ...] = ()
    """reasoning_gym: what `ood` is drawn from; none: `generators` at the top of their curriculum."""


@section
class MixedTaskConfig(OneTaskConfig):
    """One task of several."""

    weight: Positive = 1.0
    """Prompts are drawn in proportion."""
    label: str = ""
    """What the mix calls it, in ids, in the column `task` and in the log; empty: the task's own name, which is a file's
    without its ending."""


@section
class TaskConfig(OneTaskConfig):
    """What is learnt. Besides what one task may be, `name` may be `mix`."""

    mix: tuple[MixedTaskConfig, ...] = ()
    """mix: the tasks, with weights."""


@section
class LoraConfig:
    """A frozen model with small trained matrices beside its linear layers: y = W x + (alpha / rank) B A x."""

    rank: CountOrZero = 0
    """Rows of A and columns of B; 0 = off, all parameters learn."""
    alpha: Positive = 32.0
    """The matrices' product counts alpha / rank times."""
    targets: tuple[str, ...] = ()
    """Ends of the names of the layers that get them (`q_proj`, `v_proj`); none: all linear layers but the head."""


@section
class ModelConfig:
    """The policy's starting point."""

    path: str = "embedded"
    """`embedded` (a tiny Qwen3 made and warm-started here; for your own files and tasks it is that of `math`), a local
    model folder, or a hub name."""
    weights: Literal["pretrained", "random"] = "pretrained"
    """`random`: make the model from the folder's config.json instead of loading weights."""
    checker: Share = 1.0
    """embedded: how much the warm start taught the model about checking solutions; 0 = nothing."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute type. Master weights, heads, losses and advantages are float32 either way."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    template: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What the chat template is told with every prompt and turn, such as `{enable_thinking: false}`."""
    lora: LoraConfig = LoraConfig()
    """Of the policy, and of the critic unless `critic.lora` says otherwise; needs the extra `lora` (docs/scale.md)."""


@section
class VllmConfig:
    """The vLLM server that draws responses, with `sampling.engine: vllm`."""

    address: str = "http://localhost:8000"
    """Where it listens; docs/scale.md says how it is started."""
    timeout: Seconds = 600.0
    """Seconds that one turn of up to 4,096 tokens (of more: in proportion), or one reading of the weights, may take."""
    patience: Weight = 300.0
    """Seconds without any progress, the server being away or hung, after which the run stops itself."""
    concurrency: Count = 256
    """Responses asked for side by side."""
    folder: str | None = None
    """Where the policy's weights are laid for the server to read, under the same name on its machine; None:
    `vllm-weights` in the run's output."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"https?://[^/\s?#]+(/[^\s?#]*)?", self.address):
            raise ValueError(
                f"sampling.vllm.address = {self.address} is no address of a server: write it as http://localhost:8000"
            )


@section
class CorrectionConfig:
    """What becomes of the difference between the sampler's log-probs and the trainer's for the same weights."""

    kind: Literal["off", "truncated"] = "off"
    """`truncated`: the actor's ratio is against the trainer's own log-probs (one more forward pass a step), and a
    token's loss counts min(p_trainer / p_sampler, cap) times. `off`: the ratio is against the sampler's."""
    cap: Positive = 2.0
    """Greatest weight of a token."""


@section
class SamplingConfig:
    """How responses are drawn. One step samples `prompts_per_step * samples_per_prompt` responses."""

    engine: Literal["transformers", "vllm"] = "transformers"
    """Who draws in training and in its evaluations: the trainer's own model, or a vLLM server that is given its weights
    after every update."""
    vllm: VllmConfig = VllmConfig()
    correction: CorrectionConfig = CorrectionConfig()

    prompts_per_step: Count = 16
    """Prompts, each answered `samples_per_prompt` times."""
    samples_per_prompt: Count = 8
    """Responses to one prompt: the group that a group baseline compares."""
    temperature: Positive = 1.0
    """Of the draws in training and in pass@k."""
    top_p: Tail = 1.0
    """Likeliest tokens of this mass only; 1 = all."""
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

    @property
    def responses_per_step(self) -> int:
        return self.prompts_per_step * self.samples_per_prompt

    def __post_init__(self) -> None:
        if self.engine == "vllm" and (self.top_p < 1 or self.top_k):
            raise ValueError(
                f"sampling.engine = vllm gives log-probs of the truncated distribution where sampling.top_p = "
                f"{self.top_p:g} and sampling.top_k = {self.top_k} truncate it, and training needs those of the whole: "
                "set top_p to 1 and top_k to 0"
            )
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
    weight: Finite = 1.0
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
    timeout: Seconds = 30.0
    """Seconds that one call may take before its worker process is killed."""
    workers: Count = 1
    """Processes that run the function; they share a batch, the responses to one prompt staying together."""
    concurrency: CountOrZero = 0
    """Call an `async def` function for each response by itself, so many at a time, each with the time limit to itself;
    0 = one call for the batch, as other functions of a mix have it whatever stands here."""
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
    """Then clip every reward to [-clip, clip], after a `norm` the return; None = off."""
    floor: Finite | None = None
    """Then lift the return to this at least: what is worse counts alike; None = off."""
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
        if self.floor is not None and self.clip is not None and self.floor > self.clip:
            raise ValueError(f"reward.floor = {self.floor:g} is above reward.clip = {self.clip:g}: lower it")
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
    """What happens to a reward; docs/noise.md has the table."""
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
    by: str | None = None
    """affine: a column of the data; one offset and scale for each of its values in place of each prompt."""
    path: str | None = None
    """pseudo_labels: JSONL file with `id` and `answer`."""
    low: Finite = 0.0
    """Reward of a wrong response."""
    high: Finite = 1.0
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
        takes += OPTIONAL.get(self.kind, ())
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
