"""The page for TRL's users names every setting of theirs and none of ours that there is not; its examples run."""

import re
import runpy
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import tiny_runs
import torch
from tiny_runs import data, in_tmp_path, metrics_of, models
from transformers import GPT2Config, GPT2ForSequenceClassification

from ppo_rlhf.config import PPOConfig

__all__ = ["data", "in_tmp_path", "models"]

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "from-trl.md").read_text(encoding="utf-8")
LAST_TRAINER = """
learning_rate dataset_num_proc num_mini_batches total_episodes local_rollout_forward_batch_size num_sample_generations
response_length stop_token stop_token_id temperature missing_eos_penalty sft_model_path world_size num_total_batches
micro_batch_size local_batch_size batch_size local_mini_batch_size mini_batch_size push_to_hub reward_model_path
model_adapter_name ref_adapter_name num_ppo_epochs whiten_rewards kl_coef kl_estimator cliprange vf_coef
cliprange_value gamma lam ds3_gather_for_generation
"""
STEP_API = """
exp_name seed log_with task_name model_name query_dataset reward_model remove_unused_columns tracker_kwargs
accelerator_kwargs project_kwargs tracker_project_name push_to_hub_if_best_kwargs steps learning_rate adap_kl_ctrl
init_kl_coef kl_penalty target horizon gamma lam cliprange cliprange_value vf_coef batch_size forward_batch_size
mini_batch_size gradient_accumulation_steps world_size ppo_epochs max_grad_norm optimize_cuda_cache
optimize_device_cache early_stopping target_kl compare_steps ratio_threshold use_score_scaling use_score_norm
score_clip whiten_rewards gradient_checkpointing is_encoder_decoder is_peft_model backward_batch_size
global_backward_batch_size global_batch_size dataset_num_proc
"""
LAST_METRICS = """
eps objective/kl objective/entropy objective/non_score_reward objective/rlhf_reward objective/scores
policy/approxkl_avg policy/clipfrac_avg loss/policy_avg loss/value_avg val/clipfrac_avg policy/entropy_avg val/ratio
val/ratio_var val/num_eos_tokens lr episode
"""


def cells_of(section, column):
    """The code words of one column of the tables below a heading."""
    (text,) = re.findall(rf"^## {section}.*?\n(.*?)(?=^## |\Z)", PAGE, flags=re.MULTILINE | re.DOTALL)
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| ")][1:]
    return [word for row in rows for word in re.findall(r"`(.*?)`", row[column])]


def settings_of(kind=PPOConfig, prefix=""):
    names = set()
    for field in fields(kind):
        default = field.default_factory() if callable(field.default_factory) else field.default
        names |= (
            settings_of(type(default), f"{prefix}{field.name}.") if is_dataclass(default) else {prefix + field.name}
        )
    return names


@pytest.mark.parametrize(
    ("section", "theirs"), [("The last trainer's settings", LAST_TRAINER), ("The step API's settings", STEP_API)]
)
def test_every_setting_of_trl_has_its_row(section, theirs):
    assert sorted(cells_of(section, 0)) == sorted(theirs.split())


def test_every_setting_of_ours_that_the_page_names_exists():
    named = cells_of("The last trainer's settings", 1) + cells_of("The step API's settings", 1)
    named += re.findall(r"→ `(.*?)`", PAGE)
    settings = [word.split(":")[0] for word in named if not word.startswith("ppo-rlhf ")]
    assert len(settings) > 40
    assert set(settings) <= settings_of()


def test_every_metric_of_the_last_trainer_has_its_row():
    assert set(cells_of("Metrics", 0)) == set(LAST_METRICS.split())


# ------------------------------------------------------------------------------------------------------- examples


def run_example(name, *arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    return runpy.run_path(str(ROOT / "examples" / name))


def code_lines(name):
    """Lines of code, without the docstring, blank lines and what only parses arguments."""
    text = (ROOT / "examples" / name).read_text(encoding="utf-8").split('"""', 2)[2]
    return [line for line in text.splitlines() if line.strip()]


def test_the_quick_start_is_shorter_than_trls_and_takes_a_step(models, monkeypatch, capsys):
    done = run_example("trl_quickstart.py", models["llama"], monkeypatch=monkeypatch)
    assert done["metrics"]["objective/kl"] == 0
    assert done["metrics"]["objective/score"] == 1
    assert done["metrics"]["optimizer_steps"] == 4
    assert len(code_lines("trl_quickstart.py")) <= 29  # TRL 0.11's has so many


def judge(folder):
    """A classifier of two classes."""
    tokens = tiny_runs.tokenizer()
    labels = {"id2label": {0: "NEGATIVE", 1: "POSITIVE"}, "label2id": {"NEGATIVE": 0, "POSITIVE": 1}}
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=len(tokens), num_labels=2, pad_token_id=1, **labels)
    torch.manual_seed(0)
    tokens.model_max_length = 64
    return tiny_runs.save(folder, GPT2ForSequenceClassification(config), tokens)


def test_the_sentiment_example_trains_by_a_classifier_and_names_its_metrics_as_the_page_does(
    models, tmp_path, monkeypatch, capsys
):
    reviews = [
        {"text": f"the film {word} was {other} and long"} for word in tiny_runs.WORDS for other in tiny_runs.WORDS
    ]
    words = ["--policy", models["gpt2"], "--judge", judge(tmp_path / "judge")]
    words += ["--reviews", tiny_runs.write_rows("reviews.jsonl", reviews)]
    words += ["--num-steps", "2", "--batch-size", "8", "--output-dir", "run"]
    run_example("trl_sentiment.py", *words, monkeypatch=monkeypatch)
    last = metrics_of("run")[-1]
    assert 0 < last["objective/score"] < 1
    named = [word for word in cells_of("Metrics", 2) if not word.endswith("…")]
    assert len(named) > 12
    assert set(named) <= set(last)
    assert len(code_lines("trl_sentiment.py")) <= 90  # TRL 0.11's script has more than a hundred
