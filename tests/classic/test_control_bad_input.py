"""Users' mistakes on the control side: exit code 2, one line that names the thing, and nothing left on disk."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import gymnasium
import pytest
import torch
import yaml
from command_cases import TINY_WORDS, cartpole, finished_runs, in_tmp_path, refused, train

__all__ = ["cartpole", "finished_runs", "in_tmp_path"]

ROOT = Path(__file__).parents[2]
STRANGE = """
import gymnasium

class Strange(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-1, 1, (2,))
    action_space = gymnasium.spaces.Text(3)

gymnasium.register("Strange-v0", entry_point=Strange)
"""

TRAIN = [
    # environments
    ("Cartpole-v1", ["Cartpole-v1", "Did you mean CartPole-v1?"]),
    ("nowhere:Mine-v0", ["nowhere"]),
    ("strange:Strange-v0", ["unsupported action space", "Text"]),
    ("strange:Stranger-v0", ["Stranger-v0", "Did you mean Strange-v0?"]),
    ("", ["environment", "CartPole-v1"]),
    ("CartPole-v1 --environment.env_kwargs.colour red", ["CartPole-v1", "colour"]),
    ("CartPole-v1 --environment.max_episode_steps 0", ["max_episode_steps=0"]),
    ("CartPole-v1 --max-episode-steps -2", ["max_episode_steps=-2"]),
    ("CartPole-v1 --environment.wrappers [nowhere:Wrapper]", ["nowhere"]),
    ("CartPole-v1 --environment.vectorization asink", ["asink", "Did you mean async?"]),
    ("Acrobot-v1 --environment.vectorization torch", ["vectorization=torch", "Acrobot-v1"]),
    # presets, algorithms, settings
    ("CartPole-v1 --preset Pendulm-v1", ["Pendulm-v1", "Did you mean Pendulum-v1?"]),
    ("CartPole-v1 --algorithm cilp", ["cilp", "Did you mean clip?"]),
    ("CartPole-v1 --num_env 3", ["num_env", "Did you mean num_envs?"]),
    ("CartPole-v1 --num-env 3", ["num_env", "Did you mean num_envs?"]),
    ("CartPole-v1 --ppo.clip-rang 0.1", ["ppo.clip_rang", "Did you mean ppo.clip_range?"]),
    ("CartPole-v1 --network.gaussian squash", ["squash", "Did you mean squashed?"]),
    ("CartPole-v1 --network [64]", ["network"]),
    ("CartPole-v1 --compile maybe", ["compile", "maybe"]),
    ("CartPole-v1 --seed one", ["seed", "one"]),
    ("CartPole-v1 Pendulum-v1", ["Pendulum-v1"]),
    # ranges
    ("CartPole-v1 --num-steps 0", ["num_steps=0"]),
    ("CartPole-v1 --num-envs -1", ["num_envs=-1"]),
    ("CartPole-v1 --horizon 0", ["horizon=0"]),
    ("CartPole-v1 --eval-episodes 0", ["eval_episodes=0"]),
    ("CartPole-v1 --keep-checkpoints 0", ["keep_checkpoints=0"]),
    ("CartPole-v1 --save-every -1", ["save_every=-1"]),
    ("CartPole-v1 --gamma 1.5", ["gamma=1.5"]),
    ("CartPole-v1 --seed -1", ["seed=-1"]),
    ("CartPole-v1 --optimizer.lr 0", ["optimizer.lr=0"]),
    ("CartPole-v1 --ppo.num_epochs 0", ["ppo.num_epochs=0"]),
    ("CartPole-v1 --penalty.kl_target 0", ["penalty.kl_target=0"]),
    ("CartPole-v1 --trust_region.max_kl 0", ["trust_region.max_kl=0"]),
    ("CartPole-v1 --network.hidden_sizes [0]", ["network.hidden_sizes"]),
    # what does not go together
    ("CartPole-v1 --ppo.num_minibatches 3", ["ppo.num_minibatches=3", "num_envs × horizon = 64"]),
    ("CartPole-v1 --network.recurrent gru --ppo.num_minibatches 8", ["ppo.num_minibatches=8", "4 environments"]),
    ("CartPole-v1 --algorithm trpo --trust_region.value_minibatches 3", ["trust_region.value_minibatches=3", "64"]),
    ("CartPole-v1 --algorithm trpo --network.recurrent gru --num-envs 6", ["value_minibatches=4", "6 environments"]),
    ("CartPole-v1 --ppo.compile true", ["ppo.compile", "use compile"]),
    ("MountainCarContinuous-v0 --network.gaussian squashed --network.initial_log_std 9", ["initial_log_std=9"]),
    ("CartPole-v1 --network.encoder nowhere:Encoder", ["nowhere"]),
    ("CartPole-v1 --log_with [tensorbord]", ["log_with", "tensorbord"]),
    # files
    ("--config nowhere.yaml", ["nowhere.yaml"]),
    ("--config unreadable.yaml", ["unreadable.yaml"]),
    ("--config list.yaml", ["list.yaml", "mapping"]),
    ("--config misspelt.yaml", ["gama", "gamma"]),
    ("--config nameless.yaml", ["env_id"]),
]


@pytest.fixture
def files():
    """What the command lines below name."""
    Path("strange.py").write_text(STRANGE)
    Path("unreadable.yaml").write_text("gamma: [0.9\n")
    Path("list.yaml").write_text("- gamma\n")
    Path("misspelt.yaml").write_text("env_id: CartPole-v1\ngama: 0.9\n")
    Path("nameless.yaml").write_text("gamma: 0.9\n")
    yield
    if sys.modules.pop("strange", None):
        del gymnasium.registry["Strange-v0"]


@pytest.mark.parametrize(("line", "named"), TRAIN, ids=[line for line, _ in TRAIN])
def test_a_mistake_in_training_is_named_in_one_line_and_leaves_nothing(line, named, files, capfd):
    told = refused(capfd, "train", *TINY_WORDS, *line.split(), "--output-dir", "out")
    assert all(name in told for name in named), told
    assert not Path("out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_asked_for_and_absent_is_named(capfd):
    assert "device=cuda" in refused(capfd, "train", "CartPole-v1", "--device", "cuda", "--output-dir", "out")
    assert not Path("out").exists()


def test_a_missing_extra_is_named_with_the_command_that_installs_it(monkeypatch, capfd):
    for name in [name for name in sys.modules if name.startswith("gymnasium.envs.box2d")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "Box2D", None)
    told = refused(capfd, "train", "LunarLander-v3", "--output-dir", "out")
    assert "LunarLander-v3" in told
    assert 'pip install "ppo-rlhf[box2d]"' in told
    assert not Path("out").exists()


# ------------------------------------------------------------------------------------------------------- folders


def test_a_folder_that_holds_a_run_is_not_used_again(cartpole, capfd):
    before = (cartpole / "metrics.jsonl").read_bytes()
    assert "--resume" in refused(capfd, "train", "CartPole-v1", "--output-dir", cartpole)
    assert (cartpole / "metrics.jsonl").read_bytes() == before


def test_an_output_dir_that_is_a_file_is_named(capfd):
    Path("out").write_text("mine")
    assert "out is a file" in refused(capfd, "train", "CartPole-v1", "--output-dir", "out")


def test_resume_without_a_folder_is_refused(capfd):
    assert "--output-dir" in refused(capfd, "train", "CartPole-v1", "--resume")
    assert not Path("runs").exists()


@pytest.mark.parametrize("words", [["Pendulum-v1"], ["--seed", "1"], ["--algorithm", "trpo"]])
@pytest.mark.parametrize("state", ["finished", "to be longer", "interrupted"])
def test_a_resumed_run_refuses_another_environment_and_other_training(words, state, cartpole, capfd):
    if state == "interrupted":
        (cartpole / "summary.json").unlink()
    more = ["--num-steps", "1024"] if state == "to be longer" else []
    before = {path: path.read_bytes() for path in cartpole.rglob("*") if path.is_file()}
    told = refused(capfd, "train", *words, "--resume", "--output-dir", cartpole, *more)
    assert "was started with" in told
    assert words[-1] in told
    assert before == {path: path.read_bytes() for path in cartpole.rglob("*") if path.is_file()}


def test_a_checkpoint_of_another_environment_is_refused(finished_runs, cartpole, capfd):
    shutil.rmtree(cartpole / "checkpoints")
    shutil.copytree(finished_runs["Pendulum-v1"] / "checkpoints", cartpole / "checkpoints")
    told = refused(capfd, "train", "--resume", "--output-dir", cartpole, "--num-steps", 256)
    assert "of another model" in told


def test_a_resumed_run_whose_configuration_is_unreadable_is_named(cartpole, capfd):
    (cartpole / "config.yaml").write_text("gamma: [0.9\n")
    assert "config.yaml" in refused(capfd, "train", "--resume", "--output-dir", cartpole)


# -------------------------------------------------------------------------------- commands that read what a run left

READERS = ["evaluate", "export", "video"]


@pytest.mark.parametrize("command", [*READERS, "plot"])
def test_a_folder_without_a_run_is_named(command, capfd):
    Path("empty").mkdir()
    for folder in ("empty", "nowhere"):
        assert f"{folder} holds no run" in refused(capfd, command, folder)
    assert not list(Path("empty").iterdir())
    assert not Path("nowhere").exists()


@pytest.mark.parametrize("command", READERS)
@pytest.mark.parametrize(("option", "folder"), [([], "policy"), (["--best"], "best")])
def test_a_run_without_the_policy_that_is_asked_for_is_named(command, option, folder, cartpole, capfd):
    shutil.rmtree(cartpole / folder)
    assert "policy yet" in refused(capfd, command, cartpole, *option)


def cut_weights(folder):
    weights = folder / "policy.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])


def cut_description(folder):
    description = folder / "policy.json"
    description.write_text(description.read_text()[:40])


def other_shapes(folder):
    description = json.loads((folder / "policy.json").read_text())
    description["network"]["hidden_sizes"] = [3]
    (folder / "policy.json").write_text(json.dumps(description))


DAMAGES = [
    cut_weights,
    cut_description,
    other_shapes,
    lambda folder: (folder / "policy.safetensors").unlink(),
    lambda folder: (folder / "policy.json").write_text("[]"),
]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("command", READERS)
def test_a_damaged_policy_is_named(command, damage, cartpole, capfd):
    damage(cartpole / "policy")
    assert "cartpole/policy is damaged" in refused(capfd, command, cartpole)


@pytest.mark.parametrize("command", ["evaluate", "video"])
def test_a_policy_of_another_environment_is_named(command, finished_runs, cartpole, capfd):
    shutil.rmtree(cartpole / "policy")
    shutil.copytree(finished_runs["Pendulum-v1"] / "policy", cartpole / "policy")
    told = refused(capfd, command, cartpole)
    assert "another environment than CartPole-v1" in told
    assert "Box (3,), not Box (4,)" in told


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("evaluate --episodes 0", ["episodes=0"]),
        ("evaluate --episodes many", ["episodes", "many"]),
        ("evaluate --seed -1", ["seed=-1"]),
        ("evaluate --render vidoe", ["vidoe", "Did you mean video?"]),
        ("evaluate --episode 3", ["episode", "Did you mean episodes?"]),
        ("video --episodes 0", ["episodes=0"]),
        ("plot --metric episode/retrun", ["episode/retrun", "Did you mean episode/return?"]),
        ("plot --x stpes", ["stpes", "Did you mean steps?"]),
        ("plot --smooth 0", ["smooth=0"]),
        ("plot --output nowhere/curve.png", ["nowhere"]),
        ("export --output nowhere/policy.onnx", ["nowhere"]),
        ("evaluat", ["evaluat", "Did you mean evaluate?"]),
    ],
)
def test_a_mistake_in_what_is_asked_of_a_run_is_named(words, named, cartpole, capfd):
    before = sorted(cartpole.rglob("*"))
    command, *options = words.split()
    told = refused(capfd, command, cartpole, *options)
    assert all(name in told for name in named), told
    assert sorted(cartpole.rglob("*")) == before


@pytest.mark.parametrize("text", ["env_id: [", "- env_id"])
@pytest.mark.parametrize("command", ["evaluate", "export", "plot"])
def test_a_run_whose_configuration_cannot_be_read_is_named(command, text, cartpole, capfd):
    (cartpole / "config.yaml").write_text(text)
    assert "config.yaml" in refused(capfd, command, cartpole)


def test_the_run_of_a_language_model_is_not_one_to_evaluate(cartpole, capfd):
    (cartpole / "config.yaml").write_text("policy: gpt2\n")
    assert "policy" in refused(capfd, "evaluate", cartpole)


def test_a_real_command_exits_with_code_2_and_one_line():
    words = ["-m", "classic", "train", "CartPole-v1", "--algorithm", "cilp"]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.endswith("Did you mean clip?")


def test_a_run_of_an_environment_that_only_its_program_knew_is_named(capfd):
    folder = train("CartPole-v1", "out")
    settings = yaml.safe_load((folder / "config.yaml").read_text()) | {"env_id": "MyEnv"}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    assert "unknown environment MyEnv" in refused(capfd, "evaluate", folder)
