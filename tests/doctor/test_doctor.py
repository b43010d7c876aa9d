"""Every check speaks where a run was really broken in its way, through the public API; none does on healthy runs."""

import copy
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_runs
import torch
import torch.nn.functional as F
from tiny_runs import STOPS

import classic
from ppo_rlhf import doctor
from ppo_rlhf.cli import main
from ppo_rlhf.config import PPOConfig, RewardConfig, SFTConfig
from ppo_rlhf.errors import UserError
from ppo_rlhf.models import load_policy
from ppo_rlhf.sampling import sample
from ppo_rlhf.settings import OptimizerSettings, PPOSettings, SamplingSettings
from ppo_rlhf.train import ppo, reward_model, sft

ROWS = tiny_runs.prompts(100)


def findings(folder="run"):
    """What the doctor finds: evidence by the check's name."""
    return {finding.check.name: finding.evidence for finding in doctor.examine(Path(folder))}


def vowels(prompts, responses, **columns):
    return [sum(letter in "aeiou" for letter in response) for response in responses]


def nothing(prompts, responses, **columns):
    return [0.0] * len(responses)


def fast(lr):
    return OptimizerSettings(lr=lr, schedule="constant")


def run(models, reward=vowels, *, given=None, gold=None, **changes):
    """A PPO run with these settings; → what the doctor finds. given: objects that take a name's place."""
    settings = {"num_steps": 16, "batch_size": 16, "eval_fraction": 0.3, "kl_coef": 0.0} | changes
    config = tiny_runs.ppo_config(models, **settings)
    ppo.train(config, reward=reward, gold=gold, prompts=ROWS, **given or {})
    return findings()


# ------------------------------------------------------------------------------------------------- healthy runs


def test_nothing_is_found_in_the_three_stages_of_the_embedded_task(toy):
    assert findings(toy) == {}


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_nothing_is_found_in_a_healthy_control_run(env_id, control):
    assert findings(control / env_id) == {}


def test_nothing_is_found_in_healthy_supervised_runs(models, data):
    common = {"policy": models["dropout"], "batch_size": 4, "num_epochs": 3.0, "eval_fraction": 0.2, "log_with": ()}
    common["optimizer"] = fast(1e-3)
    sft.train(SFTConfig(data=data["demonstrations"], output_dir="sft", **common))
    common["sampling"] = SamplingSettings(max_new_tokens=8)
    reward_model.train(RewardConfig(data=data["rankings"], output_dir="reward", **common))
    assert findings("sft") == findings("reward") == {}


def test_nothing_is_found_in_a_healthy_run_of_a_random_model(models):
    assert run(models, kl_coef=0.1) == {}


# -------------------------------------------------------------------------------------------------- broken runs


def test_a_sampler_that_cuts_the_distribution_shows_as_a_negative_kl(models):
    cut = SamplingSettings(max_new_tokens=8, top_k=3, stop_token_ids=STOPS)
    flattening = PPOSettings(num_epochs=2, entropy_coef=1.0)
    with pytest.warns(UserWarning, match="top_k=3"):
        found = run(models, nothing, sampling=cut, ppo=flattening, optimizer=fast(3e-3))
    assert "sampling.top_k=3" in found["negative KL"]


def test_a_policy_that_moves_between_rollout_and_update_shows_in_its_first_ratio(models):
    policy, tokenizer = load_policy(models["gpt2"], setting="test")

    def meddling(prompts, responses, **columns):
        with torch.no_grad():
            policy.transformer.wte.weight.mul_(1.01)
        return vowels(prompts, responses)

    found = run(models, meddling, given={"policy": policy, "tokenizer": tokenizer})
    assert "first ratio is not 1" in found
    assert "dropout left on" not in found


def test_a_sampler_that_keeps_the_weights_of_the_start_is_found(models):
    start, _ = load_policy(models["gpt2"], setting="test")

    def stale(policy, *arguments, **options):
        return sample(start, *arguments, **options)

    found = run(models, given={"sampler": stale}, optimizer=fast(1e-2))
    assert "sampler is not the policy" in found
    assert "first ratio is not 1" not in found


def test_dropout_that_no_name_betrays_is_found(models):
    policy, tokenizer = load_policy(models["gpt2"], setting="test")
    policy.transformer.h[0].register_forward_hook(lambda module, _, hidden: F.dropout(hidden, 0.2, module.training))
    found = run(models, given={"policy": policy, "tokenizer": tokenizer})
    assert {"dropout left on", "first ratio is not 1"} <= found.keys()


def test_a_mask_inferred_from_ids_where_padding_is_eos_is_found(toy):
    def inferring(policy, tokenizer, *arguments, **options):
        responses = sample(policy, tokenizer, *arguments, **options)
        return replace(responses, mask=responses.mask & (responses.ids != tokenizer.eos_token_id))

    config = PPOConfig(
        policy=str(toy / "sft" / "policy"), prompts="ppo_rlhf.toy:prompts", output_dir="run", num_steps=3
    )
    ppo.train(replace(config, batch_size=8, max_eval_prompts=8, log_with=()), reward=vowels, sampler=inferring)
    assert "stop token is masked" in findings()


def test_a_score_that_rises_while_the_gold_score_falls_is_reward_hacking(models):
    def gold(prompts, responses, **columns):
        return [-number for number in vowels(prompts, responses)]

    found = run(models, gold=gold, optimizer=fast(1e-2), num_steps=24)
    assert "the gold score fell" in found["reward hacking"]


def test_responses_that_grow_and_repeat_themselves_with_the_score_are_reward_hacking(models):
    def length(prompts, responses, **columns):
        return [len(response) / 10 for response in responses]

    longer = SamplingSettings(max_new_tokens=32, stop_token_ids=STOPS)
    found = run(models, length, sampling=longer, optimizer=fast(2e-2), num_steps=40)
    assert "responses grew" in found["reward hacking"]
    assert "stop rate falling" in found
    assert "repeated token pairs" in found["reward hacking"]


def test_steps_far_too_long_show_in_clip_fraction_kl_and_entropy(models):
    found = run(models, optimizer=fast(0.03), ppo=PPOSettings(num_epochs=6, num_minibatches=4))
    assert {"clip fraction too high", "KL running away", "entropy collapse"} <= found.keys()
    assert "by now" in found["value function explains nothing"]


def test_a_kl_far_above_its_target_is_running_away(models):
    found = run(models, kl_coef=1e-6, kl_target=0.02, optimizer=fast(1e-2), num_steps=12)
    assert "kl_target=0.02" in found["KL running away"]


def test_a_reward_for_silence_collapses_the_length(models):
    def silence(prompts, responses, **columns):
        return [-len(response) for response in responses]

    longer = SamplingSettings(max_new_tokens=16, stop_token_ids=STOPS)
    assert "length collapse" in run(models, silence, sampling=longer, optimizer=fast(1e-2), num_steps=24)


def test_a_value_function_that_is_not_trained_explains_nothing(models):
    assert "one constant" in run(models, ppo=PPOSettings(value_coef=0.0))["value function explains nothing"]


def test_whitening_over_a_handful_is_found(models):
    assert "over 2 responses" in run(models, batch_size=2)["whitening batch too small"]
    shutil.rmtree("run")
    minibatches = PPOSettings(num_minibatches=4, whiten_advantages="minibatch")
    assert "4 responses of a minibatch" in run(models, ppo=minibatches)["whitening batch too small"]
    shutil.rmtree("run")
    raw = PPOSettings(whiten_advantages="none")
    assert "whitening batch too small" not in run(models, batch_size=2, ppo=raw)


def test_advantages_against_the_group_are_whitened_over_minibatches_alone(models):
    groups = {"advantage": "rloo", "responses_per_prompt": 2, "batch_size": 4, "num_steps": 1}
    assert "whitening batch too small" not in run(models, **groups)
    shutil.rmtree("run")
    minibatches = PPOSettings(whiten_advantages="minibatch")
    assert "4 responses of a minibatch" in run(models, **groups, ppo=minibatches)["whitening batch too small"]


def with_another_vocabulary(reward_model, target):
    """The reward model beside a tokenizer of the same size whose ids mean other tokens."""
    shutil.copytree(reward_model, target)
    path = target / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    ids = tokenizer["model"]["vocab"]
    tokens = sorted(ids, key=ids.get)
    special, others = tokens[:2], tokens[2:]
    random.Random(2).shuffle(others)
    tokenizer["model"]["vocab"] = {token: index for index, token in enumerate([*special, *others])}
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    return str(target)


def test_a_reward_model_that_reads_another_vocabulary_is_found(toy, tmp_path):
    sound = toy / "reward" / "reward_model"
    config = PPOConfig(
        policy=str(toy / "sft" / "policy"),
        reward=with_another_vocabulary(sound, tmp_path / "wrong"),
        gold="ppo_rlhf.toy:gold",
        prompts="ppo_rlhf.toy:prompts",
        output_dir="run",
        num_steps=1,
        batch_size=8,
        max_eval_prompts=256,
        log_with=(),
    )
    ppo.train(config)
    assert "reward does not read this vocabulary" in findings()
    assert "reward does not read this vocabulary" not in findings(toy / "ppo")


def test_a_constant_reward_is_found(models):
    found = run(models, lambda prompts, responses, **_: [1.0] * len(responses))
    assert "scored 1" in found["constant reward"]


def test_an_environment_that_pays_the_same_for_everything_is_found():
    settings = replace(classic.ppo.preset_for("Pendulum-v1"), num_envs=4, horizon=8, eval_episodes=1, log_with=())
    environment = replace(settings.environment, max_episode_steps=4, env_kwargs={})
    classic.train(paying_one, num_steps=512, output_dir="run", config=replace(settings, environment=environment))
    assert "constant reward" in findings()


def paying_one(**options):
    """Pendulum, whose every step pays 1."""
    import gymnasium

    return gymnasium.wrappers.TransformReward(gymnasium.make("Pendulum-v1", **options), lambda reward: 1.0)


def test_a_reference_that_a_callback_moves_is_found(models):
    policy, tokenizer = load_policy(models["gpt2"], setting="test")
    reference = copy.deepcopy(policy)

    def follow(step, metrics):
        reference.load_state_dict(policy.state_dict())

    given = {"policy": policy, "tokenizer": tokenizer, "reference": reference, "callbacks": [follow]}
    assert "norm of the reference's weights" in run(models, given=given)["reference moved"]


def test_a_reference_that_is_the_policy_itself_is_found(models):
    policy, tokenizer = load_policy(models["gpt2"], setting="test")
    given = {"policy": policy, "tokenizer": tokenizer, "reference": policy}
    assert "reference moved" in run(models, given=given)


def test_a_gradient_that_is_cut_to_nothing_at_every_step_is_found(models, data):
    found = run(models, ppo=PPOSettings(max_grad_norm=1e-3))
    assert "max_grad_norm=0.001" in found["gradient clipped at every step"]
    config = SFTConfig(policy=models["gpt2"], data=data["demonstrations"], output_dir="sft", batch_size=2, log_with=())
    sft.train(replace(config, eval_fraction=0.2, max_grad_norm=1e-3))
    assert "gradient clipped at every step" in findings("sft")


def test_steps_that_were_skipped_and_numbers_that_are_none_are_found(models):
    found = run(models, lambda prompts, responses, **_: [1e38] * len(responses), num_steps=2)
    assert "optimizer steps were skipped; not finite: grad_norm, " in found["bad numbers"]


def test_a_control_run_that_is_torn_apart_is_found():
    config = replace(classic.ppo.preset_for("CartPole-v1"), optimizer=fast(1.0), log_with=(), eval_episodes=2)
    classic.train("CartPole-v1", num_steps=20_000, output_dir="run", config=config)
    assert {"entropy collapse", "clip fraction too high"} & findings().keys()


def test_every_check_is_triggered_above():
    text = Path(__file__).read_text(encoding="utf-8")
    assert [check.name for check in doctor.CHECKS if f'"{check.name}"' not in text] == []


def test_every_check_is_documented():
    page = (Path(__file__).parents[2] / "docs" / "doctor.md").read_text(encoding="utf-8")
    for check in doctor.CHECKS:
        for text in (check.name, check.threshold, check.cause, check.remedy):
            assert text in page, text


# -------------------------------------------------------------------------------------------------- the command


def test_the_command_exits_with_0_for_a_healthy_run_and_with_1_for_findings(toy, models, capfd):
    assert main(["doctor", str(toy)]) == 0
    assert capfd.readouterr().out == "healthy: no check found anything.\n"
    run(models, batch_size=2, num_steps=1)
    capfd.readouterr()
    assert main(["doctor", "run"]) == 1
    first, cause, remedy = capfd.readouterr().out.splitlines()
    assert first.startswith("whitening batch too small (run, step 1): ")
    assert cause.startswith("    cause: ")
    assert remedy.startswith("    remedy: Raise batch_size")


def test_json_is_one_object_with_everything_about_a_finding(models, capfd):
    run(models, batch_size=2, num_steps=1)
    capfd.readouterr()
    assert main(["doctor", "run", "--json"]) == 1
    told = tiny_runs.strict(capfd.readouterr().out)
    assert told["healthy"] is False
    (finding,) = told["findings"]
    assert finding.keys() == {"name", "threshold", "cause", "remedy", "folder", "step", "evidence"}
    assert (finding["folder"], finding["step"]) == ("run", 1)


def test_a_terminal_gets_a_table(models, monkeypatch):
    from io import StringIO

    from rich.console import Console

    run(models, batch_size=2, num_steps=1)
    console = Console(file=StringIO(), force_terminal=True, width=120, markup=False)
    doctor.show(doctor.examine(Path("run")), console)
    assert "━" in console.file.getvalue()
    assert "whitening batch too small" in console.file.getvalue()


@pytest.mark.parametrize("name", ["absent", "empty", "user.py"])
def test_a_folder_without_a_run_is_a_user_s_mistake(name, capfd):
    Path("empty").mkdir()
    assert main(["doctor", name]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ")


def test_a_line_that_is_still_being_written_is_left_out(models):
    run(models, num_steps=1)
    with Path("run/metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "objective/kl": -')
    assert findings() == {}


def test_a_config_that_cannot_be_read_is_named():
    Path("run").mkdir()
    Path("run/config.yaml").write_text("a: [")
    with pytest.raises(UserError, match="holds no run that can be read"):
        doctor.examine(Path("run"))


def test_watch_follows_a_run_to_its_end(models, capfd):
    """The run goes on in a thread while the doctor watches: it tells the finding once, and ends with the run."""
    seen = threading.Event()

    def slowly(step, metrics):
        if step == 2:
            assert seen.wait(30)

    config = tiny_runs.ppo_config(models, batch_size=2)
    training = threading.Thread(target=lambda: ppo.train(config, reward=vowels, prompts=ROWS, callbacks=[slowly]))
    training.start()
    while not Path("run/metrics.jsonl").exists():
        time.sleep(0.01)
    threading.Timer(0.5, seen.set).start()
    assert main(["doctor", "run", "--watch"]) == 1
    training.join()
    out = capfd.readouterr().out
    assert out.count("whitening batch too small") == 1


def test_ctrl_c_ends_the_watching_quietly(models):
    run(models, num_steps=1)
    Path("run/summary.json").unlink()  # as if it were still going on
    words = [sys.executable, "-m", "ppo_rlhf", "doctor", "run", "--watch"]
    process = subprocess.Popen(words, env=tiny_runs.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (0, b""), (out, err)
    assert os.path.exists("run/metrics.jsonl")
