"""What is published installs alone, holds what it should and nothing else, and runs without a checkout."""

import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import tiny_runs
from documents import ROOT

PACKAGES = ("ppo_rlhf", "classic")
ALSO = ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "tests", "docs", "examples")
DEBRIS = shutil.ignore_patterns("__pycache__", "*.egg-info")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The sdist made of a copy of the sources, and the wheel made of that sdist."""
    copy = tmp_path_factory.mktemp("sources")
    for name in (*PACKAGES, *ALSO):
        source = ROOT / name
        shutil.copytree(source, copy / name, ignore=DEBRIS) if source.is_dir() else shutil.copy(source, copy)
    words = [sys.executable, "-m", "build", "--no-isolation", "--outdir", copy / "dist", copy]
    built = subprocess.run(words, capture_output=True, text=True, cwd=copy)
    assert built.returncode == 0, built.stderr
    (sdist,), (wheel,) = (copy / "dist").glob("*.tar.gz"), (copy / "dist").glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def installed(published, tmp_path_factory):
    """The programs of an environment that holds the wheel, and what it depends on from where the tests have it."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, with_pip=True)
    programs = home / "bin"
    words = [programs / "python", "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", published[1]]
    subprocess.run(words, check=True, capture_output=True)
    (site,) = home.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")  # its own .pth files stay unread
    return programs


def files_of_the_packages():
    found = {path.relative_to(ROOT) for name in PACKAGES for path in (ROOT / name).rglob("*") if path.is_file()}
    return {str(path) for path in found if "__pycache__" not in path.parts}


def test_the_wheel_holds_the_packages_and_nothing_else(published):
    with zipfile.ZipFile(published[1]) as wheel:
        held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert held == files_of_the_packages()


def test_the_source_distribution_holds_the_packages_and_what_builds_them(published):
    with tarfile.open(published[0]) as sdist:
        held = {name.split("/", 1)[1] for name in sdist.getnames() if "/" in name and ".egg-info" not in name}
        folders = {name.split("/", 1)[1] for name in sdist.getnames() if "/" in name and sdist.getmember(name).isdir()}
    extra = {"pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "PKG-INFO", "setup.cfg"}
    assert held - folders == files_of_the_packages() | extra


def run(program, *words, cwd):
    environment = tiny_runs.environment()
    environment.pop("PYTHONPATH", None)
    return subprocess.run([program, *words], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def test_an_installed_wheel_is_imported_from_its_own_environment(installed, tmp_path):
    code = "import classic, ppo_rlhf; print(ppo_rlhf.__file__, classic.__file__)"
    places = run(installed / "python", "-c", code, cwd=tmp_path).stdout.split()
    assert len(places) == 2
    assert all(Path(place).is_relative_to(installed.parent) for place in places)


@pytest.mark.slow
def test_an_installed_wheel_runs_the_demo_without_a_checkout(installed, tmp_path):
    done = run(installed / "ppo-rlhf", "demo", "--output-dir", "demo", *tiny_runs.SHORT_DEMO.split(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    written = {str(path.relative_to(tmp_path / "demo")) for path in (tmp_path / "demo").rglob("*")}
    assert written >= {"report.html", "summary.json", "sft/policy", "reward/reward_model", "ppo/policy"}
