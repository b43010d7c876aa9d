"""Memory that runs out: the rows that go through a model at once are halved, and nothing but that changes."""

import contextlib
import functools
from pathlib import Path

import pytest
import tiny_runs
import torch
from accelerate import Accelerator, debug_launcher
from accelerate.utils import DistributedType
from test_update import TinyPolicy, forget_accelerators, parameters_of, rollout_of, sgd, update
from tiny_runs import data, in_tmp_path, metrics_of, models, same_weights, without_times
from transformers import GPT2ForSequenceClassification, GPT2Model

from ppo_rlhf.config import PPOConfig, RewardConfig, SFTConfig
from ppo_rlhf.errors import UserError
from ppo_rlhf.micro_batches import MicroBatch, is_out_of_memory
from ppo_rlhf.settings import OptimizerSettings, PPOSettings, SamplingSettings
from ppo_rlhf.train import ppo, reward_model, sft
from ppo_rlhf.update import measured_kl, ppo_update

__all__ = ["data", "in_tmp_path", "models"]

MORE_THAN_THERE_IS = 2**55  # bytes


def run_out_of_memory():
    torch.empty(MORE_THAN_THERE_IS, dtype=torch.uint8)


class RunsOutInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        run_out_of_memory()


class LittleMemory(TinyPolicy):
    """Has memory for `most` rows at once; for more, too, where row `long` of the rollout is not among them."""

    def __init__(self, most, *, where="forward", long=None):
        super().__init__()
        self.most, self.where, self.long = most, where, long

    def forward(self, observations, actions):
        evaluation = super().forward(observations, actions)
        is_long = self.long is None or (observations == self.long).all(-1).all(-1).any()
        if len(actions) <= self.most or not is_long:
            return evaluation
        if self.where == "forward":
            run_out_of_memory()
        return evaluation._replace(values=RunsOutInBackward.apply(evaluation.values))


def updated(policy, experience, micro_batch, **settings):
    """Parameters and metrics after an update of two epochs with Adam."""
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.01)
    settings = PPOSettings(**{"num_epochs": 2, "num_minibatches": 2, "micro_batch_size": micro_batch.size} | settings)
    metrics = ppo_update(
        policy,
        optimizer,
        experience,
        settings,
        accelerator=Accelerator(cpu=True),
        generator=torch.Generator().manual_seed(0),
        micro_batch=micro_batch,
    )
    return parameters_of(policy), metrics


def micro_batch_of(size, setting="ppo.micro_batch_size"):
    return MicroBatch(size, Accelerator(cpu=True), setting=setting)


def assert_same_bits(one, other):
    assert all(torch.equal(a, b) for a, b in zip(one[0], other[0], strict=True))
    assert one[1] == other[1]


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_update_that_runs_out_of_memory_is_the_one_with_the_smaller_micro_batch(where):
    micro_batch = micro_batch_of(None)
    with pytest.warns(UserWarning, match="out of memory: ppo.micro_batch_size is [12] from now on") as told:
        found = updated(LittleMemory(1, where=where), rollout_of(TinyPolicy()), micro_batch)
    assert micro_batch.size == 1
    assert len(told) == 2  # once for each size: 4 rows of a minibatch, 2, 1
    assert_same_bits(found, updated(TinyPolicy(), rollout_of(TinyPolicy()), micro_batch_of(1)))


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_minibatch_that_was_interrupted_leaves_nothing_of_its_gradient(where):
    """The first of its two micro-batches was done when the second, which holds the last row, did not fit."""
    experience = rollout_of(TinyPolicy())
    policy = LittleMemory(2, where=where, long=experience.inputs["observations"][-1])
    with pytest.warns(UserWarning, match="is 2 from now on"):
        found = updated(policy, experience, micro_batch_of(4), num_minibatches=1)
    assert_same_bits(found, updated(TinyPolicy(), experience, micro_batch_of(2), num_minibatches=1))


def test_the_measured_kl_is_taken_over_as_many_rows_at_once_as_fit():
    experience, settings, accelerator = rollout_of(TinyPolicy(seed=1)), PPOSettings(), Accelerator(cpu=True)
    micro_batch = micro_batch_of(None)
    with pytest.warns(UserWarning, match="out of memory"):
        found = measured_kl(LittleMemory(2), experience, settings, accelerator=accelerator, micro_batch=micro_batch)
    assert micro_batch.size == 2
    whole = measured_kl(TinyPolicy(), experience, settings, accelerator=accelerator)
    assert found == pytest.approx(whole, rel=1e-6)
    assert whole > 0


def test_the_smaller_micro_batch_is_kept_for_the_next_update():
    micro_batch = micro_batch_of(None)
    policy = LittleMemory(2)
    with pytest.warns(UserWarning, match="out of memory"):
        updated(policy, rollout_of(TinyPolicy()), micro_batch)
    policy.num_calls = 0
    updated(policy, rollout_of(TinyPolicy()), micro_batch)
    assert policy.num_calls == 2 * 8 / 2  # two epochs of eight rows, two at a time, none in vain


def test_a_single_row_that_does_not_fit_is_told_in_one_line():
    policy = LittleMemory(0)
    with (
        pytest.warns(UserWarning, match="is 1 from now on"),
        pytest.raises(UserError, match=r"out of memory with ppo\.micro_batch_size=1: one row"),
    ):
        updated(policy, rollout_of(TinyPolicy()), micro_batch_of(2))


def test_random_numbers_are_drawn_again():
    drawn = []

    def work(size):
        drawn.append(torch.rand(2))
        if size > 1:
            run_out_of_memory()
        return size

    with pytest.warns(UserWarning, match="is 1 from now on"):
        assert micro_batch_of(None).fitting(work, 2) == 1
    assert torch.equal(drawn[0], drawn[1])


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_what_counts_as_out_of_memory(error, expected):
    assert is_out_of_memory(error) is expected


def test_any_other_error_travels():
    def work(size):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        micro_batch_of(None).fitting(work, 4)


def test_sharded_models_are_told_to_begin_again(monkeypatch):
    """A process that begins its pass again would wait for blocks that the others do not gather."""
    micro_batch = micro_batch_of(8)
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
    with pytest.raises(UserError, match=r"set ppo\.micro_batch_size=4, and --resume"):
        micro_batch.fitting(lambda size: run_out_of_memory(), 8)


# ------------------------------------------------------------------------------------------------- processes


def little_memory_in_one_of_two(where: str, folder: str) -> None:
    with forget_accelerators():
        accelerator = Accelerator(cpu=True)
        rank = accelerator.process_index
        policy = LittleMemory(1 if rank else 8, where=where)
        prepared, optimizer = accelerator.prepare(policy, sgd(policy))
        micro_batch = MicroBatch(None, accelerator, setting="ppo.micro_batch_size")
        with contextlib.nullcontext() if rank else pytest.warns(UserWarning, match="out of memory"):
            ppo_update(
                prepared,
                optimizer,
                rollout_of(TinyPolicy())[4 * rank : 4 * rank + 4],
                PPOSettings(num_epochs=3),
                accelerator=accelerator,
                generator=torch.Generator().manual_seed(0),
                micro_batch=micro_batch,
            )
        torch.save((micro_batch.size, parameters_of(policy)), Path(folder) / f"{rank}.pt")


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_two_processes_agree_when_one_of_them_runs_out(where, tmp_path):
    """The second one does; the first one tells of it."""
    debug_launcher(little_memory_in_one_of_two, args=(where, str(tmp_path)), num_processes=2)
    policy = TinyPolicy()
    update(policy, rollout_of(TinyPolicy()), PPOSettings(num_epochs=3))
    for rank in range(2):
        size, parameters = torch.load(tmp_path / f"{rank}.pt")
        assert size == 1
        for one, other in zip(parameters, parameters_of(policy), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


# ---------------------------------------------------------------------------------------------------- stages

SAMPLING = SamplingSettings(max_new_tokens=6, stop_token_ids=tiny_runs.STOPS)
RUN = {
    "eval_every": 0,
    "save_every": 0,
    "log_with": (),
    "matmul_precision": "highest",
    "batch_size": 8,
    "optimizer": OptimizerSettings(lr=1e-2),
}
SUPERVISED = {"num_epochs": 0.5, "eval_fraction": 0.2}


def train(stage, models, files, folder, micro_batch_size, *, reward="user.py:length"):
    """A stage in `folder`; dropout acts in the supervised ones."""
    if stage == "sft":
        data = {"policy": models["dropout"], "data": files["demonstrations"]}
        sft.train(SFTConfig(output_dir=folder, micro_batch_size=micro_batch_size, **RUN, **SUPERVISED, **data))
    elif stage == "reward":
        data = {"policy": models["dropout"], "data": files["comparisons"], "sampling": SAMPLING}
        data |= {"normalization_prompts": 8, "micro_batch_size": micro_batch_size}
        reward_model.train(RewardConfig(output_dir=folder, **RUN, **SUPERVISED, **data))
    else:
        data = {"policy": models["gpt2"], "prompts": files["prompts"], "reward": reward}
        settings = PPOSettings(num_epochs=2, micro_batch_size=micro_batch_size)
        more = {"num_steps": 2, "max_eval_prompts": 4, "sampling": SAMPLING, "ppo": settings}
        ppo.train(PPOConfig(output_dir=folder, **RUN, **data, **more))


@pytest.mark.parametrize(
    ("stage", "most", "saved"), [("sft", 4, "policy"), ("reward", 8, "reward_model"), ("ppo", 4, "policy")]
)
def test_a_run_that_runs_out_of_memory_is_the_one_with_the_smaller_micro_batch(
    stage, most, saved, models, data, monkeypatch
):
    """For `most` rows, four examples, there is memory: in training, and in PPO in the evaluation of a rollout too.

    What is held out goes through in as many rows as the configuration says, 4 or all, which rounds otherwise.
    """
    train(stage, models, data, "small", 4)
    forward = GPT2Model.forward

    @functools.wraps(forward)
    def forward_in_little_memory(self, input_ids=None, **others):
        rows = others["packing"].shape[0] if others.get("packing") else len(input_ids)
        if rows > most and (stage == "ppo" or torch.is_grad_enabled()):
            run_out_of_memory()
        return forward(self, input_ids=input_ids, **others)

    monkeypatch.setattr(GPT2Model, "forward", forward_in_little_memory)
    with pytest.warns(UserWarning, match="micro_batch_size is 4 from now on") as told:
        train(stage, models, data, "large", None)
    assert len([warning for warning in told if "out of memory" in str(warning.message)]) == 1
    trained, held_out = zip(*(apart(without_times(metrics_of(folder))) for folder in ("large", "small")), strict=True)
    assert trained[0] == trained[1]
    for one, other in zip(*held_out, strict=True):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-6)
    assert same_weights(f"large/{saved}", f"small/{saved}")


def apart(rows):
    """The numbers of training, and those of the evaluations."""
    of_evaluations = [{name: x for name, x in row.items() if name.startswith("eval/")} for row in rows]
    return [{name: x for name, x in row.items() if not name.startswith("eval/")} for row in rows], of_evaluations


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_no_more_rows_than_a_micro_batch_has_go_through_a_model_at_once_where_nothing_is_trained(
    stage, models, data, monkeypatch
):
    config = tiny_runs.model(tiny_runs.tokenizer()).config
    config.update({"num_labels": 1, "pad_token_id": 1})
    rewarder = tiny_runs.save(Path("rewarder"), GPT2ForSequenceClassification(config), tiny_runs.tokenizer())
    seen, forward = [], GPT2Model.forward

    @functools.wraps(forward)
    def watched_forward(self, input_ids=None, **others):
        if others.get("packing") and not torch.is_grad_enabled():  # sampling packs nothing
            seen.append(others["packing"].shape[0])
        return forward(self, input_ids=input_ids, **others)

    monkeypatch.setattr(GPT2Model, "forward", watched_forward)
    train(stage, models, data, "run", 3, reward=rewarder)
    assert max(seen) == 3
