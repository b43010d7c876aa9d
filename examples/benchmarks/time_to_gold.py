"""Seconds until PPO has raised the embedded task's true reward, beside TRL's last trainer on the same models.

    python examples/benchmarks/time_to_gold.py --folder runs/time-to-gold --peer-python ~/trl/bin/python

`ppo-rlhf demo` makes the supervised policy and the reward model once. Both trainers then tune the same policy against
the same reward model, on the same prompts and with the same limit of 48 tokens, each in processes of its own, and keep
the policy after every step. Afterwards one judge samples responses of each kept policy to the same 150 held-out prompts
with the same noise: the first whose mean gold score is a standard deviation of the supervised policy's above its mean,
at a KL to it below 20 nats, is the goal. The seconds are the trainer's own CPU seconds of one thread up to that policy;
keeping and judging policies is not in them, nor is TRL's loading of models (ours is). Each side has settings of its own
(`OURS`, `PEERS`), the best of those named in the README; `--ours` and `--peers` change some of them, as JSON.

The peer's environment is that of lm_speed.py. Without --peer-python it is reported as absent.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from lm_speed import run_process

LIMIT = 48  # tokens of a response
HIGHEST_KL = 20.0  # nats a response, to the supervised policy
OURS: dict[str, Any] = {
    "num_steps": 16,
    "batch_size": 64,
    "kl_coef": 0.05,
    "ppo": {"num_epochs": 2, "num_minibatches": 2},
    "optimizer": {"lr": 2e-3, "schedule": "constant", "beta2": 0.95},
}
PEERS: dict[str, Any] = {
    "steps": 14,
    "per_device_train_batch_size": 64,
    "num_mini_batches": 4,
    "num_ppo_epochs": 2,
    "kl_coef": 0.05,
    "learning_rate": 5e-4,
    "lr_scheduler_type": "constant",
    "adam_beta2": 0.95,
}


def write_inputs(folder: Path, seed: int) -> None:
    """policy/, reward/, prompts.json to train on, and both kinds of prompts as rows; once a folder."""
    from ppo_rlhf.data import held_out
    from ppo_rlhf.toy import prompts

    demo = [sys.executable, "-m", "ppo_rlhf", "demo", "--output-dir", str(folder / "demo"), "--resume"]
    subprocess.run([*demo, "--seed", str(seed), "--ppo.num_steps", "1"], check=True, stdout=subprocess.DEVNULL)
    shutil.copytree(folder / "demo" / "sft" / "policy", folder / "policy", dirs_exist_ok=True)
    shutil.copytree(folder / "demo" / "reward" / "reward_model", folder / "reward", dirs_exist_ok=True)
    rows, others = held_out(list(prompts()), 0.15, seed, setting="eval_fraction")
    for name, kept in (("prompts", rows), ("held_out", others)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    (folder / "prompts.json").write_text(json.dumps([row["prompt"] for row in rows]), encoding="utf-8")


def config_of(folder: Path, policy: str, **changes: Any) -> Any:
    """A PPO run on the folder's models and prompts."""
    from ppo_rlhf.config import PPOConfig
    from ppo_rlhf.settings import OptimizerSettings, PPOSettings, SamplingSettings

    changes["ppo"] = PPOSettings(**changes.get("ppo", {}))
    changes["optimizer"] = OptimizerSettings(**changes.get("optimizer", {}))
    return PPOConfig(
        policy=policy,
        reference=str(folder / "policy"),
        prompts=str(folder / "prompts.jsonl"),
        eval_prompts=str(folder / "held_out.jsonl"),
        log_with=(),
        sampling=SamplingSettings(max_new_tokens=LIMIT),
        **changes,
    )


def ours(folder: Path, options: dict[str, Any]) -> None:
    """One process of our own: trains, keeps the policy after each step, and prints the seconds up to each."""
    import torch

    from ppo_rlhf.models import load_policy
    from ppo_rlhf.train import ppo

    torch.set_num_threads(1)
    began = time.process_time()
    policy, tokenizer = load_policy(str(folder / "policy"), setting="policy")
    kept = Path(options["kept"])
    seconds: list[float] = []
    outside = began

    def keep(step: int, _: Any) -> None:
        nonlocal outside
        now = time.process_time()
        seconds.append(now - outside)
        policy.save_pretrained(kept / f"{step:03d}")
        outside += time.process_time() - now

    run = {"output_dir": str(kept / "run"), "reward": str(folder / "reward"), "save_every": 0, "max_eval_prompts": 1}
    config = config_of(folder, str(folder / "policy"), **run, seed=options["seed"], **options["settings"])
    ppo.train(config, policy=policy, tokenizer=tokenizer, callbacks=[keep])
    print(json.dumps({"seconds": seconds}))


def judged(folder: Path, policy: Path) -> dict[str, float]:
    """The true reward's mean and standard deviation on the held-out prompts, and the KL to the supervised policy."""
    from accelerate import Accelerator

    from ppo_rlhf.models import load_policy, load_tokenizer
    from ppo_rlhf.train.ppo_evaluation import evaluate_held_out
    from ppo_rlhf.train.ppo_parts import load_parts

    if not (policy / "tokenizer.json").exists():
        load_tokenizer(str(folder / "policy"), setting="policy").save_pretrained(policy)
    config = config_of(folder, str(policy), reward="ppo_rlhf.toy:gold", gold="ppo_rlhf.toy:gold")
    accelerator = Accelerator(cpu=True)
    parts = load_parts(config, accelerator, *load_policy(str(policy), setting="policy"), None, None, None, None)
    return evaluate_held_out(parts, config, accelerator).metrics


def curve_to_goal(
    folder: Path, kept: Path, seconds: list[float], before: dict[str, float]
) -> tuple[list[tuple[float, float, float]], bool]:
    """(seconds, gold score, KL) of the kept policies up to the first that reaches the goal, and whether one does."""
    goal = before["eval/gold_score"] + before["eval/gold_score_std"]
    curve = []
    for step, second in enumerate(seconds, start=1):
        found = judged(folder, kept / f"{step:03d}")
        gold, kl = found["eval/gold_score"], found["eval/kl"]
        curve.append((round(second, 2), round(gold, 3), round(kl, 2)))
        if gold >= goal and kl < HIGHEST_KL:
            return curve, True
    return curve, False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="keeps the models, the policies and the results")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of PPO; the models' seed is 0")
    parser.add_argument("--peer-python", help="an interpreter that has trl==1.12.0")
    parser.add_argument("--sides", nargs="+", choices=("ours", "trl"), default=["ours", "trl"])
    parser.add_argument("--ours", type=json.loads, default={}, help="settings in place of some of OURS")
    parser.add_argument("--peers", type=json.loads, default={}, help="settings in place of some of PEERS")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    write_inputs(folder, seed=0)
    before = judged(folder, folder / "policy")
    print(f"gold before: {before['eval/gold_score']:.3f} ± {before['eval/gold_score_std']:.3f}", flush=True)
    sides = {"ours": ([sys.executable, __file__, "--worker", str(folder)], OURS | arguments.ours)}
    if arguments.peer_python:
        peer = [arguments.peer_python, str(Path(__file__).with_name("trl_peer.py")), str(folder)]
        sides["trl"] = (peer, PEERS | arguments.peers)
    found: dict[str, list[float]] = {}
    for seed in arguments.seeds:
        for side in arguments.sides:
            if side not in sides:
                print(f"| {side} | absent |")
                continue
            command, settings = sides[side]
            kept = folder / f"{side}-{seed}"
            shutil.rmtree(kept, ignore_errors=True)
            options = {"kept": str(kept), "seed": seed, "settings": settings, "limit": LIMIT, "device": "cpu"}
            seconds = run_process(command, options)["seconds"]
            curve, reached = curve_to_goal(folder, kept, seconds, before)
            found.setdefault(side, []).append(curve[-1][0] if reached else math.inf)
            print(f"| {side} | {seed} | {len(curve) if reached else 'not'} | {curve} |", flush=True)
    print(json.dumps({side: statistics.median(seconds) for side, seconds in found.items()}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        ours(Path(sys.argv[2]), json.loads(sys.argv[3]))
    else:
        main()
