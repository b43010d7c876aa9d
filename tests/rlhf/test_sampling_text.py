"""Stop strings, found as the tokens come, and streaming, against decoding the whole response."""

from __future__ import annotations

import language_cases as cases
import pytest
import tiny_models
import torch

from ppo_rlhf.errors import UserError
from ppo_rlhf.sampling import SamplingSettings, sample, stream
from ppo_rlhf.seeding import uniform_rows

LENGTH = 30
NEVER = (cases.VOCABULARY + 1,)
UNICODE = "héllo wörld — 日本語 🙂🙃 naïve"


def ids_of(tokenizer, strings, *, batch_size=8, stop_token_ids=NEVER):
    """Responses of random models are random: many of them, some of which hold the strings."""
    prompts = cases.prompt_batch(tokenizer, cases.TEXTS * 6)
    chosen = SamplingSettings(
        max_new_tokens=LENGTH, stop_token_ids=stop_token_ids, stop_strings=strings, batch_size=batch_size
    )
    noise = uniform_rows(list(range(len(prompts))), LENGTH, 1)
    responses = sample(cases.make_model().double(), tokenizer, prompts, chosen, noise)
    lines = [ids[mask].tolist() for ids, mask in zip(responses.ids, responses.mask, strict=True)]
    return lines, responses.finished.tolist(), responses.texts


def first_end(tokenizer, line, strings):
    """Through the first token with which the whole text so far holds one of the strings."""
    for length in range(1, len(line) + 1):
        text = tokenizer.decode(line[:length], skip_special_tokens=True)
        if any(string in text for string in strings):
            return line[:length], True
    return line, False


@pytest.mark.parametrize("batch_size", [3, 24])
def test_a_response_ends_with_the_token_that_completes_a_stop_string(tokenizer, batch_size):
    free, _, texts = ids_of(tokenizer, ())
    # pieces of what is said: of one token and of several, beginning and ending inside tokens
    strings = (texts[0][5:8], texts[1][9:14], texts[7][3:5])
    lines, finished, _ = ids_of(tokenizer, strings, batch_size=batch_size)
    expected = [first_end(tokenizer, line, strings) for line in free]
    assert lines == [line for line, _ in expected]
    assert finished == [ended for _, ended in expected]
    assert 2 < sum(finished) < len(finished)


def test_stop_ids_and_stop_strings_act_together(tokenizer):
    free, _, texts = ids_of(tokenizer, ())
    string, stop = texts[0][6:9], free[1][4]
    lines, finished, _ = ids_of(tokenizer, (string,), stop_token_ids=(stop,))
    for line, whole, ended in zip(lines, free, finished, strict=True):
        by_string, _ = first_end(tokenizer, whole, (string,))
        by_id = whole[: whole.index(stop) + 1] if stop in whole else whole
        assert line == min(by_string, by_id, key=len)
        assert ended == (len(line) < len(whole) or line[-1] == stop)


def test_an_empty_stop_string_is_refused():
    with pytest.raises(UserError, match="stop_strings"):
        SamplingSettings(stop_strings=("",))


@pytest.fixture
def bytes_tokenizer():
    """A token a byte, so that characters come in pieces."""
    return tiny_models.make_tokenizer([UNICODE], size=258)


class Scripted:
    """Noise under which a model says given ids: uniform logits make token v the one of noise (v + ½) ÷ V."""

    def __init__(self, vocabulary):
        torch.manual_seed(0)
        self.model = tiny_models.make_model("gpt2", vocabulary=vocabulary, context=256, spread=0.3)
        torch.nn.init.zeros_(self.model.lm_head.weight)
        self.vocabulary = vocabulary

    def noise(self, ids):
        return (torch.tensor([ids]) + 0.5) / self.vocabulary


def pieces_of(tokenizer, ids, monkeypatch, **options):
    script = Scripted(len(tokenizer))
    monkeypatch.setattr(torch, "rand", lambda *shape, generator=None: script.noise(ids))
    chosen = SamplingSettings(max_new_tokens=len(ids), stop_token_ids=(len(tokenizer) + 1,), **options)
    return list(stream(script.model, tokenizer, "hello", chosen))


def test_streamed_pieces_are_the_whole_text_and_never_half_a_character(bytes_tokenizer, monkeypatch):
    ids = bytes_tokenizer(UNICODE)["input_ids"]
    assert len(ids) > len(UNICODE)
    pieces = pieces_of(bytes_tokenizer, ids, monkeypatch)
    assert "".join(pieces) == UNICODE
    assert not any("\ufffd" in piece for piece in pieces)
    assert sum(map(bool, pieces)) == len(UNICODE)


def test_bytes_that_never_become_a_character_come_at_the_end(bytes_tokenizer, monkeypatch):
    ids = bytes_tokenizer("a🙂")["input_ids"][:-1] + bytes_tokenizer("b")["input_ids"]
    for line in (ids, ids[:-1]):
        pieces = pieces_of(bytes_tokenizer, line, monkeypatch)
        assert "".join(pieces) == bytes_tokenizer.decode(line)


def test_special_tokens_are_not_streamed(bytes_tokenizer, monkeypatch):
    ids = [*bytes_tokenizer("é")["input_ids"], 0, 1, *bytes_tokenizer("à!")["input_ids"]]
    assert "".join(pieces_of(bytes_tokenizer, ids, monkeypatch)) == "éà!"


def test_a_stream_says_what_sample_says_and_stops_where_it_stops(tokenizer):
    model = cases.make_model()
    for seed in range(5):
        chosen = SamplingSettings(max_new_tokens=LENGTH, stop_token_ids=(0, 9), stop_strings=("e",))
        noise = torch.rand(1, LENGTH, generator=torch.Generator().manual_seed(seed))
        expected = sample(model, tokenizer, cases.prompt_batch(tokenizer, ["the cat"]), chosen, noise)
        generator = torch.Generator().manual_seed(seed)
        pieces = list(stream(model.train(), tokenizer, "the cat", chosen, generator))
        assert "".join(pieces) == expected.texts[0]
        assert model.training


def test_a_stream_comes_token_by_token(tokenizer):
    model, read = cases.make_model(), []
    model.lm_head.register_forward_hook(lambda *_: read.append(1))
    chosen = SamplingSettings(max_new_tokens=LENGTH, stop_token_ids=NEVER)
    pieces = stream(model, tokenizer, "the cat", chosen, torch.Generator().manual_seed(0))
    assert next(pieces)
    assert len(read) < 5
    pieces.close()
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()
