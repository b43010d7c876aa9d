"""Rewards from what the configuration names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ppo_rlhf.references import check_arguments, is_reference, load_callable
from ppo_rlhf.reward_settings import RewardPart, RewardSource
from ppo_rlhf.rewards.combinations import Ensemble, Weighted, WeightedSum
from ppo_rlhf.rewards.functions import RewardFunction, name_of
from ppo_rlhf.rewards.http_reward import HTTPReward
from ppo_rlhf.rewards.model import RewardModel


def load_reward(source: RewardSource, *, setting: str, device: torch.device | str = "cpu") -> RewardFunction:
    """A reward from a reward model's folder, from `module:function`, from a URL, or of several parts.

    On the meta device its models are without weights. Raises UserError when there is none.
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
        check_arguments(HTTPReward, arguments, source, setting=setting)
        return HTTPReward(source, **arguments)
    if not is_reference(source):
        check_arguments(RewardModel, arguments, source, setting=setting)
        return RewardModel.load(source, setting=setting, device=device, **arguments)
    return load_callable(source, arguments, setting=setting)
