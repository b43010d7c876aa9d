"""Loading and saving of transformers models and tokenizers, and the conventions that all of ours share.

Every model gets position ids counted from the attention mask (GPT-2 is wrong under left padding without them), and
every tokenizer a pad token of its own that is never eos: masks come from generation and lengths, but people who load
our folders with plain transformers infer them from pads.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.activations import NewGELUActivation
from transformers.modeling_utils import load_state_dict
from transformers.utils import is_bitsandbytes_available
from transformers.utils import logging as transformers_logging

from ppo_rlhf.adapters import has_adapter, merged, saves_modules
from ppo_rlhf.errors import UserError
from ppo_rlhf.packing import use_packed_attention
from ppo_rlhf.references import call, is_reference

PAD_TOKEN = "<|pad|>"
BASE_CONFIG = "base_config.json"  # in an adapter's folder, where transformers takes config.json for a whole model's
VALUE_HEAD = "v_head.summary"
PLAIN_HEAD = "_ppo_rlhf_plain_head"  # an attribute, so that copies of a model know of themselves


def load_policy(
    source: str, *, setting: str, trust_remote_code: bool = False, base_bits: int = 32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in float32 with its tokenizer, which has eos and a pad token of its own, left padding.

    source: a folder, a name on the Hub, or `module:function` that returns (model, tokenizer). An adapter's folder gives
    its base with the adapter on it. base_bits: of the weights of linear layers, by bitsandbytes where they are not 32.
    Raises UserError when it cannot be loaded or the tokenizer has no eos token.
    """
    transformers_logging.disable_progress_bar()
    if is_reference(source):
        model, tokenizer = call(source)
    else:
        rounded = _rounded(base_bits)
        model = _load(AutoModelForCausalLM, source, setting, trust_remote_code=trust_remote_code, **rounded)
        tokenizer = load_tokenizer(source, setting=setting, trust_remote_code=trust_remote_code)
    return use_quick_kernels(model), tokenizer_with_pad(model, tokenizer, setting=setting)


def _rounded(base_bits: int) -> dict[str, Any]:
    """The options by which transformers rounds weights as it loads them."""
    if base_bits == 32:
        return {}
    if not is_bitsandbytes_available():
        raise UserError(
            f"lora.base_bits={base_bits} needs bitsandbytes, which is not installed: install it, or use 32."
        )
    four = base_bits == 4
    config = BitsAndBytesConfig(load_in_4bit=four, load_in_8bit=not four, bnb_4bit_quant_type="nf4")
    return {"quantization_config": config}


def load_reader(source: str, *, setting: str, trust_remote_code: bool = False) -> tuple[PreTrainedTokenizerBase, int]:
    """What a policy reads by, without its weights: its tokenizer, as `load_policy` gives it, and its context length."""
    model, tokenizer = policy_without_weights(source, setting=setting, trust_remote_code=trust_remote_code)
    return tokenizer, context_length(model)


def policy_without_weights(
    source: str, *, setting: str, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """What `load_policy` gives, on the meta device: shapes and types of the weights, none of which is read.

    A `module:function` must be called for that, and makes its model.
    """
    if is_reference(source):
        model, tokenizer = load_policy(source, setting=setting)
        return model.to(torch.device("meta")), tokenizer  # type: ignore[arg-type]
    return _without_weights(AutoModelForCausalLM, source, setting, trust_remote_code=trust_remote_code)


def classifier_without_weights(source: str, *, setting: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """What `load_classifier` gives, on the meta device, with its tokenizer."""
    return _without_weights(AutoModelForSequenceClassification, source, setting, num_labels=1)


def _without_weights(
    factory: Any, source: str, setting: str, *, trust_remote_code: bool = False, **options: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """With room for a pad token that must be added."""
    config = _load(AutoConfig, source, setting, trust_remote_code=trust_remote_code, **options)
    tokenizer = load_tokenizer(source, setting=setting, trust_remote_code=trust_remote_code)
    add_pad_token(tokenizer, setting=setting)
    config.vocab_size = max(config.vocab_size, len(tokenizer))
    with torch.device("meta"):
        return factory.from_config(config, trust_remote_code=trust_remote_code), tokenizer


def load_tokenizer(source: str, *, setting: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or a Hub name. Raises UserError when it cannot be loaded."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise UserError(f"{setting}: the tokenizer of {source} cannot be loaded: {_first_line(error)}") from error
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):  # what transformers makes of a folder without one
        raise UserError(f"{setting}: there is no tokenizer in {source}; save it there: tokenizer.save_pretrained(…).")
    return tokenizer


def load_classifier(source: str, *, setting: str) -> PreTrainedModel:
    """A trained reward model: a sequence classifier with one output, in float32.

    Raises UserError for one with more of them, and for a language model, whose head would be a random one.
    """
    options: dict[str, Any] = {"num_labels": 1}
    if (Path(source) / BASE_CONFIG).exists():  # it has the normalisation
        options = {"config": AutoConfig.from_pretrained(Path(source) / BASE_CONFIG)}
    model, found = _load(AutoModelForSequenceClassification, source, setting, output_loading_info=True, **options)
    if found["missing_keys"] or (has_adapter(model) and not saves_modules(model)):
        missing = min(found["missing_keys"], default="a head")
        raise UserError(
            f"{setting}: {source} is not a reward model, {missing} is missing in it; make one of a policy by "
            "ppo-rlhf reward."
        )
    if model.config.num_labels != 1:
        raise UserError(f"{setting}: {source} has {model.config.num_labels} outputs; a reward model has one.")
    return use_quick_kernels(model)


def _load(factory: Any, source: str, setting: str, **options: Any) -> Any:
    looks_like_path = source.startswith((".", "/", "~")) or source.count("/") > 1
    if looks_like_path and not Path(source).is_dir():
        raise UserError(f"{setting}: there is no folder {source}.")
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # what is missing is told in a line of ours
    try:
        return factory.from_pretrained(source, dtype=torch.float32, **options)
    except Exception as error:
        raise UserError(f"{setting}: {source} cannot be loaded as a model: {_first_line(error)}") from error
    finally:
        transformers_logging.set_verbosity(level)


def tokenizer_with_pad(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, setting: str
) -> PreTrainedTokenizerBase:
    """The tokenizer with left padding and a pad token that is not eos; the model's embeddings grow where they must.

    Raises UserError for a tokenizer without eos, without which no response could ever stop.
    """
    add_pad_token(tokenizer, setting=setting)
    embeddings: Any = model.get_input_embeddings()
    if len(tokenizer) > embeddings.num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    model.config.pad_token_id = tokenizer.pad_token_id
    return tokenizer


def add_pad_token(tokenizer: PreTrainedTokenizerBase, *, setting: str) -> None:
    """Left padding, and a pad token where there is none but eos. Raises UserError for a tokenizer without eos."""
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{setting}: the tokenizer has no eos token, so no response could stop; set one: tokenizer.eos_token = …"
        )
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})


def save_policy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    temperature: float = 1.0,
    stop_ids: list[int] | None = None,
    merge: bool = True,
) -> None:
    """A folder that plain transformers loads: safetensors, tokenizer, and generation settings that sample as we do."""
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=stop_ids or [tokenizer.eos_token_id],
        pad_token_id=tokenizer.pad_token_id,
    )
    save_model(model, folder, merge=merge)
    tokenizer.save_pretrained(folder)


def save_model(model: PreTrainedModel, folder: Path, *, merge: bool) -> None:
    """The model's folder; of one with an adapter that of plain weights where `merge` says so, else the adapter's alone.

    Plain transformers loads both, the latter where peft and the base are.
    """
    if merge:
        model = merged(model)
    model.save_pretrained(folder)
    if has_adapter(model):
        model.config.to_json_file(folder / BASE_CONFIG)


def save_value_head(head: nn.Linear, folder: Path) -> None:
    """A head alone, by the names that TRL gave it, which `load_value_head` reads."""
    weights = {f"{VALUE_HEAD}.{name}": tensor.detach().contiguous() for name, tensor in head.named_parameters()}
    save_file(weights, folder / "value_head.safetensors")


def load_value_head(source: str) -> tuple[Tensor, Tensor] | None:
    """weight (1, d) and bias (1,) of a value head in a folder, None where it holds none.

    Of TRL's AutoModelForCausalLMWithValueHead, whose folder has it beside the language model's weights, or of ours.
    """
    names = [f"{VALUE_HEAD}.weight", f"{VALUE_HEAD}.bias"]
    for path in sorted(Path(source).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            if names[0] in set(file.keys()):
                return file.get_tensor(names[0]), file.get_tensor(names[1])
    for path in sorted(Path(source).glob("pytorch_model*.bin")):
        weights = load_state_dict(str(path), weights_only=True)
        if names[0] in weights:
            return weights[names[0]], weights[names[1]]
    return None


def use_quick_kernels(model: PreTrainedModel) -> PreTrainedModel:
    """The same model with quicker parts where it has slow ones; in place, and numerically the same. → the model.

    Attention becomes the one that packed batches need, and where a model cannot have it plain matrix products on a CPU:
    at the lengths that a CPU can train, PyTorch's fused attention is the slower one there.
    """
    if not use_packed_attention(model) and not torch.accelerator.is_available():
        model.set_attn_implementation("eager")
    use_fused_gelu(model)
    setattr(model, PLAIN_HEAD, _computes_plain_logits(model))
    return model


def use_fused_gelu(model: nn.Module) -> None:
    """GPT-2's GELU, which transformers spells out in eight kernels, becomes one; in place."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))


def has_plain_head(model: nn.Module) -> bool:
    """Whether `use_quick_kernels` found the model's logits to be one linear map of its last hidden states."""
    return getattr(model, PLAIN_HEAD, False)


@torch.no_grad()
def _computes_plain_logits(model: Any) -> bool:
    """Some models scale or bend what comes from their output embeddings: asked of the model itself, by two tokens."""
    if not isinstance(model.get_output_embeddings(), nn.Linear) or not hasattr(model, "base_model"):
        return False
    with evaluating(model):
        ids = torch.tensor([[0, 1]], device=model.device)
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        hidden = model.base_model(**inputs).last_hidden_state
        return torch.equal(model(**inputs).logits, model.get_output_embeddings()(hidden))


def frozen_copy(model: nn.Module) -> Any:
    """A copy that no optimizer can move: the reference policy. In evaluation mode.

    What is frozen in the model already, such as the base of its adapter, is shared instead.
    """
    clone = copy.deepcopy(model, {id(weight): weight for weight in model.parameters() if not weight.requires_grad})
    return clone.requires_grad_(False).eval()


def disable_dropout(model: nn.Module) -> None:
    """Sets every dropout probability to 0, so that the same tokens always get the same log-probabilities.

    The modules of attention keep theirs as plain numbers beside nn.Dropout.
    """
    for module in model.modules():
        for name, value in list(vars(module).items()):
            probability = name.endswith("dropout") or (name == "p" and isinstance(module, nn.Dropout))
            if probability and isinstance(value, float):
                setattr(module, name, 0.0)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; afterwards the mode that was."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


def position_ids_of(mask: Tensor) -> Tensor:
    """Positions counted over the real tokens, 0 on padding before them. mask (B, S) bool → (B, S) int64."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def model_inputs(model: nn.Module, ids: Tensor, mask: Tensor) -> dict[str, Any]:
    """Keyword arguments for a forward over padded ids: attention mask, and position ids for models that take them.

    Padding ids are replaced by 0, so that the id of padding cannot matter, nor be outside the vocabulary.
    """
    inputs: dict[str, Any] = {"input_ids": torch.where(mask, ids, 0), "attention_mask": mask.long()}
    if takes_position_ids(model):
        inputs["position_ids"] = position_ids_of(mask)
    return inputs


def right_padded(encoded: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """ids, mask (N, S) of texts of different lengths; padding is id 0 behind them, which the mask makes harmless."""
    width = max(len(line) for line in encoded)
    ids = torch.zeros(len(encoded), width, dtype=torch.int64)
    mask = torch.zeros(len(encoded), width, dtype=torch.bool)
    for row, line in enumerate(encoded):
        ids[row, : len(line)] = torch.tensor(line)
        mask[row, : len(line)] = True
    return ids.to(device), mask.to(device)


def takes_position_ids(model: nn.Module) -> bool:
    """Whether the model's forward has a `position_ids` argument (ALiBi models have none)."""
    return "position_ids" in inspect.signature(getattr(model, "module", model).forward).parameters


def context_length(model: PreTrainedModel) -> int:
    """The longest sequence the model can read, in tokens."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
