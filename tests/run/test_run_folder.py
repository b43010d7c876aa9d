"""Files of a run are written whole or not at all."""

import contextlib
import json
import math
import os
from pathlib import Path

import pytest
import tiny_runs
from accelerate import Accelerator
from accelerate.utils import LoggerType
from torch import nn

from ppo_rlhf.config import SFTConfig
from ppo_rlhf.errors import UserError
from ppo_rlhf.run import (
    LoopState,
    Run,
    gathered,
    new_folder,
    processes,
    read_config,
    share_of,
    write_config,
    write_text,
)
from ppo_rlhf.run.checkpoints import checkpoints_in, is_whole, load_checkpoint, replaced_folder, save_checkpoint


@pytest.fixture
def accelerator():
    made = Accelerator(cpu=True)
    made.prepare(nn.Linear(2, 2))
    return made


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir() if path.name != "user.py")


def test_a_text_is_replaced_whole(tmp_path):
    write_text(tmp_path / "a.json", "old")
    write_text(tmp_path / "a.json", "new γ")
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == "new γ"
    assert "a.json" in names(tmp_path)
    assert not [name for name in names(tmp_path) if name.endswith(".partial")]


def test_a_text_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    write_text(tmp_path / "a.json", "old")

    def full_disk(_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_text(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text() == "old"


def test_a_folder_is_replaced_whole(tmp_path):
    for content in ("old", "new"):
        with replaced_folder(tmp_path / "model") as folder:
            (folder / content).write_text(content)
    assert names(tmp_path / "model") == ["new"]
    assert not [name for name in names(tmp_path) if name.startswith(".model")]


def test_a_folder_that_fails_to_be_written_leaves_the_old_one(tmp_path):
    with replaced_folder(tmp_path / "model") as folder:
        (folder / "old").write_text("old")

    def fill(folder):
        (folder / "new").write_text("half")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"), replaced_folder(tmp_path / "model") as folder:
        fill(folder)
    assert names(tmp_path / "model") == ["old"]
    assert not [name for name in names(tmp_path) if name.startswith(".model")]


def test_what_a_crash_left_beside_a_folder_does_not_disturb_the_next_one(tmp_path):
    for left in ("model", ".model.partial", ".model.old"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "left").write_text("left")
    with replaced_folder(tmp_path / "model") as folder:
        (folder / "new").write_text("new")
    assert names(tmp_path / "model") == ["new"]
    assert not [name for name in names(tmp_path) if name.startswith(".model")]


def test_the_latest_checkpoints_are_kept(tmp_path, accelerator):
    for step in (2, 4, 10, 100):
        save_checkpoint(tmp_path, LoopState(step=step), accelerator, keep=2)
    assert names(tmp_path) == ["step_000010", "step_000100"]
    assert load_checkpoint(tmp_path, accelerator) == LoopState(step=100)


def test_a_checkpoint_that_fails_to_be_written_leaves_those_before_it(tmp_path, accelerator, monkeypatch):
    save_checkpoint(tmp_path, LoopState(step=1, kl_coef=0.3), accelerator, keep=1)

    def full_disk(folder, **_):
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(accelerator, "save_state", full_disk)
        with pytest.raises(OSError, match="no space"):
            save_checkpoint(tmp_path, LoopState(step=2), accelerator, keep=1)
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step_000001"]
    assert load_checkpoint(tmp_path, accelerator) == LoopState(step=1, kl_coef=0.3)
    save_checkpoint(tmp_path, LoopState(step=2), accelerator, keep=1)
    assert names(tmp_path) == ["step_000002"]
    assert is_whole(tmp_path / "step_000002")


def test_a_folder_of_damaged_checkpoints_is_refused_instead_of_begun_anew(tmp_path, accelerator):
    for step in (1, 2):
        save_checkpoint(tmp_path, LoopState(step=step), accelerator, keep=2)
        (tmp_path / f"step_00000{step}" / "loop.json").write_text("{}")
    with pytest.raises(UserError, match=r"every checkpoint in .* is damaged; put a whole one there, or remove them"):
        load_checkpoint(tmp_path, accelerator)


def test_a_tracker_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(processes, "get_available_trackers", lambda: [LoggerType.TENSORBOARD])
    with pytest.raises(UserError, match=r"log_with: wandb needs its package, .* pip install wandb"):
        processes.make_accelerator(None, precision="no", log_with=("wandb",))


def test_there_is_no_checkpoint_in_a_folder_that_does_not_exist(tmp_path, accelerator):
    assert load_checkpoint(tmp_path / "nowhere", accelerator) is None


def test_an_unused_number_is_given_to_a_run_without_a_folder(tmp_path):
    assert new_folder(None, "sft", resume=False) == Path("runs/sft-0001")
    for taken in ("sft-0001", "sft-0002", "ppo-0007"):
        Path("runs", taken).mkdir(parents=True)
    assert new_folder(None, "sft", resume=False) == Path("runs/sft-0003")
    assert new_folder(None, "reward", resume=False) == Path("runs/reward-0001")


def test_an_empty_folder_is_taken_and_a_used_one_is_not(tmp_path):
    (tmp_path / "empty").mkdir()
    assert new_folder(str(tmp_path / "empty"), "sft", resume=False) == tmp_path / "empty"
    (tmp_path / "empty" / "config.yaml").write_text("seed: 0")
    with pytest.raises(UserError, match="holds a run already"):
        new_folder(str(tmp_path / "empty"), "sft", resume=False)
    assert new_folder(str(tmp_path / "empty"), "sft", resume=True) == tmp_path / "empty"


def test_a_configuration_is_read_as_it_was_written(tmp_path):
    write_config(tmp_path, SFTConfig(data="émile.jsonl", log_with=("tensorboard",), max_length=None))
    settings = read_config(tmp_path)
    assert settings["data"] == "émile.jsonl"
    assert settings["log_with"] == ["tensorboard"]
    assert settings["max_length"] is None
    assert settings["optimizer"]["schedule"] == "cosine"
    assert read_config(tmp_path / "nowhere") is None


def run_in(folder, accelerator, **changes):
    config = SFTConfig(output_dir=str(folder), log_with=(), **changes)
    return Run(folder, config, kind="sft", accelerator=accelerator, num_steps=9, started=0.0)


def test_a_number_that_is_not_finite_is_null_in_every_file_of_a_run(tmp_path, accelerator):
    with run_in(tmp_path / "out", accelerator) as run:
        run.log(1, {"loss": math.nan, "grad_norm": math.inf, "lr": 0.5})
        run.log_samples([{"step": 1, "kind": "rollout", "prompt": "é", "values": [1.0, -math.inf, (math.nan, 2)]}])
        summary = run.finish({"loss_after": math.nan, "loss_before": 3.0})
    assert (tmp_path / "out" / "metrics.jsonl").read_text() == (
        '{"step": 1, "loss": null, "grad_norm": null, "lr": 0.5}\n'
    )
    assert tiny_runs.jsonl(tmp_path / "out" / "samples.jsonl") == [
        {"step": 1, "kind": "rollout", "prompt": "é", "values": [1.0, None, [None, 2]]}
    ]
    written = tiny_runs.strict((tmp_path / "out" / "summary.json").read_text())
    assert written == {"loss_after": None, "loss_before": 3.0, "seconds": written["seconds"]}
    assert summary == written | {"output_dir": str(tmp_path / "out")}


@pytest.mark.parametrize("kept", [True, False])
def test_skipped_steps_are_told_with_their_samples_where_they_are_kept(kept, tmp_path, accelerator, capfd):
    """A control run keeps none."""
    with run_in(tmp_path / "out", accelerator, max_skips=1) as run:
        run.log_bad_samples([{"step": 1, "prompt": "é"}] if kept else [])
        with pytest.raises(UserError) as stopped:
            run.log(1, {"skipped_steps": 1, "optimizer_steps": 0})
    for message in (capfd.readouterr().err, str(stopped.value)):
        assert "not finite" in message
        assert ("bad_samples.jsonl" in message) is kept


class Tracker:
    """Remembers whether it was ended."""

    finished = False

    def log(self, values, step):
        """Takes no note."""

    def finish(self):
        self.finished = True


@pytest.mark.parametrize("failing", [False, True], ids=["at its end", "by an error"])
def test_a_run_that_is_left_ends_its_progress_and_its_trackers(failing, tmp_path, accelerator, monkeypatch):
    tracker, waits = Tracker(), []
    monkeypatch.setattr(accelerator, "trackers", [tracker])
    closed = []
    with contextlib.suppress(KeyError), run_in(tmp_path / "out", accelerator) as run:
        monkeypatch.setattr(run.progress, "close", lambda: closed.append(True))
        monkeypatch.setattr(accelerator, "wait_for_everyone", lambda: waits.append(True))
        if failing:
            raise KeyError
    assert tracker.finished
    assert closed
    assert bool(waits) is not failing  # after an error the others may never come


def test_what_was_logged_after_the_checkpoint_is_forgotten_also_a_line_cut_in_half(tmp_path, accelerator):
    with run_in(tmp_path / "out", accelerator) as run:
        run.log(0, {"loss": 3.0})
        run.log(1, {"loss": 2.0})
        run.save_checkpoint(LoopState(step=1))
        run.log(2, {"loss": 1.0})
    with (tmp_path / "out" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    again = run_in(tmp_path / "out", accelerator)
    assert again.resume() == LoopState(step=1)
    again.log(2, {"loss": 1.5})
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert lines == ['{"step": 0, "loss": 3.0}', '{"step": 1, "loss": 2.0}', '{"step": 2, "loss": 1.5}']


def test_a_line_with_a_character_that_elsewhere_ends_lines_is_one_line(tmp_path, accelerator):
    said = "one\u2028two\x85three"
    with run_in(tmp_path / "out", accelerator) as run:
        run.log_samples([{"step": 1, "response": said}])
        run.save_checkpoint(LoopState(step=1))
        run.log_samples([{"step": 2, "response": said}])
    assert run_in(tmp_path / "out", accelerator).resume() == LoopState(step=1)
    (line,) = (tmp_path / "out" / "samples.jsonl").read_text(encoding="utf-8").removesuffix("\n").split("\n")
    assert json.loads(line) == {"step": 1, "response": said}


def test_one_process_has_all_the_rows(accelerator):
    assert list(range(7))[share_of(7, accelerator)] == list(range(7))
    assert gathered(["a", "b"]) == ["a", "b"]
