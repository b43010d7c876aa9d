"""Runs on disk and over processes: the only place that knows files and ranks."""

from ppo_rlhf.run.checkpoints import LoopState, write_text
from ppo_rlhf.run.folder import Run, is_finished, new_folder, read_config, write_config
from ppo_rlhf.run.processes import end_processes, gathered, is_main_process, make_accelerator, share_of

__all__ = [
    "LoopState",
    "Run",
    "end_processes",
    "gathered",
    "is_finished",
    "is_main_process",
    "make_accelerator",
    "new_folder",
    "read_config",
    "share_of",
    "write_config",
    "write_text",
]
