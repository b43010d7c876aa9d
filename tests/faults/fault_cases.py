"""Tiny runs in processes of their own, to be killed: started by forking a server that has imported everything.

A run is `main(words)` of a command line in a real process, which a SIGKILL ends as it ends any other; the fork spares
it the ten seconds that the imports take.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tiny_runs
from safetensors.torch import load_file

from ppo_rlhf.run.checkpoints import checkpoints_in, is_whole, number_of

STOPS = json.dumps(tiny_runs.STOPS).replace(" ", "")
SAMPLING = f"--sampling.max_new_tokens 6 --sampling.stop_token_ids {STOPS}"
COMMON = "--save_every 1 --eval_every 4 --eval_fraction 0.2 --log_with [] --seed 3 --matmul_precision highest"


@dataclass(frozen=True)
class Case:
    """A stage as a user starts it."""

    program: str  # ppo_rlhf or classic
    line: str
    model: str  # the file that it is all about
    steps: int


CASES = {
    "sft": Case(
        "ppo_rlhf",
        "sft --policy {dropout} --data {demonstrations} --batch_size 4 --num_epochs 2 --optimizer.lr 0.01 " + COMMON,
        "policy/model.safetensors",
        16,
    ),
    "reward": Case(
        "ppo_rlhf",
        f"reward --policy {{dropout}} --data {{rankings}} --batch_size 4 --num_epochs 2 --optimizer.lr 0.01 "
        f"--normalization_prompts 8 {SAMPLING} {COMMON}",
        "reward_model/model.safetensors",
        16,
    ),
    "ppo": Case(
        "ppo_rlhf",
        f"ppo --policy {{llama}} --prompts {{prompts}} --reward user.py:vowels --batch_size 8 --num_steps 12 "
        f"--max_eval_prompts 4 --kl_target 0.5 --kl_horizon 80 --value_model separate --ppo.num_minibatches 2 "
        f"--optimizer.lr 0.01 {SAMPLING} {COMMON}",
        "policy/model.safetensors",
        12,
    ),
    "classic": Case(
        "classic",
        "train CartPole-v1 --num-envs 4 --horizon 32 --num-steps 2560 --network.hidden-sizes [16] --eval-episodes 2 "
        "--normalize-observations true --save-every 128 --eval-every 512 --log-with [] --seed 3",
        "policy/policy.safetensors",
        20,
    ),
}


def words_of(stage, models, data, folder):
    """A stage's command line, into this folder."""
    return [*CASES[stage].line.format(**models, **data).split(), "--output-dir", str(folder)]


def _execute(program, words, cwd, errors, like_any_user):
    """In the forked process: the command line, its stderr in a file. like_any_user: even root minds permissions."""
    import torch

    if like_any_user:
        _mind_permissions()
    torch.set_num_threads(1)
    os.chdir(cwd)
    for stream, name in ((1, os.devnull), (2, errors)):
        file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, stream)
    if program == "classic":
        from classic.cli import main
    else:
        from ppo_rlhf.cli import main
    code = main(words)
    sys.stderr.flush()
    os._exit(code)


def context():
    """Processes that are forked from the server, which has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fault_imports"])
    return context


def _mind_permissions():
    """Gives up CAP_DAC_OVERRIDE, by which root writes where nobody may."""
    library = ctypes.CDLL(None)
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert library.capget(header, sets) == 0
    sets[0] &= ~(1 << 1)  # of the effective ones
    assert library.capset(header, sets) == 0


def start(stage, words, cwd, *, like_any_user=False):
    """The stage's process, started."""
    errors = str(Path(cwd) / "errors.txt")
    process = context().Process(target=_execute, args=(CASES[stage].program, words, str(cwd), errors, like_any_user))
    process.start()
    return process


def finish(stage, words, cwd, *, timeout=120):
    """Runs a stage to its end, in a process; → its exit code."""
    process = start(stage, words, cwd)
    process.join(timeout)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


def errors_of(cwd):
    """What the processes wrote on stderr."""
    path = Path(cwd) / "errors.txt"
    return path.read_text(encoding="utf-8") if path.exists() else ""


def saved_step(folder):
    """The step of the latest whole checkpoint, 0 where there is none."""
    return max([number_of(path) for path in checkpoints_in(Path(folder) / "checkpoints") if is_whole(path)], default=0)


def outcome(stage, folder):
    """All that a run is judged by: weights, metrics and samples without what a clock decides, and the summary."""
    folder = Path(folder)
    clocks = (*tiny_runs.CLOCKED, "steps_per_second")
    summary = json.loads((folder / "summary.json").read_text())
    summary.pop("seconds")
    samples = folder / "samples.jsonl"
    return {
        "weights": {name: x.numpy().tobytes() for name, x in load_file(folder / CASES[stage].model).items()},
        "metrics": [
            {name: value for name, value in row.items() if not name.startswith(clocks)}
            for row in tiny_runs.metrics_of(folder)
        ],
        "samples": samples.read_text(encoding="utf-8") if samples.exists() else "",
        "summary": summary,
    }


@dataclass
class Kills:
    """What was killed, and when."""

    total: int = 0
    in_a_write: int = 0  # a checkpoint's temporary folder was there when the process was killed
    before_any_checkpoint: int = 0

    def kill(self, process, folder, step, seconds, *, in_a_write=False):
        """SIGKILL so long after a step was logged, or then as soon as a checkpoint is written; → whether it hit."""
        checkpoints, log = Path(folder) / "checkpoints", Path(folder) / "metrics.jsonl"
        deadline = None
        while process.is_alive():
            writing = bool(list(checkpoints.glob(".step_*.partial")))
            if deadline is None and (log.read_bytes().count(b"\n") if log.exists() else 0) >= step:
                deadline = time.monotonic() + seconds
            if deadline is not None and time.monotonic() >= deadline and (writing or not in_a_write):
                process.kill()
                break
            time.sleep(0.0003 if in_a_write else 0.002)
        process.join()
        if process.exitcode != -9:
            return False
        self.total += 1
        self.in_a_write += bool(list(checkpoints.glob(".step_*.partial")))
        self.before_any_checkpoint += saved_step(folder) == 0
        return True


def killed_and_resumed(stage, models, data, cwd, random, kills, *, times):
    """A run that is killed so many times, each time resumed, and in the end left alone; → its folder, and the step from
    which it was resumed last.

    Moments are drawn over the whole run: a number of logged steps, from none on, and up to 50 ms after it.
    """
    folder = Path(cwd) / "killed"
    words = words_of(stage, models, data, folder)
    done = 0
    for step in sorted(random.sample(range(CASES[stage].steps), times)):
        process = start(stage, words, cwd)
        seconds = random.uniform(0, 0.05) if step else random.uniform(0, 2)
        hit = kills.kill(process, folder, step, seconds, in_a_write=random.random() < 0.5)
        assert hit or process.exitcode == 0, errors_of(cwd)
        assert saved_step(folder) >= done, "work was lost"
        done = saved_step(folder)
        words = [*words_of(stage, models, data, folder), "--resume"]
    if done:
        logged = [row["step"] for row in tiny_runs.metrics_of_whole_lines(folder)]
        assert max(logged) - done <= 1, "more was lost than the step since the last checkpoint"
    assert finish(stage, words, cwd) == 0, errors_of(cwd)
    return folder, done
