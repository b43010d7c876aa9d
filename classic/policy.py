"""The control policy: observations → normaliser → encoder → [recurrent core] → twin networks → distribution, value."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from classic.distributions import Categorical, Parameters, make_distribution
from classic.envs.types import Environments
from classic.networks import ImageEncoder, RecurrentCore, TwinMLP
from classic.normalizers import ObservationNormalizer, RewardNormalizer
from classic.settings import NetworkSettings
from classic.spaces import (
    Observations,
    Space,
    encode,
    from_plain,
    image_shapes,
    is_batch,
    outline,
    to_native,
    to_plain,
    vector_size,
)
from ppo_rlhf.core import Evaluation
from ppo_rlhf.errors import UserError
from ppo_rlhf.references import load_object

Batch = TypeVar("Batch")


@dataclass
class Memory:
    """What a recurrent policy remembers of each environment while it acts."""

    state: Tensor  # (N, S)
    starts: Tensor = field(repr=False)  # (N,) bool: an episode begins with the next observation

    def forget(self, ended: Any) -> None:
        """Begins a new episode where `ended` (N,) is true."""
        self.starts = self.starts | torch.as_tensor(ended, device=self.starts.device)


class Policy(nn.Module):
    """A stochastic policy with a value function for any supported pair of spaces.

    `policy(**experience.inputs)` evaluates decisions that were taken, for the update; `act` takes new ones.
    """

    def __init__(
        self,
        observation_space: Space,
        action_space: Space,
        settings: NetworkSettings | None = None,
        *,
        normalize_observations: bool = False,
        reward_gamma: float | None = None,
        encoder: nn.Module | None = None,
    ) -> None:
        """reward_gamma: normalise rewards, by returns discounted so; None: do not. encoder: a module from observations
        as `classic.spaces.encode` gives them to (B, num_features), with that attribute; by default images go through a
        CNN and vectors pass as they are.

        Raises UserError for a space that cannot be acted in.
        """
        super().__init__()
        settings = settings or NetworkSettings()
        self.observation_space = observation_space
        self.action_space = action_space
        self.settings = settings
        vector, images = vector_size(observation_space), image_shapes(observation_space)
        self.normalizer = ObservationNormalizer(vector) if normalize_observations and vector else None
        self.reward_normalizer = None if reward_gamma is None else RewardNormalizer(reward_gamma)
        self.own_encoder = None if encoder is None else type(encoder).__name__  # that no setting names
        if encoder is None and settings.encoder is not None:
            encoder = load_object(settings.encoder)(observation_space)
        if encoder is None and images:
            encoder = ImageEncoder(vector, images, orthogonal=settings.orthogonal)
        self.encoder = encoder
        size = vector if encoder is None else _num_features(encoder)
        self.core = None
        if settings.recurrent != "none":
            self.core = RecurrentCore(size, settings.recurrent_size, settings.recurrent, orthogonal=settings.orthogonal)
            size = self.core.num_features
        width = settings.hidden_sizes[-1] if settings.hidden_sizes else size
        self.distribution = make_distribution(action_space, num_features=width, settings=settings)
        self.networks = TwinMLP(
            size,
            settings.hidden_sizes,
            self.distribution.num_outputs,
            activation=settings.activation,
            orthogonal=settings.orthogonal,
            policy_head_gain=settings.policy_head_gain,
            value_rate=settings.value_rate,
        )

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.networks.weights.device

    def forward(
        self,
        *,
        actions: Tensor,
        action_mask: Tensor | None = None,
        starts: Tensor | None = None,
        state: Tensor | None = None,
        **observations: Tensor,
    ) -> Evaluation:
        """Evaluates actions (B, T, …) taken in observations (B, T, …), which are those of `inputs_of`.

        action_mask (B, T, A): the choices that were allowed. A recurrent policy reads starts (B, T), True where an
        episode begins, and state (B, S), its memory before the first decision.
        """
        batch, steps = next(iter(observations.values())).shape[:2]
        features = self._features({name: x.flatten(0, 1) for name, x in observations.items()})
        if self.core is not None:
            assert starts is not None
            assert state is not None
            features = self.core(features.unflatten(0, (batch, steps)), starts, state)[0].flatten(0, 1)
        output, values, last = self.networks(features)
        allowed = None if action_mask is None else action_mask.flatten(0, 1)
        parameters = self.distribution(output, last, allowed)
        taken = actions.flatten(0, 1)
        return Evaluation(
            logprobs=self.distribution.logprob(parameters, taken).view(batch, steps),
            entropy=self.distribution.entropy(parameters, taken).view(batch, steps),
            values=values.view(batch, steps),
            distribution=tuple(each.reshape(batch, steps, *each.shape[1:]) for each in parameters),
        )

    def decide(
        self, observations: Observations, noise: Tensor | None, memory: Memory | None, action_mask: Tensor | None
    ) -> Tensor:
        """New actions (N, …) as the distribution stores them: drawn with `noise`, or without it the likeliest ones."""
        parameters, last = self._distribution_at(observations, memory, action_mask)
        if noise is None:
            return self.distribution.mode(parameters)
        return self.distribution.sample(parameters, noise, last)

    def probabilities(self, observations: Observations) -> Tensor:
        """π(a|s) (N, A) of every choice a, by a policy that has a Discrete action space and no memory."""
        assert isinstance(self.distribution, Categorical)
        return self._distribution_at(observations, None, None)[0][0].exp()

    def value(self, observations: Observations, memory: Memory | None = None) -> Tensor:
        """V (N,) of observations (N, …); memory is read, and not changed."""
        seen = None if memory is None else Memory(memory.state, memory.starts)
        features = self._remembered(self._features(inputs_of(observations)), seen)
        values: Tensor = self.networks(features)[1]
        return values

    def observe(self, inputs: Mapping[str, Tensor], mask: Tensor) -> None:
        """Merges a rollout's observations (N, T, …), where the mask (N, T) is True, into the running statistics."""
        if self.normalizer is not None:
            self.normalizer.update(inputs["vector" if "vector" in inputs else "observations"], mask)

    def keep_policy_still(self) -> None:
        """Forgets the gradients of all parameters but those that the value function shares only in memory."""
        own = {id(parameter) for parameter in self.networks.parameters()}
        for parameter in self.parameters():
            if id(parameter) not in own:
                parameter.grad = None

    def memory(self, num_envs: int) -> Memory | None:
        """A fresh memory for so many environments; None for a policy without recurrence."""
        if self.core is None:
            return None
        state = torch.zeros(num_envs, self.core.state_size, device=self.device)
        return Memory(state, torch.ones(num_envs, dtype=torch.bool, device=self.device))

    @torch.no_grad()
    def act(
        self,
        observations: Batch,
        deterministic: bool = True,
        *,
        memory: Memory | None = None,
        action_mask: Any = None,
        generator: torch.Generator | None = None,
    ) -> Batch:
        """Actions for a batch of the environment's own observations (numpy or torch, or dicts and tuples of them), in
        the environment's own form: ready for `env.step`. A single observation gives a single action.

        memory: of a recurrent policy, from `memory(num_envs)`; without it every call begins an episode. generator: of
        the noise when not deterministic, on the policy's device; None: torch's global one.
        """
        single = not is_batch(self.observation_space, observations)
        batch = encode(self.observation_space, _batched(observations) if single else observations, self.device)
        size = len(next(iter(inputs_of(batch).values())))
        allowed = (
            None if action_mask is None else torch.as_tensor(action_mask, device=self.device).view(size, -1).bool()
        )
        noise = None
        if not deterministic:
            noise = self.distribution.noise(1, size, generator=generator)[0]
        actions = self.decide(batch, noise, memory if memory is not None else self.memory(size), allowed)
        native = to_native(self.action_space, self.distribution.to_environment(actions))
        result: Any = native[0] if single else native
        return result if _is_torch(observations) else result.cpu().numpy()

    def save(self, path: str | Path) -> None:
        """Writes a folder that `load` reads: policy.safetensors and policy.json."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        description = {
            "observation_space": to_plain(self.observation_space),
            "action_space": to_plain(self.action_space),
            "network": asdict(self.settings),
            "normalize_observations": self.normalizer is not None,
            "reward_gamma": None if self.reward_normalizer is None else self.reward_normalizer.gamma,
            "own_encoder": self.own_encoder,
        }
        (folder / "policy.json").write_text(json.dumps(description, indent=1), encoding="utf-8")
        save_file({name: x.contiguous() for name, x in self.state_dict().items()}, folder / "policy.safetensors")

    def _features(self, inputs: dict[str, Tensor]) -> Tensor:
        """(B, …) inputs → (B, D), the vector normalised and the rest encoded."""
        if self.normalizer is not None:
            name = "vector" if "vector" in inputs else "observations"
            inputs = {**inputs, name: self.normalizer(inputs[name])}
        if self.encoder is None:
            return inputs["observations"]
        features: Tensor = self.encoder(inputs.get("observations", inputs))
        return features

    def _distribution_at(
        self, observations: Observations, memory: Memory | None, action_mask: Tensor | None
    ) -> tuple[Parameters, Tensor]:
        """The distribution's parameters, and the last layer's features; moves the memory on by one decision."""
        features = self._remembered(self._features(inputs_of(observations)), memory)
        output, last = self.networks.policy_alone(features)
        return self.distribution(output, last, action_mask), last

    def _remembered(self, features: Tensor, memory: Memory | None) -> Tensor:
        """(N, D) → the recurrent core's features; moves the memory on by one decision."""
        if self.core is None:
            return features
        assert memory is not None
        after, memory.state = self.core(features[:, None], memory.starts[:, None], memory.state)
        memory.starts = torch.zeros_like(memory.starts)
        return after[:, 0]


def load(path: str | Path, *, encoder: nn.Module | None = None) -> Policy:
    """The policy of a run folder, or of a folder that `Policy.save` wrote.

    encoder: the user's own module, where the policy was made with one that is not named in its settings.
    Raises UserError where there is none, or it is damaged.
    """
    folder = Path(path)
    if (folder / "policy" / "policy.json").exists():
        folder = folder / "policy"
    if not (folder / "policy.json").exists():
        raise UserError(f"{path} holds no policy: there is no policy.json in it or in its policy/ folder.")
    try:
        description = json.loads((folder / "policy.json").read_text(encoding="utf-8"))
        if encoder is None and description.get("own_encoder"):
            name = description["own_encoder"]
            raise UserError(f"{folder} holds a policy with your own encoder {name}: load(…, encoder={name}(…)).")
        network: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in description["network"].items()}
        with torch.random.fork_rng(devices=[]):  # what is drawn is overwritten, and shall cost the caller no numbers
            policy = Policy(
                from_plain(description["observation_space"]),
                from_plain(description["action_space"]),
                NetworkSettings(**network),
                normalize_observations=description["normalize_observations"],
                reward_gamma=description["reward_gamma"],
                encoder=encoder,
            )
        policy.load_state_dict(load_file(folder / "policy.safetensors"))
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{folder} is damaged: {' '.join(str(error).split())[:200]}") from error
    return policy.eval()


def require_spaces(policy: Policy, envs: Environments, name: str) -> None:
    """Raises UserError where the policy was made for other observations or actions than those of the environments."""
    for role in ("observation", "action"):
        own, theirs = (outline(getattr(each, f"{role}_space")) for each in (policy, envs))
        if own != theirs:
            raise UserError(f"the policy is of another environment than {name}: its {role}s are {own}, not {theirs}.")


def inputs_of(observations: Observations) -> dict[str, Tensor]:
    """Observations by name, as the policy's inputs have them."""
    return observations if isinstance(observations, dict) else {"observations": observations}


def _num_features(encoder: nn.Module) -> int:
    size = getattr(encoder, "num_features", None)
    if not isinstance(size, int):
        raise UserError(f"the encoder {type(encoder).__name__} needs an integer attribute num_features: its outputs.")
    return size


def _batched(observations: Any) -> Any:
    """One observation as a batch of one."""
    return _map(observations, lambda leaf: leaf[None] if isinstance(leaf, Tensor) else np.asarray(leaf)[None])


def _is_torch(observations: Any) -> bool:
    leaves: list[Any] = []
    _map(observations, leaves.append)
    return any(isinstance(leaf, Tensor) for leaf in leaves)


def _map(observations: Any, function: Callable[[Any], Any]) -> Any:
    if isinstance(observations, dict):
        return {name: _map(inner, function) for name, inner in observations.items()}
    if isinstance(observations, tuple):
        return tuple(_map(inner, function) for inner in observations)
    return function(observations)
