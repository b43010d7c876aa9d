"""The run folder: what a run was, what it measured, what it said, and how to go on."""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from torch import Tensor

from ppo_rlhf.errors import Interrupted, UserError
from ppo_rlhf.run.checkpoints import (
    LoopState,
    checkpoints_in,
    load_checkpoint,
    number_of,
    replaced_folder,
    save_checkpoint,
    told_if_unwritable,
    write_text,
)
from ppo_rlhf.run.lock import lock
from ppo_rlhf.run.progress import StepProgress
from ppo_rlhf.run.stopping import StopRequest
from ppo_rlhf.settings import ARGUMENTS

# What a resumed run may change, for it changes nothing that is trained, or tells where a server is now; and how long it
# trains, until it is finished.
HOW_OFTEN = {
    "output_dir",
    "resume",
    "eval_every",
    "save_every",
    "keep_checkpoints",
    "log_with",
    "max_skips",
    "pictures",
    "callbacks",
    "sampler",
}
HOW_LONG = {"num_steps", "num_epochs"}
BAD_SAMPLES = "bad_samples.jsonl"  # of the stages that learn from texts, where a step was skipped
GROWING = ("metrics.jsonl", "samples.jsonl", BAD_SAMPLES, "policy_pictures.jsonl")  # a step in each line
SAMPLES_KEPT = 8  # of each evaluation
LIBRARIES = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "numpy", "gymnasium")


def new_folder(output_dir: str | None, kind: str, *, resume: bool) -> Path:
    """The folder for a run, not made yet: `output_dir`, or the first free runs/<kind>-0001.

    Raises UserError for a folder that holds a run already, unless it is to be resumed.
    """
    if output_dir is None:
        if resume:
            raise UserError("--resume needs --output-dir: the folder of the run to go on with.")
        number = 1
        while Path(f"runs/{kind}-{number:04d}").exists():
            number += 1
        return Path(f"runs/{kind}-{number:04d}")
    folder = Path(output_dir)
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"output_dir={output_dir}: {existing} is a file, not a folder.")
    if (folder / "config.yaml").exists() and not resume:
        raise UserError(f"{folder} holds a run already; go on with it by --resume, or give another --output-dir.")
    return folder


def is_finished(folder: Path) -> bool:
    """Whether the run in the folder came to its end."""
    return (folder / "summary.json").exists()


def read_config(folder: Path) -> dict[str, Any] | None:
    """The configuration of the run in the folder, None where there is none.

    Raises UserError for a file that holds none.
    """
    path = folder / "config.yaml"
    if not path.exists():
        return None
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise UserError(f"{path} holds no settings.")
    return settings


def write_config(folder: Path, config: Any) -> None:
    """config.yaml: fully resolved, and accepted back by --config."""
    settings = yaml.safe_dump(_plain(asdict(config)), sort_keys=False, allow_unicode=True)
    write_text(folder / "config.yaml", settings)


def refuse_changes(
    folder: Path,
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    *,
    prefix: str = "",
    may_change: set[str] | None = None,
) -> None:
    """Raises UserError for the first setting in which the folder's run, started with `old`, would train otherwise.

    old: as read from a config.yaml; settings that it lacks count as unchanged. prefix: of the name that is told.
    may_change: by default how often it saves and evaluates, and until it is finished how long it trains.
    """
    if may_change is None:
        may_change = HOW_OFTEN if is_finished(folder) else HOW_OFTEN | HOW_LONG
    for name, before, value in _changes(old, _plain(new)):
        if name.split(".")[0] not in may_change:
            raise UserError(
                f"{folder} was started with {prefix}{name}={before!r}, not {value!r}: a resumed run keeps what it "
                "trains. Give another --output-dir for another run."
            )


def _changes(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Settings of other values: dotted name, before, now. One that `old` lacks is none of them."""
    for name, value in new.items():
        before = old.get(name, value)
        if isinstance(before, dict) and isinstance(value, dict) and name not in ARGUMENTS:
            yield from _changes(before, value, f"{prefix}{name}.")
        elif before != value:
            yield f"{prefix}{name}", before, value


def matmul_precision_of(folder: Path, configured: str, device: torch.device) -> str:
    """How the run in the folder takes its matrix products: as configured, or, for `auto`, as it chose when it began.

    Another measurement might choose otherwise, and no bit be the same. `auto` where none began yet on such a device.

    Raises UserError for a file that no run wrote.
    """
    path = folder / "environment.json"
    if configured != "auto" or not path.exists():
        return configured
    try:
        environment = json.loads(path.read_text(encoding="utf-8"))
        began_here = torch.device(environment["device"]).type == device.type
        return str(environment.get("matmul_precision", configured)) if began_here else configured
    except (OSError, ValueError, LookupError, TypeError, RuntimeError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from error


def strict_json(value: Any, *, indent: int | None = None) -> str:
    """JSON as any reader takes it: a number that is not finite is null."""
    return json.dumps(_without_nan(value), ensure_ascii=False, allow_nan=False, indent=indent)


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Run:
    """One run folder being written, as a context: `with Run(…) as run:`. Only the main process writes; all call."""

    def __init__(
        self,
        folder: Path,
        config: Any,
        *,
        kind: str,
        accelerator: Accelerator,
        num_steps: int,
        started: float,
    ) -> None:
        """Makes the folder, or takes up the run in it. started: time.monotonic() when the stage began."""
        self.folder = folder
        self.config = config
        self.accelerator = accelerator
        self._started = started
        self._skips = 0  # updates in a row up to now
        accelerator.wait_for_everyone()  # until all have seen whether the folder can be used
        self._stop = StopRequest(tells=accelerator.is_main_process)
        self._saved = -1  # step of the latest checkpoint
        self._lock: int | None = None
        if accelerator.is_main_process:
            with told_if_unwritable(folder):
                folder.mkdir(parents=True, exist_ok=True)
                self._lock = lock(folder)
                (folder / "summary.json").unlink(missing_ok=True)  # before all else: a run that goes on is not finished
                write_config(folder, config)
                write_text(folder / "environment.json", json.dumps(_environment(config, kind, accelerator), indent=1))
        accelerator.wait_for_everyone()
        if accelerator.log_with:
            accelerator.init_trackers(kind)
        self.progress = StepProgress(kind, num_steps, enabled=accelerator.is_main_process)

    def resume(self) -> LoopState | None:
        """Loads the last good checkpoint and forgets what was logged after it; None where there is none."""
        state = load_checkpoint(self.folder / "checkpoints", self.accelerator)
        if self.accelerator.is_main_process:
            for name in GROWING:
                _keep_lines_until(self.folder / name, state.step if state else -1)
        self.accelerator.wait_for_everyone()
        return state

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line of metrics.jsonl for a completed step, the same to the trackers, and to the eye.

        Raises UserError when this was the last of `max_skips` updates in a row of which every step was skipped.
        """
        self._append("metrics.jsonl", [{"step": step, **metrics}])
        self.accelerator.log({name: value for name, value in metrics.items() if math.isfinite(value)}, step=step)
        self.progress.show(step, metrics)
        skipped = metrics.get("skipped_steps", 0) > 0 and not metrics.get("optimizer_steps", 0)
        self._skips = self._skips + 1 if skipped else 0
        if skipped:
            see = f"; see {BAD_SAMPLES}" if (self.folder / BAD_SAMPLES).exists() else ""
            self.progress.tell(f"step {step} was skipped: its loss or gradient is not finite{see}.")
        if self._skips >= self.config.max_skips:
            raise UserError(self._stopped_by_skips(step))

    def _stopped_by_skips(self, step: int) -> str:
        first = step - self._skips + 1
        names = [path.name for path in checkpoints_in(self.folder / "checkpoints") if number_of(path) < first]
        way_on = f"{self.folder}/checkpoints/{names[-1]} is from before" if names else "no checkpoint is from before"
        if (self.folder / BAD_SAMPLES).exists():
            way_on = f"their samples are in {self.folder}/{BAD_SAMPLES}, {way_on}"
        return (
            f"the {self._skips} updates up to step {step} were skipped, for numbers that are not finite: {way_on}. "
            "Lower optimizer.lr, or bound the reward."
        )

    def log_held_out(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Lines of samples.jsonl: the first few of an evaluation's samples, the same at every evaluation."""
        self.log_samples([{"step": step, "kind": "held-out", **sample} for sample in samples[:SAMPLES_KEPT]])

    def log_samples(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Lines of samples.jsonl, each with its step."""
        self._append("samples.jsonl", rows)

    def log_policy_picture(self, step: int, picture: Mapping[str, Any]) -> None:
        """A line of policy_pictures.jsonl: what a control policy does over its environment's state."""
        self._append("policy_pictures.jsonl", [{"step": step, **picture}])

    def log_bad_samples(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Lines of bad_samples.jsonl: what a skipped step was to learn from, each with its step."""
        self._append(BAD_SAMPLES, rows)

    def save_checkpoint(self, state: LoopState, more: Callable[[], Mapping[str, Tensor]] = dict) -> None:
        """A checkpoint of all that was prepared by the accelerator, and the loop's state.

        None while updates are skipped, so that the one from before is kept. more: tensors of the loop that are made for
        a checkpoint alone, by all processes together.
        """
        if self._skips:
            return
        state = replace(state, tensors={**state.tensors, **more()})
        folder = self.folder / "checkpoints"
        with told_if_unwritable(folder / f"step_{state.step:06d}"):
            save_checkpoint(folder, state, self.accelerator, keep=self.config.keep_checkpoints)
        self._saved = state.step

    def save_model(self, name: str, save: Callable[[Path], None]) -> Path:
        """A `save_pretrained` folder of the run, written whole or not at all; → its path."""
        folder = self.folder / name
        if self.accelerator.is_main_process:
            with told_if_unwritable(folder), replaced_folder(folder) as temporary:
                save(temporary)
        self.accelerator.wait_for_everyone()
        return folder

    def promote(self, name: str, final: str) -> None:
        """Gives a saved model its final name, in place of an earlier one."""
        source = self.folder / name
        if self.accelerator.is_main_process and source.exists():  # not where a run ended just after this
            shutil.rmtree(self.folder / final, ignore_errors=True)
            source.rename(self.folder / final)
        self.accelerator.wait_for_everyone()

    def remove(self, name: str) -> None:
        """Removes a saved model that another took the place of."""
        if self.accelerator.is_main_process:
            shutil.rmtree(self.folder / name)
        self.accelerator.wait_for_everyone()

    def finish(self, summary: Mapping[str, Any]) -> dict[str, Any]:
        """Writes summary.json, by which a run is known to be finished; → what it holds, with this session's `seconds`.

        A number that is not finite is None there.
        """
        complete = strict_json({**summary, "seconds": round(time.monotonic() - self._started, 1)}, indent=1)
        if self.accelerator.is_main_process:
            with told_if_unwritable(self.folder / "summary.json"):
                write_text(self.folder / "summary.json", complete)
        return {**json.loads(complete), "output_dir": str(self.folder)}

    def stop_if_asked(self, state: LoopState, more: Callable[[], Mapping[str, Tensor]] = dict) -> None:
        """The end of a step: after a signal saves a checkpoint and raises Interrupted, in all processes.

        more: as in `save_checkpoint`. The command then exits with 128 + the signal's number.
        """
        asked = self._stop.signal
        if self.accelerator.num_processes > 1:
            numbers = torch.tensor(asked, device=self.accelerator.device)
            asked = int(self.accelerator.gather(numbers.reshape(1)).max())
        if not asked:
            return
        if self._saved != state.step:
            self.save_checkpoint(state, more)
        way_on = f"--resume --output-dir {self.folder} goes on from the last checkpoint."
        raise Interrupted(f"stopped after step {state.step}; {way_on}", 128 + asked)

    def __enter__(self) -> Run:
        self._stop.listen()
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        """Ends progress and trackers, also after an error: then without the other processes, which may never come."""
        self._stop.forget()
        self.progress.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        if error is None:
            self.accelerator.wait_for_everyone()
        # Not end_training, which ends the process group as well, and with it the next stage of a pipeline.
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def _append(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        if self.accelerator.is_main_process and rows:
            path = self.folder / name
            with told_if_unwritable(path), path.open("a", encoding="utf-8") as file:
                file.writelines(strict_json(row) + "\n" for row in rows)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _keep_lines_until(path: Path, step: int) -> None:
    if path.exists():
        with path.open(encoding="utf-8", newline="\n") as lines:  # not splitlines, which breaks at U+2028 as well
            kept = [line for line in lines if _step_of(line) <= step]
        write_text(path, "".join(kept))


def _step_of(line: str) -> float:
    """The step of a line; a line cut off by a crash belongs to no step that was kept."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return math.inf


def _environment(config: Any, kind: str, accelerator: Accelerator) -> dict[str, Any]:
    return {
        "stage": kind,
        "command": sys.argv,
        "seed": config.seed,
        "processes": accelerator.num_processes,
        "device": str(accelerator.device),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "commit": checked_out_commit(),
        "versions": {name: version(name) for name in LIBRARIES} | {"ppo_rlhf": version("ppo-rlhf")},
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def checked_out_commit() -> str | None:
    """The commit of the working folder, None outside a git checkout."""
    try:
        answer = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return answer.stdout.strip() or None
