"""The ready-made Accelerate configurations: read by Accelerate's own loader, and the one that can run here is run."""

import json
from pathlib import Path

import pytest
import tiny_runs
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from tiny_runs import data, in_tmp_path, models, steps_of

__all__ = ["data", "in_tmp_path", "models"]

FOLDER = Path(__file__).parents[1] / "examples" / "configs" / "accelerate"
KINDS = {  # name → (how it is distributed, processes, machines)
    "two_cpu_processes": ("MULTI_GPU", 2, 1),
    "one_gpu": ("NO", 1, 1),
    "eight_gpus_ddp": ("MULTI_GPU", 8, 1),
    "eight_gpus_fsdp2": ("FSDP", 8, 1),
    "deepspeed_zero3": ("DEEPSPEED", 8, 1),
    "two_nodes": ("MULTI_GPU", 16, 2),
}


def test_every_configuration_is_listed_and_explained():
    assert {path.stem for path in FOLDER.iterdir()} == set(KINDS)
    page = (FOLDER.parents[2] / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert [name for name in KINDS if f"{name}.yaml" not in page] == []


@pytest.mark.parametrize("name", KINDS)
def test_accelerate_reads_the_configuration(name):
    """It refuses keys that it does not know, and the launcher values that do not go together."""
    path = str(FOLDER / f"{name}.yaml")
    config = load_config_from_file(path)
    assert isinstance(config, ClusterConfig)
    kind, processes, machines = KINDS[name]
    assert (config.distributed_type.value, config.num_processes, config.num_machines) == (kind, processes, machines)
    words = ["--config_file", path, "-m", "ppo_rlhf"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    assert arguments.num_processes == processes
    assert (arguments.use_fsdp, arguments.use_deepspeed) == (kind == "FSDP", kind == "DEEPSPEED")
    if kind == "FSDP":
        assert str(arguments.fsdp_version) == "2"
    if kind == "DEEPSPEED":
        assert arguments.zero_stage == 3


def test_an_unknown_key_would_have_been_noticed(tmp_path):
    settings = yaml.safe_load((FOLDER / "eight_gpus_ddp.yaml").read_text())
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump({**settings, "num_proceses": 8}))
    with pytest.raises(ValueError, match="num_proceses"):
        load_config_from_file(str(tmp_path / "wrong.yaml"))


def test_two_cpu_processes_are_really_two(models, data, tmp_path):
    words = (
        f"ppo --policy {models['gpt2']} --prompts {data['prompts']} --reward user.py:vowels --batch_size 8 "
        "--num_steps 1 --max_eval_prompts 4 --sampling.max_new_tokens 4 --log_with [] --output-dir run"
    )
    launcher = ["-m", "accelerate.commands.launch", "--config_file", f"{FOLDER}/two_cpu_processes.yaml"]
    words = [*launcher, "-m", "ppo_rlhf", *words.split()]
    done = tiny_runs.python(*words, cwd=tmp_path, timeout=180, ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["processes"] == 2
    assert steps_of(tmp_path / "run") == [0, 1]
