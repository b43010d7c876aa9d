"""The policy: a causal language model with a value head, which evaluates responses token by token.

The index convention: `logprobs[:, t]` and `values[:, t]` come from the position that *predicts* token t of the
response, index P − 1 + t of prompt and response together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ppo_rlhf.core import Evaluation, entropy_of, logprobs_of
from ppo_rlhf.models import model_inputs

Inputs = dict[str, Tensor]  # prompt_ids, prompt_mask (B, P), response_ids, response_mask (B, T)


class TokenValues(nn.Module):
    """A transformer with a scalar head on every position: a value function of its own, apart from the policy."""

    def __init__(self, trunk: PreTrainedModel, head: nn.Linear) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = head

    @classmethod
    def from_reward_model(cls, model: Any, *, mean: float, scale: float) -> TokenValues:
        """Starts as the reward model itself, its normalisation (score − mean) / scale folded into the head.

        Stiennon et al. (2020), Ouyang et al. (2022): a value function that starts from the reward model.
        """
        weight = model.score.weight
        head = nn.Linear(weight.shape[1], 1, dtype=weight.dtype, device=weight.device)
        with torch.no_grad():
            head.weight.copy_(weight / scale)
            head.bias.fill_(-mean / scale)
        return cls(model.base_model, head)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids, mask (B, S) → values (B, S), float32."""
        hidden = self.trunk(**model_inputs(self.trunk, ids, mask), use_cache=False).last_hidden_state
        return self.head(hidden).squeeze(-1).float()


class PolicyWithValue(nn.Module):
    """`policy(**experience.inputs) -> Evaluation` for a causal language model.

    The value function is a zero-initialised linear head on the model's last hidden state (Ziegler et al., 2019), or a
    model of its own. temperature: of the distribution that was sampled from; it divides the logits here too.
    """

    def __init__(
        self,
        language_model: PreTrainedModel,
        *,
        value_model: TokenValues | None = None,
        temperature: float = 1.0,
        differentiable_entropy: bool = False,
    ) -> None:
        """differentiable_entropy: only an entropy bonus needs its gradient, which keeps another (B, T, vocabulary)."""
        super().__init__()
        self.language_model = language_model
        self.value_model = value_model
        self.temperature = temperature
        self.differentiable_entropy = differentiable_entropy
        self._no_split_modules = getattr(language_model, "_no_split_modules", None)  # the blocks that FSDP2 shards
        self.value_head: nn.Linear | None = None
        if value_model is None:
            embeddings = language_model.get_output_embeddings().weight
            self.value_head = nn.Linear(embeddings.shape[1], 1, dtype=embeddings.dtype, device=embeddings.device)
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)

    def checkpoint_activations(self) -> None:
        """From now on, in training mode, activations are computed again in the backward pass: less memory, more time.

        Those of the language model, and of a value model of its own.
        """
        self.language_model.activation_checkpointing_enable()
        if self.value_model is not None:
            self.value_model.trunk.activation_checkpointing_enable()

    def forward(
        self, *, prompt_ids: Tensor, prompt_mask: Tensor, response_ids: Tensor, response_mask: Tensor
    ) -> Evaluation:
        """prompt_ids, prompt_mask (B, P), response_ids, response_mask (B, T) → Evaluation, each (B, T) float32."""
        inputs = {
            "prompt_ids": prompt_ids,
            "prompt_mask": prompt_mask,
            "response_ids": response_ids,
            "response_mask": response_mask,
        }
        logits, hidden = response_logits(self.language_model, inputs, hidden=self.value_head is not None)
        if self.value_head is not None:
            assert hidden is not None
            values = self.value_head(hidden).squeeze(-1).float()
        else:
            assert self.value_model is not None
            values = at_predicting_positions(self.value_model(*sequences(inputs)), prompt_ids, response_ids)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.differentiable_entropy):
            entropy = entropy_of(logits, temperature=self.temperature)
        logprobs = logprobs_of(logits, safe_ids(response_ids, response_mask), temperature=self.temperature)
        return Evaluation(logprobs, entropy, values)


def response_logprobs(language_model: PreTrainedModel, inputs: Inputs, *, temperature: float) -> Tensor:
    """log π(token) of each response token under a model without a value head, such as the reference. → (B, T)."""
    logits, _ = response_logits(language_model, inputs, hidden=False)
    ids = safe_ids(inputs["response_ids"], inputs["response_mask"])
    return logprobs_of(logits, ids, temperature=temperature)


def response_logits(language_model: PreTrainedModel, inputs: Inputs, *, hidden: bool) -> tuple[Tensor, Tensor | None]:
    """Logits at the positions that predict the response, (B, T, V), and there the last hidden state.

    The head runs on the response's positions alone.
    """
    ids, mask = sequences(inputs)
    steps = inputs["response_ids"].shape[1]
    output = language_model(
        **model_inputs(language_model, ids, mask),
        use_cache=False,
        logits_to_keep=steps + 1,
        output_hidden_states=hidden,
    )
    return output.logits[:, -steps - 1 : -1], output.hidden_states[-1][:, -steps - 1 : -1] if hidden else None


def sequences(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Prompt and response in a row: ids, mask, each (B, P + T)."""
    return (
        torch.cat([inputs["prompt_ids"], inputs["response_ids"]], dim=1),
        torch.cat([inputs["prompt_mask"], inputs["response_mask"]], dim=1),
    )


def at_predicting_positions(per_position: Tensor, prompt_ids: Tensor, response_ids: Tensor) -> Tensor:
    """The columns P − 1 … P + T − 2 of (B, P + T): those that predict the T tokens of the response."""
    start = prompt_ids.shape[1] - 1
    return per_position[:, start : start + response_ids.shape[1]]


def safe_ids(ids: Tensor, mask: Tensor) -> Tensor:
    """ids with 0 where the mask is False: the id of padding may lie outside the vocabulary."""
    return torch.where(mask, ids, 0)
