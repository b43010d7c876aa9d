"""LoRA (Hu et al., 2021): W + α/r · B·A, of which B and A alone are trained, through `peft`.

Adapters are injected into the transformers model itself, whose class, trunk and head stay what they are. The models of
a run are modules of their own, so that none has to be switched on before a forward, on the same memory of the base.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ppo_rlhf.errors import UserError
from ppo_rlhf.settings import LoRASettings

ADAPTED = (".lora_", ".modules_to_save.")  # in the names of what peft adds


def has_adapter(model: nn.Module) -> bool:
    """Whether the model has LoRA matrices, trained or not."""
    return getattr(model, "_hf_peft_config_loaded", False)


def saves_modules(model: nn.Module) -> bool:
    """Whether the model's adapter holds whole modules beside its matrices, as that of a reward model holds the head."""
    return any(".modules_to_save." in name for name, _ in model.named_parameters())


def train_adapter(model: Any, settings: LoRASettings, *, heads: Sequence[str] = ()) -> None:
    """From now on the model's adapter alone is trained; in place. Without an adapter and without a rank: nothing.

    A model that has an adapter goes on with it; another gets a new one, which at first changes no output (B = 0).
    heads: new modules that are trained as a whole and saved with the adapter.

    Raises UserError where peft is missing, a rank differs from that of the adapter, or no module has a given name.
    """
    if not has_adapter(model):
        if settings.rank:
            _add_adapter(model, settings, heads)
        return
    if settings.rank not in (0, rank_of(model)):
        raise UserError(
            f"lora.rank={settings.rank}, but the model has an adapter of rank {rank_of(model)}, which is trained "
            "further: leave lora.rank out, or merge the adapter first by ppo-rlhf export."
        )
    model.requires_grad_(False)
    model.set_adapter(model.active_adapters())


def rank_of(model: Any) -> int:
    """The rank of the model's adapter; 0: it has none."""
    return model.peft_config[model.active_adapters()[0]].r if has_adapter(model) else 0


def _add_adapter(model: Any, settings: LoRASettings, heads: Sequence[str]) -> None:
    peft, named = _peft(), f"lora.target_modules={list(settings.target_modules)}"
    if not settings.merge and not model.name_or_path:
        raise UserError("lora.merge=false: the base must be a folder or on the Hub, or nobody could load the adapter.")
    adapter = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(settings.target_modules) or "all-linear",
        exclude_modules=list(heads) or None,
        modules_to_save=list(heads) or None,
    )
    with warnings.catch_warnings():  # of GPT-2's transposed matrices, which peft sees itself, and of what follows here
        warnings.filterwarnings("ignore", message="fan_in_fan_out|.*tie_word_embeddings")
        try:
            model.add_adapter(adapter)
        except ValueError as error:
            raise UserError(f"{named}: {' '.join(str(error).split())}") from error
    head_too = isinstance(model.get_output_embeddings(), peft.tuners.lora.LoraLayer)
    if head_too and model.config.tie_word_embeddings:
        raise UserError(f"{named}: this model's head is its embeddings; an adapter on the one would part them.")


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise UserError("lora needs peft, which is not installed: install 'ppo-rlhf[lora]'.") from error
    return peft


def on_same_base(model: nn.Module) -> Any:
    """A copy with an adapter of its own where the model has one; its other weights are the model's memory, frozen.

    The model's own flags stay as they are. In evaluation mode.
    """
    shared = {}
    for name, weight in model.named_parameters():
        if not any(part in name for part in ADAPTED):
            shared[id(weight)] = nn.Parameter(weight.detach(), requires_grad=False) if weight.requires_grad else weight
    return copy.deepcopy(model, shared).eval()


@torch.no_grad()
def merged(model: Any) -> Any:
    """The model without an adapter: each adapted W becomes W + α/r · B·A. What was not adapted shares its memory.

    A model that has no adapter is returned itself.
    """
    if not has_adapter(model):
        return model
    peft = _peft()
    plain = on_same_base(model)
    (name,) = plain.active_adapters()
    for parent in list(plain.modules()):
        for child, layer in list(parent.named_children()):
            if isinstance(layer, peft.tuners.lora.LoraLayer):
                base: Any = layer.get_base_layer()
                base.weight = nn.Parameter(base.weight + layer.get_delta_weight(name), requires_grad=False)
                setattr(parent, child, base)
            elif isinstance(layer, peft.utils.ModulesToSaveWrapper):
                setattr(parent, child, layer.modules_to_save[name])
    plain._hf_peft_config_loaded = False
    del plain.peft_config
    plain._weight_conversions = None  # an adapter that was loaded left its own names there
    plain.name_or_path = plain.config.name_or_path = ""  # such a model is nowhere yet
    return plain


@torch.no_grad()
def share_weights(model: nn.Module, other: nn.Module) -> int:
    """Lets frozen weights of `model` be those of `other` where both are equal; → how many numbers are held once less.

    So a policy and a reward model that were trained as adapters of one base hold that base once.
    """
    known: dict[tuple[str, torch.Size], nn.Parameter] = {}
    for name, parameter in other.named_parameters():
        if not parameter.requires_grad:
            known[_base_name(name, other), parameter.shape] = parameter
    saved = 0
    for path, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            twin = known.get((_base_name(f"{path}.{name}", model), parameter.shape))
            if twin is not None and twin is not parameter and not parameter.requires_grad and _equal(twin, parameter):
                setattr(module, name, twin)
                saved += parameter.numel()
    return saved


def _equal(one: nn.Parameter, other: nn.Parameter) -> bool:
    return one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)


def _base_name(name: str, model: Any) -> str:
    """A weight's name in the trunk, with or without an adapter, whatever stands on it."""
    prefix = getattr(model, "base_model_prefix", "") + "."
    return name.replace(".base_layer.", ".").removeprefix(prefix)
