"""A dense reward, an ensemble and a server each teach the policy of the embedded task what is really wanted."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ppo_rlhf import toy
from ppo_rlhf.config import MissingEOS, PPOConfig, SFTConfig
from ppo_rlhf.reward_settings import RewardPart
from ppo_rlhf.settings import OptimizerSettings, PPOSettings
from ppo_rlhf.toy import lexicon
from ppo_rlhf.train import ppo, sft


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """The folder of a policy that has seen a thousand reviews: it writes some, none too well."""
    folder = tmp_path_factory.mktemp("learning") / "sft"
    config = SFTConfig(
        policy="ppo_rlhf.toy:policy",
        batch_size=8,
        eval_fraction=0.02,
        eval_every=0,
        save_every=0,
        log_with=(),
        output_dir=str(folder),
        optimizer=OptimizerSettings(lr=3e-3, schedule="cosine", warmup_steps=10, beta2=0.98),
    )
    sft.train(config, data=toy.demonstrations()[:1000])
    return str(folder / "policy")


def improvement(policy, folder, **changes):
    """Gold score after a few steps of PPO, less that before, over the standard error of their difference."""
    config = PPOConfig(
        policy=policy,
        gold="ppo_rlhf.toy:gold",
        max_eval_prompts=96,
        num_steps=8,
        batch_size=48,
        eval_every=0,
        save_every=0,
        log_with=(),
        output_dir=str(folder),
        missing_eos=MissingEOS(value=-4.0),
        ppo=PPOSettings(num_epochs=2, num_minibatches=2),
        optimizer=OptimizerSettings(lr=6e-4, schedule="constant", beta2=0.95),
        **changes,
    )
    summary = ppo.train(config, prompts=toy.prompts()[:600])
    error = (2 / config.max_eval_prompts) ** 0.5 * summary["gold_score_std_before"]
    return (summary["gold_score_after"] - summary["gold_score_before"]) / error


OPINIONS = {
    entry.words[0]: entry.value
    for entry in lexicon.lexemes()
    if entry.category in lexicon.OPINION_CATEGORIES and len(entry.words) == 1
}


def opinions(prompts, responses, *, response_tokens, **columns):
    """Each token earns the opinion that it is, of whatever; a word of this task is a token."""
    return [[OPINIONS.get(token.strip(), 0.0) for token in tokens] for tokens in response_tokens]


def test_a_dense_reward_raises_the_gold_score(policy, tmp_path):
    reward = (RewardPart("test_reward_learning:opinions"),)
    # Held closer to the reference: a sum of opinions is best earned by praise without end.
    assert improvement(policy, tmp_path, reward=reward, kl_coef=0.3) > 2


def pessimist(prompts, responses, **columns):
    return [min(0.0, score) for score in toy.gold(prompts, responses)]


def test_an_ensemble_raises_the_gold_score(policy, tmp_path):
    members = ("ppo_rlhf.toy:gold", "test_reward_learning:pessimist")
    reward = (RewardPart(members, ensemble="lower_bound", deviations=0.5),)
    assert improvement(policy, tmp_path, reward=reward) > 2


@pytest.fixture
def server():
    """The gold reward, behind HTTP; its address. Every third request fails at first."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.server.count += 1
            self.send_response(503 if self.server.count % 3 == 0 else 200)
            self.end_headers()
            self.wfile.write(json.dumps({"scores": toy.gold(asked["prompts"], asked["responses"])}).encode())

        def log_message(self, *_):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.count = 0
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def test_a_server_raises_the_gold_score(policy, tmp_path, server):
    part = RewardPart(server, arguments={"batch_size": 20, "pause": 0.01}, name="gold")
    assert improvement(policy, tmp_path, reward=(part,)) > 2
