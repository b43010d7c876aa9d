"""`Experience` checks its shapes, and goes to the update by rows, shuffled rows, or single steps."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

from ppo_rlhf.core import Evaluation, Experience


def experience_of(batch=4, steps=3, *, distribution=None):
    """Every number tells its place: row b, step t is 10·b + t, in each field with its own offset."""
    place = 10.0 * torch.arange(batch)[:, None] + torch.arange(steps)
    return Experience(
        inputs={"observations": torch.stack([place, -place], dim=-1), "actions": place + 1000},
        logprobs=place + 2000,
        values=place + 3000,
        advantages=place + 4000,
        returns=place + 5000,
        mask=(place.long() % 3) != 1,
        distribution=distribution,
    )


def assert_consistent(experience, places):
    """Every field shows the same places: nothing was reordered without the rest."""
    assert torch.equal(experience.inputs["observations"], torch.stack([places, -places], dim=-1))
    assert torch.equal(experience.inputs["actions"], places + 1000)
    for offset, name in enumerate(("logprobs", "values", "advantages", "returns"), start=2):
        assert torch.equal(getattr(experience, name), places + 1000 * offset)
    assert torch.equal(experience.mask, (places.long() % 3) != 1)


def test_an_evaluation_needs_no_distribution():
    evaluation = Evaluation(*torch.zeros(3, 1, 1))
    assert evaluation.distribution is None
    assert evaluation._fields == ("logprobs", "entropy", "values", "distribution")


def test_an_experience_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        experience_of().mask = None


def test_its_length_is_its_rows():
    assert len(experience_of(4, 3)) == 4


@pytest.mark.parametrize(
    "mask", [torch.ones(4, 3), torch.ones(4, dtype=torch.bool), torch.ones(4, 3, 1, dtype=torch.bool)]
)
def test_a_mask_must_be_a_boolean_matrix(mask):
    message = f"mask must be a boolean tensor (B, T), not {mask.dtype} {tuple(mask.shape)}."
    with pytest.raises(ValueError, match=re.escape(message)):
        dataclasses.replace(experience_of(), mask=mask)


@pytest.mark.parametrize("name", ["logprobs", "values", "advantages", "returns"])
def test_every_field_must_have_the_shape_of_the_mask(name):
    with pytest.raises(ValueError, match=re.escape(f"{name} has shape (4, 4), the mask (4, 3).")):
        dataclasses.replace(experience_of(), **{name: torch.zeros(4, 4)})


def test_every_input_must_have_the_rows_of_the_mask():
    with pytest.raises(ValueError, match=re.escape("inputs['ids'] has 3 rows, the mask 4.")):
        dataclasses.replace(experience_of(), inputs={"ids": torch.zeros(3, 3)})


@pytest.mark.parametrize("rows", [slice(1, 3), torch.tensor([3, 0]), torch.tensor([True, False, False, True])])
def test_indexing_takes_rows_of_everything(rows):
    experience = experience_of()
    places = (experience.logprobs - 2000)[rows]
    assert_consistent(experience[rows], places)


def test_split_gives_consecutive_pieces_and_a_smaller_last_one():
    pieces = list(experience_of(5, 2).split(2))
    assert [len(piece) for piece in pieces] == [2, 2, 1]
    assert_consistent(pieces[2], torch.tensor([[40.0, 41.0]]))


def test_shuffled_covers_every_row_once_an_epoch():
    generator = torch.Generator().manual_seed(0)
    minibatches = list(experience_of(10, 2).shuffled(5, generator))
    assert [len(minibatch) for minibatch in minibatches] == [5, 5]
    first_places = torch.cat([minibatch.logprobs[:, 0] - 2000 for minibatch in minibatches])
    assert sorted(first_places.tolist()) == [10.0 * row for row in range(10)]


def test_shuffled_keeps_the_fields_of_a_row_together():
    for minibatch in experience_of(10, 2).shuffled(4, torch.Generator().manual_seed(0)):
        assert_consistent(minibatch, minibatch.logprobs - 2000)


def test_shuffled_differs_between_epochs_and_repeats_with_the_seed():
    def order(generator):
        return torch.cat([each.logprobs[:, 0] for each in experience_of(10, 2).shuffled(5, generator)]).tolist()

    generator = torch.Generator().manual_seed(0)
    epochs = [order(generator) for _ in range(3)]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    again = torch.Generator().manual_seed(0)
    assert [order(again) for _ in range(3)] == epochs


def test_shuffled_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()
    list(experience_of().shuffled(2, torch.Generator().manual_seed(0)))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_by_step_makes_a_row_of_every_decision_in_order():
    steps = experience_of(2, 3).by_step()
    assert len(steps) == 6
    assert steps.mask.shape == (6, 1)
    assert steps.inputs["observations"].shape == (6, 1, 2)
    assert_consistent(steps, torch.tensor([[0.0], [1], [2], [10], [11], [12]]))


def test_by_step_keeps_masked_rows():
    experience = experience_of(4, 3)
    assert not experience.mask.all()
    assert torch.equal(experience.by_step().mask.flatten(), experience.mask.flatten())


def test_by_step_needs_inputs_of_every_step():
    experience = dataclasses.replace(experience_of(4, 3), inputs={"ids": torch.zeros(4, 7)})
    with pytest.raises(ValueError, match=r"inputs\['ids'\].*\(4, 7\).*needs \(4, 3, …\)"):
        experience.by_step()


def test_a_distribution_of_one_tensor_travels_with_its_rows():
    logits = torch.arange(24.0).reshape(4, 3, 2)
    experience = experience_of(distribution=logits)
    assert torch.equal(experience[torch.tensor([2, 1])].distribution, logits[[2, 1]])
    assert torch.equal(experience.by_step().distribution, logits.reshape(12, 1, 2))


def test_a_distribution_of_several_tensors_travels_with_its_rows():
    mean, std = torch.arange(24.0).reshape(4, 3, 2), torch.ones(4, 3)
    experience = experience_of(distribution=(mean, std))
    taken = experience[1:3].distribution
    assert torch.equal(taken[0], mean[1:3])
    assert torch.equal(taken[1], std[1:3])
    assert [tuple(each.shape) for each in experience.by_step().distribution] == [(12, 1, 2), (12, 1)]


def test_the_references_logprobs_travel_with_their_rows_and_have_the_shape_of_the_mask():
    ref_logprobs = torch.arange(12.0).reshape(4, 3)
    experience = dataclasses.replace(experience_of(4, 3), ref_logprobs=ref_logprobs)
    assert torch.equal(experience[torch.tensor([2, 1])].ref_logprobs, ref_logprobs[[2, 1]])
    assert torch.equal(experience.by_step().ref_logprobs, ref_logprobs.reshape(12, 1))
    assert experience_of(4, 3)[1:3].ref_logprobs is None
    with pytest.raises(ValueError, match=r"ref_logprobs has shape \(4, 2\), the mask \(4, 3\)"):
        dataclasses.replace(experience, ref_logprobs=ref_logprobs[:, :2])
