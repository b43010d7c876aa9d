"""The three stages: each module has one `train(config, …)`, a plain function."""

from collections.abc import Callable, Mapping

Callback = Callable[[int, Mapping[str, float]], None]  # called after each step with its number and metrics
