"""A step's rollout on its way to the update: scores that may still be under way, and its place in a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from ppo_rlhf.config import PPOConfig
from ppo_rlhf.prompts import PromptBatch
from ppo_rlhf.rewards import Scores
from ppo_rlhf.rollout import Rollout, inputs_of
from ppo_rlhf.run import LoopState, gathered, share_of
from ppo_rlhf.sampling import Responses, texts_of
from ppo_rlhf.train.ppo_parts import Parts
from ppo_rlhf.train.ppo_records import Clock
from ppo_rlhf.train.scoring import scores_of

PLACE = "ahead/"  # of a batch among a loop's tensors
EVALUATED = ("logprobs", "ref_logprobs", "values", "entropy")  # fields of a rollout
ScoredLater = Callable[[], list[Scores]]  # waits for the scores by the reward, and by the gold one where there is one


@dataclass(frozen=True)
class Batch:
    """What the policy said in one step, and what is known of it before the update."""

    prompts: PromptBatch
    responses: Responses
    rollout: Rollout
    scores: ScoredLater
    clock: Clock  # of sampling and evaluation; the update goes on with it


def prompts_of(step: int, parts: Parts, config: PPOConfig, accelerator: Accelerator) -> PromptBatch:
    """This process's prompts of a step, a function of the step alone."""
    rows = parts.rows_of(step, config)[share_of(config.batch_size, accelerator)]
    return parts.prompts.batch(rows, accelerator.device)


# ---------------------------------------------------------------------------------------------------------- scoring


@contextmanager
def scoring_thread() -> Iterator[Executor]:
    """A thread in which rewards are called one after the other; what has not begun at an error is left out."""
    worker = ThreadPoolExecutor(1, thread_name_prefix="scoring")
    try:
        yield worker
    finally:
        worker.shutdown(cancel_futures=True)


class Scoring:
    """The scores of a batch, group by group, each by the run's reward and its gold one.

    With a worker a group is scored there from when it is added, and what a reward raises comes out of `scores`; without
    one all are scored in `scores`.
    """

    def __init__(self, prompts: PromptBatch, parts: Parts, worker: Executor | None) -> None:
        self.prompts = prompts
        self.parts = parts
        self.worker = worker
        self.rows: list[int] = []
        self.groups: list[ScoredLater] = []

    def add(self, rows: Sequence[int], responses: Responses) -> None:
        """The responses of these rows of the batch have ended."""
        prompts = [self.prompts.texts[row] for row in rows]
        columns = self.parts.prompts.columns_of([self.prompts.rows[row] for row in rows])
        rewards = [reward for reward in (self.parts.reward, self.parts.gold) if reward is not None]

        def scored() -> list[Scores]:
            # One that is not finite makes all advantages NaN, and all of the update's steps are skipped.
            return [
                scores_of(reward, prompts, responses, columns, self.parts.tokenizer, must_be_finite=False)
                for reward in rewards
            ]

        self.rows += rows
        self.groups.append(scored if self.worker is None else self.worker.submit(scored).result)

    def scores(self) -> list[Scores]:
        """All scores, by each reward, in the order of the batch."""
        order = torch.tensor(self.rows).argsort()
        return [joined(pieces, order) for pieces in zip(*(group() for group in self.groups), strict=True)]


def joined(pieces: Sequence[Scores], order: Tensor) -> Scores:
    """The scores of groups as one, its i-th row the order[i]-th of theirs."""
    parts = {name: torch.cat([piece.parts[name] for piece in pieces])[order] for name in pieces[0].parts}
    dense = None
    if pieces[0].dense is not None:
        widest = max(piece.dense.shape[1] for piece in pieces if piece.dense is not None)
        padded = [F.pad(x, (0, widest - x.shape[1])) for x in (piece.dense for piece in pieces) if x is not None]
        dense = torch.cat(padded)[order]
    return Scores(torch.cat([piece.total for piece in pieces])[order], parts, dense)


# ----------------------------------------------------------------------------------------------------- a checkpoint


def tensors_of(batch: Batch | None) -> dict[str, Tensor]:
    """All of a batch that a resumed run cannot find again, whose policy has moved on: of all processes, each (B, …).

    Waits for the scores; all processes call it together. Nothing of None.
    """
    if batch is None:
        return {}
    responses = batch.responses
    own = {
        "ids": responses.ids,
        "mask": responses.mask,
        "finished": responses.finished,
        **({} if responses.logprobs is None else {"sampled_logprobs": responses.logprobs}),
        **{name: getattr(batch.rollout, name) for name in EVALUATED},
        **{f"seconds/{phase}": torch.full((len(batch.prompts),), x) for phase, x in batch.clock.laps.items()},
    }
    for number, scores in enumerate(batch.scores()):
        own |= {f"scores/{number}/{name}": x for name, x in {"": scores.total, **scores.parts}.items()}
        if scores.dense is not None:
            own[f"dense/{number}"] = scores.dense
    pieces = gathered([{name: tensor.cpu() for name, tensor in own.items()}])
    widest = max(piece["ids"].shape[1] for piece in pieces)
    return {PLACE + name: torch.cat([_widened(piece, name, widest) for piece in pieces]) for name in own}


def _widened(piece: dict[str, Tensor], name: str, widest: int) -> Tensor:
    missing = widest - piece["ids"].shape[1]
    return F.pad(piece[name], (0, missing)) if piece[name].dim() == 2 else piece[name]


def restored_batch(
    state: LoopState, parts: Parts, config: PPOConfig, accelerator: Accelerator
) -> tuple[LoopState, Batch | None]:
    """The state without the batch of the next step that was saved with it, and this process's share of that batch.

    None where none was saved.
    """
    tensors = {name.removeprefix(PLACE): x for name, x in state.tensors.items() if name.startswith(PLACE)}
    if not tensors:
        return state, None
    state = replace(state, tensors={name: x for name, x in state.tensors.items() if not name.startswith(PLACE)})
    own = {name: x[share_of(config.batch_size, accelerator)].to(accelerator.device) for name, x in tensors.items()}
    width = int(own["mask"].sum(1).max())
    own = {name: x[:, : width + (name == "values")] if x.dim() == 2 else x for name, x in own.items()}
    prompts = prompts_of(state.step, parts, config, accelerator)
    texts = texts_of(own["ids"], own["mask"], parts.tokenizer)
    responses = Responses(own["ids"], own["mask"], own["finished"], texts, own.get("sampled_logprobs"))
    rollout = Rollout(
        inputs=inputs_of(prompts, responses), mask=responses.mask, **{name: own[name] for name in EVALUATED}
    )
    scores: list[dict[str, Tensor]] = [{}, {}]
    laps: dict[str, float] = {}
    for name, x in own.items():
        kind, _, rest = name.partition("/")
        if kind == "scores":
            number, _, part = rest.partition("/")
            scores[int(number)][part] = x.cpu()
        elif kind == "seconds":
            laps[rest] = float(x[0])
    saved = [Scores(each.pop(""), each, own.get(f"dense/{number}")) for number, each in enumerate(scores) if each]
    return state, Batch(prompts, responses, rollout, scores=lambda: saved, clock=Clock(laps))
