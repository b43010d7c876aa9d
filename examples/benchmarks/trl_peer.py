"""TRL's PPO trainer on the inputs of lm_speed.py, in an environment of its own: trl_peer.py FOLDER OPTIONS."""

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
    """CPU seconds of the process at the end of each iteration, on a GPU the clock's when all its work is done."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.seconds: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() if self.device == "cuda" else time.process_time())


def main() -> None:
    folder, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    tokenizer.padding_side = "left"
    load = AutoModelForSequenceClassification.from_pretrained
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder / "policy") for _ in range(2))
    reward, value = (load(folder / "reward", num_labels=1) for _ in range(2))
    prompts = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
    dataset = Dataset.from_dict({"input_ids": [tokenizer(prompt)["input_ids"] for prompt in prompts]})
    clock = Clock(options["device"])
    with tempfile.TemporaryDirectory() as run:
        config = PPOConfig(
            output_dir=run,
            per_device_train_batch_size=options["batch_size"],
            gradient_accumulation_steps=1,
            num_mini_batches=options["num_minibatches"],
            total_episodes=options["batch_size"] * (options["iterations"] + 1),
            local_rollout_forward_batch_size=options["batch_size"],
            response_length=options["limit"],
            stop_token="eos" if options["stops"] else None,
            temperature=1.0,
            num_ppo_epochs=4,
            num_sample_generations=0,
            learning_rate=1e-6,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=options["device"] == "cpu",
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
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
    between = [after - before for before, after in itertools.pairwise(clock.seconds)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"seconds": between, "lengths": [options["limit"]], "phases": {}, "peak_gib": peak}))


if __name__ == "__main__":
    main()
