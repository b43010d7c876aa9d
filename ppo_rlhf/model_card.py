"""The model card of a saved model: README.md, whose first lines the Hub reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from ppo_rlhf.references import is_reference

POLICY = """# Policy, by {stage}

A causal language model trained from {start} by `ppo_rlhf`: {how}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer, model = AutoTokenizer.from_pretrained(FOLDER), AutoModelForCausalLM.from_pretrained(FOLDER)
inputs = tokenizer("A prompt", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, do_sample=True, top_k=0, max_new_tokens=48)[0]))
```

`generation_config.json` holds the temperature and the stop tokens that it was trained with.
"""
REWARD_MODEL = """# Reward model

A sequence classifier with one output, trained from {start} by `ppo_rlhf`: the score of prompt + response + eos, each
encoded apart.

The output of plain `transformers` is the raw score. `ppo_rlhf.rewards.RewardModel.load` applies the normalisation kept
in `config.json`, (raw − reward_mean) / reward_scale, by which the policy it started from scores 0 on average.
"""
STAGES = {
    "sft": (POLICY, "supervised fine-tuning", "the cross-entropy of demonstrations"),
    "ppo": (POLICY, "PPO", "proximal policy optimisation of a reward, held near its start by a KL penalty"),
    "reward": (REWARD_MODEL, "", ""),
}


def model_card(kind: str, start: str | None, outcome: Mapping[str, float]) -> str:
    """kind: the stage, sft, reward or ppo. start: what it was trained from. outcome: its numbers by name."""
    template, stage, how = STAGES[kind]
    local = start is None or is_reference(start) or Path(start).exists() or start.startswith((".", "/", "~"))
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-classification" if kind == "reward" else "text-generation",
        tags=["ppo_rlhf", "rlhf", kind],
        base_model=None if local else start,
    )
    named = "a local model" if local else f"`{start}`"
    rows = "\n".join(f"| {name} | {value:.6g} |" for name, value in outcome.items())
    table = f"\n| outcome, on held-out data | |\n|---|---|\n{rows}\n" if rows else ""
    text = template.format(stage=stage, start=named, how=how) + table
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}"))
