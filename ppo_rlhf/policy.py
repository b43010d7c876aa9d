"""The policy: a causal language model with a value head, which evaluates responses token by token.

The index convention: `logprobs[:, t]` and `values[:, t]` come from the position that *predicts* token t of the
response, index P − 1 + t of prompt and response together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ppo_rlhf.core import Evaluation, entropy_of, head_logprobs, logprobs_of
from ppo_rlhf.models import has_plain_head, model_inputs
from ppo_rlhf.packing import Packing, bucketed, last_hidden_states

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
        """ids, mask (B, S) → values (B, S), float32 (float64 stays), 0 on padding."""
        packing = Packing.of(ids, mask)
        return packing.padded(linear_values(self.head, last_hidden_states(self.trunk, packing)))


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
        with_values: bool = True,
    ) -> None:
        """differentiable_entropy: only an entropy bonus needs its gradient, which keeps another (B, T, vocabulary).
        with_values: without them all values are 0, and there is no head for them.
        """
        super().__init__()
        self.language_model = language_model
        self.value_model = value_model
        self.temperature = temperature
        self.differentiable_entropy = differentiable_entropy
        self._no_split_modules = getattr(language_model, "_no_split_modules", None)  # the blocks that FSDP2 shards
        self.value_head: nn.Linear | None = None
        if value_model is None and with_values:
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

    def value_parameters(self) -> list[nn.Parameter]:
        """The weights of the value function alone: of its head, or of its own model."""
        own = self.value_model if self.value_model is not None else self.value_head
        return [] if own is None else list(own.parameters())

    @property
    def evaluates_in_turn(self) -> bool:
        """Whether decisions and values come from models apart, so that `only` one of them can be asked for."""
        return self.value_model is not None

    def forward(
        self,
        *,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        response_ids: Tensor,
        response_mask: Tensor,
        only: Literal["decisions", "values"] | None = None,
    ) -> Evaluation:
        """prompt_ids, prompt_mask (B, P), response_ids, response_mask (B, T) → Evaluation, each (B, T) float32.

        only: of a policy with a value model of its own, log-probabilities and entropy, or values; the others are 0.
        """
        inputs = {
            "prompt_ids": prompt_ids,
            "prompt_mask": prompt_mask,
            "response_ids": response_ids,
            "response_mask": response_mask,
        }
        tokens = ResponseTokens.of(inputs)
        if only == "values":
            values = self._values(tokens)
            return Evaluation(torch.zeros_like(values), torch.zeros_like(values), values)
        if has_plain_head(self.language_model):
            hidden = tokens.hidden_states(self.language_model.base_model)
            logprobs, entropy = tokens.logprobs(
                self.language_model,
                hidden,
                temperature=self.temperature,
                differentiable_entropy=self.differentiable_entropy,
            )
        else:
            logits, hidden = response_logits(self.language_model, tokens, inputs)
            logprobs = logprobs_of(logits[None], tokens.ids[None], temperature=self.temperature)[0]
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.differentiable_entropy):
                entropy = entropy_of(logits[None], temperature=self.temperature)[0]
        if only != "decisions" and self.value_head is not None:
            values = tokens.padded(linear_values(self.value_head, hidden))
        elif only != "decisions" and self.value_model is not None:
            values = self._values(tokens)
        else:
            values = torch.zeros(tokens.shape, device=hidden.device)
        return Evaluation(tokens.padded(logprobs), tokens.padded(entropy), values)

    def _values(self, tokens: ResponseTokens) -> Tensor:
        """(B, T) by the value model."""
        assert self.value_model is not None
        return tokens.padded(linear_values(self.value_model.head, tokens.hidden_states(self.value_model.trunk)))


@dataclass(frozen=True)
class ResponseTokens:
    """The K tokens of a batch's responses, where they are in it, and the packed tokens that predict them.

    `ids` and `places` are some dummies longer than K, which `padded` drops.
    """

    packing: Packing  # prompts and responses, each without its last token, which predicts nothing
    places: Tensor  # (K + dummies,) the predicting tokens among the packed ones
    ids: Tensor  # (K + dummies,) of the predicted tokens
    cells: Tensor  # (K,) their places in the flattened responses (B · T)
    shape: torch.Size  # (B, T)

    @classmethod
    def of(cls, inputs: Inputs) -> ResponseTokens:
        """Rows without a response take no part."""
        ids, mask = sequences(inputs)
        decided = inputs["response_mask"]
        before = inputs["prompt_ids"].shape[1]
        predicting = torch.zeros_like(mask)
        predicting[:, before - 1 : -1] = decided
        seen = mask & (predicting.flip(1).cumsum(1).flip(1) > 0)  # all up to a row's last predicting token
        packing = Packing.of(torch.where(mask, ids, 0), seen | predicting)
        cells = decided.flatten().nonzero().squeeze(1)
        dummies = (0, bucketed(len(cells)) - len(cells))
        return cls(
            packing=packing,
            places=F.pad(packing.places_of(predicting.flatten().nonzero().squeeze(1)), dummies),
            ids=F.pad(inputs["response_ids"].flatten()[cells], dummies),
            cells=cells,
            shape=decided.shape,
        )

    def hidden_states(self, trunk: nn.Module) -> Tensor:
        """The last hidden state of each predicting token, (K + dummies, d)."""
        return last_hidden_states(trunk, self.packing).index_select(0, self.places)

    def logprobs(
        self, language_model: PreTrainedModel, hidden: Tensor, *, temperature: float, differentiable_entropy: bool
    ) -> tuple[Tensor, Tensor]:
        """log π of the response's tokens, and the entropies of their distributions. Each (K + dummies,)."""
        head: Any = language_model.get_output_embeddings()
        device = hidden.device.type
        narrow = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.weight.dtype
        return head_logprobs(
            hidden.to(narrow),
            head.weight,
            self.ids,
            bias=head.bias,
            temperature=temperature,
            differentiable_entropy=differentiable_entropy,
        )

    def padded(self, each: Tensor) -> Tensor:
        """(K + dummies,) → (B, T) float32 (float64 stays), 0 where no token was decided."""
        each = each[: len(self.cells)]
        return each.new_zeros(self.shape.numel()).index_copy(0, self.cells, each).view(self.shape)


def linear_values(head: nn.Linear, hidden: Tensor) -> Tensor:
    """(…, d) → (…,): a value each, in float32 (float64 stays) whatever the precision."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        return F.linear(hidden.to(wide), head.weight.to(wide), head.bias.to(wide)).squeeze(-1)


def response_logprobs(language_model: PreTrainedModel, inputs: Inputs, *, temperature: float) -> Tensor:
    """log π(token) of each response token under a model without a value head, such as the reference. → (B, T)."""
    tokens = ResponseTokens.of(inputs)
    if not has_plain_head(language_model):
        logits, _ = response_logits(language_model, tokens, inputs)
        return tokens.padded(logprobs_of(logits[None], tokens.ids[None], temperature=temperature)[0])
    hidden = tokens.hidden_states(language_model.base_model)
    logprobs, _ = tokens.logprobs(language_model, hidden, temperature=temperature, differentiable_entropy=False)
    return tokens.padded(logprobs)


def response_logits(language_model: PreTrainedModel, tokens: ResponseTokens, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Logits and last hidden states of the predicting tokens, (K + dummies, V) and (K + dummies, d), by the model's own
    forward: for a head that is more than one linear map.
    """
    ids, mask = sequences(inputs)
    steps = tokens.shape[1]
    output = language_model(
        **model_inputs(language_model, ids, mask), use_cache=False, logits_to_keep=steps + 1, output_hidden_states=True
    )
    cells = F.pad(tokens.cells, (0, len(tokens.ids) - len(tokens.cells)))
    logits, hidden = (x[:, -steps - 1 : -1].flatten(0, 1) for x in (output.logits, output.hidden_states[-1]))
    return logits[cells], hidden[cells]


def sequences(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Prompt and response in a row: ids, mask, each (B, P + T)."""
    return (
        torch.cat([inputs["prompt_ids"], inputs["response_ids"]], dim=1),
        torch.cat([inputs["prompt_mask"], inputs["response_mask"]], dim=1),
    )
