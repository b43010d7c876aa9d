"""What else breaks: full disks, read-only folders, damaged files, a second process, signals. Nothing is lost."""

import os
import resource
import signal
import sys
import time
from pathlib import Path

import pytest
from fault_cases import CASES, errors_of, finish, outcome, saved_step, start, words_of

from ppo_rlhf.run.checkpoints import checkpoints_in

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits and permissions are set as Linux has them")
# Bytes of a file on the full disk: room for an error, and for none of the checkpoints.
ROOM = {"sft": 30_000, "reward": 30_000, "ppo": 30_000, "classic": 2_000}


def begun(process, folder, step=3):
    """Waits until the running process has saved this step."""
    while saved_step(folder) < step:
        assert process.is_alive(), errors_of(Path.cwd())
        time.sleep(0.002)


def ended(process):
    process.join(120)
    return process.exitcode


def last_line():
    """The last line on stderr, after which there is no traceback."""
    errors = errors_of(Path.cwd())
    assert "Traceback" not in errors, errors
    return errors.splitlines()[-1]


def resumed(stage, words):
    """Goes on with the run to its end; → its outcome."""
    assert finish(stage, [*words, "--resume"], Path.cwd()) == 0, errors_of(Path.cwd())
    return outcome(stage, "run")


@pytest.mark.parametrize("stage", CASES)
def test_a_full_disk_ends_the_run_with_one_line_and_costs_at_most_a_step(stage, models, data, whole):
    words = words_of(stage, models, data, "run")
    process = start(stage, words, Path.cwd())
    begun(process, "run")
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (ROOM[stage], ROOM[stage]))
    assert ended(process) == 2
    assert last_line().startswith("error: run/")
    assert "cannot be written" in last_line()
    assert last_line().endswith("What was saved before is whole: mend it, and go on with --resume.")
    assert saved_step("run") >= 3
    assert resumed(stage, words) == whole[stage]


@pytest.mark.parametrize("folder", ["closed", "closed/run"])
@pytest.mark.parametrize("stage", ["ppo", "classic"])
def test_a_folder_that_may_not_be_written_is_named(stage, folder, models, data):
    Path("closed").mkdir(mode=0o555)
    words = words_of(stage, models, data, folder)
    assert ended(start(stage, words, Path.cwd(), like_any_user=True)) == 2
    assert last_line().startswith(f"error: {folder} cannot be written: Permission denied")
    assert list(Path("closed").iterdir()) == []


def test_a_folder_that_is_closed_during_a_run_ends_it_with_one_line_and_loses_nothing(models, data, whole):
    words = words_of("sft", models, data, "run")
    process = start("sft", words, Path.cwd(), like_any_user=True)
    begun(process, "run")
    Path("run/checkpoints").chmod(0o555)
    assert ended(process) == 2
    assert "cannot be written: Permission denied" in last_line()
    Path("run/checkpoints").chmod(0o755)
    assert saved_step("run") >= 3
    assert resumed("sft", words) == whole["sft"]


def damage(checkpoint, how):
    weights = max(checkpoint.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    content = bytearray(weights.read_bytes())
    if how == "deleted":
        weights.unlink()
    elif how == "truncated":
        weights.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 4
        weights.write_bytes(content)


@pytest.mark.parametrize(
    ("stage", "how"),
    [("sft", "truncated"), ("reward", "one bit flipped"), ("ppo", "deleted"), ("classic", "truncated")],
)
def test_the_checkpoint_before_a_damaged_one_is_used_and_this_is_said(stage, how, models, data, whole):
    words = words_of(stage, models, data, "run")
    process = start(stage, words, Path.cwd())
    begun(process, "run", 4)
    process.kill()
    process.join()
    before, latest = checkpoints_in(Path("run/checkpoints"))[-2:]
    damage(latest, how)
    assert saved_step("run") == int(before.name[-6:]) > 0
    assert resumed(stage, words) == whole[stage]
    assert f"{latest.name} is damaged; the one before it is used." in errors_of(Path.cwd())


@pytest.mark.parametrize("stage", ["reward", "classic"])
def test_a_second_process_in_a_run_s_folder_is_refused_and_the_first_goes_on(stage, models, data, whole):
    words = words_of(stage, models, data, "run")
    process = start(stage, words, Path.cwd())
    begun(process, "run", 2)
    os.kill(process.pid, signal.SIGSTOP)  # so that it is still there
    try:
        assert finish(stage, [*words, "--resume"], Path.cwd()) == 2
        assert "error: another process is writing into run" in last_line()
    finally:
        os.kill(process.pid, signal.SIGCONT)
    assert ended(process) == 0
    assert outcome(stage, "run") == whole[stage]


@pytest.mark.parametrize("stage", CASES)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "Ctrl-C"])
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint_and_says_how_to_go_on(
    number, code, stage, models, data, whole
):
    words = words_of(stage, models, data, "run")
    words[words.index("--save_every" if stage != "classic" else "--save-every") + 1] = "0"  # none but for the signal
    process = start(stage, words, Path.cwd())
    log = Path("run/metrics.jsonl")
    while not log.exists() or log.read_text().count("\n") < 3:
        time.sleep(0.002)
    os.kill(process.pid, number)
    assert ended(process) == code
    step = saved_step("run")
    assert step >= 2
    assert f"stopped after step {step}; --resume --output-dir run goes on from the last checkpoint." in errors_of(".")
    assert "Traceback" not in errors_of(".")
    assert resumed(stage, words) == whole[stage]


def test_ctrl_c_ends_a_reward_that_hangs_before_the_run_has_begun(models, data):
    Path("user.py").write_text(
        "import time\nfrom pathlib import Path\ndef vowels(prompts, responses, **columns):\n"
        "    Path('called').touch()\n    time.sleep(60)\n"
    )
    process = start("ppo", words_of("ppo", models, data, "run"), Path.cwd())
    while not Path("called").exists():
        assert process.is_alive()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    process.join(20)
    assert process.exitcode == 130
    assert last_line() == "interrupted; --resume with the same --output-dir goes on from the last checkpoint."
    assert not Path("run").exists()


def test_a_second_ctrl_c_does_not_wait_for_the_step(models, data):
    Path("user.py").write_text(
        "import time\ncalls = []\ndef vowels(prompts, responses, **columns):\n    calls.append(1)\n"
        "    time.sleep(60 if len(calls) == 3 else 0)\n    return [1.0] * len(responses)\n"
    )
    process = start("ppo", words_of("ppo", models, data, "run"), Path.cwd())
    begun(process, "run", 1)
    time.sleep(0.5)
    for _ in range(2):
        os.kill(process.pid, signal.SIGINT)
        time.sleep(0.5)
    process.join(20)
    assert process.exitcode == 130
    assert "once more stops at once" in errors_of(".")
    assert saved_step("run") == 1
