"""PPO, PPO-Penalty and TRPO on control tasks: `from classic import train, load`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from classic.policy import Policy, load
    from classic.ppo import train

__all__ = ["Policy", "load", "train"]


def __getattr__(name: str) -> Any:
    """Imports torch with the first name that is asked for, so that the command line starts at once."""
    if name == "train":
        from classic.ppo import train

        return train
    if name in ("Policy", "load"):
        import classic.policy

        return getattr(classic.policy, name)
    raise AttributeError(f"module 'classic' has no attribute {name!r}")
