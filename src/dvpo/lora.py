"""LoRA: a frozen model with small trained matrices beside its linear layers, put there by peft.

    y = W x + (alpha / rank) B A x,   A [rank, in], B [out, rank], B = 0 at the start

Only A and B learn. The model without them is the one that the run began with: the reference of the KL penalty needs no
copy, and a critic whose trunk has adapters of its own reads the policy's frozen weights. There is no dropout, so that
the ratio of a policy to itself stays 1.

In a checkpoint `policy/` and `critic/` hold plain models, B A added to W; `adapter/` is the policy's in peft's format.
What a resume needs, A and B themselves, is state of the run, beside its optimisers.
"""

import copy
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dvpo.config import Config
from dvpo.errors import InputError
from dvpo.frozen import LINEAR
from dvpo.parallel import shared_like, whole_state
from dvpo.settings import LoraConfig

NAME = "default"
"""peft's name for the only adapter of a model."""
PROBES = 16
"""Numbers of each frozen weight by which a resumed run knows it again."""


def refuse_without_peft(settings: LoraConfig) -> None:
    """Check that peft is there if adapters are wanted.

    Raises:
        InputError: it is not installed, or too old for this version of transformers.
    """
    if not settings.rank:
        return
    try:
        importlib.import_module("peft")
    except ImportError as error:
        raise InputError(
            f"model.lora.rank = {settings.rank} needs peft, which cannot be imported ({error}): run `pip install "
            "'dvpo[lora]'`, or set model.lora.rank=0"
        ) from None


def shares_base(config: Config) -> bool:
    """Whether the critic's trunk reads the policy's frozen weights instead of a copy of them.

    Not where weights are sharded, which makes them each model's own, nor where the trunk is another model or learns.
    """
    kept = config.critic.trunk == "frozen" or config.critic_lora.rank
    foreign = config.critic.path is not None or config.distributed.strategy == "fsdp"
    return bool(config.model.lora.rank and kept and not foreign)


# A model's adapters


def add_adapters(module: nn.Module, settings: LoraConfig, field: str, base: str | None = None) -> None:
    """Freeze a model and put trained matrices beside its linear layers, in place; draws A from torch's generator.

    Args:
        module: a transformers model, or its trunk.
        settings: rank, alpha, which layers.
        field: the config's section, for the error.
        base: folder or hub name of the frozen model, for whoever loads the adapters by peft.

    Raises:
        InputError: `targets` that name no linear layer.
    """
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    layers = _linear_layers(module)
    for target in settings.targets:
        if not any(name == target or name.endswith(f".{target}") for name in layers):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
            raise InputError(
                f"{field}.targets: {target!r} is the end of no linear layer's name in this model: take some of "
                f"{known}, or leave the list empty for all of them"
            )
    wanted = PeftConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=0.0,
        target_modules=list(settings.targets) or "all-linear",
        fan_in_fan_out=any(isinstance(part, Conv1D) for part in module.modules()),
    )
    inject_adapter_in_model(wanted, module, NAME)
    for parameter in learning(module):  # peft draws them in the type of the layer that they stand beside
        parameter.data = parameter.data.float()


def _linear_layers(module: Any) -> list[str]:
    """Names of the linear layers of a model but for its head."""
    head = module.get_output_embeddings()
    return [name for name, part in module.named_modules() if isinstance(part, LINEAR) and part is not head]


def adapted_layers(module: nn.Module) -> dict[str, Any]:
    """The layers of a model that have adapters, by name."""
    return {name: part for name, part in module.named_modules() if hasattr(part, "lora_A")}


def learning(module: nn.Module) -> list[nn.Parameter]:
    """What learns of a model whose training is on: its adapters, or everything where it has none."""
    adapters = [p for name, p in module.named_parameters() if _is_adapter(name)]
    return adapters or list(module.parameters())


def _is_adapter(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


@contextmanager
def without_adapters(module: nn.Module) -> Iterator[None]:
    """The model as it was before training; of a sharded one, `parallel.inside` it."""
    layers = adapted_layers(module).values()
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


@torch.no_grad()
def merged(module: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict as a model without adapters has it: W + (alpha / rank) B A under the name of W.

    Args:
        module: the model; it is left as it is.
        state: its whole state dict.

    Returns:
        The same, with what was added to float32 and on the CPU; `state` itself where there are no adapters.
    """
    layers = adapted_layers(module)
    if not layers:
        return state
    plain = {name.replace(".base_layer.", "."): tensor for name, tensor in state.items() if not _is_adapter(name)}
    for name, layer in layers.items():
        a_RI, b_OR = (state[f"{name}.lora_{letter}.{NAME}.weight"] for letter in "AB")
        added_OI = layer.scaling[NAME] * (b_OR @ a_RI)
        weight = plain[f"{name}.weight"]
        plain[f"{name}.weight"] = (weight + (added_OI.T if layer.fan_in_fan_out else added_OI)).cpu()
    return plain


def adapter_writer(module: Any) -> Callable[[Path], None]:
    """What writes a model's adapters as peft reads them; every process must ask for it, one of them may use it."""
    state = whole_state(module)

    def write(folder: Path) -> None:
        settings = copy.copy(module.peft_config[NAME])
        settings.inference_mode, settings.target_modules = True, sorted(settings.target_modules)
        settings.save_pretrained(folder)
        tensors = {
            f"base_model.model.{name.replace(f'.{NAME}.', '.')}": tensor.contiguous()
            for name, tensor in state.items()
            if _is_adapter(name)
        }
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})

    return write


# A run's adapters


class Adapters:
    """What a run with adapters trains, as a part of its checkpoints: adapters and heads, not what they stand on.

    Args:
        config: of the run.
        source: folder or hub name of the policy's starting model.
        policy: its model, whole, which is given adapters.
        critic: likewise, if its trunk is to have any.

    Raises:
        InputError: `targets` that name no linear layer.
    """

    def __init__(self, config: Config, source: str | Path, policy: nn.Module, critic: nn.Module | None) -> None:
        self._modules = {"policy": policy} | ({} if critic is None else {"critic": critic})
        add_adapters(policy, config.model.lora, "model.lora", str(source))
        if critic is not None and config.critic_lora.rank:
            add_adapters(critic.trunk, config.critic_lora, "critic.lora")  # type: ignore[arg-type]
        self._names = {
            key: [name for name, p in module.named_parameters() if p.requires_grad]
            for key, module in self._modules.items()
        }
        self._held = getattr(torch, config.model.dtype)
        self._base = {key: _probe(module) for key, module in self._modules.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"base": self._base, **{key: self._learning(key) for key in self._modules}}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what was trained.

        Raises:
            InputError: it has another form, or stood on other weights.
        """
        for key, probe in self._base.items():
            form, old = ({name: tuple(p.shape) for name, p in of.items()} for of in (self._learning(key), state[key]))
            if form != old:
                name = min(name for name in form.keys() | old.keys() if form.get(name) != old.get(name))
                field = "model" if key == "policy" else "critic"
                raise InputError(
                    f"{field}.lora: the shape of {name} was {old.get(name)} and is {form.get(name)}, and what was "
                    "trained keeps its form: take the run's rank and targets, or start another output folder"
                )
            # Older checkpoints were written when all of them were held in float32.
            if not torch.equal(probe.to(self._held), state["base"][key].to(self._held)):
                raise InputError(
                    f"the {key}'s frozen weights are not those that the run began with: bring back the model folders "
                    "that its config names, or start anew from checkpoint-N/policy"
                )
            for name, parameter in self._learning(key).items():
                parameter.copy_(shared_like(state[key][name], parameter))

    def _learning(self, key: str) -> dict[str, nn.Parameter]:
        parameters = dict(self._modules[key].named_parameters())  # asked for anew: sharding replaces them
        return {name: parameters[name] for name in self._names[key]}


def _probe(module: nn.Module) -> Tensor:
    """A few numbers of each frozen weight, [weights, PROBES]."""
    frozen = [p.detach().flatten() for p in module.parameters() if not p.requires_grad]
    rows = [flat[torch.arange(PROBES, device=flat.device) * (len(flat) - 1) // (PROBES - 1)].cpu() for flat in frozen]
    return torch.stack([row.float() for row in rows]) if rows else torch.empty(0, PROBES)
