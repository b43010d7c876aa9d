"""A resumed PPO run ends bit for bit where the whole one ends, whatever the model's family."""

import pytest
import tiny_models
import tiny_runs
from tiny_runs import STOPS, data, in_tmp_path, metrics_in_one_go_and_in_two, same_weights

from ppo_rlhf.config import PPOConfig
from ppo_rlhf.settings import OptimizerSettings, PPOSettings, SamplingSettings

__all__ = ["data", "in_tmp_path"]


@pytest.mark.parametrize("architecture", sorted({**tiny_models.ARCHITECTURES, **tiny_models.MORE_ARCHITECTURES}))
def test_a_resumed_run_is_the_whole_run(architecture, data):
    tokens = tiny_runs.tokenizer()
    config = PPOConfig(
        policy=tiny_runs.save(tiny_runs.Path("model"), tiny_runs.model(tokens, architecture), tokens),
        prompts=data["prompts"],
        reward="user.py:vowels",
        batch_size=4,
        num_steps=2,
        save_every=1,
        max_eval_prompts=2,
        matmul_precision="highest",
        sampling=SamplingSettings(max_new_tokens=4, stop_token_ids=STOPS),
        ppo=PPOSettings(num_epochs=1, num_minibatches=2),
        optimizer=OptimizerSettings(lr=1e-2),
        log_with=(),
    )
    rows, resumed = metrics_in_one_go_and_in_two(config, cut_at=2)
    assert rows[1]["objective/kl"] == 0
    assert rows[2]["objective/kl"] != 0
    assert resumed == rows
    assert same_weights("whole/policy", "parts/policy")
