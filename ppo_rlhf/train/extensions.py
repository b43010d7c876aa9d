"""What a run takes from its user in place of its own functions: objects, or what the configuration names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ppo_rlhf.config import PPOConfig
from ppo_rlhf.errors import UserError
from ppo_rlhf.references import check_arguments, is_reference, load_callable
from ppo_rlhf.sampling import Responses, Sampler, sample
from ppo_rlhf.settings import Extension
from ppo_rlhf.vllm_sampler import VLLMSampler


@dataclass(frozen=True)
class Extensions:
    """The functions of a run that may be one's own."""

    sampler: Sampler


def load_extensions(config: PPOConfig, *, sampler: Sampler | None = None) -> Extensions:
    """Those that are given, else those that the configuration names, else the run's own.

    Raises UserError for what cannot be loaded or called.
    """
    return Extensions(sampler=sampler or sampler_of(config))


def sampler_of(config: PPOConfig) -> Sampler:
    """The sampler that the configuration names: module:object, or the URL of a vLLM server."""
    if config.sampler is None:
        return sample
    source = as_extension(config.sampler)
    if source.name.startswith(("http://", "https://")):
        check_arguments(VLLMSampler, source.arguments, source.name, setting="sampler")
        return VLLMSampler(source.name, **source.arguments)  # type: ignore[arg-type]
    return load_extension(source, setting="sampler")


def check_responses(responses: Responses, count: int) -> None:
    """Raises UserError for what a sampler returned that is not a response of a token or more for each prompt."""
    if not isinstance(responses, Responses):
        raise UserError(f"the sampler returned {type(responses).__name__}; it must return ppo_rlhf.sampling.Responses.")
    if not len(responses.ids) == len(responses.mask) == len(responses.texts) == count:
        raise UserError(f"the sampler returned {len(responses.ids)} responses to {count} prompts.")
    mask = responses.mask
    if not mask[:, 0].all() or (mask[:, 1:] & ~mask[:, :-1]).any():
        raise UserError("the sampler's mask must be True from each response's first token through its last.")


def load_extension(source: str | Extension, *, setting: str) -> Any:
    """What a setting names, to be called."""
    source = as_extension(source)
    if not is_reference(source.name):
        raise UserError(f"{setting}: {source.name} is not module:function, nor file.py:function.")
    return load_callable(source.name, source.arguments, setting=setting)


def as_extension(source: str | Extension) -> Extension:
    """A name alone has no arguments."""
    return Extension(source) if isinstance(source, str) else source
