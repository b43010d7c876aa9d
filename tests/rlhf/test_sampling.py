"""The sampler against a slow loop without cache, batch or padding; and its draw against exact frequencies.

`test_sampling_cache.py` has what makes it fast, `test_sampling_text.py` stop strings and streaming.
"""

from __future__ import annotations

import copy
import itertools
import warnings

import language_cases as cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig

from ppo_rlhf.errors import UserError
from ppo_rlhf.sampling import SamplingSettings, decoding, draw, sample, stop_ids_of, warn_of_truncation
from ppo_rlhf.seeding import uniform_rows

LENGTH = 12
ALMOST_ONE = 0.99999994  # the largest float32 below 1


def noise_for(count, seed=0):
    return uniform_rows(list(range(count)), LENGTH, seed)


def slow_response(model, prompt, noise, *, temperature=1.0, stop_ids=(0,), limit=LENGTH):
    """A whole forward in float64 for each token, the first whose cumulative probability exceeds the noise."""
    wide, ids = copy.deepcopy(model).double().eval(), list(prompt)
    response = []
    for t in range(limit):
        with torch.no_grad():
            probabilities = (wide(torch.tensor([ids]), use_cache=False).logits[0, -1] / temperature).softmax(-1)
        cumulative = list(itertools.accumulate(probabilities.tolist()))
        token = next(token for token, total in enumerate(cumulative) if total > float(noise[t]) * cumulative[-1])
        response.append(token)
        ids.append(token)
        if token in stop_ids:
            return response, True
    return response, False


def lines_of(responses):
    """The generated ids of each row."""
    return [ids[mask].tolist() for ids, mask in zip(responses.ids, responses.mask, strict=True)]


@pytest.fixture
def several_stops():
    """Stop ids under which some rows stop early, some late, some never."""
    return (0, 2, 3, 4, 17, 30)


@cases.every_architecture
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_cached_sampler_equals_a_slow_loop_token_by_token(architecture, tokenizer, several_stops, temperature):
    model = cases.make_model(architecture)
    prompts = cases.prompt_batch(tokenizer, cases.TEXTS * 2)
    noise = noise_for(len(prompts))
    chosen = SamplingSettings(max_new_tokens=LENGTH, temperature=temperature, stop_token_ids=several_stops)
    responses = sample(model, tokenizer, prompts, chosen, noise)
    expected = [
        slow_response(
            model,
            prompts.ids[row][prompts.mask[row]].tolist(),
            noise[row],
            temperature=temperature,
            stop_ids=several_stops,
        )
        for row in range(len(prompts))
    ]
    assert lines_of(responses) == [line for line, _ in expected]
    assert responses.finished.tolist() == [finished for _, finished in expected]
    lengths = {len(line) for line, _ in expected}
    assert len(lengths) > 2  # rows did end at different times
    assert responses.ids.shape[1] == max(lengths)


def test_a_response_depends_neither_on_its_neighbours_nor_on_the_batch_size(architecture, tokenizer, several_stops):
    model = cases.make_model(architecture).double()
    prompts, noise = cases.prompt_batch(tokenizer, cases.TEXTS * 2), noise_for(8)
    expected = None
    for size in (1, 3, 8):
        chosen = SamplingSettings(max_new_tokens=LENGTH, stop_token_ids=several_stops, batch_size=size)
        lines = lines_of(sample(model, tokenizer, prompts, chosen, noise))
        expected = expected or lines
        assert lines == expected
    chosen = SamplingSettings(max_new_tokens=LENGTH, stop_token_ids=several_stops)
    for row in (1, 6):
        alone = sample(model, tokenizer, prompts[row : row + 1], chosen, noise[row : row + 1])
        assert lines_of(alone) == [expected[row]]


def test_the_mask_is_true_through_the_stop_token_and_finished_says_who_stopped(tokenizer, several_stops):
    prompts = cases.prompt_batch(tokenizer, cases.TEXTS * 4)
    chosen = SamplingSettings(max_new_tokens=LENGTH, stop_token_ids=several_stops)
    responses = sample(cases.make_model(), tokenizer, prompts, chosen, noise_for(16))
    assert responses.finished.any()
    assert not responses.finished.all()
    for line, mask, finished in zip(responses.ids, responses.mask, responses.finished, strict=True):
        length = int(mask.sum())
        assert mask.tolist() == [True] * length + [False] * (len(mask) - length)
        stops = [t for t in range(length) if int(line[t]) in several_stops]
        assert stops == ([length - 1] if finished else [])
        assert finished or length == LENGTH
        assert (line[length:] == tokenizer.pad_token_id).all()


def test_a_row_that_stops_at_the_very_limit_is_finished(tokenizer):
    model, prompts, noise = cases.make_model(), cases.prompt_batch(tokenizer), noise_for(4)
    free = lines_of(sample(model, tokenizer, prompts, SamplingSettings(max_new_tokens=LENGTH), noise))
    line = next(line for line in free if len(line) > 3 and line[2] not in line[:2])
    row = free.index(line)
    chosen = SamplingSettings(max_new_tokens=3, stop_token_ids=(line[2],))
    responses = sample(model, tokenizer, prompts[row : row + 1], chosen, noise[row : row + 1])
    assert lines_of(responses) == [line[:3]]
    assert responses.finished.tolist() == [True]


def test_a_response_of_one_token_ends_the_batch(tokenizer):
    prompts = cases.prompt_batch(tokenizer)
    chosen = SamplingSettings(max_new_tokens=LENGTH, stop_token_ids=tuple(range(cases.VOCABULARY)))
    responses = sample(cases.make_model(), tokenizer, prompts, chosen, noise_for(4))
    assert responses.ids.shape == responses.mask.shape == (4, 1)
    assert responses.mask.all()
    assert responses.finished.all()


def test_pad_equal_to_eos_samples_the_same_and_keeps_the_eos_in_the_mask(tokenizer, tokenizer_without_pad):
    model = cases.make_model()
    chosen = SamplingSettings(max_new_tokens=LENGTH, stop_token_ids=(0,))
    noise = noise_for(4)
    noise[1, 2] = 0.0  # id 0, the eos, is first in the cumulative distribution
    batches = [cases.prompt_batch(tokenizer), cases.prompt_batch(tokenizer)]
    batches[1] = type(batches[1])(
        torch.where(batches[1].mask, batches[1].ids, 0), batches[1].mask, batches[1].texts, batches[1].rows
    )
    own = sample(model, tokenizer, batches[0], chosen, noise)
    same = sample(model, tokenizer_without_pad, batches[1], chosen, noise)
    assert lines_of(own) == lines_of(same)
    assert lines_of(same)[1][-1] == 0
    assert len(lines_of(same)[1]) == 3
    assert same.finished[1]


def test_texts_are_the_generated_tokens_without_special_ones(tokenizer):
    prompts = cases.prompt_batch(tokenizer)
    responses = sample(cases.make_model(), tokenizer, prompts, SamplingSettings(max_new_tokens=LENGTH), noise_for(4))
    for text, line in zip(responses.texts, lines_of(responses), strict=True):
        assert text == tokenizer.decode([token for token in line if token not in (0, 1)])


def test_a_vanishing_temperature_is_argmax(architecture, tokenizer):
    model, prompts = cases.make_model(architecture), cases.prompt_batch(tokenizer)
    chosen = SamplingSettings(max_new_tokens=5, temperature=1e-4, stop_token_ids=(cases.VOCABULARY + 1,))
    lines = lines_of(sample(model, tokenizer, prompts, chosen, noise_for(4)))
    for row, line in enumerate(lines):
        ids = prompts.ids[row][prompts.mask[row]].tolist()
        for token in line:
            assert token == int(cases.plain_logits(model, ids)[-1].argmax())
            ids.append(token)


@pytest.mark.parametrize("training", [True, False])
def test_sampling_acts_without_dropout_and_keeps_the_models_mode(tokenizer, training):
    model, prompts = cases.make_model(dropout=0.5).train(training), cases.prompt_batch(tokenizer)
    first, second = (
        sample(model, tokenizer, prompts, SamplingSettings(max_new_tokens=LENGTH), noise_for(4)) for _ in range(2)
    )
    assert lines_of(first) == lines_of(second)
    assert model.training is training
    assert all(module.training is training for module in model.modules())


def test_the_models_mode_is_kept_when_sampling_fails(tokenizer):
    model = cases.make_model().train()
    unreadable = cases.prompt_batch(tokenizer)
    unreadable.ids[0, -2] = cases.VOCABULARY
    with pytest.raises(IndexError):
        sample(model, tokenizer, unreadable, SamplingSettings(max_new_tokens=LENGTH), noise_for(4))
    assert model.training


def test_what_does_not_fit_into_the_context_is_refused_in_one_line(tokenizer):
    prompts, chosen = cases.prompt_batch(tokenizer), SamplingSettings(max_new_tokens=cases.CONTEXT - 5)
    noise = torch.zeros(4, chosen.max_new_tokens)
    with pytest.raises(UserError, match=r"max_new_tokens=43 do not fit into the model's context of 48") as caught:
        sample(cases.make_model(), tokenizer, prompts, chosen, noise)
    assert "\n" not in str(caught.value)


def test_a_model_whose_memory_is_more_than_keys_and_values_is_refused(tokenizer):
    model = cases.make_model("llama")
    model.config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(UserError, match="LlamaForCausalLM has layers other than attention"):
        sample(model, tokenizer, cases.prompt_batch(tokenizer), SamplingSettings(max_new_tokens=3), noise_for(4))


def test_too_little_noise_is_refused(tokenizer):
    model, prompts, chosen = cases.make_model(), cases.prompt_batch(tokenizer), SamplingSettings(max_new_tokens=20)
    with pytest.raises(ValueError, match=r"noise is \(4, 12\); \(4, 20\) is needed"):
        sample(model, tokenizer, prompts, chosen, noise_for(4))


def test_generation_defaults_of_the_model_do_not_leak(tokenizer):
    model, prompts, noise = cases.make_model(), cases.prompt_batch(tokenizer), noise_for(4)
    chosen = SamplingSettings(max_new_tokens=LENGTH)
    expected = lines_of(sample(model, tokenizer, prompts, chosen, noise))
    model.generation_config = GenerationConfig(
        do_sample=False,
        top_k=1,
        top_p=0.1,
        temperature=0.01,
        repetition_penalty=5.0,
        no_repeat_ngram_size=1,
        min_new_tokens=10,
        eos_token_id=list(range(2, 40)),
        max_new_tokens=1,
    )
    assert lines_of(sample(model, tokenizer, prompts, chosen, noise)) == expected


def test_sampling_leaves_the_global_generator_alone(tokenizer):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    prompts = cases.prompt_batch(tokenizer)
    sample(cases.make_model(), tokenizer, prompts, SamplingSettings(max_new_tokens=3), noise_for(4))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_stop_ids_are_those_of_the_settings_else_eos(tokenizer):
    assert stop_ids_of(SamplingSettings(), tokenizer) == [tokenizer.eos_token_id]
    assert stop_ids_of(SamplingSettings(stop_token_ids=(7, 9)), tokenizer) == [7, 9]


# ---------------------------------------------------------------------------------------------------- draw


def frequencies(logits, size, **options):
    """How often each token is drawn by `size` evenly spaced noises, the midpoints of [0, 1)."""
    noise = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    logits = torch.as_tensor(logits, dtype=torch.float64).expand(size, -1)
    tokens, _ = draw(logits, noise, SamplingSettings(**options))
    return torch.bincount(tokens, minlength=logits.shape[1]).tolist()


def test_a_grid_of_noise_draws_each_token_exactly_as_often_as_it_is_likely():
    logits = torch.tensor([0.1, 0.2, 0.0, 0.3, 0.4]).log()
    assert frequencies(logits, 1000) == [100, 200, 0, 300, 400]


def test_the_temperature_raises_probabilities_to_its_inverse():
    logits = torch.tensor([0.1, 0.3, 0.6], dtype=torch.float64).log()
    # p^2: 0.01, 0.09, 0.36 of 0.46
    assert frequencies(logits, 46, temperature=0.5) == [1, 9, 36]


def test_top_k_keeps_the_k_most_likely_in_proportion():
    logits = torch.tensor([0.1, 0.3, 0.2, 0.4], dtype=torch.float64).log()
    assert frequencies(logits, 700, top_k=2) == [0, 300, 0, 400]


def test_top_p_keeps_the_fewest_tokens_that_reach_p():
    logits = torch.tensor([0.1, 0.3, 0.2, 0.4], dtype=torch.float64).log()
    assert frequencies(logits, 700, top_p=0.65) == [0, 300, 0, 400]
    assert frequencies(logits, 900, top_p=0.75) == [0, 300, 200, 400]


def test_top_p_sees_the_distribution_after_the_temperature():
    logits = torch.tensor([0.25, 0.35, 0.4], dtype=torch.float64).log()
    # at T = 0.1 the probabilities are p^10: 0.4^10 is 79 % of the sum, so it alone reaches 0.7
    assert frequencies(logits, 100, temperature=0.1, top_p=0.7) == [0, 0, 100]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@given(seed=st.integers(0, 10_000), width=st.integers(1, 400))
@settings(max_examples=30, deadline=None)
def test_a_token_of_probability_zero_is_never_drawn(dtype, seed, width):
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(6, width, generator=generator)
    logits[torch.rand(6, width, generator=generator) < 0.6] = -torch.inf
    logits[:, int(torch.randint(width, (), generator=generator))] = 0.0
    noise = torch.tensor([0.0, ALMOST_ONE, ALMOST_ONE, 0.0, 0.5, 0.99999])
    tokens, _ = draw(logits.to(dtype), noise, SamplingSettings())
    assert logits.gather(1, tokens[:, None]).isfinite().all()


def test_noise_at_its_two_ends_draws_the_first_and_the_last_possible_token():
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf], [-torch.inf, 0.0, 1.0, -torch.inf]])
    assert draw(logits, torch.tensor([0.0, ALMOST_ONE]), SamplingSettings())[0].tolist() == [1, 2]


def test_draw_works_in_float32_whatever_the_dtype_of_the_logits():
    logits = torch.randn(500, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    noise = torch.rand(500, generator=torch.Generator().manual_seed(1))
    for options in ({}, {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.6}):
        chosen = SamplingSettings(**options)
        for narrow, wide in zip(draw(logits, noise, chosen), draw(logits.float(), noise, chosen), strict=True):
            assert torch.equal(narrow, wide)


def test_the_log_probability_is_that_of_the_distribution_before_truncation():
    logits = torch.tensor([[0.1, 0.3, 0.2, 0.4]]).log() + 5
    for noise, token, expected in ((0.0, 1, 0.3), (0.9, 3, 0.4)):
        tokens, logprobs = draw(logits, torch.tensor([noise]), SamplingSettings(top_k=2, top_p=0.75))
        assert tokens.tolist() == [token]
        assert logprobs.exp().item() == pytest.approx(expected, rel=1e-6)
    # at T = 0.5 the probabilities are p²: 0.16 of 0.30
    _, logprobs = draw(logits, torch.tensor([0.9]), SamplingSettings(temperature=0.5))
    assert logprobs.exp().item() == pytest.approx(0.16 / 0.30, rel=1e-6)


def test_a_truncating_sampler_warns_with_its_reason():
    for options in ({"top_k": 50}, {"top_p": 0.9}):
        with pytest.warns(UserWarning, match="KL estimates are biased"):
            warn_of_truncation(SamplingSettings(**options))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_truncation(SamplingSettings())


# ------------------------------------------------------------------------------------------- handed out as they end


@pytest.mark.parametrize("group_size", [1, 3, 100])
def test_rows_are_handed_out_in_groups_as_they_end_with_their_responses(group_size, tokenizer, several_stops):
    model = cases.make_model()
    prompts, noise = cases.prompt_batch(tokenizer, cases.TEXTS * 2), noise_for(8)
    chosen = SamplingSettings(max_new_tokens=LENGTH, stop_token_ids=several_stops, batch_size=5)
    groups = []
    responses = sample(
        model,
        tokenizer,
        prompts,
        chosen,
        noise,
        on_finished=lambda *group: groups.append(group),
        group_size=group_size,
    )
    rows = [row for group, _ in groups for row in group]
    assert sorted(rows) == list(range(8))
    assert [len(group) for group, _ in groups] == [min(group_size, 8 - n) for n in range(0, 8, group_size)]
    for group, found in groups:
        lines = lines_of(responses)
        assert lines_of(found) == [lines[row] for row in group]
        assert found.texts == [responses.texts[row] for row in group]
        assert torch.equal(found.finished, responses.finished[group])
        width = found.ids.shape[1]
        assert torch.equal(found.logprobs, responses.logprobs[group, :width])


def test_a_row_is_handed_out_before_the_longest_one_has_ended(tokenizer, several_stops, monkeypatch):
    prompts, noise = cases.prompt_batch(tokenizer, cases.TEXTS * 2), noise_for(8)
    chosen = SamplingSettings(max_new_tokens=LENGTH, stop_token_ids=several_stops)
    steps, handed_out = [], {}
    monkeypatch.setattr(decoding, "draw", lambda *arguments: steps.append(1) or draw(*arguments))
    responses = sample(
        cases.make_model(),
        tokenizer,
        prompts,
        chosen,
        noise,
        on_finished=lambda group, _: handed_out.update(dict.fromkeys(group, len(steps))),
    )
    lengths = responses.mask.sum(1).tolist()
    assert min(lengths) < max(lengths)
    assert handed_out == dict(enumerate(lengths))  # all rows are decoded from the first step on
