"""The three stages in order: demonstrations ► policy ► comparisons of its samples ► reward model ► PPO."""

from __future__ import annotations

import json
import shutil
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppo_rlhf.compute import set_up_products
from ppo_rlhf.config import ComparisonConfig, PipelineConfig
from ppo_rlhf.data import Row, load_rows, stream
from ppo_rlhf.errors import UserError
from ppo_rlhf.models import context_length, load_policy
from ppo_rlhf.prompts import PromptBatch, Prompts
from ppo_rlhf.references import call, is_reference, load_object
from ppo_rlhf.run import (
    gathered,
    is_finished,
    make_accelerator,
    matmul_precision_of,
    new_folder,
    read_config,
    refuse_changes,
    share_of,
    strict_json,
    told_if_unwritable,
    write_config,
    write_text,
)
from ppo_rlhf.sampling import check_stop_ids, sample
from ppo_rlhf.seeding import uniform_rows
from ppo_rlhf.train import ppo, reward_model, sft

STAGES = ("sft", "reward", "ppo")


def run(config: PipelineConfig) -> dict[str, Any]:
    """Runs the stages, each in a run folder of its own inside the pipeline's; → the summary of all.

    A finished stage is not run again when the pipeline is resumed. Raises UserError for a mistake in any stage's
    configuration that can be seen before the first stage starts, and for a stage that was started with another one.
    """
    folder = new_folder(config.output_dir, "pipeline", resume=config.resume)
    check_unchanged(config, folder)
    if is_finished(folder):
        return {"finished": str(folder)}
    check_references(asdict(config))
    check_inputs(config)
    given, config = replace(config, output_dir=str(folder)), filled_in(config, folder)

    accelerator = make_accelerator(folder, precision="no", log_with=())
    accelerator.wait_for_everyone()  # until all have seen that the folder is free
    if accelerator.is_main_process:  # before the first stage, so that it can be resumed by its folder alone
        with told_if_unwritable(folder):
            folder.mkdir(parents=True, exist_ok=True)
            write_config(folder, given)  # without paths into this folder, so that another can be made from it
    try:
        sft.train(config.sft)
    except UserError:
        if accelerator.is_main_process and not (folder / "sft").exists():  # nothing was started
            shutil.rmtree(folder)
        raise
    if given.reward.data is None:
        compare(config, folder)
    reward_model.train(config.reward)
    ppo.train(config.ppo)

    stages = {name: json.loads((folder / name / "summary.json").read_text()) for name in STAGES}
    seconds = {name: summary.pop("seconds") for name, summary in stages.items()}
    summary: dict[str, Any] = {**stages, "seconds": seconds}
    comparisons = folder / "comparisons.json"
    if comparisons.exists():
        summary["comparisons"] = json.loads(comparisons.read_text())
        seconds["comparisons"] = summary["comparisons"].pop("seconds")
    if accelerator.is_main_process:
        write_text(folder / "summary.json", strict_json(summary, indent=1))
    return summary | {"output_dir": str(folder)}


def check_unchanged(config: PipelineConfig, folder: Path) -> None:
    """Raises UserError for a setting that differs from the one with which a part of the pipeline was run already."""
    old, new = read_config(folder), asdict(config)
    if old is None:
        return
    for stage in STAGES:
        if read_config(folder / stage) is not None:
            refuse_changes(folder / stage, {"seed": old["seed"]}, {"seed": config.seed})
            refuse_changes(folder / stage, old[stage], new[stage], prefix=f"{stage}.")
    if (folder / "comparisons.jsonl").exists():
        refuse_changes(folder, old["comparisons"], new["comparisons"], prefix="comparisons.")


def filled_in(config: PipelineConfig, folder: Path) -> PipelineConfig:
    """The configuration with each stage's folder and seed, and each stage's inputs from the stage before."""
    common: dict[str, Any] = {"seed": config.seed, "resume": config.resume}
    policy = str(folder / "sft" / "policy")
    comparisons = None if config.comparisons.annotator is None else str(folder / "comparisons.jsonl")
    return replace(
        config,
        output_dir=str(folder),
        sft=replace(config.sft, output_dir=str(folder / "sft"), **common),
        reward=replace(
            config.reward,
            output_dir=str(folder / "reward"),
            policy=config.reward.policy or policy,
            data=config.reward.data or comparisons,
            **common,
        ),
        ppo=replace(
            config.ppo,
            output_dir=str(folder / "ppo"),
            policy=config.ppo.policy or policy,
            reward=config.ppo.reward or str(folder / "reward" / "reward_model"),
            **common,
        ),
    )


def check_references(settings: dict[Any, Any]) -> None:
    """Raises UserError for a Python object named anywhere in the configuration that cannot be found."""
    for value in settings.values():
        if isinstance(value, dict):
            check_references(value)
        elif isinstance(value, tuple):
            check_references(dict(enumerate(value)))
        elif isinstance(value, str) and is_reference(value):
            load_object(value)


def check_inputs(config: PipelineConfig) -> None:
    """Raises UserError for data of the later stages that is not named, or cannot be read."""
    if config.reward.data is not None:
        load_rows(config.reward.data, required=(), setting="reward.data", columns=config.reward.columns)
    elif config.comparisons.annotator is None:
        raise UserError("reward.data is not set: comparisons, or comparisons.annotator to have some made.")
    elif config.comparisons.prompts is None:
        raise UserError("comparisons.prompts is not set: rows with a column `prompt`.")
    else:
        comparison_prompts(config.comparisons)
    if config.ppo.prompts is None:
        raise UserError("ppo.prompts is not set: rows with a column `prompt`.")
    load_rows(config.ppo.prompts, required=("prompt",), setting="ppo.prompts", columns=config.ppo.columns)


def compare(config: PipelineConfig, folder: Path) -> None:
    """Samples responses of the supervised policy and has them judged: comparisons.jsonl; once a pipeline."""
    target = folder / "comparisons.jsonl"
    if target.exists():
        return
    started = time.monotonic()
    settings, policy_folder = config.comparisons, str(folder / "sft" / "policy")
    accelerator = make_accelerator(folder, precision=config.ppo.precision, log_with=())
    # As the stage whose policy is asked, also where that was finished before this process began.
    products = matmul_precision_of(folder / "sft", config.sft.matmul_precision, accelerator.device)
    set_up_products(products, accelerator.device, torch.float32)
    policy, tokenizer = load_policy(policy_folder, setting="sft")
    check_stop_ids(settings.sampling, tokenizer)
    policy.to(accelerator.device)
    longest = context_length(policy) - settings.sampling.max_new_tokens
    rows = comparison_prompts(settings)
    prompts = Prompts(rows, tokenizer, longest=longest, setting="comparisons.prompts")
    chosen = stream(len(prompts), 0, settings.num_prompts, config.seed).tolist()
    numbers = list(range(len(chosen)))[share_of(len(chosen), accelerator)]
    pairs = []
    if numbers:  # fewer prompts than processes leave some without any
        batch = prompts.batch([chosen[number] for number in numbers], accelerator.device)
        responses = responses_to(batch, policy, tokenizer, settings, numbers, config.seed)
        pairs = list(zip(batch.texts, responses, strict=True))
    pairs = gathered(pairs)
    if accelerator.is_main_process:  # the annotator is asked once, who may be paid
        judged = call(str(settings.annotator), [p for p, _ in pairs], [r for _, r in pairs], seed=config.seed)
        statistics = {
            "count": len(judged),
            "disagreement": disagreement(judged),
            "seconds": round(time.monotonic() - started, 1),
        }
        write_text(folder / "comparisons.json", strict_json(statistics))
        write_text(target, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in judged))
    accelerator.wait_for_everyone()


def responses_to(
    batch: PromptBatch,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: ComparisonConfig,
    numbers: list[int],
    seed: int,
) -> list[list[str]]:
    """The responses to each prompt, by noise of its own number among all that are compared."""
    found: list[list[str]] = [[] for _ in numbers]
    for repeat in range(settings.responses_per_prompt):
        noise = uniform_rows(numbers, settings.sampling.max_new_tokens, seed, "comparison", repeat)
        sampled = sample(policy, tokenizer, batch, settings.sampling, noise)
        for texts, text in zip(found, sampled.texts, strict=True):
            texts.append(text)
    return found


def comparison_prompts(settings: ComparisonConfig) -> list[Row]:
    """The rows of prompts of which responses are compared."""
    assert settings.prompts is not None
    return load_rows(settings.prompts, required=("prompt",), setting="comparisons.prompts", columns=settings.columns)


def disagreement(rows: Sequence[dict[str, Any]]) -> float | None:
    """Share of the pairs judged more than once on which the judges differ; None where none was.

    Two equal responses leave nothing to differ about and are left out.
    """
    choices: dict[tuple[str, frozenset[str]], list[str]] = defaultdict(list)
    for row in rows:
        if "chosen" in row and row["chosen"] != row["rejected"]:
            choices[row["prompt"], frozenset((row["chosen"], row["rejected"]))].append(row["chosen"])
    repeated = [judged for judged in choices.values() if len(judged) > 1]
    return sum(len(set(judged)) > 1 for judged in repeated) / len(repeated) if repeated else None
