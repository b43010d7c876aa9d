"""The whole circle on the embedded task: sample ► label ► reward model ► PPO ► label again.

The annotator is a script that reads the responses off a real page and ranks them by keys as the gold reward does. As in
InstructGPT a label is a ranking of several responses.
"""

import json

import pytest
from browsers import page_of
from label_cases import choices_in, done, press
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
num_epochs: 3
batch_size: 4
eval_every: 0
save_every: 0
keep_best: false
log_with: []
language_model_coef: 0.3
normalization_prompts: 128
optimizer: {lr: 1.0e-3, schedule: linear, warmup_steps: 30, weight_decay: 0.1}
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
    """Ranks as the gold reward does, by keys, reading nothing but the page."""
    for _ in range(count):
        prompt, responses = page.inner_text(".prompt .text"), page.locator(".response .formatted").all_inner_texts()
        scores = toy.gold([prompt] * len(responses), responses)
        for position in sorted(range(len(responses)), key=lambda index: -scores[index]):
            page.keyboard.press(str(position + 1))
        press(page, "Enter")


def gold_ranks(pair):
    return [-score for score in toy.gold([pair.prompt] * 2, pair.responses)]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_labels_made_in_a_browser_train_a_reward_model_that_raises_the_gold_score(serve, browser, tmp_path, capfd):
    train("sft", SFT, tmp_path, capfd)
    prompts = list(toy.prompts())
    labelled, others = (write_rows(f"{number}.jsonl", prompts[number::2]) for number in range(2))
    held_out = samples_of_one("sft", prompts=others, count=800, responses=2, seed=1)
    rows = [{"prompt": pair.prompt, "responses": pair.responses, "ranks": gold_ranks(pair)} for pair in held_out]
    write_rows(tmp_path / "held_out.jsonl", rows)

    sampling = ["--prompts", labelled, "--num-pairs", "300", "--db", "sqlite:///preferences.db"]
    sampling += ["--responses", "4", "--rank", "--annotator", "gold", "--port", "0"]
    server = serve("label", "--sample", "sft", *sampling)
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
    server = serve("label", "--sample", "ppo", *sampling, *uncertain)
    with page_of(browser, server.address) as page:
        judge(page, 5)
    server.end()
    assert len(choices_in(tmp_path / "preferences.db")) == 305
