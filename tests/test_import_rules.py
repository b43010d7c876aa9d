"""Who may import whom, read from the source with `ast`; and that the command line starts without anything heavy."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ppo_rlhf"
FILES = sorted(PACKAGE.rglob("*.py"))
STANDARD = set(sys.stdlib_module_names)

ERRORS = {"errors"}
LIGHT = ERRORS | {"settings"}  # free of torch
LANGUAGE = LIGHT | {"core", "models", "data", "references"}
EVERYTHING_BELOW = LANGUAGE | {
    "config",
    "optimizer",
    "policy",
    "prompts",
    "rewards",
    "rollout",
    "run",
    "sampling",
    "seeding",
    "update",
}

# module → (the libraries, our modules) that it may import besides the standard library and itself
RULES: dict[str, tuple[set[str], set[str]]] = {
    "__init__": (set(), set()),
    "__main__": (set(), {"cli"}),
    "errors": (set(), set()),
    "settings": (set(), ERRORS),
    "config": (set(), LIGHT),
    "references": (set(), ERRORS),
    "core": ({"torch"}, set()),
    "seeding": ({"torch"}, set()),
    "optimizer": ({"torch"}, LIGHT),
    "update": ({"torch", "accelerate"}, LIGHT | {"core"}),
    "run": ({"torch", "accelerate", "safetensors", "yaml", "rich"}, ERRORS | {"core"}),
    "data": ({"torch", "datasets"}, ERRORS | {"references", "seeding"}),
    "models": ({"torch", "transformers"}, ERRORS | {"references"}),
    "prompts": ({"torch", "transformers", "datasets"}, LANGUAGE),
    "policy": ({"torch", "transformers"}, LANGUAGE),
    "sampling": ({"torch", "transformers"}, LANGUAGE | {"prompts"}),
    "rewards": ({"torch", "transformers"}, LANGUAGE),
    "rollout": ({"torch", "transformers"}, LANGUAGE | {"policy", "prompts", "sampling"}),
    "toy": ({"torch", "transformers", "tokenizers"}, ERRORS | {"core", "rewards"}),
    "train": ({"torch", "transformers", "accelerate"}, EVERYTHING_BELOW),
    "pipeline": ({"torch", "transformers", "accelerate"}, EVERYTHING_BELOW | {"train"}),
    "report": ({"jinja2", "matplotlib"}, ERRORS),
    "cli": ({"jsonargparse", "yaml"}, LIGHT | {"config", "pipeline", "report", "run", "train"}),
}


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def module_of(path: Path) -> str:
    """The first name below ppo_rlhf: `core` for ppo_rlhf/core/kl.py, `policy` for ppo_rlhf/policy.py."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_by(path: Path) -> set[str]:
    """Every dotted name that the file imports, also inside functions, `from a import b` as a.b."""
    names = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def calls_in(path: Path) -> list[ast.Call]:
    return [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call)]


def identifier(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.fixture(params=FILES, ids=identifier)
def path(request) -> Path:
    """Each source file in turn."""
    return request.param


def test_every_module_has_its_rule():
    assert {module_of(path) for path in FILES} <= set(RULES)


def test_a_module_imports_only_what_its_rule_allows(path):
    libraries, ours = RULES[module_of(path)]
    for name in imported_by(path):
        first, *rest = name.split(".")
        if first == "ppo_rlhf":
            assert rest, f"{name}: import a module of ppo_rlhf by name"
            assert rest[0] in ours | {module_of(path)}, f"{module_of(path)} may not import ppo_rlhf.{rest[0]}"
        elif first not in STANDARD:
            assert first in libraries, f"{module_of(path)} may not import {first}"


def test_the_toolkit_never_imports_the_control_side(path):
    assert not {name for name in imported_by(path) if name.split(".")[0] in ("classic", "gymnasium")}


def test_only_the_command_line_imports_the_report(path):
    uses = {name for name in imported_by(path) if name.startswith("ppo_rlhf.report")}
    assert not uses or module_of(path) in ("cli", "report")


def test_the_control_side_never_imports_transformers():
    allowed = {"core", "update", "run", "errors", "settings", "seeding", "optimizer", "references"}
    for path in sorted((ROOT / "classic").rglob("*.py")):
        for name in imported_by(path):
            first, *rest = name.split(".")
            assert first not in ("transformers", "datasets", "tokenizers"), f"{path} imports {name}"
            assert first != "ppo_rlhf" or rest[0] in allowed, f"{path} imports {name}"


def test_printing_is_for_the_command_line_and_the_run(path):
    prints = [call.lineno for call in calls_in(path) if isinstance(call.func, ast.Name) and call.func.id == "print"]
    assert not prints or module_of(path) in ("cli", "run"), prints


def test_no_file_unpickles(path):
    assert not {name for name in imported_by(path) if name.split(".")[0] in ("pickle", "dill", "cloudpickle", "joblib")}
    loads = [ast.unparse(call.func) for call in calls_in(path)]
    assert "torch.load" not in loads


def test_no_file_trusts_remote_code_by_itself(path):
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            assert not (isinstance(node.value, ast.Constant) and node.value.value), f"line {node.value.lineno}"
        if isinstance(node, ast.arguments):
            positional = [*node.posonlyargs, *node.args]
            pairs = [*zip(positional[len(positional) - len(node.defaults) :], node.defaults, strict=True)]
            pairs += list(zip(node.kwonlyargs, node.kw_defaults, strict=True))
            for argument, default in pairs:
                if argument.arg == "trust_remote_code":
                    assert isinstance(default, ast.Constant)
                    assert default.value is False


def test_the_core_switches_no_gradient_off():
    for path in (PACKAGE / "core").glob("*.py"):
        decorators = [
            ast.unparse(decorator)
            for node in ast.walk(tree_of(path))
            if isinstance(node, ast.FunctionDef)
            for decorator in node.decorator_list
        ]
        assert not [name for name in decorators if "no_grad" in name or "inference_mode" in name]


# ---------------------------------------------------------------------------------------------------- start-up

HEAVY = ("torch", "transformers", "numpy", "datasets", "accelerate", "matplotlib")
HELP = f"""
import contextlib, io, sys
from ppo_rlhf import cli
with contextlib.redirect_stdout(io.StringIO()) as out:
    code = cli.main(sys.argv[1:])
assert code == 0, code
assert "usage" in out.getvalue().lower(), out.getvalue()
loaded = [name for name in {HEAVY!r} if name in sys.modules]
assert not loaded, loaded
"""


def run_python(*arguments: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", *arguments], capture_output=True, text=True, timeout=120, env=environment, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_importing_the_command_line_imports_nothing_heavy():
    run_python(f"import ppo_rlhf.cli, sys; assert not [name for name in {HEAVY!r} if name in sys.modules]")


@pytest.mark.parametrize("command", [None, "demo", "sft", "reward", "ppo", "pipeline", "report"])
def test_help_imports_nothing_heavy(command):
    run_python(HELP, *([command] if command else []), "--help")


def test_every_command_is_tried_above():
    from ppo_rlhf.cli import COMMANDS

    assert set(COMMANDS) == {"demo", "sft", "reward", "ppo", "pipeline", "report"}
