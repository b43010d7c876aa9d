"""Who may import whom, read from the source with `ast`; and that the command line starts without anything heavy."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ppo_rlhf"
CONTROL = ROOT / "classic"
FILES = sorted(PACKAGE.rglob("*.py"))
CONTROL_FILES = sorted(CONTROL.rglob("*.py"))
STANDARD = set(sys.stdlib_module_names)

ERRORS = {"errors"}
LIGHT = ERRORS | {"settings"}  # free of torch
LANGUAGE = LIGHT | {"adapters", "core", "models", "packing", "data", "messages", "references", "preferences"}
EVERYTHING_BELOW = LANGUAGE | {
    "compute",
    "config",
    "measures",
    "micro_batches",
    "model_card",
    "optimizer",
    "policy",
    "prompts",
    "reward_settings",
    "rewards",
    "rollout",
    "run",
    "sampling",
    "seeding",
    "update",
    "vllm_sampler",
}

# module → (the libraries, our modules) that it may import besides the standard library and itself
RULES: dict[str, tuple[set[str], set[str]]] = {
    "__init__": (set(), set()),
    "__main__": (set(), {"cli"}),
    "errors": (set(), set()),
    "settings": (set(), ERRORS),
    "config": (set(), LIGHT | {"reward_settings"}),
    "references": (set(), ERRORS),
    "core": ({"torch"}, set()),
    "seeding": ({"torch"}, set()),
    "statistics": ({"numpy", "scipy"}, set()),
    "optimizer": ({"torch", "bitsandbytes"}, LIGHT),
    "micro_batches": ({"torch", "accelerate"}, ERRORS),
    "update": ({"torch", "accelerate"}, LIGHT | {"core", "micro_batches"}),
    "run": ({"torch", "accelerate", "safetensors", "yaml", "rich"}, LIGHT | {"core"}),
    "messages": (set(), ERRORS),
    "data": ({"torch", "datasets", "transformers"}, LIGHT | {"messages", "preferences", "references", "seeding"}),
    "intervals": (set(), set()),
    "preferences": ({"sqlalchemy", "datasets"}, LIGHT | {"intervals", "messages"}),
    "packing": ({"torch", "transformers"}, set()),
    "adapters": ({"torch", "peft"}, LIGHT),
    "models": ({"torch", "transformers", "safetensors"}, ERRORS | {"adapters", "packing", "references"}),
    "compute": ({"torch"}, LIGHT),
    "measures": ({"torch"}, set()),
    "prompts": ({"torch", "transformers", "datasets"}, LANGUAGE),
    "policy": ({"torch", "transformers"}, LANGUAGE),
    "kv_cache": ({"torch", "transformers"}, set()),
    "forwards": ({"torch", "transformers"}, LANGUAGE),
    "sampling": ({"torch", "transformers"}, LANGUAGE | {"forwards", "kv_cache", "prompts"}),
    "vllm_sampler": ({"httpx2", "torch", "transformers"}, LANGUAGE | {"http_client", "prompts", "run", "sampling"}),
    "reward_settings": (set(), LIGHT),
    "http_client": ({"httpx2"}, ERRORS),
    "rewards": ({"httpx2", "jsonschema", "torch", "transformers"}, LANGUAGE | {"http_client", "reward_settings"}),
    "rollout": ({"torch", "transformers"}, LANGUAGE | {"policy", "prompts", "sampling"}),
    "toy": ({"torch", "transformers", "tokenizers"}, ERRORS | {"core", "rewards"}),
    "train": ({"torch", "transformers", "accelerate"}, EVERYTHING_BELOW),
    "model_card": ({"huggingface_hub"}, {"references"}),
    "export": ({"torch", "transformers", "huggingface_hub"}, LANGUAGE | {"rewards", "run"}),
    "stepwise": ({"torch", "transformers", "accelerate"}, EVERYTHING_BELOW | {"train"}),
    "saved_runs": (set(), EVERYTHING_BELOW),
    "candidates": ({"transformers"}, EVERYTHING_BELOW | {"saved_runs"}),
    "chat": ({"torch", "transformers"}, EVERYTHING_BELOW | {"saved_runs", "train"}),
    "evaluation_settings": (set(), LIGHT | {"reward_settings"}),
    "evaluate": (
        {"torch", "transformers", "safetensors", "numpy", "rich"},
        EVERYTHING_BELOW | {"evaluation_settings", "intervals", "saved_runs", "statistics", "train"},
    ),
    "inspection": ({"transformers", "rich"}, EVERYTHING_BELOW | {"train"}),
    "pipeline": ({"torch", "transformers", "accelerate"}, EVERYTHING_BELOW | {"train"}),
    "study": (
        {"torch", "matplotlib", "numpy", "scipy", "transformers", "yaml"},
        EVERYTHING_BELOW | {"document", "measures", "pipeline", "records", "statistics", "toy", "train"},
    ),
    "document": (set(), ERRORS),
    "records": ({"yaml"}, ERRORS),
    "report": ({"bokeh", "jinja2", "markupsafe", "numpy", "yaml"}, LIGHT | {"document", "records"}),
    "doctor": ({"rich"}, ERRORS | {"records"}),
    "label": ({"jinja2", "markdown_it", "markupsafe", "starlette", "uvicorn"}, ERRORS | {"preferences"}),
    "arguments": ({"jsonargparse", "yaml"}, ERRORS),
    "cli": (
        {"jsonargparse", "rich", "yaml"},
        LIGHT
        | {"arguments", "candidates", "chat", "config", "data", "doctor", "label", "pipeline", "preferences", "report"}
        | {"evaluate", "evaluation_settings", "export", "inspection", "run", "study", "train"},
    ),
}

PLAYING = {"envs", "policy", "spaces"}
EXPERIMENT = {"config", "experiment", "many_runs", "plot", "presets", "variants"}
# the same for the control side, of which the toolkit knows nothing: (libraries, its own modules, the toolkit's)
CONTROL_RULES: dict[str, tuple[set[str], set[str], set[str]]] = {
    "__init__": (set(), {"policy", "ppo"}, set()),
    "__main__": (set(), {"cli"}, set()),
    "settings": (set(), set(), LIGHT),
    "config": (set(), {"settings"}, LIGHT),
    "presets": (set(), {"config", "settings"}, LIGHT),
    "variants": (set(), set(), set()),
    "spaces": ({"torch", "numpy"}, set(), ERRORS),
    "networks": ({"torch"}, {"settings"}, set()),
    "normalizers": ({"torch"}, set(), {"core"}),
    "distributions": ({"torch"}, {"settings", "spaces"}, ERRORS),
    "envs": ({"torch"}, {"spaces"}, ERRORS),
    "envs.gymnasium": ({"torch", "numpy", "gymnasium", "ale_py"}, {"envs", "spaces"}, ERRORS | {"references"}),
    "policy": (
        {"torch", "numpy", "safetensors"},
        {"distributions", "envs", "networks", "normalizers", "settings", "spaces"},
        ERRORS | {"core", "references"},
    ),
    "rollout": ({"torch"}, PLAYING | {"normalizers"}, {"core"}),
    "systems": ({"torch"}, {"config", "spaces"}, set()),
    "pictures": ({"torch"}, PLAYING | {"config", "evaluate", "systems"}, {"seeding"}),
    "evaluate": ({"torch", "gymnasium"}, PLAYING | {"config"}, ERRORS | {"seeding"}),
    "trpo": ({"torch"}, {"config", "policy"}, {"core", "seeding"}),
    "ppo": (
        {"torch", "accelerate"},
        PLAYING | {"config", "evaluate", "pictures", "presets", "rollout", "trpo"},
        LIGHT | {"core", "micro_batches", "optimizer", "run", "seeding", "update"},
    ),
    "video": ({"gymnasium"}, PLAYING | {"config", "evaluate"}, ERRORS | {"seeding"}),
    "export": ({"torch"}, {"policy", "spaces"}, ERRORS),
    "plot": ({"matplotlib", "numpy"}, set(), LIGHT | {"run", "statistics"}),
    "many_runs": (set(), {"config", "envs", "ppo"}, {"run"}),
    "compare": ({"numpy"}, {"config", "many_runs", "plot", "presets"}, {"run", "statistics"}),
    "experiment": (
        {"numpy"},
        {"config", "envs", "evaluate", "many_runs", "ppo", "variants"},
        ERRORS | {"run", "seeding"},
    ),
    "table1": ({"numpy"}, EXPERIMENT, {"run", "statistics"}),
    "ablations": (set(), EXPERIMENT, {"run", "statistics"}),
    "cli": (
        {"jsonargparse", "yaml"},
        {"compare", "config", "evaluate", "export", "plot", "policy", "ppo", "presets", "video"}
        | {"ablations", "table1", "variants"},
        LIGHT | {"arguments", "run"},
    ),
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


@pytest.mark.parametrize("leaf", ["report", "label", "doctor"])
def test_only_the_command_line_imports_a_leaf(path, leaf):
    uses = {name for name in imported_by(path) if name.split(".")[:2] == ["ppo_rlhf", leaf]}
    assert not uses or module_of(path) in ("cli", leaf)


def control_module_of(path: Path) -> str:
    """`ppo` for classic/ppo.py, `envs` for all of classic/envs/ but gymnasium.py, which is `envs.gymnasium`."""
    first, *rest = path.relative_to(CONTROL).with_suffix("").parts
    return f"{first}.{rest[0]}" if rest == ["gymnasium"] else first


def test_every_module_of_the_control_side_has_its_rule():
    assert {control_module_of(path) for path in CONTROL_FILES} == set(CONTROL_RULES)


@pytest.mark.parametrize("path", CONTROL_FILES, ids=identifier)
def test_a_module_of_the_control_side_imports_only_what_its_rule_allows(path):
    module = control_module_of(path)
    libraries, own, ours = CONTROL_RULES[module]
    for name in imported_by(path):
        first, *rest = name.split(".")
        if first == "classic":
            assert rest[0] in own | {module.partition(".")[0]}, f"{module} may not import classic.{rest[0]}"
        elif first == "ppo_rlhf":
            assert rest[0] in ours, f"{module} may not import ppo_rlhf.{rest[0]}"
        elif first not in STANDARD:
            assert first in libraries, f"{module} may not import {first}"


@pytest.mark.parametrize("path", CONTROL_FILES, ids=identifier)
def test_on_the_control_side_only_the_command_line_prints(path):
    prints = [call.lineno for call in calls_in(path) if isinstance(call.func, ast.Name) and call.func.id == "print"]
    assert not prints or control_module_of(path) == "cli", prints


def test_printing_is_for_the_command_line_and_the_run(path):
    prints = [call.lineno for call in calls_in(path) if isinstance(call.func, ast.Name) and call.func.id == "print"]
    assert not prints or module_of(path) in ("arguments", "cli", "run"), prints


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

HEAVY = ("torch", "transformers", "numpy", "datasets", "accelerate", "matplotlib", "bokeh", "gymnasium", "sqlalchemy")
HEAVY += ("scipy", "uvicorn")
HELP = f"""
import contextlib, importlib, io, sys
program, *words = sys.argv[1:]
cli = importlib.import_module(program + ".cli")
with contextlib.redirect_stdout(io.StringIO()) as out:
    code = cli.main(words)
assert code == 0, code
assert "usage" in out.getvalue().lower(), out.getvalue()
loaded = [name for name in {HEAVY!r} if name in sys.modules]
assert not loaded, loaded
"""
COMMANDS = {
    "ppo_rlhf": [
        *("demo", "sft", "reward", "ppo", "pipeline", "evaluate", "inspect-data", "chat", "doctor", "report", "label"),
        *("preferences", "export", "compare", "study"),
    ],
    "classic": ["train", "evaluate", "plot", "compare", "table1", "ablations", "video", "export"],
}


def run_python(*arguments: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", *arguments], capture_output=True, text=True, timeout=120, env=environment, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("program", COMMANDS)
def test_importing_the_command_line_imports_nothing_heavy(program):
    run_python(f"import {program}.cli, sys; assert not [name for name in {HEAVY!r} if name in sys.modules]")


@pytest.mark.parametrize(
    "words", [(program, *command) for program, names in COMMANDS.items() for command in [[], *([n] for n in names)]]
)
def test_help_imports_nothing_heavy(words):
    run_python(HELP, *words, "--help")


@pytest.mark.parametrize("program", COMMANDS)
def test_every_command_is_tried_above(program):
    cli = importlib.import_module(f"{program}.cli")
    assert list(cli.COMMANDS) == COMMANDS[program]
