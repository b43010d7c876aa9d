"""Many annotators at once through the real server, small; `examples/benchmarks/label_load.py` has it in full."""

import subprocess
import sys
from pathlib import Path

import tiny_runs

SCRIPT = Path(__file__).parents[2] / "examples" / "benchmarks" / "label_load.py"


def test_annotators_at_once_lose_and_double_no_choice(address, tmp_path):
    words = ["--annotators", "6", "--choices", "10", "--pause", "0", "--limit", "30", "--db", address]
    done = subprocess.run(
        [sys.executable, SCRIPT, *words],
        cwd=tmp_path,
        env=tiny_runs.environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "60 choices of 6 annotators" in done.stdout
    assert "lost 0, doubled 0" in done.stdout
