"""Every command and YAML block of the README and the docs is carried out, in a folder as its reader would have it.

Training is cut to a few steps and a server stops as soon as it serves; the rest is run as it stands. A command may take
the place of what an earlier one wrote, as in the reader's folder.
"""

import importlib
import io
import os
import shutil
import urllib.request
from pathlib import Path

import pytest
import servers
import tiny_models
import tiny_runs
import yaml
from documents import DOCUMENTS, ROOT, commands_in, fenced_blocks

REWARDS = """
def short(prompts, responses, **columns):
    return [-len(response) for response in responses]
"""
JUDGE = """
def better(prompts, responses, others):
    return ["tie" if len(a) == len(b) else "ab"[len(b) > len(a)] for a, b in zip(responses, others, strict=True)]
"""
ELSEWHERE = {
    "make": "the machine's own tests, and the wheel's, carry it out",
    "demo": "the wheel's own test carries it out",
    "rt_polarity": "takes ten minutes; its task is tested in test_examples.py",
    "postgresql": "has its own server in tests/label and tests/preferences",
    "--push-to-hub": "needs an account on the Hub",
    "table1": "its own tests carry out a small one",
    "ablations": "its own tests carry out a small one",
    "overoptimization": "its own tests carry out a small one",
    "http://localhost:8000": "has a stand-in of a server in tests/stages/test_samplers.py",
    "openai/gsm8k?name=main": "needs the Hub",
}
PPO = ["--num_steps=2", "--batch_size=8", "--eval_every=0", "--max_eval_prompts=8", "--sampling.max_new_tokens=6"]
SHORT = {
    "sft": ["--num_epochs=0.5"],
    "reward": ["--num_epochs=0.5"],
    "ppo": [*PPO, "--ppo.num_minibatches=1", "--ppo.num_epochs=1"],
    "label": ["--port=0", "--num_pairs=4"],
    "train": ["--num_steps=4096"],
    "compare": ["--num_steps=8192", "--algorithms=clip", "--eval_episodes=1"],
}
CONTROL = ["python", "-m", "classic"]


def told_elsewhere(command):
    return any(part in command for part in ELSEWHERE)


COMMANDS = {" ".join(words): words for path in DOCUMENTS for words in commands_in(path.read_text())}
SETTINGS = [
    pytest.param(block, id=f"{path.name}-{number}")
    for path in DOCUMENTS
    for number, block in enumerate(fenced_blocks(path.read_text(), "yaml"))
    if not told_elsewhere(block)
]


def carry_out(words):
    """Runs what a reader types, in this process where it can; → the exit code."""
    program, *rest = words
    if program == "torchrun":
        return tiny_runs.python("-m", "torch.distributed.run", *rest, cwd=".", ACCELERATE_USE_CPU="true").returncode
    if program == "python" and rest[0] != "-m":
        return tiny_runs.python(ROOT / rest[0], *rest[1:], cwd=".").returncode
    module, arguments = (rest[1], rest[2:]) if program == "python" else ("ppo_rlhf", rest)
    return importlib.import_module(f"{module}.cli").main(arguments)


def shortened(words):
    """The command with what cuts it to seconds; `ppo-rlhf compare` needs none, only that of control trains."""
    name = words[3] if words[:3] == CONTROL else words[words.index("ppo_rlhf") + 1] if "ppo_rlhf" in words else words[1]
    if name == "compare" and words[:3] != CONTROL:
        return [*words, "--port=0"]
    return [*words, *SHORT.get(name, [])]


def filled_in(words):
    """The command with runs in place of the names that stand for any."""
    runs = {"RUN": ["runs/ppo"], "RUN…": ["runs/ppo", "runs/sft"]}
    return [part for word in words for part in runs.get(word, [word])]


def make_room(words):
    """Takes away what an earlier command wrote where this one will write."""
    for option in ("--output-dir", "--output"):
        if option in words:
            place = Path(words[words.index(option) + 1])
            shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)


def write_files():
    """A reader's own rows, function and configurations, which some commands write over."""
    tiny_runs.write_rows("demonstrations.jsonl", tiny_runs.demonstrations(40))
    tiny_runs.write_rows("texts.jsonl", [{"text": row["prompt"]} for row in tiny_runs.prompts(40)])
    tiny_runs.write_rows("published.jsonl", tiny_runs.comparisons(60))
    tiny_runs.write_rows("prompts.jsonl", tiny_runs.prompts(300))
    comparisons = tiny_runs.comparisons(40)
    tiny_runs.write_rows("comparisons.jsonl", comparisons)
    pairs = [{"prompt": row["prompt"], "responses": [row["chosen"], row["rejected"]]} for row in comparisons]
    tiny_runs.write_rows("samples.jsonl", pairs)
    Path("rewards.py").write_text(REWARDS)
    Path("judge.py").write_text(JUDGE)
    Path("wiki.txt").write_text("a small red fish in the river\n" * 20)
    ppo = {"policy": "runs/sft/policy", "reward": "rewards.py:short", "prompts": "prompts.jsonl"}
    sft = {"policy": "gpt2", "data": "demonstrations.jsonl"}
    Path("ppo.yaml").write_text(yaml.safe_dump(ppo))
    Path("sft.yaml").write_text(yaml.safe_dump(sft))
    pipeline = {"sft": sft, "reward": {"data": "comparisons.jsonl"}, "ppo": ppo}
    Path("pipeline.yaml").write_text(yaml.safe_dump(pipeline))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What a reader of the documents has at hand: a model, rows, configurations, and runs of each kind."""
    folder = tmp_path_factory.mktemp("reader")
    before = Path.cwd()
    os.chdir(folder)
    tokens = tiny_runs.tokenizer()
    tokens.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    model = tiny_models.make_model("gpt2", vocabulary=len(tokens), context=512, spread=0.2)  # room for the defaults
    tiny_runs.save(folder / "gpt2", model, tokens)
    (folder / "examples").symlink_to(ROOT / "examples")
    write_files()
    for name in ("sft", "a", "b"):
        assert carry_out(["ppo-rlhf", "sft", "--config=sft.yaml", f"--output_dir=runs/{name}", *SHORT["sft"]]) == 0
    for name in ("reward", "reward-0", "reward-1", "reward-2"):
        words = ["--policy=runs/sft/policy", "--data=comparisons.jsonl", f"--output_dir=runs/{name}"]
        assert carry_out(["ppo-rlhf", "reward", *words, *SHORT["reward"]]) == 0
    assert carry_out(["ppo-rlhf", "ppo", "--config=ppo.yaml", "--output_dir=runs/ppo", *SHORT["ppo"]]) == 0
    for algorithm, name in (("clip", "cartpole"), ("clip", "clip-0"), ("clip", "clip-1"), ("trpo", "trpo")):
        words = ["train", "CartPole-v1", f"--algorithm={algorithm}", f"--output_dir=runs/{name}"]
        assert carry_out(["python", "-m", "classic", *words, *SHORT["train"]]) == 0
    shutil.copytree("runs/clip-0", "runs/comparison-0001")
    assert carry_out(["ppo-rlhf", "preferences", "import", "published.jsonl", "--db=sqlite:///preferences.db"]) == 0
    os.chdir(before)
    return folder


@pytest.fixture
def reader(folder, monkeypatch):
    monkeypatch.chdir(folder)
    write_files()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("sys.stdin", io.StringIO("a red fish\n"))


@pytest.mark.parametrize("command", [command for command in COMMANDS if not told_elsewhere(command)])
def test_a_told_command_does_what_it_says(command, reader):
    words = shortened(filled_in(COMMANDS[command]))
    make_room(words)
    if words[1] == "label" or "--label" in words:
        server = servers.Server(*words[1:], cwd=".")
        with urllib.request.urlopen(server.address) as page:
            assert page.status == 200
        server.kill()
        return
    allowed = (0, 1) if words[1] == "doctor" else (0,)  # 1: the doctor found something
    assert carry_out(words) in allowed


@pytest.mark.parametrize("block", SETTINGS)
def test_told_settings_are_settings_of_a_run(block, reader):
    settings = yaml.safe_load(Path("ppo.yaml").read_text()) | yaml.safe_load(block)
    Path("told.yaml").write_text(yaml.safe_dump(settings))
    make_room(["--output-dir", "runs/told"])
    assert carry_out(["ppo-rlhf", "ppo", "--config=told.yaml", "--output_dir=runs/told", *SHORT["ppo"]]) == 0
