"""PPO-ptx: the language-modelling loss on texts that joins PPO's in the same optimizer steps (Ouyang et al., 2022)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ppo_rlhf.config import PPOConfig
from ppo_rlhf.core import masked_mean
from ppo_rlhf.data import load_rows, stream
from ppo_rlhf.models import right_padded
from ppo_rlhf.policy import Inputs
from ppo_rlhf.run import share_of
from ppo_rlhf.train.sft import Demonstration, encode
from ppo_rlhf.update import AuxiliaryLosses


def load_texts(config: PPOConfig, tokenizer: PreTrainedTokenizerBase, *, longest: int) -> list[Demonstration]:
    """The texts of `pretraining.data`, tokenised and cut to max_length; none where there are none.

    Raises UserError for what is wrong with them.
    """
    settings = config.pretraining
    if settings.data is None:
        return []
    rows = load_rows(settings.data, required=(), setting="pretraining.data")
    texts, _ = encode(rows, tokenizer, longest=min(settings.max_length, longest), cut=True)
    return texts


def pretraining_of(
    model: nn.Module, texts: Sequence[Demonstration], step: int, config: PPOConfig, accelerator: Accelerator
) -> AuxiliaryLosses | None:
    """What joins the optimizer steps of the update after rollout `step`; None without texts."""
    first = step * config.ppo.num_epochs * config.ppo.num_minibatches
    if not texts:
        return None
    return lambda number: pretraining_losses(model, texts, first + number, config, accelerator)


def pretraining_losses(
    model: nn.Module, texts: Sequence[Demonstration], step: int, config: PPOConfig, accelerator: Accelerator
) -> Iterator[Tensor]:
    """coef · cross-entropy of optimizer step `step`, by micro-batches, which add up to coef · its mean in nats over the
    tokens of all processes' texts. A function of the step alone, so that a resumed run reads on where it was.
    """
    settings = config.pretraining
    size = settings.batch_size
    batch = [texts[row] for row in stream(len(texts), step * size, (step + 1) * size, config.seed).tolist()]
    # DDP averages gradients, hence the count per process.
    count = sum(len(text.ids) - text.start for text in batch) / accelerator.num_processes
    mine = batch[share_of(size, accelerator)]
    for start in range(0, len(mine), settings.micro_batch_size or size):
        inputs = _inputs_of(mine[start : start + (settings.micro_batch_size or size)], accelerator.device)
        logprobs = model(**inputs).logprobs
        yield settings.coef * masked_mean(-logprobs, inputs["response_mask"], count=count)


def _inputs_of(texts: Sequence[Demonstration], device: torch.device) -> Inputs:
    """The policy's keyword arguments: what is given as the prompt, left-padded, and what is learnt as the response."""
    reversed_ids, reversed_mask = right_padded([text.ids[: text.start][::-1] for text in texts], device)
    ids, mask = right_padded([text.ids[text.start :] for text in texts], device)
    return {
        "prompt_ids": reversed_ids.flip(1),
        "prompt_mask": reversed_mask.flip(1),
        "response_ids": ids,
        "response_mask": mask,
    }
