"""Rewards from what the configuration names."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import torch

from ppo_rlhf.errors import UserError, did_you_mean
from ppo_rlhf.references import is_reference, load_object
from ppo_rlhf.reward_settings import RewardPart, RewardSource
from ppo_rlhf.rewards.combinations import Ensemble, Weighted, WeightedSum
from ppo_rlhf.rewards.functions import RewardFunction, name_of
from ppo_rlhf.rewards.http_reward import HTTPReward
from ppo_rlhf.rewards.model import RewardModel


def load_reward(source: RewardSource, *, setting: str, device: torch.device | str = "cpu") -> RewardFunction:
    """A reward from a reward model's folder, from `module:function`, from a URL, or of several parts.

    Raises UserError when there is none.
    """
    if isinstance(source, str):
        return _load_one(source, {}, setting=setting, device=device)
    return WeightedSum([_load_part(part, setting=setting, device=device) for part in source])


def _load_part(part: RewardPart, *, setting: str, device: torch.device | str) -> Weighted:
    sources = [part.reward] if isinstance(part.reward, str) else part.reward
    loaded = [_load_one(source, part.arguments, setting=setting, device=device) for source in sources]
    reward = loaded[0]
    if not isinstance(part.reward, str):
        reward = Ensemble(loaded, rule=part.ensemble, deviations=part.deviations)
    return Weighted(part.name or name_of(reward), reward, part.weight)


def _load_one(source: str, arguments: Mapping[str, Any], *, setting: str, device: torch.device | str) -> RewardFunction:
    if source.startswith(("http://", "https://")):
        _check_arguments(HTTPReward, arguments, source, setting)
        return HTTPReward(source, **arguments)
    if not is_reference(source):
        _check_arguments(RewardModel, arguments, source, setting)
        return RewardModel.load(source, setting=setting, device=device, **arguments)
    function = load_object(source)
    if not callable(function):
        raise UserError(f"{setting}: {source} is not a function, but {type(function).__name__}.")
    _check_arguments(function, arguments, source, setting)
    if isinstance(function, type):
        return function(**arguments)
    if not arguments:
        return function
    return functools.wraps(function)(functools.partial(function, **arguments))


def _check_arguments(function: Any, arguments: Mapping[str, Any], source: str, setting: str) -> None:
    """Raises UserError for an argument that the function does not name: among **columns it would go unseen."""
    if not arguments:
        return
    parameters = inspect.signature(function).parameters.values()
    known = [parameter.name for parameter in parameters if parameter.kind != parameter.VAR_KEYWORD]
    for name in arguments:
        if name not in known:
            raise UserError(f"{setting}: {source} names no argument {name!r}.{did_you_mean(name, known)}")
