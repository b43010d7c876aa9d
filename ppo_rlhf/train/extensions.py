"""What a run takes from its user in place of its own functions: objects, or what the configuration names."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ppo_rlhf.config import ADVANTAGES, PPOConfig
from ppo_rlhf.errors import UserError
from ppo_rlhf.prompts import PromptBatch
from ppo_rlhf.references import check_arguments, is_reference, load_callable
from ppo_rlhf.sampling import FinishedRows, Responses, Sampler, sample
from ppo_rlhf.settings import Extension
from ppo_rlhf.train import Callback
from ppo_rlhf.train.ppo_credit import AdvantageEstimator, RewardShaping, response_advantages, token_rewards
from ppo_rlhf.vllm_sampler import VLLMSampler


@dataclass(frozen=True)
class Extensions:
    """The functions of a run that may be one's own."""

    sampler: Sampler
    reward_shaping: RewardShaping
    advantage: AdvantageEstimator
    callbacks: tuple[Callback, ...]


def load_extensions(
    config: PPOConfig,
    sampler: Sampler | None = None,
    reward_shaping: RewardShaping | None = None,
    advantage: AdvantageEstimator | None = None,
    callbacks: Iterable[Callback] = (),
) -> Extensions:
    """Those that are given, else those that the configuration names, else the run's own; callbacks are added up.

    What is one's own is checked at each call. Raises UserError for what cannot be loaded or called.
    """
    if sampler is None and config.sampler is not None:
        sampler = _load_sampler(config.sampler)
    if reward_shaping is None and config.reward_shaping is not None:
        reward_shaping = _load(config.reward_shaping, setting="reward_shaping")
    if advantage is None and config.advantage not in ADVANTAGES:
        advantage = _load(config.advantage, setting="advantage")
    named = [_load(source, setting="callbacks") for source in config.callbacks]
    return Extensions(
        sampler=sample if sampler is None else _checked_sampler(sampler),
        reward_shaping=token_rewards if reward_shaping is None else _checked_shaping(reward_shaping),
        advantage=response_advantages if advantage is None else _checked_advantage(advantage),
        callbacks=(*callbacks, *named),
    )


def _load_sampler(source: str | Extension) -> Sampler:
    """module:function, or the URL of a vLLM server."""
    extension = _extension(source)
    if not extension.name.startswith(("http://", "https://")):
        return _load(extension, setting="sampler")
    arguments: dict[str, Any] = extension.arguments
    check_arguments(VLLMSampler, arguments, extension.name, setting="sampler")
    return VLLMSampler(extension.name, **arguments)


def _load(source: str | Extension, *, setting: str) -> Any:
    extension = _extension(source)
    if not is_reference(extension.name):
        raise UserError(f"{setting}: {extension.name} is not module:function, nor file.py:function.")
    return load_callable(extension.name, extension.arguments, setting=setting)


def _extension(source: str | Extension) -> Extension:
    return Extension(source) if isinstance(source, str) else source


# -------------------------------------------------------------------------------------- what they must return


def _checked_sampler(sampler: Sampler) -> Sampler:
    """The sampler, whose responses must be a token or more for each prompt, each told to on_finished once or none."""

    def checked(
        language_model: Any,
        tokenizer: Any,
        prompts: PromptBatch,
        *arguments: Any,
        on_finished: FinishedRows | None = None,
        **options: Any,
    ) -> Responses:
        told: list[int] = []

        def noted(rows: list[int], responses: Responses) -> None:
            told.extend(rows)
            if on_finished is not None:
                on_finished(rows, responses)

        noting = None if on_finished is None else noted
        found = sampler(language_model, tokenizer, prompts, *arguments, on_finished=noting, **options)
        if told and sorted(told) != list(range(len(prompts))):
            raise UserError(
                f"the sampler told on_finished of {len(told)} rows, {len(set(told))} different ones; it must tell of "
                f"each of the {len(prompts)} once, or of none."
            )
        if not isinstance(found, Responses):
            raise UserError(f"the sampler must return ppo_rlhf.sampling.Responses, not {type(found).__name__}.")
        if not len(found.ids) == len(found.mask) == len(found.finished) == len(found.texts) == len(prompts):
            raise UserError(f"the sampler returned {len(found.ids)} responses to {len(prompts)} prompts.")
        if not found.mask.any(1).all() or (found.mask[:, 1:] & ~found.mask[:, :-1]).any():
            raise UserError("the sampler's mask must be True from each response's first token through its last.")
        _like(found.mask, found.ids, "the sampler's ids")
        if found.logprobs is not None:
            _like(found.mask, found.logprobs, "the sampler's logprobs")
        return found

    return checked


def _checked_shaping(reward_shaping: RewardShaping) -> RewardShaping:
    """The function, whose rewards must be one a token."""

    def checked(scores: Any, log_ratio: Tensor, *arguments: Any, **options: Any) -> Tensor:
        return _like(log_ratio, reward_shaping(scores, log_ratio, *arguments, **options), "rewards of reward_shaping")

    return checked


def _checked_advantage(advantage: AdvantageEstimator) -> AdvantageEstimator:
    """The function, which must return two numbers a token."""

    def checked(rewards: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        found = advantage(rewards, *arguments, **options)
        if not isinstance(found, tuple) or len(found) != 2:
            raise UserError(f"advantage must return advantages and returns, not {type(found).__name__}.")
        return _like(rewards, found[0], "advantages"), _like(rewards, found[1], "returns of advantage")

    return checked


def _like(expected: Tensor, found: Any, name: str) -> Tensor:
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise UserError(f"{name} must be a tensor of shape {tuple(expected.shape)}, (B, T), not {shape}.")
    return found
