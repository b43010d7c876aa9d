"""Settings of control policies as frozen dataclasses, free of torch, so that `--help` starts at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ppo_rlhf.settings import require


@dataclass(frozen=True)
class NetworkSettings:
    """The policy's networks and its distribution (read by `classic.policy` and `classic.distributions`)."""

    hidden_sizes: tuple[int, ...] = (64, 64)
    """Units of each hidden layer, of the policy and of the value function alike (Schulman et al., 2017: 64, 64)."""
    activation: Literal["tanh", "relu", "elu", "silu"] = "tanh"
    """Between layers (Andrychowicz et al., 2021: tanh does best)."""
    orthogonal: bool = True
    """Orthogonal weights, gain √2 in hidden layers (Huang et al., 2022)."""
    policy_head_gain: float = 0.01
    """Gain of the policy's last layer (Huang et al., 2022: 0.01, so that the first actions are nearly uniform)."""
    value_rate: float = 1.0
    """The value function's learning rate, as a multiple of the policy's."""
    encoder: str | None = None
    """module:Class of your own network in front: Class(observation_space) with an attribute num_features."""
    recurrent: Literal["none", "lstm", "gru"] = "none"
    """A recurrent core between encoder and networks; its minibatches are whole environments."""
    recurrent_size: int = 64
    """Units of the recurrent core."""
    gaussian: Literal["independent", "state_dependent", "squashed", "gsde"] = "independent"
    """For continuous actions: one standard deviation per action, one per state and action, tanh-squashed, or gSDE."""
    initial_log_std: float = 0.0
    """Logarithm of the standard deviation at the start (Huang et al., 2022: 0)."""
    sde_sample_freq: int = -1
    """gSDE: decisions between fresh exploration matrices; -1: one for a whole rollout (Raffin et al., 2021)."""

    def __post_init__(self) -> None:
        sizes = self.hidden_sizes
        require(all(size >= 1 for size in sizes), f"network.hidden_sizes={sizes} must all be at least 1.")
        require(self.value_rate > 0, f"network.value_rate={self.value_rate} must be above 0.")
        require(self.recurrent_size >= 1, f"network.recurrent_size={self.recurrent_size} must be at least 1.")
        frequency = self.sde_sample_freq
        require(frequency == -1 or frequency >= 1, f"network.sde_sample_freq={frequency} must be at least 1, or -1.")
