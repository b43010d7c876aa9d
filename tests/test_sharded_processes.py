"""Two processes that share a sharded model (FSDP2 over gloo) take the same steps as one that has the whole of it."""

import json
from pathlib import Path

import pytest
import tiny_runs
from tiny_runs import STOPS, data, in_tmp_path, metrics_of, models, two_processes, weights_of, without_times

from ppo_rlhf.cli import main

__all__ = ["data", "in_tmp_path", "models"]

SHARDED = Path(__file__).with_name("sharded.py")  # the command with FSDP2 on CPUs
COMMON = (
    "--matmul_precision highest --log_with [] --eval_fraction 0.2 --save_every 1 --eval_every 2 --optimizer.lr 1e-3"
)
SAMPLING = f"--sampling.max_new_tokens 6 --sampling.stop_token_ids {json.dumps(STOPS).replace(' ', '')}"
PPO = (
    f"ppo --policy {{gpt2}} --prompts {{prompts}} --batch_size 8 {COMMON} {SAMPLING} --max_eval_prompts 3 "
    "--kl_target 1 --ppo.num_epochs 2 --ppo.micro_batch_size 2"
)
COMMANDS = {
    "sft": f"sft --policy {{gpt2}} --data {{demonstrations}} --batch_size 4 --num_epochs 0.75 {COMMON} "
    "--micro_batch_size 1",
    # five or six demonstrations a step, in micro-batches of two: the second process has fewer of them
    "sft_packed": f"sft --policy {{gpt2}} --data {{demonstrations}} --batch_tokens 65 --num_epochs 0.75 {COMMON} "
    "--micro_batch_size 2",
    "reward": f"reward --policy {{gpt2}} --data {{rankings}} --batch_size 4 --num_epochs 0.75 {COMMON} {SAMPLING} "
    "--normalization_prompts 8 --language_model_coef 0.1",
    "ppo": f"{PPO} --reward user.py:vowels --num_steps 3",
    "ppo_separate": f"{PPO} --reward user.py:vowels --num_steps 3 --value_model separate",
}
MODELS = {"sft": "policy", "sft_packed": "policy", "reward": "reward_model", "ppo": "policy", "ppo_separate": "policy"}


@pytest.mark.parametrize("stage", COMMANDS)
def test_two_sharded_processes_take_the_same_steps_as_one(stage, models, data, tmp_path):
    words = COMMANDS[stage].format(**models, **data).split()
    assert main([*words, "--output-dir", "one"]) == 0
    done = two_processes(SHARDED, *words, "--output-dir", "two", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert list(Path("two/checkpoints").glob("*/pytorch_model_fsdp_0"))  # it was sharded indeed
    rows = [without_times(metrics_of(name)) for name in ("one", "two")]
    for one, two in zip(*rows, strict=True):
        assert two == pytest.approx(one, abs=2e-5, rel=2e-5)
    weights = weights_of(f"one/{MODELS[stage]}")
    for name, value in weights_of(f"two/{MODELS[stage]}").items():
        assert float((value - weights[name]).abs().max()) < 1e-5, name


FAILS_ONCE = """
from pathlib import Path

calls = []

def vowels(prompts, responses, **columns):
    calls.append(1)
    if len(calls) == 4 and not Path("cured").exists():
        raise RuntimeError("the judge is ill")
    return [sum(letter in "aeiou" for letter in response) for response in responses]
"""


def test_a_sharded_run_is_resumed_from_its_sharded_checkpoint(models, data, tmp_path):
    Path("user.py").write_text(FAILS_ONCE)
    words = f"{PPO} --reward user.py:vowels --num_steps 4 --eval_every 0".format(**models, **data).split()
    assert two_processes(SHARDED, *words, "--output-dir", "cut", cwd=tmp_path).returncode != 0
    assert Path("cut/checkpoints/step_000002/pytorch_model_fsdp_0").is_dir()
    Path("cured").touch()
    resumed = two_processes(SHARDED, *words, "--output-dir", "cut", "--resume", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert two_processes(SHARDED, *words, "--output-dir", "whole", cwd=tmp_path).returncode == 0
    assert without_times(metrics_of("cut")) == without_times(metrics_of("whole"))
    assert tiny_runs.same_weights("cut/policy", "whole/policy")
