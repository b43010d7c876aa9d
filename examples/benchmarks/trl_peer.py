"""TRL's PPO trainer on the inputs of lm_speed.py or time_to_gold.py, in an environment of its own:
trl_peer.py FOLDER OPTIONS.
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer


class Clock(TrainerCallback):
    """CPU seconds of the process up to the end of each iteration, on a GPU the clock's when all its work is done.

    kept: a folder that gets the policy after each iteration, outside these seconds.
    """

    def __init__(self, device: str, kept: str | None) -> None:
        self.device = device
        self.kept = kept
        self.outside = 0.0
        self.seconds: list[float] = []

    def now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() if self.device == "cuda" else time.process_time()

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.outside = self.now()

    def on_step_end(self, _: Any, state: Any, __: Any, *, model: Any, **___: Any) -> None:
        now = self.now()
        self.seconds.append(now - self.outside)
        if self.kept is not None:
            model.policy.save_pretrained(Path(self.kept) / f"{state.global_step:03d}")
            self.outside += self.now() - now


def with_normalization(classifier: Any) -> Any:
    """The classifier with a head that gives normalised scores itself: TRL does not know of our normalisation."""
    mean, scale = (getattr(classifier.config, name, None) for name in ("reward_mean", "reward_scale"))
    if mean is not None and scale is not None:
        weight = classifier.score.weight.detach()
        classifier.score = torch.nn.Linear(weight.shape[1], 1)
        classifier.score.weight.data.copy_(weight / scale)
        classifier.score.bias.data.fill_(-mean / scale)
    return classifier


def settings_of(options: dict[str, Any]) -> dict[str, Any]:
    """TRL's settings for the iterations that lm_speed.py measures."""
    return {
        "steps": options["iterations"] + 1,
        "per_device_train_batch_size": options["batch_size"],
        "num_mini_batches": options["num_minibatches"],
        "num_ppo_epochs": 4,
        "learning_rate": 1e-6,
    }


def main() -> None:
    folder, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    tokenizer.padding_side = "left"
    load = AutoModelForSequenceClassification.from_pretrained
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder / "policy") for _ in range(2))
    reward, value = (with_normalization(load(folder / "reward", num_labels=1)) for _ in range(2))
    prompts = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
    dataset = Dataset.from_dict({"input_ids": [tokenizer(prompt)["input_ids"] for prompt in prompts]})
    clock = Clock(options["device"], options.get("kept"))
    settings = options.get("settings") or settings_of(options)
    steps, batch_size = settings.pop("steps"), settings["per_device_train_batch_size"]
    with tempfile.TemporaryDirectory() as run:
        config = PPOConfig(
            output_dir=run,
            seed=options.get("seed", 42),
            gradient_accumulation_steps=1,
            total_episodes=batch_size * steps,
            local_rollout_forward_batch_size=batch_size,
            response_length=options["limit"],
            stop_token="eos" if options.get("stops", True) else None,
            temperature=1.0,
            num_sample_generations=0,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=options["device"] == "cpu",
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            **settings,
        )
        trainer = PPOTrainer(
            args=config,
            processing_class=tokenizer,
            model=policy,
            ref_model=reference,
            reward_model=reward,
            value_model=value,
            train_dataset=dataset,
            callbacks=[clock],
        )
        trainer.train()
    seconds = clock.seconds
    if not clock.kept:
        seconds = [after - before for before, after in itertools.pairwise(seconds)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"seconds": seconds, "lengths": [options["limit"]], "phases": {}, "peak_gib": peak}))


if __name__ == "__main__":
    main()
