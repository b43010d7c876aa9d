"""Models for use elsewhere: `ppo-rlhf export`, the model card, the Hub; the files and names that converters expect."""

import json
from pathlib import Path

import pytest
import tiny_models
import tiny_runs
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import LocalTokenNotFoundError
from safetensors import safe_open
from tiny_runs import data, in_tmp_path, models
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from ppo_rlhf.adapters import train_adapter
from ppo_rlhf.cli import main
from ppo_rlhf.model_card import model_card
from ppo_rlhf.models import load_policy, save_policy
from ppo_rlhf.rewards import RewardModel
from ppo_rlhf.settings import LoRASettings
from ppo_rlhf.train.reward_model import classifier_from

__all__ = ["data", "in_tmp_path", "models"]

IDS = torch.tensor([[5, 9, 12, 10]])
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def adapter_run(models, *, architecture="llama"):
    """A run folder whose policy is an adapter; → the adapted model."""
    model, tokenizer = load_policy(models[architecture], setting="policy")
    tokenizer.chat_template = TEMPLATE
    train_adapter(model, LoRASettings(rank=2, merge=False))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_B." in name:
                weight.fill_(0.1)
    save_policy(model, tokenizer, Path("run/policy"), temperature=0.7, stop_ids=[0, 9], merge=False)
    Path("run/policy/README.md").write_text(model_card("ppo", "gpt2", {"score_after": 1.5}))
    return model.eval()


def test_an_adapter_is_exported_as_plain_weights_with_all_its_settings(models, capsys):
    model = adapter_run(models)
    assert main(["export", "run", "--output", "plain", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"output": "plain"}
    loaded, tokenizer = AutoModelForCausalLM.from_pretrained("plain"), AutoTokenizer.from_pretrained("plain")
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=0, atol=1e-4)
    assert loaded.generation_config.temperature == 0.7
    assert loaded.generation_config.eos_token_id == [0, 9]
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.padding_side == "left"
    assert Path("plain/README.md").read_text() == Path("run/policy/README.md").read_text()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_type_of_the_weights_is_chosen(dtype, models):
    adapter_run(models)
    assert main(["export", "run/policy", "--output", "plain", "--dtype", dtype]) == 0
    with safe_open("plain/model.safetensors", framework="pt") as file:
        kinds = {file.get_tensor(name).dtype for name in set(file.keys())}
    assert kinds == {getattr(torch, dtype)}
    assert json.loads(Path("plain/config.json").read_text())["dtype"] == dtype


@pytest.mark.parametrize("adapter", [False, True], ids=["plain", "adapter"])
def test_a_reward_model_is_exported_with_its_head_and_normalisation(adapter, models):
    policy, tokenizer = load_policy(models["llama"], setting="policy")
    classifier = classifier_from(policy)
    if adapter:
        train_adapter(classifier, LoRASettings(rank=2, merge=False), heads=["score"])
    reward_model = RewardModel(classifier, tokenizer)
    reward_model.set_normalization(0.5, 2.0)
    reward_model.save(Path("run/reward_model"))
    assert main(["export", "run", "--output", "plain"]) == 0
    exported = RewardModel.load("plain", setting="reward")
    texts = ["red fish 1:", "old 2:"], [" the bird .", " blue"]
    torch.testing.assert_close(exported(*texts), reward_model(*texts), rtol=1e-4, atol=1e-5)
    assert AutoModelForSequenceClassification.from_pretrained("plain").config.num_labels == 1


def test_what_cannot_be_exported_is_named(models, capsys):
    adapter_run(models)
    Path("empty").mkdir()
    assert main(["export", "empty", "--output", "plain"]) == 2
    assert "empty is neither a run that has saved a model, nor a model's folder" in capsys.readouterr().err
    assert main(["export", "run", "--output", "run"]) == 2
    assert "--output run holds something already" in capsys.readouterr().err
    assert not Path("plain").exists()


# --------------------------------------------------------------------------------------------------------- the Hub


class Hub:
    """What HfApi is asked for."""

    def __init__(self, error=None):
        self.asked, self.error = [], error

    def create_repo(self, name, **options):
        self.asked.append(("create", name, options))
        if self.error:
            raise self.error
        return f"https://huggingface.co/{name}"

    def upload_folder(self, *, repo_id, folder_path, **_):
        self.asked.append(("upload", repo_id, {path.name for path in Path(folder_path).iterdir()}))


def test_an_exported_model_is_uploaded_whole(models, monkeypatch, capsys):
    adapter_run(models)
    hub = Hub()
    monkeypatch.setattr("ppo_rlhf.export.HfApi", lambda: hub)
    assert main(["export", "run", "--output", "plain", "--push-to-hub", "me/mine", "--private", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["address"] == "https://huggingface.co/me/mine"
    created, uploaded = hub.asked
    assert created == ("create", "me/mine", {"private": True, "exist_ok": True})
    assert uploaded[:2] == ("upload", "me/mine")
    assert uploaded[2] >= {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "README.md"}


def test_an_upload_that_is_refused_is_one_line_and_the_folder_is_whole(models, monkeypatch, capsys):
    adapter_run(models)
    monkeypatch.setattr("ppo_rlhf.export.HfApi", lambda: Hub(LocalTokenNotFoundError("no token")))
    assert main(["export", "run", "--output", "plain", "--push-to-hub", "me/mine"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: --push-to-hub me/mine: no token. plain is complete")
    assert Path("plain/model.safetensors").exists()


# -------------------------------------------------------------------------------------------------------- the card


@pytest.mark.parametrize(
    ("kind", "pipeline_tag"),
    [("sft", "text-generation"), ("ppo", "text-generation"), ("reward", "text-classification")],
)
def test_the_hub_reads_the_card_s_metadata_and_people_its_numbers(kind, pipeline_tag):
    card = ModelCard(model_card(kind, "Qwen/Qwen2-0.5B", {"score_after": 1.5}))
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == pipeline_tag
    assert card.data.base_model == "Qwen/Qwen2-0.5B"
    assert kind in card.data.tags
    assert "| score_after | 1.5 |" in card.text


@pytest.mark.parametrize("start", [None, "runs/sft/policy", "/home/me/secret", "file.py:make"])
def test_the_card_tells_no_path_of_the_machine(start, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs/sft/policy").mkdir(parents=True)
    card = model_card("ppo", start, {})
    assert ModelCard(card).data.base_model is None
    assert start is None or start not in card
    assert "a local model" in card


# ------------------------------------------- converters: what they look for by name, the converters themselves not run

LAYER = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
LAYER += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm"]
NAMES = {  # as vLLM's loaders and llama.cpp's tensor map have them
    "llama": {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
        *(f"model.layers.{number}.{name}.weight" for number in range(2) for name in LAYER),
    },
    "gpt2": {
        "transformer.wte.weight",
        "transformer.wpe.weight",
        *(f"transformer.ln_f.{kind}" for kind in ("weight", "bias")),
        *(
            f"transformer.h.{number}.{name}.{kind}"
            for number in range(2)
            for name in ("ln_1", "ln_2", "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
            for kind in ("weight", "bias")
        ),
    },
}
NAMES["qwen2"] = NAMES["llama"] | {
    f"model.layers.{number}.self_attn.{name}_proj.bias" for number in range(2) for name in "qkv"
}
CLASSES = {"llama": "LlamaForCausalLM", "gpt2": "GPT2LMHeadModel", "qwen2": "Qwen2ForCausalLM"}


@pytest.mark.parametrize("architecture", NAMES)
def test_the_files_and_tensors_are_those_that_converters_look_for(architecture):
    tokens = tiny_runs.tokenizer()
    model = tiny_models.make_model(architecture, vocabulary=len(tokens), context=64, spread=0.2)
    train_adapter(model, LoRASettings(rank=2))
    save_policy(model, tokens, Path("policy"))
    files = {path.name for path in Path("policy").iterdir()}
    assert files >= {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert {name for name in files if name.endswith(".safetensors")} == {"model.safetensors"}
    with safe_open("policy/model.safetensors", framework="pt") as file:
        assert set(file.keys()) == NAMES[architecture]
        assert file.metadata()["format"] == "pt"
    config = json.loads(Path("policy/config.json").read_text())
    assert config["architectures"] == [CLASSES[architecture]]
    assert config["model_type"] == architecture
    assert config["vocab_size"] >= len(tokens)
    assert "quantization_config" not in config
    assert "auto_map" not in config
