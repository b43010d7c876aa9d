"""Supervised fine-tuning: demonstrations → policy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppo_rlhf.adapters import train_adapter
from ppo_rlhf.compute import set_up_products
from ppo_rlhf.config import SFTConfig
from ppo_rlhf.core import masked_mean
from ppo_rlhf.data import Example, Examples, Row, demonstrations, prompts_and_completions
from ppo_rlhf.model_card import model_card
from ppo_rlhf.models import context_length, evaluating, right_padded, save_policy, use_quick_kernels
from ppo_rlhf.policy import Inputs, response_logprobs
from ppo_rlhf.prompts import Prompts
from ppo_rlhf.run import SAMPLES_KEPT, begin, share_of, write_text
from ppo_rlhf.sampling import sample
from ppo_rlhf.seeding import uniform_rows
from ppo_rlhf.settings import SamplingSettings
from ppo_rlhf.train import Callback
from ppo_rlhf.train.inputs import policy_with_tokenizer, training_and_held_out
from ppo_rlhf.train.supervised import HeldOut, Task, batch_of, evaluation_batch, fit, num_steps_of, token_batches


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
    set_up_products(start.matmul_precision, accelerator.device, torch.float32)
    named = config.policy if policy is None else None
    policy, tokenizer = policy_with_tokenizer(config, policy, tokenizer, what="the language model to start from")
    longest = min(config.max_length or 2**31, context_length(policy))
    examples, eval_examples = load_examples(config, data, tokenizer, longest)
    num_steps, batch = batches_of(config, examples.lengths, accelerator)
    train_adapter(use_quick_kernels(policy), config.lora)
    module = CompletionModule(policy.to(accelerator.device))

    shown = prompts_and_completions(eval_examples.rows(SAMPLES_KEPT), tokenizer, "data")

    def loss(module: nn.Module, batch: Sequence[int], count: Tensor) -> Tensor:
        logprobs, learnt = completion_logprobs(module, [examples[row] for row in batch], accelerator.device)
        return masked_mean(-logprobs, learnt, count=count)

    def evaluate() -> HeldOut:
        with evaluating(module), accelerator.autocast():
            size = evaluation_batch(config.micro_batch_size)
            return HeldOut(
                {"eval/loss": held_out_loss(module, eval_examples, accelerator, batch_size=size)},
                responses_beside(shown, policy, tokenizer, longest=longest, seed=config.seed),
            )

    task = Task(
        batch=batch,
        weight=lambda batch: sum(sum(examples[row].learnt) for row in batch),
        loss=loss,
        evaluate=evaluate,
        quality=lambda metrics: -metrics["eval/loss"],
        save=lambda folder: save_policy(policy, tokenizer, folder, merge=config.lora.merge),
        example=examples.row,
    )
    with start.run(num_steps=num_steps) as run:
        for line in examples.told("demonstrations"):
            run.progress.tell(line)
        state = fit(module, task, config, config.optimizer, run, num_steps=num_steps, callbacks=callbacks)
        run.promote("best", "policy")
        outcome = {"loss_before": state.before["eval/loss"], "loss_after": state.after["eval/loss"]}
        if accelerator.is_main_process:
            write_text(run.folder / "policy" / "README.md", model_card("sft", named, outcome))
        return run.finish(outcome)


def load_examples(
    config: SFTConfig, data: Iterable[Row] | None, tokenizer: PreTrainedTokenizerBase, longest: int
) -> tuple[Examples, Examples]:
    """Demonstrations to train on and held-out ones, in tokens."""
    return training_and_held_out(
        config,
        data,
        what="demonstrations with `prompt` and `completion`, or `text`, or `messages`",
        read=lambda rows, setting: demonstrations_of(config, rows, tokenizer, longest=longest, setting=setting),
        split=lambda examples: examples.split(config.eval_fraction, config.seed, setting="eval_fraction"),
    )


def demonstrations_of(
    config: SFTConfig, rows: list[Row], tokenizer: PreTrainedTokenizerBase, *, longest: int, setting: str
) -> Examples:
    """Rows in tokens, those with more than `longest` treated as the configuration says."""
    too_long = config.too_long or ("refuse" if config.max_length is None else "right")
    return demonstrations(rows, tokenizer, longest=longest, too_long=too_long, setting=setting)


def batches_of(
    config: SFTConfig, lengths: Sequence[int], accelerator: Accelerator
) -> tuple[int, Callable[[int], Sequence[int]]]:
    """How many steps the run has, and the global batch of each: of batch_size demonstrations, or of batch_tokens."""
    if config.batch_tokens is not None:
        batches = token_batches(lengths, config, config.batch_tokens, accelerator.num_processes)
        return len(batches), batches.__getitem__
    num_steps = num_steps_of(config, len(lengths), accelerator)
    return num_steps, lambda step: batch_of(step, num_steps, config, lengths)


def held_out_loss(
    module: nn.Module, examples: Sequence[Example], accelerator: Accelerator, *, batch_size: int
) -> float:
    """Mean cross-entropy over all learnt tokens of all processes, in nats."""
    mine = examples[share_of(len(examples), accelerator)]
    totals = example_losses(module, mine, accelerator.device, batch_size=batch_size).sum(0)
    nll, tokens = accelerator.reduce(totals).tolist()
    return nll / tokens


@torch.no_grad()
def example_losses(module: nn.Module, examples: Sequence[Example], device: torch.device, *, batch_size: int) -> Tensor:
    """The cross-entropy of each example, summed over its learnt tokens, and how many these are. (N, 2) float64."""
    losses = [torch.zeros(0, 2, dtype=torch.float64, device=device)]  # a process may have no example
    for start in range(0, len(examples), batch_size):
        logprobs, learnt = completion_logprobs(module, examples[start : start + batch_size], device)
        nll = torch.where(learnt, -logprobs.double(), 0)
        losses.append(torch.stack([nll.sum(1), learnt.sum(1).double()], dim=1))
    return torch.cat(losses)


def responses_beside(
    rows: Sequence[dict[str, Any]],
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    longest: int,
    seed: int,
) -> list[dict[str, Any]]:
    """A response of the policy beside each demonstration, by the same noise at every call; none of plain texts."""
    if not rows:
        return []
    prompts = Prompts(rows, tokenizer, longest=longest - 1, setting="data", too_long="left")
    room = longest - max(map(len, prompts.ids))
    settings = SamplingSettings(max_new_tokens=min(SamplingSettings.max_new_tokens, room))
    numbers = list(range(len(rows)))
    noise = uniform_rows(numbers, settings.max_new_tokens, seed, "beside demonstrations")
    responses = sample(policy, tokenizer, prompts.batch(numbers, policy.device), settings, noise)
    return [
        {"prompt": prompt, "demonstration": row["completion"], "response": response, "finished": finished}
        for row, prompt, response, finished in zip(
            rows, prompts.texts, responses.texts, responses.finished.tolist(), strict=True
        )
    ]


class CompletionModule(nn.Module):
    """log π of a language model's responses, by a padding-free forward, as a module that can be wrapped and sharded."""

    def __init__(self, language_model: PreTrainedModel) -> None:
        super().__init__()
        self.language_model = language_model
        self._no_split_modules = getattr(language_model, "_no_split_modules", None)  # the blocks that FSDP2 shards

    def forward(self, **inputs: Tensor) -> Tensor:
        """prompt_ids, prompt_mask (B, P), response_ids, response_mask (B, T) → (B, T), 0 where the mask is False."""
        return response_logprobs(self.language_model, inputs, temperature=1.0)


def completion_logprobs(module: nn.Module, examples: Sequence[Example], device: torch.device) -> tuple[Tensor, Tensor]:
    """log π of all tokens from the first that is learnt on, (B, T), and the mask of those that are learnt."""
    inputs, learnt = completion_inputs(examples, device)
    return module(**inputs), learnt


def completion_inputs(examples: Sequence[Example], device: torch.device) -> tuple[Inputs, Tensor]:
    """The arguments of a forward pass over examples: what comes before the first learnt token is the prompt, and the
    rest the response; and the mask of its tokens that are learnt, (B, T).
    """
    reversed_prompts = right_padded([each.ids[: each.start][::-1] for each in examples], device)
    prompt_ids, prompt_mask = (x.flip(1) for x in reversed_prompts)  # padding comes before a prompt
    response_ids, response_mask = right_padded([each.ids[each.start :] for each in examples], device)
    learnt, _ = right_padded([each.learnt[each.start :] for each in examples], device)
    prompt = {"prompt_ids": prompt_ids, "prompt_mask": prompt_mask}
    return prompt | {"response_ids": response_ids, "response_mask": response_mask}, learnt.bool()
