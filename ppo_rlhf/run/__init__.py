"""Runs on disk and over processes: the only place that knows files and ranks."""

from ppo_rlhf.run.checkpoints import LoopState, checkpoints_in, is_whole, number_of, told_if_unwritable, write_text
from ppo_rlhf.run.folder import (
    SAMPLES_KEPT,
    Run,
    checked_out_commit,
    is_finished,
    matmul_precision_of,
    new_folder,
    read_config,
    refuse_changes,
    strict_json,
    write_config,
)
from ppo_rlhf.run.processes import (
    end_processes,
    gathered,
    in_main_process,
    is_main_process,
    make_accelerator,
    share_of,
    whole_weights,
)
from ppo_rlhf.run.progress import StepProgress
from ppo_rlhf.run.start import Start, begin

__all__ = [
    "SAMPLES_KEPT",
    "LoopState",
    "Run",
    "Start",
    "StepProgress",
    "begin",
    "checked_out_commit",
    "checkpoints_in",
    "end_processes",
    "gathered",
    "in_main_process",
    "is_finished",
    "is_main_process",
    "is_whole",
    "make_accelerator",
    "matmul_precision_of",
    "new_folder",
    "number_of",
    "read_config",
    "refuse_changes",
    "share_of",
    "strict_json",
    "told_if_unwritable",
    "whole_weights",
    "write_config",
    "write_text",
]
