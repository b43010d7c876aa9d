"""The whole circle on the embedded task: sample ► label ► reward model ► PPO ► label again.

The annotator is a script that reads both responses off a real page and presses the key of the one that the gold reward
prefers.
"""

import json

import pytest
from label_cases import choices_in, done, page_of, press
from tiny_runs import write_rows

from ppo_rlhf import toy
from ppo_rlhf.candidates import samples_of_one
from ppo_rlhf.cli import main

SFT = """
policy: ppo_rlhf.toy:policy
data: ppo_rlhf.toy:demonstrations
num_epochs: 1.2
batch_size: 16
eval_every: 0
save_every: 0
log_with: []
optimizer: {lr: 3.0e-3, schedule: cosine, warmup_steps: 30, weight_decay: 0.1, beta2: 0.98}
"""
REWARD = """
policy: sft/policy
data: sqlite:///preferences.db
eval_data: held_out.jsonl
gold: ppo_rlhf.toy:gold
num_epochs: 6
batch_size: 16
eval_every: 15
save_every: 0
log_with: []
language_model_coef: 0.3
normalization_prompts: 128
optimizer: {lr: 5.0e-4, schedule: linear, warmup_steps: 10, weight_decay: 0.1}
"""
PPO = """
policy: sft/policy
reward: reward/reward_model
gold: ppo_rlhf.toy:gold
prompts: ppo_rlhf.toy:prompts
num_steps: 12
batch_size: 64
eval_every: 0
save_every: 0
log_with: []
max_eval_prompts: 256
kl_coef: 0.15
ppo: {num_epochs: 2, num_minibatches: 2, value_coef: 0.1}
optimizer: {lr: 3.0e-4, schedule: linear, warmup_steps: 3, beta2: 0.95}
"""


def train(stage, settings, tmp_path, capfd):
    (tmp_path / f"{stage}.yaml").write_text(settings)
    assert main([stage, "--config", f"{stage}.yaml", "--output-dir", stage, "--json"]) == 0
    return json.loads(capfd.readouterr().out.splitlines()[-1])


def judge(page, count):
    """Chooses as the gold reward does, by keys, reading nothing but the page."""
    for _ in range(count):
        prompt = page.inner_text(".prompt .text")
        left, right = toy.gold([prompt] * 2, page.locator(".response .text").all_inner_texts())
        press(page, "1" if left > right else "3" if right > left else "2")


def gold_ranks(pair):
    return [-score for score in toy.gold([pair.prompt] * 2, pair.responses)]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_labels_made_in_a_browser_train_a_reward_model_that_raises_the_gold_score(serve, browser, tmp_path, capfd):
    train("sft", SFT, tmp_path, capfd)
    held_out = samples_of_one("sft", prompts="ppo_rlhf.toy:prompts", count=200, responses=2, seed=1)
    rows = [{"prompt": pair.prompt, "responses": pair.responses, "ranks": gold_ranks(pair)} for pair in held_out]
    write_rows(tmp_path / "held_out.jsonl", rows)

    sampling = ["--prompts", "ppo_rlhf.toy:prompts", "--num-pairs", "320", "--db", "sqlite:///preferences.db"]
    server = serve("label", "--sample", "sft", *sampling, "--annotator", "gold", "--port", "0")
    with page_of(browser, server.address) as page:
        judge(page, 300)
        assert done(page) == 300
    server.end()
    assert len(choices_in(tmp_path / "preferences.db")) == 300

    reward = train("reward", REWARD, tmp_path, capfd)
    assert reward["pairwise_accuracy"] >= 0.75, reward
    ppo = train("ppo", PPO, tmp_path, capfd)
    assert ppo["gold_score_after"] > ppo["gold_score_before"] + 0.3, ppo

    sampling[3] = "20"
    uncertain = ["--order", "uncertain", "--reward-model", "reward/reward_model"]
    server = serve("label", "--sample", "ppo", *sampling, *uncertain, "--annotator", "gold", "--port", "0")
    with page_of(browser, server.address) as page:
        judge(page, 5)
    server.end()
    assert len(choices_in(tmp_path / "preferences.db")) == 305
    print(reward, ppo)
