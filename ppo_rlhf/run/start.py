"""How every stage begins."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed

from ppo_rlhf.run.folder import (
    HOW_LONG,
    HOW_OFTEN,
    Run,
    is_finished,
    matmul_precision_of,
    new_folder,
    read_config,
    refuse_changes,
)
from ppo_rlhf.run.processes import make_accelerator


@dataclass(frozen=True)
class Start:
    """A stage that has its processes and its seed, and has not written anything yet."""

    config: Any
    kind: str
    folder: Path
    accelerator: Accelerator
    time: float  # time.monotonic() when it began

    @property
    def matmul_precision(self) -> str:
        """How it takes matrix products; `auto` where that is not chosen yet."""
        return matmul_precision_of(self.folder, self.config.matmul_precision, self.accelerator.device)

    def run(self, *, num_steps: int) -> Run:
        """The run folder, made or taken up: what follows may write."""
        return Run(
            self.folder,
            self.config,
            kind=self.kind,
            accelerator=self.accelerator,
            num_steps=num_steps,
            started=self.time,
        )


def begin(config: Any, kind: str, *, cpu: bool = False, longer: bool = False) -> Start | None:
    """Begins a stage, all of whose randomness follows from its seed; None where its run is finished already.

    cpu: stay there even where there is a GPU. longer: go on also with a finished run.

    Raises UserError for a folder that cannot be used, a run in it that trained otherwise, or processes that cannot be
    had.
    """
    started = time.monotonic()
    folder = new_folder(config.output_dir, kind, resume=config.resume)
    refuse_changes(folder, read_config(folder) or {}, asdict(config), may_change=HOW_OFTEN | HOW_LONG)
    if is_finished(folder) and not longer:
        return None
    accelerator = make_accelerator(folder, precision=config.precision, log_with=config.log_with, cpu=cpu)
    set_seed(config.seed)
    return Start(config, kind, folder, accelerator, started)
