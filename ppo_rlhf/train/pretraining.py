"""PPO-ptx: the language-modelling loss on texts that joins PPO's in the same optimizer steps (Ouyang et al., 2022)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ppo_rlhf.config import PPOConfig
from ppo_rlhf.core import masked_mean
from ppo_rlhf.data import Example, demonstrations, load_rows, stream
from ppo_rlhf.run import share_of
from ppo_rlhf.train.sft import completion_inputs
from ppo_rlhf.update import AuxiliaryLosses


def load_texts(config: PPOConfig, tokenizer: PreTrainedTokenizerBase, *, longest: int) -> Sequence[Example]:
    """The texts of `pretraining.data`, tokenised and cut to max_length; none where there are none.

    Raises UserError for what is wrong with them.
    """
    settings = config.pretraining
    if settings.data is None:
        return []
    rows = load_rows(settings.data, required=(), setting="pretraining.data")
    longest = min(settings.max_length, longest)
    return demonstrations(rows, tokenizer, longest=longest, too_long="right", setting="pretraining.data")


def pretraining_of(
    model: nn.Module, texts: Sequence[Example], step: int, config: PPOConfig, accelerator: Accelerator
) -> AuxiliaryLosses | None:
    """What joins the optimizer steps of the update after rollout `step`; None without texts."""
    first = step * config.ppo.num_epochs * config.ppo.num_minibatches
    if not texts:
        return None
    return lambda number: pretraining_losses(model, texts, first + number, config, accelerator)


def pretraining_losses(
    model: nn.Module, texts: Sequence[Example], step: int, config: PPOConfig, accelerator: Accelerator
) -> Iterator[Tensor]:
    """coef · cross-entropy of optimizer step `step`, by micro-batches, which add up to coef · its mean in nats over the
    tokens of all processes' texts. A function of the step alone, so that a resumed run reads on where it was.
    """
    settings = config.pretraining
    size = settings.batch_size
    batch = [texts[row] for row in stream(len(texts), step * size, (step + 1) * size, config.seed).tolist()]
    # DDP averages gradients, hence the count per process.
    count = sum(sum(text.learnt) for text in batch) / accelerator.num_processes
    mine = batch[share_of(size, accelerator)]
    for start in range(0, len(mine), settings.micro_batch_size or size):
        inputs, learnt = completion_inputs(
            mine[start : start + (settings.micro_batch_size or size)], accelerator.device
        )
        logprobs = model(**inputs, only="decisions").logprobs
        yield settings.coef * masked_mean(-logprobs, learnt, count=count)
