"""The documentation builds offline without a warning, holds every page, and fetches nothing when it is read."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAVIGATION = tomllib.loads((ROOT / "zensical.toml").read_text())["project"]["nav"]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The pages as they come out of a copy that holds nothing but what they are made of."""
    copy = tmp_path_factory.mktemp("documentation")
    for name in ("docs", "ppo_rlhf", "classic"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "zensical.toml", copy)
    program = Path(sys.executable).with_name("zensical")
    built = subprocess.run([program, "build", "--strict"], cwd=copy, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    assert "No issues found" in built.stdout + built.stderr
    return copy / "site"


def pages_of(entry):
    if isinstance(entry, str):
        return [entry]
    return [page for inner in (entry.values() if isinstance(entry, dict) else entry) for page in pages_of(inner)]


def test_every_page_is_in_the_navigation():
    written = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert set(pages_of(NAVIGATION)) == written


def test_no_page_fetches_anything_from_elsewhere(site):
    fetched = re.compile(r'<(?:script|link|img|iframe)\b[^>]*?(?:src|href)="((?:https?:)?//[^"]+)"')
    pages = list(site.rglob("*.html"))
    assert len(pages) > len(pages_of(NAVIGATION)) - 1
    assert [address for page in pages for address in fetched.findall(page.read_text())] == []


@pytest.mark.parametrize(
    ("page", "name"),
    [
        ("mathematics", "ppo_rlhf.core.advantages.gae"),
        ("mathematics", "ppo_rlhf.update.ppo_update"),
        ("language-models", "ppo_rlhf.train.ppo.train"),
        ("settings", "ppo_rlhf.config.PPOConfig.kl_coef"),
        ("rewards", "ppo_rlhf.rewards.http_reward.HTTPReward"),
        ("control", "classic.policy.Policy.act"),
    ],
)
def test_the_reference_describes_what_a_user_calls(site, page, name):
    assert f'id="{name}"' in (site / "api" / f"{page}.html").read_text()


def test_a_formula_keeps_its_lines_in_the_reference(site):
    page = (site / "api" / "mathematics.html").read_text()
    described = page.split('id="ppo_rlhf.core.advantages.gae"')[1].split("<h3")[0]
    assert re.search(r"<code>.*δ_t = r_t.*\n.*A_t = δ_t", described, flags=re.DOTALL)
