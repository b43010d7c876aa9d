"""What the README shows works: its Python runs, its commands and their options exist."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_runs
from documents import DOCUMENTS, READMES, ROOT, commands_in, fenced_blocks
from tiny_runs import data, in_tmp_path, models

__all__ = ["data", "in_tmp_path", "models"]

DATA = ROOT / "docs" / "data.md"


PYTHON = [
    pytest.param(block, id=path.name) for path in DOCUMENTS for block in fenced_blocks(path.read_text(), "python")
]
COMMANDS = [words for path in DOCUMENTS for words in commands_in(path.read_text())]


def test_the_readme_has_python_and_commands_to_try():
    assert PYTHON
    assert {words[0] for words in COMMANDS} >= {"ppo-rlhf", "torchrun", "make"}


@pytest.mark.parametrize("block", PYTHON)
def test_the_python_of_readme_and_docs_runs_on_a_users_files(block, models):
    Path("runs/sft").mkdir(parents=True)
    Path("runs/sft/policy").symlink_to(models["gpt2"])
    tiny_runs.write_rows("demonstrations.jsonl", tiny_runs.demonstrations(80))
    tiny_runs.write_rows("comparisons.jsonl", tiny_runs.comparisons(80))
    tiny_runs.write_rows("prompts.jsonl", tiny_runs.prompts(80))
    exec(compile(block, "README.md", "exec"), {})


SECTIONS = {"Demonstrations": "sft", "Comparisons": "reward", "Prompts": "ppo"}
ROWS = [
    (stage, row)
    for title, stage in SECTIONS.items()
    for row in fenced_blocks(re.split(r"^## ", DATA.read_text().split(f"## {title}")[1], flags=re.MULTILINE)[0], "json")
]


@pytest.mark.parametrize(("stage", "row"), ROWS)
def test_the_rows_of_the_data_page_are_read_by_their_stage(stage, row, models, capfd):
    Path("chat.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}")
    Path("rows.jsonl").write_text(row * 2)
    words = ["--policy", models["gpt2"], "--data", "rows.jsonl", "--chat-template", "chat.jinja", "--too-long", "left"]
    assert importlib.import_module("ppo_rlhf.cli").main(["inspect-data", "--json", *words]) == 0
    (found,) = json.loads(capfd.readouterr().out)["stages"]
    assert (found["stage"], found["rows"]) == (stage, 2)
    assert found["tokens"] > 0


def test_the_data_page_shows_rows_of_every_stage():
    assert {stage for stage, _ in ROWS} == set(SECTIONS.values())


def help_of_module(module, subcommand, capsys):
    """The help of `python -m module subcommand`."""
    assert importlib.import_module(f"{module}.cli").main([subcommand, "--help"]) == 0
    return capsys.readouterr().out


def help_of(words, capsys):
    """The help of the program that the words call; nothing is run."""
    if words[0] == "ppo-rlhf":
        return help_of_module("ppo_rlhf", words[1], capsys)
    if words[0] == "torchrun":
        place = words.index("-m")
        return help_of_module(*words[place + 1 : place + 3], capsys) + "--nproc_per_node --standalone"
    if words[1] == "-m":
        return help_of_module(words[2], words[3], capsys)
    done = subprocess.run([sys.executable, ROOT / words[1], "--help"], capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.parametrize("words", [words for words in COMMANDS if words[0] != "make"], ids=" ".join)
def test_a_command_of_the_readme_exists_with_all_its_options(words, capsys):
    known = set(re.findall(r"--[\w.-]+", help_of(words, capsys)))
    for word in words:
        if word.startswith("--"):
            option = word.partition("=")[0]
            assert option in known or "--" + option[2:].replace("-", "_") in known, word
        if word.startswith("examples/"):
            assert (ROOT / word).exists(), word


def test_every_make_target_of_the_readme_exists():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    named = {words[1] for words in COMMANDS if words[0] == "make"}
    assert named
    assert named <= set(targets)


@pytest.mark.parametrize("path", READMES, ids=lambda path: path.name)
def test_every_file_that_the_readme_names_exists(path):
    named = re.findall(r"`((?:ppo_rlhf|classic|examples|tests|docs)/[\w./-]*)`", path.read_text())
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []


def facts_of(text):
    """What two languages must say alike: code, commands, where links lead, and the numbers of each table's rows."""
    prose = re.sub(r"^(```.*?^```| {4}.*?)$", "", text, flags=re.DOTALL | re.MULTILINE)
    rows = [re.findall(r"[−\d][\d.,]*\d|\d", row) for row in re.findall(r"^\|.*$", text, flags=re.MULTILINE)]
    return {
        "headings": len(re.findall(r"^#+ ", text, flags=re.MULTILINE)),
        "python": fenced_blocks(text, "python"),
        "commands": commands_in(text),
        "code": sorted(" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)),
        "links": sorted(target for target in re.findall(r"\]\(([^)]+)\)", prose) if not target.startswith("README")),
        "numbers of the tables": rows,
    }


@pytest.mark.parametrize("fact", facts_of(""))
def test_the_chinese_readme_says_what_the_english_one_says(fact):
    english, chinese = (facts_of((ROOT / name).read_text())[fact] for name in ("README.md", "README.zh.md"))
    assert english
    assert chinese == english
