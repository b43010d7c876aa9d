"""A look at the reward before a run: a few samples, scored."""

from __future__ import annotations

from typing import Any

from ppo_rlhf.config import PPOConfig
from ppo_rlhf.run import make_accelerator
from ppo_rlhf.seeding import uniform_rows
from ppo_rlhf.train.ppo_parts import load_parts
from ppo_rlhf.train.scoring import scores_of

NUM_SAMPLES = 10


def dry_run(config: PPOConfig) -> list[dict[str, Any]]:
    """The first responses that the run would sample, each with its score and what it is made of; writes nothing.

    Raises UserError for whatever would keep the run from starting.
    """
    accelerator = make_accelerator(None, precision=config.precision, log_with=())
    parts = load_parts(config, accelerator, *[None] * 6)
    rows = [row for step in range(NUM_SAMPLES) for row in parts.rows_of(step, config)][:NUM_SAMPLES]
    prompts = parts.prompts.batch(rows, accelerator.device)
    noise = uniform_rows(list(range(NUM_SAMPLES)), config.sampling.max_new_tokens, config.seed, "sample", 0)
    with accelerator.autocast():
        sampler = parts.extensions.sampler
        responses = sampler(parts.model.language_model, parts.tokenizer, prompts, config.sampling, noise)
    columns = parts.prompts.columns_of(rows)
    found = {
        name: scores_of(reward, prompts.texts, responses, columns, parts.tokenizer, must_be_finite=True)
        for name, reward in (("score", parts.reward), ("gold_score", parts.gold))
        if reward is not None
    }
    return [
        {
            "prompt": prompts.texts[row],
            "response": responses.texts[row],
            **{name: float(scores.total[row]) for name, scores in found.items()},
            "parts": found["score"].parts_of(row),
        }
        for row in range(NUM_SAMPLES)
    ]
