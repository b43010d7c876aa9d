"""What people are to judge: a policy's own samples beside each other, or two policies' against one another."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ppo_rlhf.data import Row, Rows, held_out, load_rows, prompt_texts_and_ids, stream
from ppo_rlhf.errors import UserError
from ppo_rlhf.models import context_length, load_policy
from ppo_rlhf.preferences import Pair, Prompt, text_of
from ppo_rlhf.prompts import Prompts
from ppo_rlhf.rewards import RewardModel
from ppo_rlhf.run import read_config
from ppo_rlhf.sampling import sample
from ppo_rlhf.seeding import uniform_rows
from ppo_rlhf.settings import SamplingSettings


def samples_of_one(run: str, *, prompts: str | None, count: int, responses: int, seed: int) -> list[Pair]:
    """Several responses of a run's policy to each of `count` prompts: those of its configuration, or others.

    Where all are the same there is nothing to judge, and they are left out.
    """
    chosen = chosen_prompts(prompt_rows(run, prompts), count, seed)
    told = sampled(run, chosen, repeats=responses, seed=seed, side=0)
    return [
        Pair(row["prompt"], several, [run] * responses)
        for row, several in zip(chosen, told, strict=True)
        if len(set(several)) > 1
    ]


def samples_of_two(run: str, other: str, *, prompts: str | None, count: int, seed: int) -> list[Pair]:
    """A response of each of two runs' policies to each of `count` prompts, by default held out from the first run."""
    if Path(run).resolve() == Path(other).resolve():
        raise UserError(f"{run} and {other} are the same run; compare it with another.")
    rows = prompt_rows(run, prompts)
    config = read_config(run_folder(run)) or {}
    if prompts is None and config.get("eval_prompts") is None:
        _, rows = held_out(rows, config["eval_fraction"], config["seed"], setting="eval_fraction")
    chosen = chosen_prompts(rows, count, seed)
    sides = [sampled(each, chosen, repeats=1, seed=seed, side=side) for side, each in enumerate((run, other))]
    return [Pair(row["prompt"], [*mine, *yours], [run, other]) for row, mine, yours in zip(chosen, *sides, strict=True)]


def uncertainty_order(pairs: Mapping[int, Pair], reward_model: str) -> dict[int, float]:
    """Of each pair, how far the reward model puts its best response above the next: the smallest is the least sure."""
    model = RewardModel.load(reward_model, setting="--reward-model", device=device())
    prompts = [_as_read(pair.prompt, model.tokenizer) for pair in pairs.values() for _ in pair.responses]
    scores = iter(model(prompts, [text for pair in pairs.values() for text in pair.responses]).tolist())
    margins = {}
    for number, pair in pairs.items():
        best, second, *_ = sorted((next(scores) for _ in pair.responses), reverse=True)
        margins[number] = best - second
    return margins


def _as_read(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> str:
    """A prompt as the reward stage reads it: a chat by the chat template, or without one in turns of text."""
    if isinstance(prompt, str) or tokenizer.chat_template is None:
        return text_of(prompt)
    texts, _ = prompt_texts_and_ids([{"prompt": prompt}], tokenizer, setting="--pairs")
    return texts[0]


def run_folder(run: str) -> Path:
    """The folder of the run itself: of a pipeline, that of its last stage."""
    return Path(run) / "ppo" if (Path(run) / "ppo" / "policy").is_dir() else Path(run)


def prompt_rows(run: str, prompts: str | None) -> list[Row]:
    """The rows of the given prompts, else of those in the run's configuration. Raises UserError where it has none."""
    setting, columns = "--prompts", {}
    if prompts is None:
        config = read_config(run_folder(run)) or {}
        prompts, setting = config.get("eval_prompts") or config.get("prompts"), f"the prompts of {run}"
        columns = config.get("columns", {})
    if prompts is None:
        raise UserError(f"{run} names no prompts; give some with --prompts.")
    return load_rows(prompts, required=("prompt",), setting=setting, columns=columns)


def chosen_prompts(rows: Rows, count: int, seed: int) -> list[Row]:
    """Rows of distinct prompts, `count` of them or as many as there are, in a random order."""
    distinct = list({str(row["prompt"]): row for row in rows}.values())
    return [distinct[index] for index in stream(len(distinct), 0, min(count, len(distinct)), seed).tolist()]


def sampled(run: str, rows: Rows, *, repeats: int, seed: int, side: int) -> list[list[str]]:
    """Responses of a run's policy to each prompt, sampled with the run's own settings."""
    folder = run_folder(run)
    source = folder / "policy" if (folder / "policy").is_dir() else folder
    if not source.is_dir():
        raise UserError(f"there is no run in {run}: no such folder.")
    policy, tokenizer = load_policy(str(source), setting=run)
    policy.to(device())  # type: ignore[arg-type]
    settings = sampling_settings(folder)
    longest = context_length(policy) - settings.max_new_tokens
    prompts = Prompts(rows, tokenizer, longest=longest, setting="--prompts")
    batch = prompts.batch(list(range(len(rows))), policy.device)
    told = []
    for repeat in range(repeats):
        noise = uniform_rows(batch.rows, settings.max_new_tokens, seed, "candidates", side, repeat)
        told.append(sample(policy, tokenizer, batch, settings, noise).texts)
    return [list(several) for several in zip(*told, strict=True)]


def sampling_settings(folder: Path) -> SamplingSettings:
    """How the run sampled; a policy without a run, or a stage that does not sample, as the defaults say."""
    settings: dict[str, Any] = dict((read_config(folder) or {}).get("sampling") or {})
    for name in ("stop_token_ids", "stop_strings"):
        settings[name] = tuple(settings.get(name, ()))
    return SamplingSettings(**settings)


def device() -> torch.device:
    return torch.accelerator.current_accelerator() or torch.device("cpu")
