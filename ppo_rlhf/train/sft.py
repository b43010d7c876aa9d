"""Supervised fine-tuning: demonstrations → policy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppo_rlhf.compute import set_up_products
from ppo_rlhf.config import SFTConfig
from ppo_rlhf.core import masked_mean, masked_sum
from ppo_rlhf.data import text_column
from ppo_rlhf.errors import UserError
from ppo_rlhf.models import context_length, evaluating, right_padded, save_policy, use_quick_kernels
from ppo_rlhf.policy import response_logprobs
from ppo_rlhf.prompts import Prompts
from ppo_rlhf.run import SAMPLES_KEPT, begin, share_of
from ppo_rlhf.sampling import sample
from ppo_rlhf.seeding import uniform_rows
from ppo_rlhf.settings import SamplingSettings
from ppo_rlhf.train import Callback
from ppo_rlhf.train.inputs import policy_with_tokenizer, training_and_held_out
from ppo_rlhf.train.supervised import HeldOut, Task, fit, num_steps_of

EVAL_BATCH = 64  # examples of one forward in evaluation


@dataclass(frozen=True)
class Demonstration:
    """A tokenised demonstration."""

    ids: list[int]
    start: int  # tokens from here on are learnt: the completion and eos


def train(
    config: SFTConfig,
    *,
    policy: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    data: Iterable[dict[str, Any]] | None = None,
    callbacks: Iterable[Callback] = (),
) -> dict[str, Any]:
    """Fine-tunes the policy on demonstrations by the cross-entropy of their completions; → the run's summary.

    policy with tokenizer, data: objects that take the place of the configuration's names. The loss of a step is a mean
    over the tokens of its whole batch. Raises UserError for what is wrong with the configuration or the data.
    """
    start = begin(config, "sft")
    if start is None:
        return {"finished": config.output_dir}
    accelerator = start.accelerator
    set_up_products(config.matmul_precision, accelerator.device, torch.float32)
    policy, tokenizer = policy_with_tokenizer(config, policy, tokenizer, what="the language model to start from")
    rows, eval_rows = training_and_held_out(
        config, data, required=(), what="demonstrations with `prompt` and `completion`, or `text`"
    )
    longest = min(config.max_length or 2**31, context_length(policy))
    demonstrations, num_cut = encode(rows, tokenizer, longest=longest, cut=config.max_length is not None)
    eval_demonstrations, _ = encode(eval_rows, tokenizer, longest=longest, cut=config.max_length is not None)
    num_steps = num_steps_of(config, len(demonstrations), accelerator)
    module = CompletionModule(use_quick_kernels(policy).to(accelerator.device))

    def loss(module: nn.Module, batch: Sequence[int], count: Tensor) -> Tensor:
        logprobs, learnt = completion_logprobs(module, [demonstrations[row] for row in batch], accelerator.device)
        return masked_mean(-logprobs, learnt, count=count)

    def evaluate() -> HeldOut:
        with evaluating(module), accelerator.autocast():
            return HeldOut(
                {"eval/loss": held_out_loss(module, eval_demonstrations, accelerator)},
                responses_beside(eval_rows[:SAMPLES_KEPT], policy, tokenizer, longest=longest, seed=config.seed),
            )

    task = Task(
        lengths=[len(demonstration.ids) for demonstration in demonstrations],
        weight=lambda batch: sum(len(demonstrations[row].ids) - demonstrations[row].start for row in batch),
        loss=loss,
        evaluate=evaluate,
        quality=lambda metrics: -metrics["eval/loss"],
        save=lambda folder: save_policy(policy, tokenizer, folder),
        example=lambda row: dict(rows[row]),
    )
    with start.run(num_steps=num_steps) as run:
        if num_cut:
            run.progress.tell(
                f"{num_cut} of {len(demonstrations)} demonstrations were cut to max_length={longest} tokens."
            )
        state = fit(module, task, config, config.optimizer, run, num_steps=num_steps, callbacks=callbacks)
        run.promote("best", "policy")
        return run.finish({"loss_before": state.before["eval/loss"], "loss_after": state.after["eval/loss"]})


@torch.no_grad()
def held_out_loss(module: nn.Module, demonstrations: Sequence[Demonstration], accelerator: Accelerator) -> float:
    """Mean cross-entropy over all learnt tokens of all processes, in nats."""
    mine = demonstrations[share_of(len(demonstrations), accelerator)]
    totals = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    for start in range(0, len(mine), EVAL_BATCH):
        logprobs, learnt = completion_logprobs(module, mine[start : start + EVAL_BATCH], accelerator.device)
        totals += torch.stack([masked_sum(-logprobs.double(), learnt), learnt.sum().double()])
    nll, tokens = accelerator.reduce(totals).tolist()
    return nll / tokens


def responses_beside(
    rows: Sequence[dict[str, Any]],
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    longest: int,
    seed: int,
) -> list[dict[str, Any]]:
    """A response of the policy beside each demonstration, by the same noise at every call; none of plain texts."""
    if "completion" not in rows[0]:
        return []
    prompts = Prompts(rows, tokenizer, longest=longest - 1, setting="data")
    room = longest - max(map(len, prompts.ids))
    settings = SamplingSettings(max_new_tokens=min(SamplingSettings.max_new_tokens, room))
    numbers = list(range(len(rows)))
    noise = uniform_rows(numbers, settings.max_new_tokens, seed, "beside demonstrations")
    responses = sample(policy, tokenizer, prompts.batch(numbers, policy.device), settings, noise)
    return [
        {"prompt": row["prompt"], "demonstration": row["completion"], "response": response, "finished": finished}
        for row, response, finished in zip(rows, responses.texts, responses.finished.tolist(), strict=True)
    ]


def encode(
    rows: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, *, longest: int, cut: bool
) -> tuple[list[Demonstration], int]:
    """Demonstrations with eos at their end, from `prompt` and `completion` or from `text`; → and how many were cut.

    Prompt and completion are encoded apart, as they are when the policy responds. Of a plain text everything after its
    first token is learnt.
    """
    if "completion" in rows[0]:
        prompts = text_column(rows, "prompt", setting="data")
        completions = text_column(rows, "completion", setting="data")
        prompt_ids = tokenizer(prompts)["input_ids"]
        completion_ids = tokenizer(completions, add_special_tokens=False)["input_ids"]
    elif "text" in rows[0]:
        prompt_ids = [ids[:1] for ids in tokenizer(text_column(rows, "text", setting="data"))["input_ids"]]
        completion_ids = [ids[1:] for ids in tokenizer([row["text"] for row in rows])["input_ids"]]
    else:
        raise UserError(f"data: demonstrations need `prompt` and `completion`, or `text`; found {', '.join(rows[0])}.")
    demonstrations, num_cut = [], 0
    for index, (prompt, completion) in enumerate(zip(prompt_ids, completion_ids, strict=True)):
        ids = [*prompt, *completion, tokenizer.eos_token_id]
        if not prompt:  # nothing would predict the first token to learn
            raise UserError(f"data: the tokenizer finds no token in the text or prompt of demonstration {index}.")
        if len(prompt) >= longest or (len(ids) > longest and not cut):
            raise UserError(
                f"data: demonstration {index} has {len(ids)} tokens ({len(prompt)} of them the prompt), but {longest} "
                "fit: set max_length to cut completions, or shorten the prompt."
            )
        num_cut += len(ids) > longest
        demonstrations.append(Demonstration(ids[:longest], len(prompt)))
    return demonstrations, num_cut


class CompletionModule(nn.Module):
    """log π of a language model's responses, by a padding-free forward, as a module that can be wrapped and sharded."""

    def __init__(self, language_model: PreTrainedModel) -> None:
        super().__init__()
        self.language_model = language_model
        self._no_split_modules = getattr(language_model, "_no_split_modules", None)  # the blocks that FSDP2 shards

    def forward(self, **inputs: Tensor) -> Tensor:
        """prompt_ids, prompt_mask (B, P), response_ids, response_mask (B, T) → (B, T), 0 where the mask is False."""
        return response_logprobs(self.language_model, inputs, temperature=1.0)


def completion_logprobs(
    module: nn.Module, demonstrations: Sequence[Demonstration], device: torch.device
) -> tuple[Tensor, Tensor]:
    """log π of the completions' tokens, (B, T), and the mask of them; what is not completion is 0."""
    reversed_prompts = right_padded([each.ids[: each.start][::-1] for each in demonstrations], device)
    prompt_ids, prompt_mask = (x.flip(1) for x in reversed_prompts)  # padding comes before a prompt
    response_ids, response_mask = right_padded([each.ids[each.start :] for each in demonstrations], device)
    inputs = {"prompt_ids": prompt_ids, "prompt_mask": prompt_mask}
    return module(**inputs, response_ids=response_ids, response_mask=response_mask), response_mask
