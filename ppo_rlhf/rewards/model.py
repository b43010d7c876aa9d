"""A reward model: a transformer with one score for a prompt and its response, read at the last token.

It is a plain sequence classifier to transformers. Its normalisation lives in its config as `reward_mean` and
`reward_scale`, which plain transformers does not apply: score = (raw − mean) / scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppo_rlhf.data import prompt_and_response_ids
from ppo_rlhf.errors import UserError
from ppo_rlhf.messages import Message
from ppo_rlhf.models import (
    classifier_without_weights,
    context_length,
    evaluating,
    load_classifier,
    load_tokenizer,
    right_padded,
    save_model,
    tokenizer_with_pad,
)
from ppo_rlhf.packing import Packing, last_hidden_states


class ScoringNetwork(nn.Module):
    """The transformer and its score head, as a module that can be trained and sharded."""

    def __init__(self, classifier: PreTrainedModel) -> None:
        super().__init__()
        self.classifier: Any = classifier  # its trunk and head differ from class to class

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """ids, mask (N, S) → raw scores (N,) float32, and the last hidden states (N, S, d), 0 on padding.

        The score is read at the last position of the mask, never at the last id that is not a pad: a prompt may well
        contain that id.
        """
        packing = Packing.of(ids, mask)
        packed = last_hidden_states(self.classifier.base_model, packing)
        positions = torch.arange(mask.shape[1], device=mask.device)
        last = torch.where(mask, positions, 0).max(dim=1).values
        cells = torch.arange(len(ids), device=ids.device) * mask.shape[1] + last
        scores = self.classifier.score(packed[packing.places_of(cells)])
        return scores.squeeze(-1).float(), packing.padded(packed)


class RewardModel:
    """Scores texts, with a tokenizer of its own, so that a policy of another vocabulary can be scored as well.

    It is a reward function: `reward_model(prompts, responses) -> scores`, normalised.
    """

    def __init__(
        self,
        classifier: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int = 64,
        chat_template: bool = False,
    ) -> None:
        """batch_size: texts scored together, for memory alone. chat_template: prompt and response are put as a user's
        and an assistant's message into the tokenizer's template, for models that were trained so.

        Raises UserError where the tokenizer has no template.
        """
        if chat_template and tokenizer.chat_template is None:
            raise UserError("the reward model's tokenizer has no chat template; leave out chat_template.")
        self.network = ScoringNetwork(classifier)
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.chat_template = chat_template
        self.__name__ = "reward_model"

    @classmethod
    def load(
        cls, source: str | Path, *, setting: str, device: torch.device | str = "cpu", **arguments: Any
    ) -> RewardModel:
        """A saved reward model; arguments: batch_size, chat_template. On the meta device its weights are not read.

        Raises UserError when it cannot be loaded.
        """
        if torch.device(device).type == "meta":
            return cls(*classifier_without_weights(str(source), setting=setting), **arguments)
        classifier = load_classifier(str(source), setting=setting)
        tokenizer = load_tokenizer(str(source), setting=setting)
        classifier.to(torch.device(device))  # type: ignore[arg-type]
        return cls(classifier, tokenizer_with_pad(classifier, tokenizer, setting=setting), **arguments)

    def save(self, folder: Path, *, merge: bool = False) -> None:
        """A folder that transformers loads as a sequence classifier, and `load` with its normalisation.

        merge: an adapter into the weights; else its folder is the adapter's alone.
        """
        save_model(self.classifier, folder, merge=merge)
        self.tokenizer.save_pretrained(folder)

    @property
    def classifier(self) -> Any:
        """The plain transformers model."""
        return self.network.classifier

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.classifier.score.weight.device

    @property
    def mean(self) -> float:
        """Raw score that counts as 0."""
        return float(getattr(self.classifier.config, "reward_mean", 0.0))

    @property
    def scale(self) -> float:
        """Raw difference that counts as 1."""
        return float(getattr(self.classifier.config, "reward_scale", 1.0))

    def set_normalization(self, mean: float, scale: float) -> None:
        """Makes later scores (raw − mean) / scale; saved with the model's config."""
        self.classifier.config.reward_mean = mean
        self.classifier.config.reward_scale = scale

    def encode(
        self, prompts: Sequence[str], responses: Sequence[str], messages: Sequence[list[Message]] | None = None
    ) -> list[list[int]]:
        """Token ids of prompt + response + eos. What does not fit in the context is cut from the prompt's beginning.

        Raises UserError for a response that alone does not fit. With a chat template it is the template that says what
        stands around and between the two, and the whole is cut at its beginning; messages are then the prompts where
        these are conversations.
        """
        if self.chat_template:
            asked = messages or [[{"role": "user", "content": prompt}] for prompt in prompts]
            return self._encode_chats(asked, responses)
        longest = context_length(self.classifier)
        encoded = []
        for prompt, response in prompt_and_response_ids(self.tokenizer, prompts, responses):
            if len(response) > longest:
                raise UserError(f"a response of {len(response) - 1} tokens does not fit the reward model's {longest}.")
            encoded.append([*prompt, *response][-longest:])
        return encoded

    def _encode_chats(self, asked: Sequence[list[Message]], responses: Sequence[str]) -> list[list[int]]:
        chats = [
            [*messages, {"role": "assistant", "content": response}]
            for messages, response in zip(asked, responses, strict=True)
        ]
        encoded: Any = self.tokenizer.apply_chat_template(chats, return_dict=True)
        return [ids[-context_length(self.classifier) :] for ids in encoded["input_ids"]]

    @torch.no_grad()
    def raw_scores(self, encoded: Sequence[Sequence[int]]) -> Tensor:
        """Scores before normalisation, (N,) float32; no dropout acts. Texts of like length are scored together.

        In the type of the weights, also under autocast: the scores of a rollout, of an evaluation, and those that mean
        and scale are set by come from the same arithmetic.
        """
        scores = torch.zeros(len(encoded))
        by_length = sorted(range(len(encoded)), key=lambda index: len(encoded[index]))
        with evaluating(self.network), torch.autocast(self.device.type, enabled=False):
            for start in range(0, len(encoded), self.batch_size):
                rows = by_length[start : start + self.batch_size]
                scores[rows] = self.network(*right_padded([encoded[row] for row in rows], self.device))[0].cpu()
        return scores

    def __call__(self, prompts: list[str], responses: list[str], **columns: Any) -> Tensor:
        """Normalised scores, (N,) float32."""
        raw = self.raw_scores(self.encode(prompts, responses, columns.get("messages")))
        return (raw - self.mean) / self.scale
