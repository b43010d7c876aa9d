"""The loop that the two supervised stages share: shuffled batches, one optimizer step each, evaluation, checkpoints."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ppo_rlhf.config import SFTConfig, SupervisedConfig
from ppo_rlhf.data import stream
from ppo_rlhf.errors import UserError
from ppo_rlhf.micro_batches import MicroBatch, average_gradients, local_gradients
from ppo_rlhf.optimizer import OptimizerSettings, learning_rate, make_optimizer, set_learning_rate
from ppo_rlhf.run import LoopState, Run, whole_weights
from ppo_rlhf.seeding import permutation
from ppo_rlhf.train import Callback

WINDOW = 16  # batches whose examples are sorted by length together, so that a batch's examples are of like length


@dataclass(frozen=True)
class HeldOut:
    """One evaluation on held-out data."""

    metrics: dict[str, float]  # eval/…
    samples: list[dict[str, Any]]  # of the first few examples, for samples.jsonl


@dataclass(frozen=True)
class Task:
    """What a supervised stage optimises, as functions of row numbers of its training data."""

    batch: Callable[[int], Sequence[int]]  # step → the rows of its global batch, a function of the step alone
    weight: Callable[[Sequence[int]], float]  # what a batch's loss is divided by: its tokens, or its rankings
    loss: Callable[[nn.Module, Sequence[int], Tensor], Tensor]  # (module, rows, count) → Σ of losses ÷ count
    evaluate: Callable[[], HeldOut]  # over all processes
    quality: Callable[[dict[str, float]], float]  # of held-out metrics: higher is better
    save: Callable[[Path], None]  # writes the model as a folder that transformers loads
    example: Callable[[int], dict[str, Any]]  # a row of the training data, for bad_samples.jsonl


def evaluation_batch(micro_batch_size: int | None) -> int:
    """Examples of one forward in evaluation: 64, fewer where a micro-batch has fewer."""
    return min(64, micro_batch_size or 64)


def num_steps_of(config: SupervisedConfig, num_examples: int, accelerator: Accelerator) -> int:
    """Optimizer steps of the whole run: every batch is full, what is left of a pass begins the next.

    Raises UserError for a batch larger than the data, or one that the processes cannot share evenly.
    """
    if config.batch_size > num_examples:
        raise UserError(
            f"batch_size={config.batch_size} is larger than the training data, {num_examples} examples; lower it."
        )
    if config.batch_size % accelerator.num_processes:
        raise UserError(
            f"batch_size={config.batch_size} does not divide between {accelerator.num_processes} processes."
        )
    return max(1, round(config.num_epochs * num_examples / config.batch_size))


def fit(
    module: nn.Module,
    task: Task,
    config: SupervisedConfig,
    optimizer_settings: OptimizerSettings,
    run: Run,
    *,
    num_steps: int,
    callbacks: Iterable[Callback] = (),
) -> LoopState:
    """Trains the module; → the loop's last state. callbacks: called after each step with its number and metrics.

    The model to keep, the best evaluated one or the last, is in the run's folder `best`.
    """
    accelerator = run.accelerator
    optimizer = make_optimizer(module, optimizer_settings)
    wrapped, optimizer = accelerator.prepare(module, optimizer)
    micro_batch = MicroBatch(config.micro_batch_size, accelerator, setting="micro_batch_size")
    state = run.resume()
    if state is None:
        with whole_weights(wrapped):
            before = task.evaluate()
        state = LoopState(before=before.metrics)
        run.log(0, before.metrics)
        run.log_held_out(0, before.samples)

    while state.step < num_steps:
        set_learning_rate(optimizer, learning_rate(optimizer_settings, state.step, num_steps))
        rows = task.batch(state.step)
        module.train()
        metrics = _step(wrapped, optimizer, task, rows, config, accelerator, micro_batch)
        if metrics["skipped_steps"]:
            run.log_bad_samples([{"step": state.step + 1, "row": row, **task.example(row)} for row in rows])
        state = replace(state, step=state.step + 1)
        last = state.step == num_steps
        metrics |= {"lr": learning_rate(optimizer_settings, state.step - 1, num_steps)}
        if last or (config.eval_every and state.step % config.eval_every == 0):
            with whole_weights(wrapped):
                held_out = task.evaluate()
            metrics |= held_out.metrics
            run.log_held_out(state.step, held_out.samples)
            quality = task.quality(held_out.metrics)
            if math.isnan(quality):  # which nothing would beat
                quality = -math.inf
            if quality > state.best or not config.keep_best or not state.after:
                state = replace(state, best=quality, after=held_out.metrics)
                with whole_weights(wrapped):
                    run.save_model("best", task.save)
        run.log(state.step, metrics)
        if last or (config.save_every and state.step % config.save_every == 0):
            run.save_checkpoint(state)
        for callback in callbacks:
            callback(state.step, metrics)
        run.stop_if_asked(state)
    return state


def batch_of(step: int, num_steps: int, config: SupervisedConfig, lengths: Sequence[int]) -> list[int]:
    """The global batch of a step, a function of the step alone.

    Windows of the shuffled stream are sorted by length and cut into batches, whose order is shuffled again: less
    padding. No window reaches over the end of a pass, or two copies of an example, of one length, would meet in a
    batch; what a pass's last batch takes from the next stays in that batch.
    """
    size, total = config.batch_size, len(lengths)
    number = step * size // total  # the pass in which the batch begins
    begin, end = (-(-at * total // size) for at in (number, number + 1))  # the steps that begin in it
    first = begin + (step - begin) // WINDOW * WINDOW
    last = min(first + WINDOW, end, num_steps)
    rows = stream(total, first * size, last * size, config.seed).tolist()
    places = sorted(range(len(rows)), key=lambda place: ((first * size + place) // total, lengths[rows[place]]))
    batch = int(permutation(last - first, config.seed, "window", first)[step - first])
    return [rows[place] for place in places[batch * size : (batch + 1) * size]]


def token_batches(lengths: Sequence[int], config: SFTConfig, budget: int, num_processes: int) -> list[list[int]]:
    """The global batches of a run, each of as many whole examples of the shuffled stream as `budget` tokens hold.

    Every batch is full: the last one takes from the next pass what it lacks. Raises UserError for a budget that an
    example exceeds, or that leaves a process without one.
    """
    batches: list[list[int]] = []
    batch: list[int] = []
    tokens, left = 0, round(config.num_epochs * len(lengths))
    passes = (permutation(len(lengths), config.seed, "pass", number).tolist() for number in itertools.count())
    for row in itertools.chain.from_iterable(passes):
        if tokens + lengths[row] > budget:
            if len(batch) < num_processes:
                raise UserError(
                    f"batch_tokens={budget} holds {len(batch)} demonstrations beside one of {lengths[row]} tokens, "
                    f"fewer than the {num_processes} processes need; raise it."
                )
            batches.append(batch)
            batch, tokens = [], 0
            if left <= 0:
                return batches
        batch.append(row)
        tokens, left = tokens + lengths[row], left - 1
    raise AssertionError("the passes never end")


def _step(
    wrapped: nn.Module,
    optimizer: torch.optim.Optimizer,
    task: Task,
    rows: Sequence[int],
    config: SupervisedConfig,
    accelerator: Accelerator,
    micro_batch: MicroBatch,
) -> dict[str, float]:
    """One optimizer step on a global batch, whatever its micro-batches and processes."""
    # The mean of the processes' gradients is taken, hence the count per process.
    count = torch.tensor(task.weight(rows) / accelerator.num_processes, device=accelerator.device)
    mine = rows[accelerator.process_index :: accelerator.num_processes]  # those of like length are neighbours
    largest = -(-len(rows) // accelerator.num_processes)  # share of a process

    def gradient(size: int) -> Tensor:
        """Adds this process's gradient to the parameters'; → its loss."""
        total = torch.zeros((), device=accelerator.device)
        for start in range(0, largest, size):
            part = mine[start : start + size]
            with local_gradients(wrapped, accelerator, last=start + size >= largest):
                loss = task.loss(wrapped, part or mine[-1:], count)
                if not part:  # sharded models wait for all processes in each pass
                    loss = 0 * loss
                accelerator.backward(loss)
            total += loss.detach()
        return total

    total = micro_batch.fitting(gradient, largest, undo=optimizer.zero_grad)
    average_gradients(wrapped.parameters(), accelerator)
    grad_norm = float(accelerator.clip_grad_norm_(wrapped.parameters(), config.max_grad_norm))
    finite = math.isfinite(grad_norm)
    if finite or accelerator.scaler is not None:  # fp16: the scaler itself leaves out a bad step
        optimizer.step()
    optimizer.zero_grad()
    mean = float(accelerator.reduce(total, "mean"))
    return {"loss": mean, "grad_norm": grad_norm, "skipped_steps": int(not finite)}
