"""What makes the sampler fast changes nothing: rows that leave and enter, shared reading, our own forward passes."""

from __future__ import annotations

import copy
import gc
import weakref
from collections import deque

import language_cases as cases
import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from transformers import MistralConfig, MistralForCausalLM

from ppo_rlhf import forwards
from ppo_rlhf.forwards import functional_forward, is_functional, models_own_forward, product_with
from ppo_rlhf.kv_cache import ColumnCache
from ppo_rlhf.policy import response_logprobs
from ppo_rlhf.rollout import inputs_of
from ppo_rlhf.sampling import SamplingSettings, decode, decoding, draw, sample
from ppo_rlhf.seeding import uniform_rows

LENGTH = 12
STOPS = (0, 2, 3, 4, 17, 30)  # some rows stop early, some late, some never
FUNCTIONAL = ["gpt2", "llama", "qwen2"]


def float64_model(architecture):
    model = cases.make_model(architecture).double()
    model.set_attn_implementation("sdpa")  # the eager attention of Llama and Qwen2 takes its softmax in float32
    return model


def noise_for(count):
    return uniform_rows(list(range(count)), LENGTH, 0)


def decoded(model, tokenizer, lines, *, static=False, noise=None, **options):
    """Each prompt's response."""
    chosen = SamplingSettings(max_new_tokens=LENGTH, stop_token_ids=STOPS, **options)
    noise = noise_for(len(lines)) if noise is None else noise
    drawn = deque(decode(model, tokenizer, lines, chosen, noise, static=static), maxlen=1).pop()
    return [drawn.ids[row, : drawn.lengths[row]].tolist() for row in range(len(lines))]


@pytest.fixture
def lines(tokenizer):
    """Sixteen prompts of different lengths, four of a single token."""
    texts = [(3 * text)[: 1 + 9 * number] for number in range(4) for text in cases.SENTENCES]
    return [tokenizer(text)["input_ids"] for text in texts]


@pytest.fixture
def forward_sizes(monkeypatch):
    """How many rows and tokens each forward pass reads."""
    sizes, original = [], decoding.forward_of

    def counted(model, **options):
        forward = original(model, **options)

        def counting(ids, positions, mask, cache):
            sizes.append(tuple(ids.shape))
            return forward(ids, positions, mask, cache)

        return counting

    monkeypatch.setattr(decoding, "forward_of", counted)
    return sizes


@pytest.mark.parametrize("spare", [0, 64], ids=["moving back often", "rarely"])
def test_waiting_prompts_that_enter_as_others_end_get_the_responses_of_all_at_once(
    architecture, tokenizer, lines, monkeypatch, spare
):
    monkeypatch.setattr(decoding, "SPARE_COLUMNS", spare)
    model = float64_model(architecture)
    expected = decoded(model, tokenizer, lines)
    assert len({len(line) for line in expected}) > 4  # rows did end at different times
    for size in (1, 2, 5, 15):
        assert decoded(model, tokenizer, lines, batch_size=size) == expected


def test_rows_that_leave_and_rows_that_stay_to_the_end_get_the_same_responses(architecture, tokenizer, lines):
    model = float64_model(architecture)
    expected = decoded(model, tokenizer, lines)
    for size in (1, 5, 16):
        assert decoded(model, tokenizer, lines, batch_size=size, static=True) == expected


def test_finished_rows_leave_the_batch_and_waiting_ones_fill_it(tokenizer, lines, forward_sizes):
    model = float64_model("gpt2")
    lengths = [len(line) for line in decoded(model, tokenizer, lines)]
    steps = [rows for rows, length in forward_sizes if length == 1]
    assert steps == [sum(length > t for length in lengths) for t in range(LENGTH)]
    forward_sizes.clear()
    decoded(model, tokenizer, lines, batch_size=4)
    steps = [rows for rows, length in forward_sizes if length == 1 and rows > 0]
    assert max(steps) == 4
    assert len(steps) < sum(max(lengths[start : start + 4]) for start in range(0, 16, 4))


def test_a_step_of_fixed_shape_reads_every_row_and_column_each_time(tokenizer, lines, forward_sizes):
    decoded(float64_model("gpt2"), tokenizer, lines, batch_size=4, static=True)
    assert {rows for rows, length in forward_sizes if length == 1} <= {4, 1}
    assert forward_sizes.count((4, 1)) > 20


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("shortest", [False, True], ids=["prompts", "prompts of one token"])
def test_a_step_of_fixed_shape_compiles_into_one_graph_with_the_same_responses(
    architecture, tokenizer, lines, shortest, monkeypatch
):
    lines = [line[:1] for line in lines] if shortest else lines
    model = float64_model(architecture)
    expected = decoded(model, tokenizer, lines)

    monkeypatch.setattr(decoding, "forward_of", lambda model, *, num_rows: models_own_forward(model))
    monkeypatch.setattr(decoding, "_step_of", lambda read, cache: torch.compile(read, backend="eager", fullgraph=True))
    torch._dynamo.reset()
    counters.clear()
    assert decoded(model, tokenizer, lines, batch_size=5, static=True) == expected
    assert counters["stats"]["unique_graphs"] == 1


def test_the_cap_on_cached_tokens_lowers_the_rows_and_changes_no_response(tokenizer, lines, forward_sizes):
    model = float64_model("gpt2")
    expected = decoded(model, tokenizer, lines)
    forward_sizes.clear()
    columns = max(map(len, lines)) - 1 + LENGTH + decoding.SPARE_COLUMNS
    assert decoded(model, tokenizer, lines, cached_tokens=3 * columns + 1) == expected
    assert max(rows for rows, _ in forward_sizes) == 3
    assert decoded(model, tokenizer, lines, cached_tokens=1) == expected


def test_a_prompt_that_is_sampled_many_times_is_read_once(architecture, tokenizer, lines, forward_sizes):
    model = float64_model(architecture)
    repeated = [lines[13]] * 6 + [lines[14]] * 2
    responses = decoded(model, tokenizer, repeated)
    assert forward_sizes[0] == (2, max(map(len, repeated)) - 1)
    assert len({tuple(response) for response in responses}) > 4
    noise = noise_for(8)
    for row, line in enumerate(repeated):
        assert decoded(model, tokenizer, [line], noise=noise[row : row + 1]) == [responses[row]]


def test_prompts_of_like_length_are_read_together(architecture, tokenizer, lines, forward_sizes, monkeypatch):
    model = float64_model(architecture)
    expected = decoded(model, tokenizer, lines)
    forward_sizes.clear()
    monkeypatch.setattr(decoding, "TOKENS_READ_TOGETHER", (20, 20))
    assert decoded(model, tokenizer, lines) == expected
    read = [shape for shape in forward_sizes if shape[1] > 1]
    assert len(read) > 3
    assert all(rows * length <= 20 or rows == 1 for rows, length in read)


def test_one_prompt_sampled_more_often_than_there_are_rows_is_read_once(tokenizer, lines, forward_sizes):
    model, line = float64_model("gpt2"), max(lines, key=len)
    responses = decoded(model, tokenizer, [line] * 12, batch_size=3)
    read = [shape for shape in forward_sizes if shape[1] > 1]
    assert read == [(1, len(line) - 2)]
    assert responses == decoded(model, tokenizer, [line] * 12)


def test_a_beginning_that_all_prompts_share_is_read_once(architecture, tokenizer, lines, forward_sizes, monkeypatch):
    model, beginning = float64_model(architecture), [20, 21, 22, 23, 24, 25, 26, 27, 28, 29]
    prompts = [beginning + line[:10] for line in lines]
    shared = decoded(model, tokenizer, prompts, batch_size=5)
    assert forward_sizes[0] == (1, 9)  # and the tenth with each prompt, so that none is left without a token
    assert all(length <= 10 for _, length in forward_sizes[1:])
    monkeypatch.setattr(decoding, "MIN_SHARED_PREFIX", 1000)
    assert decoded(model, tokenizer, prompts, batch_size=5) == shared


def test_a_model_with_windows_shares_no_beginning_and_still_samples_as_its_plain_forward(tokenizer, lines):
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MistralConfig(
        **shape, num_key_value_heads=2, vocab_size=cases.VOCABULARY, sliding_window=4, initializer_range=0.3
    )
    model = MistralForCausalLM(config).double().eval()
    prompts = [lines[-1][:9] + line[:5] for line in lines[:6]]
    noise, expected = noise_for(6), []
    for row, prompt in enumerate(prompts):
        ids = list(prompt)
        while len(ids) < len(prompt) + LENGTH:
            with torch.no_grad():
                logits = model(torch.tensor([ids]), use_cache=False).logits[:, -1]
            step = len(ids) - len(prompt)
            ids.append(int(draw(logits, noise[row, step : step + 1], SamplingSettings())[0]))
            if ids[-1] in STOPS:
                break
        expected.append(ids[len(prompt) :])
    for size in (2, 6):
        assert decoded(model, tokenizer, prompts, batch_size=size) == expected


def test_log_probabilities_are_those_of_a_forward_over_the_whole_response(architecture, tokenizer):
    model, prompts = cases.make_model(architecture), cases.prompt_batch(tokenizer, cases.TEXTS * 2)
    chosen = SamplingSettings(max_new_tokens=LENGTH, temperature=0.8, stop_token_ids=STOPS, batch_size=3)
    responses = sample(model, tokenizer, prompts, chosen, noise_for(8))
    with torch.no_grad():
        expected = response_logprobs(model, inputs_of(prompts, responses), temperature=0.8)
    assert responses.logprobs.dtype == torch.float32
    torch.testing.assert_close(responses.logprobs, torch.where(responses.mask, expected, 0.0), rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------- forward passes


def last_logits(forward, model, ids, mask):
    """Logits after all but the last token were read at once and the last one by a step of its own."""
    cache = ColumnCache(2, len(ids), 16, 8, device=torch.device("cpu"), static=False)
    every = torch.arange(len(ids))
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        with cache.reading(every, every, mask[:, :-1]):
            forward(ids[:, :-1], positions[:, :-1], mask[:, :-1], cache)
        cache.window.used = len(ids)
        return forward(ids[:, -1:], positions[:, -1:], cache.open_column(), cache)


IDS = torch.tensor([[9, 9, 9, 5, 6, 7], [8, 12, 13, 14, 15, 16], [9, 40, 41, 42, 43, 44]])
MASK = torch.tensor([[False] * 3 + [True] * 3, [True] * 6, [False] + [True] * 5])


@pytest.mark.parametrize("architecture", FUNCTIONAL)
def test_our_own_forward_is_the_models_forward(architecture):
    model = float64_model(architecture)
    model.config.use_cache = False
    ours = last_logits(functional_forward(model, num_rows=3), model, IDS, MASK)
    for row in range(3):
        expected = cases.plain_logits(model, IDS[row][MASK[row]].tolist())[-1]
        torch.testing.assert_close(ours[row], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("architecture", FUNCTIONAL)
@pytest.mark.parametrize("packed", [False, True])
def test_our_own_forward_in_float32_with_plain_and_packed_products(architecture, packed, monkeypatch):
    monkeypatch.setattr(forwards, "MIN_PACKED_WEIGHTS", 0 if packed else 2**62)
    monkeypatch.setattr(forwards, "MIN_PACKED_ROWS", 1)
    model = cases.make_model(architecture)
    ours, own = (
        last_logits(make, model, IDS, MASK)
        for make in (functional_forward(model, num_rows=3), models_own_forward(model))
    )
    torch.testing.assert_close(ours, own, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_models_own_forward_takes_both_ways_of_attention(architecture, attention):
    model = cases.make_model(architecture)
    model.set_attn_implementation(attention)
    logits = last_logits(models_own_forward(model), model, IDS, MASK)
    for row in range(3):
        expected = cases.plain_logits(model, IDS[row][MASK[row]].tolist())[-1]
        torch.testing.assert_close(logits[row], expected, rtol=1e-5, atol=1e-4, check_dtype=False)


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_keeps_its_cache_in_float32_and_stays_near_float32(architecture, tokenizer, autocast, forward_sizes):
    model, prompts = cases.make_model(architecture), cases.prompt_batch(tokenizer)
    chosen = SamplingSettings(max_new_tokens=LENGTH, stop_token_ids=STOPS)
    narrow = model if autocast else copy.deepcopy(model).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        responses = sample(narrow, tokenizer, prompts, chosen, noise_for(4))
        if is_functional(narrow):
            cache = ColumnCache(2, 3, 16, 8, device=torch.device("cpu"), static=False)
            forward = functional_forward(narrow, num_rows=3)
            cache.window.used = 3
            forward(IDS[:, :1], torch.zeros(3, 1, dtype=torch.int64), cache.open_column(), cache)
            assert cache.layers[0].keys.dtype == torch.float32
    with torch.no_grad():
        expected = response_logprobs(model, inputs_of(prompts, responses), temperature=1.0)
    error = (responses.logprobs - expected)[responses.mask].abs()
    assert responses.logprobs.isfinite().all()
    assert error.max() > 1e-4  # it was bf16
    assert error.mean() < 0.15


def test_what_is_added_to_a_model_is_never_passed_by():
    model = cases.make_model()
    assert is_functional(model)
    with torch.no_grad():
        model(IDS, output_hidden_states=True)  # transformers leaves its own hooks behind
    assert is_functional(model)

    class Adapter(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return 2 * self.inner(x)

    adapted = copy.deepcopy(model)
    adapted.transformer.h[0].attn.c_attn = Adapter(adapted.transformer.h[0].attn.c_attn)
    hooked = copy.deepcopy(model)
    hooked.transformer.h[1].mlp.register_forward_hook(lambda module, inputs, output: 2 * output)
    wrapped = copy.deepcopy(model)
    wrapped.transformer.forward = lambda *inputs, **options: None
    assert not any(map(is_functional, (adapted, hooked, wrapped)))
    assert not is_functional(cases.make_model("gpt_neox"))


def test_products_are_packed_where_that_pays():
    x, weight, bias = torch.randn(8, 64), torch.randn(64, 2**13), torch.randn(2**13)
    for num_rows in (1, 8):
        for each in (bias, None):
            expected = x.double() @ weight.double() + (0 if each is None else each.double())
            actual = product_with(weight, each, num_rows=num_rows)(x)
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4, check_dtype=False)


def test_the_cache_is_freed_with_the_sampler(tokenizer, monkeypatch):
    caches = []

    class Watched(ColumnCache):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            caches.append(weakref.ref(self))

    monkeypatch.setattr(decoding, "ColumnCache", Watched)
    gc.disable()  # without the collector's help
    try:
        sample(
            cases.make_model(),
            tokenizer,
            cases.prompt_batch(tokenizer),
            SamplingSettings(max_new_tokens=LENGTH),
            noise_for(4),
        )
        assert caches[0]() is None
    finally:
        gc.enable()
