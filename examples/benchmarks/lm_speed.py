"""A PPO iteration on a language model beside TRL's last trainer, each in processes of its own, in turn.

    python examples/benchmarks/lm_speed.py --peer-python ~/trl/bin/python [--sizes tiny gpt2] [--variants float32 …]
    python examples/benchmarks/lm_speed.py --variants --lengths 8 16 32 64 128

Models with random weights, made here: a policy, a reference, a reward model, and a value model of the reward model's
size unless shared. Prompts of 8 to 32 tokens, responses of 64, four epochs. `stops`: responses stop at a mean of a
quarter of the limit. `--lengths`: ours alone, responses of such mean lengths with a limit of four times that: what a
real token costs. Process CPU seconds of one thread (on a GPU seconds of the clock) an iteration, the median over the
iterations of all turns; peak memory of the process, ours the most of any step. The first iteration of each process
warms it up.

The peer's environment holds trl==1.12.0, the last release with a PPO trainer, and torch like ours:
python -m venv ~/trl && ~/trl/bin/pip install trl==1.12.0 torch==2.13.0. Without --peer-python it is reported as absent.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"n_layer": 4, "n_embd": 128, "n_head": 4, "vocab_size": 4096, "n_positions": 1024},
    "gpt2": {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257, "n_positions": 1024},
}
SHAPES = {"tiny": {"batch_size": 32, "num_minibatches": 4}, "gpt2": {"batch_size": 8, "num_minibatches": 2}}
VARIANTS: dict[str, dict[str, str]] = {
    "float32": {"precision": "no", "value_model": "separate"},
    "bf16": {"precision": "bf16", "value_model": "separate"},
    "shared": {"precision": "no", "value_model": "shared"},
    "shared bf16": {"precision": "bf16", "value_model": "shared"},
    "stops": {"precision": "no", "value_model": "shared"},
}
RESPONSE = 64  # tokens at most
MEAN = RESPONSE // 4  # of the case `stops`
EOS, PAD = 0, 1
NEVER = 10**6  # an id that no model says
WORDS = 2000
MEAN_PROMPT = 20  # tokens


def write_inputs(folder: Path, size: str, *, mean: int | None) -> None:
    """policy/, reward/ with a tokenizer each, and prompts.json. mean: of the responses' lengths; None: none stops."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        GPT2Config,
        GPT2ForSequenceClassification,
        GPT2LMHeadModel,
        PreTrainedTokenizerFast,
    )

    words = {"<eos>": EOS, "<pad>": PAD} | {f"w{number}": number for number in range(2, SIZES[size]["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", padding_side="left"
    )
    torch.manual_seed(0)
    config = GPT2Config(
        **SIZES[size], bos_token_id=EOS, eos_token_id=EOS, pad_token_id=PAD, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    policy = GPT2LMHeadModel(config)
    if mean is not None:
        make_stop(policy, 1 / mean)
    config.num_labels = 1
    reward = GPT2ForSequenceClassification(config)
    for name, model in (("policy", policy), ("reward", reward)):
        model.save_pretrained(folder / name)
        fast.save_pretrained(folder / name)
    draw = random.Random(0)
    prompts = [" ".join(f"w{draw.randrange(2, WORDS)}" for _ in range(draw.randint(8, 32))) for _ in range(512)]
    (folder / "prompts.json").write_text(json.dumps(prompts), encoding="utf-8")


def make_stop(policy: Any, rate: float) -> None:
    """Lifts eos to a probability of `rate` at every position: its embedding meets the last norm's bias."""
    import torch

    embeddings, bias = policy.get_output_embeddings().weight, policy.transformer.ln_f.bias
    with torch.no_grad():
        bias.copy_(torch.where(torch.arange(len(bias)) % 2 == 0, 1.0, -1.0))
        embeddings[:, :] -= (embeddings @ bias)[:, None] * bias / bias.dot(bias)
        logit = math.log(rate / (1 - rate) * len(embeddings))
        embeddings[EOS] = bias * (logit / bias.dot(bias))


def ours(folder: Path, options: Mapping[str, Any]) -> None:
    """One process of our own: runs, and prints what it measured."""
    import torch

    from ppo_rlhf.config import PPOConfig
    from ppo_rlhf.settings import OptimizerSettings, PPOSettings, SamplingSettings
    from ppo_rlhf.train import ppo

    torch.set_num_threads(1)
    clock = process_clock(options["device"])
    seconds: list[float] = []
    lengths: list[float] = []
    peaks: list[float] = []
    times: dict[str, list[float]] = {}

    def note(step: int, metrics: Mapping[str, float]) -> None:
        seconds.append(clock())
        lengths.append(metrics["response/length"])
        peaks.append(metrics["memory/peak_gib"])
        for name, value in metrics.items():
            if name.startswith("time/"):
                times.setdefault(name, []).append(value)

    prompts = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as run:
        config = PPOConfig(
            policy=str(folder / "policy"),
            reward=str(folder / "reward"),
            output_dir=str(Path(run) / "run"),
            num_steps=options["iterations"] + 2,
            batch_size=options["batch_size"],
            max_eval_prompts=2,
            precision=options["precision"],
            value_model=options["value_model"],
            log_with=(),
            sampling=SamplingSettings(
                max_new_tokens=options["limit"], stop_token_ids=() if options["stops"] else (NEVER,)
            ),
            ppo=PPOSettings(num_epochs=4, num_minibatches=options["num_minibatches"]),
            optimizer=OptimizerSettings(lr=1e-6, schedule="constant"),
        )
        with profiled(options["profile"]):
            ppo.train(config, prompts=[{"prompt": prompt} for prompt in prompts], callbacks=[note])
    between = [after - before for before, after in itertools.pairwise(seconds)][:-1]  # the last evaluates
    phases = {name: statistics.median(values[1:-1]) for name, values in times.items()}
    print(json.dumps({"seconds": between, "lengths": lengths[1:-1], "phases": phases, "peak_gib": max(peaks)}))


def process_clock(device: str) -> Callable[[], float]:
    """CPU seconds of this process, or on a GPU the clock's seconds when all its work is done."""
    import torch

    def clock() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return clock if device == "cuda" else time.process_time


@contextlib.contextmanager
def profiled(path: str | None) -> Iterator[None]:
    """Writes a trace that chrome://tracing and Perfetto open."""
    from torch.profiler import profile

    if path is None:
        yield
        return
    with profile() as trace:
        yield
    trace.export_chrome_trace(path)


def run_process(command: list[str], options: Mapping[str, Any]) -> dict[str, Any]:
    """What a process printed on its last line. Its environment: one thread, no network."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if options["device"] == "cpu":
        environment["ACCELERATE_USE_CPU"] = "true"
    done = subprocess.run([*command, json.dumps(options)], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def measure(
    size: str, variant: str, arguments: argparse.Namespace, *, mean: int | None = None, limit: int = RESPONSE
) -> dict[str, dict[str, float]]:
    """Both sides in turn: median seconds an iteration, peak memory, mean response length, seconds by phase."""
    options = {
        **SHAPES[size],
        **VARIANTS[variant],
        "stops": mean is not None,
        "limit": limit,
        "iterations": arguments.iterations,
        "device": arguments.device,
        "profile": arguments.profile,
    }
    found: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as name:
        write_inputs(Path(name), size, mean=mean)
        sides = {"ppo_rlhf": [sys.executable, __file__, "--worker", name]}
        if arguments.peer_python:
            sides["trl"] = [arguments.peer_python, str(Path(__file__).with_name("trl_peer.py")), name]
        for _ in range(arguments.repeats):
            for side, command in sides.items():
                found.setdefault(side, []).append(run_process(command, options))
    return {
        side: {
            "seconds": statistics.median(second for turn in turns for second in turn["seconds"]),
            "peak_gib": statistics.median(turn["peak_gib"] for turn in turns),
            "length": statistics.mean(length for turn in turns for length in turn["lengths"]),
            **{name: statistics.median(turn["phases"][name] for turn in turns) for name in turns[0]["phases"]},
        }
        for side, turns in found.items()
    }


def side_by_side(arguments: argparse.Namespace) -> dict[str, Any]:
    """Prints a line for each size and variant."""
    results: dict[str, Any] = {}
    print("| size | variant | ours, s | TRL, s | ratio | ours, GiB | TRL, GiB | share | length |")
    print("|---|---|---|---|---|---|---|---|---|")
    for size in arguments.sizes:
        for variant in arguments.variants:
            row = measure(size, variant, arguments, mean=MEAN if variant == "stops" else None)
            results[f"{size} {variant}"] = row
            us, peer = row["ppo_rlhf"], row.get("trl")
            cells = [f"{us['seconds']:.2f}", "absent", "", f"{us['peak_gib']:.2f}", "", ""]
            if peer:
                cells[1:3] = [f"{peer['seconds']:.2f}", f"{peer['seconds'] / us['seconds']:.1f} ×"]
                cells[4:] = [f"{peer['peak_gib']:.2f}", f"{us['peak_gib'] / peer['peak_gib']:.2f}"]
            print(f"| {size} | {variant} | {' | '.join(cells)} | {us['length']:.1f} |", flush=True)
    return results


def by_length(arguments: argparse.Namespace) -> dict[str, Any]:
    """Prints what an iteration costs at each mean length, and how far that is from a line through the origin."""
    arguments.peer_python = None
    size = arguments.sizes[0]
    rows = [measure(size, "shared", arguments, mean=mean, limit=4 * mean)["ppo_rlhf"] for mean in arguments.lengths]
    tokens = [SHAPES[size]["batch_size"] * (row["length"] + MEAN_PROMPT) for row in rows]
    slope = sum(n * row["seconds"] for n, row in zip(tokens, rows, strict=True)) / sum(n * n for n in tokens)
    print("\n| mean length | tokens, prompts too | s an iteration | ms a token | off the line |\n|---|---|---|---|---|")
    for row, count in zip(rows, tokens, strict=True):
        seconds = row["seconds"]
        print(
            f"| {row['length']:.1f} | {count:.0f} | {seconds:.2f} | {1000 * seconds / count:.2f} "
            f"| {seconds / (slope * count) - 1:+.0%} |"
        )
    return {f"{size} length {mean}": row for mean, row in zip(arguments.lengths, rows, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["tiny"])
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--lengths", nargs="+", type=int, default=[], help="mean lengths of responses, ours alone")
    parser.add_argument("--peer-python", help="the interpreter of an environment with trl==1.12.0")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each side")
    parser.add_argument("--iterations", type=int, default=3, help="measured in each process, after one to warm up")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--profile", metavar="FILE", help="write a trace of the last of our processes")
    parser.add_argument("--json", action="store_true", help="one object on the last line")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("options", nargs="?", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        ours(Path(arguments.worker), json.loads(arguments.options))
        return
    results = side_by_side(arguments) if arguments.variants else {}
    if arguments.lengths:
        results |= by_length(arguments)
    if arguments.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
