"""A loop of one's own: the same numbers as the loop of `ppo_rlhf.train.ppo`, on explicit prompts, responses, scores."""

from pathlib import Path

import pytest
import torch
from tiny_runs import STOPS, data, in_tmp_path, metrics_of, models, weights_of

from ppo_rlhf.config import MissingEOS, PPOConfig
from ppo_rlhf.errors import UserError
from ppo_rlhf.models import load_policy, save_value_head
from ppo_rlhf.reward_settings import ScoreShaping
from ppo_rlhf.settings import LoRASettings, OptimizerSettings, PPOSettings, SamplingSettings
from ppo_rlhf.stepwise import PPO
from ppo_rlhf.train import ppo

__all__ = ["data", "in_tmp_path", "models"]

QUERIES = ["red fish 1:", "old", "blue stone 22:", "small bird"]


def config_of(models, **changes):
    return PPOConfig(
        **{
            "policy": models["llama"],
            "batch_size": 8,
            "num_steps": 3,
            "max_eval_prompts": 4,
            "kl_coef": 0.2,
            "kl_target": 0.5,
            "kl_horizon": 80,
            "missing_eos": MissingEOS("subtract", 0.5),
            "matmul_precision": "highest",
            "sampling": SamplingSettings(max_new_tokens=6, stop_token_ids=STOPS, temperature=0.8),
            "ppo": PPOSettings(num_epochs=2, num_minibatches=2, micro_batch_size=2),
            "optimizer": OptimizerSettings(lr=1e-2),
            "log_with": (),
            **changes,
        }
    )


def vowels(responses):
    return [float(sum(letter in "aeiou" for letter in response)) for response in responses]


@pytest.mark.parametrize("rank", [0, 4], ids=["all weights", "an adapter"])
def test_a_loop_of_one_s_own_takes_the_steps_of_the_loop(rank, models, data):
    asked = []

    def reward(prompts, responses, **columns):
        asked.append((prompts, responses))
        return vowels(responses)

    changes = {"lora": LoRASettings(rank=rank)}
    ppo.train(config_of(models, prompts=data["prompts"], output_dir="run", **changes), reward=reward)
    theirs = metrics_of("run")[1:]
    rollouts = [(prompts, responses) for prompts, responses in asked if len(prompts) == 8]
    own = PPO(config_of(models, **changes))
    for (prompts, texts), expected in zip(rollouts, theirs, strict=True):
        responses = own.generate(prompts)
        assert responses.texts == texts
        metrics = own.update(prompts, responses, vowels(responses.texts))
        shared = metrics.keys() & expected.keys()
        assert len(shared) > 15
        assert {name: metrics[name] for name in shared} == {name: expected[name] for name in shared}
    own.save("policy")
    one, other = weights_of("policy"), weights_of("run/policy")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_token_ids_are_taken_as_they_are(models):
    by_texts, by_ids = PPO(config_of(models)), PPO(config_of(models))
    responses = by_texts.generate(QUERIES)
    ids = [torch.tensor(by_ids.tokenizer(text)["input_ids"]) for text in QUERIES]
    said = [line[mask] for line, mask in zip(responses.ids, responses.mask, strict=True)]
    one, other = by_texts.evaluate(QUERIES, responses), by_ids.evaluate(ids, said)
    assert torch.equal(one.logprobs, other.logprobs)
    assert torch.equal(one.values, other.values)
    assert (one.logprobs - one.ref_logprobs == 0).all()
    scores = vowels(responses.texts)
    metrics = by_texts.update(QUERIES, responses, scores)
    metrics.pop("sampler/logprob_difference")  # of ids alone nobody knows how a sampler saw them
    assert metrics == by_ids.update(ids, said, torch.tensor(scores))


@pytest.mark.parametrize("scores", [[1.0, 2.0], [1.0, 2.0, 3.0]], ids=["too few scores", "no two minibatches"])
def test_counts_that_do_not_fit_are_named(scores, models):
    own = PPO(config_of(models))
    with pytest.raises(UserError, match=rf"3 prompts, 3 responses and {len(scores)} scores.*ppo\.num_minibatches=2"):
        own.update(QUERIES[:3], own.generate(QUERIES[:3]), scores)
    assert own.state.step == 0


def test_a_value_model_of_its_own_is_refused(models):
    with pytest.raises(UserError, match="value_model=separate"):
        PPO(config_of(models, value_model="separate"))


def test_scores_are_not_normalised_by_held_out_responses_that_nobody_sampled(models):
    with pytest.raises(UserError, match=r"score_shaping\.normalize=reference: .* use running"):
        PPO(config_of(models, score_shaping=ScoreShaping(normalize="reference")))


def test_kl_is_measured_to_the_reference_that_the_configuration_names(models):
    own, other = PPO(config_of(models, reference=models["gpt2"])), PPO(config_of(models, policy=models["gpt2"]))
    responses = own.generate(QUERIES)
    one, judged = own.evaluate(QUERIES, responses), other.evaluate(QUERIES, responses)
    assert torch.equal(one.ref_logprobs, judged.logprobs)
    assert not torch.equal(one.ref_logprobs, one.logprobs)


# ------------------------------------------------------------------------------------------------------ value heads


def with_head(folder, models, *, form):
    """A folder as TRL's AutoModelForCausalLMWithValueHead saves it: the plain model's tensors and v_head.summary.…"""
    model, tokenizer = load_policy(models["llama"], setting="policy")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    head = {"v_head.summary.weight": torch.linspace(-1, 1, 16)[None], "v_head.summary.bias": torch.tensor([0.25])}
    weights = {**weights_of(folder), **head}
    if form == "bin":
        (folder / "model.safetensors").unlink()
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        from safetensors.torch import save_file

        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder), head


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_a_checkpoint_of_trl_s_is_a_policy_with_its_value_head(form, models, tmp_path):
    folder, head = with_head(tmp_path / "trl", models, form=form)
    plain, own = PPO(config_of(models)), PPO(config_of(models, policy=folder))
    responses = plain.generate(QUERIES)
    one, other = plain.evaluate(QUERIES, responses), own.evaluate(QUERIES, responses)
    assert torch.equal(one.logprobs, other.logprobs)
    assert (one.values == 0).all()
    prompt = own.tokenizer(QUERIES[0])["input_ids"]
    hidden = own.policy.language_model.model(torch.tensor([prompt])).last_hidden_state[0, -1]
    expected = head["v_head.summary.weight"][0] @ hidden + 0.25
    torch.testing.assert_close(other.values[0, 0], expected.detach(), rtol=1e-4, atol=1e-4)


def test_a_run_saves_its_value_head_and_another_starts_from_it(models, data):
    config = config_of(models, prompts=data["prompts"], output_dir="run", num_steps=1)
    ppo.train(config, reward=lambda prompts, responses, **_: vowels(responses))
    own = PPO(config_of(models, policy="run/policy", value_head="run/value_head"))
    values = own.evaluate(QUERIES, own.generate(QUERIES)).values
    assert values.abs().max() > 1e-3


def test_a_policy_s_folder_with_a_value_head_trains_without_values_too(models, data, tmp_path):
    folder, _ = with_head(tmp_path / "trl", models, form="safetensors")
    changes = {"advantage": "rloo", "responses_per_prompt": 2, "prompts": data["prompts"], "num_steps": 1}
    ppo.train(config_of(models, policy=folder, output_dir="run", **changes), reward=lambda p, r, **_: vowels(r))
    assert not Path("run/value_head").exists()


def test_a_value_head_of_another_width_is_refused(models, tmp_path):
    save_value_head(torch.nn.Linear(24, 1), tmp_path)
    with pytest.raises(UserError, match=r"value_head: .* hidden states of 24 numbers, and the policy's have 16"):
        PPO(config_of(models, value_head=str(tmp_path)))


@pytest.mark.parametrize("changes", [{"advantage": "rloo", "responses_per_prompt": 2}, {"value_model": "separate"}])
def test_a_value_head_is_refused_where_no_shared_value_function_starts_from_it(changes, models):
    with pytest.raises(UserError, match=r"value_head=run/value_head starts a shared value function"):
        config_of(models, value_head="run/value_head", **changes)


def test_a_folder_without_a_value_head_is_named(models):
    with pytest.raises(UserError, match=r"value_head: .* has no v_head\.summary\.weight"):
        PPO(config_of(models, value_head=models["llama"]))
