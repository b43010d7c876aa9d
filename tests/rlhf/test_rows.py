"""Rows of data: every format, checks by name, held-out splits, the order of training, seeding."""

from __future__ import annotations

import gzip
import json
import random
from collections import Counter

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from datasets.arrow_writer import ArrowWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from ppo_rlhf.config import SFTConfig
from ppo_rlhf.data import held_out, load_rows, stream, text_column
from ppo_rlhf.errors import UserError
from ppo_rlhf.prompts import Prompts
from ppo_rlhf.seeding import keyed_generator, permutation, uniform_rows
from ppo_rlhf.train.supervised import WINDOW, batch_of, num_steps_of, token_batches

ROWS = [{"prompt": "the cat", "topic": "cats"}, {"prompt": "a dog", "topic": "dogs"}, {"prompt": "why", "topic": "why"}]


def made():
    return ROWS


def write(folder, kind):
    """The rows in one of the formats; → the source to give."""
    dataset, path = Dataset.from_list(ROWS), folder / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif kind == "json":
        path.write_text(json.dumps(ROWS))
    elif kind == "csv":
        path.write_text("prompt,topic\nthe cat,cats\na dog,dogs\nwhy,why\n")
    elif kind == "parquet":
        dataset.to_parquet(path)
    elif kind == "saved":
        dataset.save_to_disk(path)
    elif kind == "saved dictionary":
        DatasetDict({"test": dataset.select([0]), "train": dataset}).save_to_disk(path)
    elif kind == "compressed":
        path = folder / "rows.jsonl.gz"
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode()))
    elif kind == "tsv":
        path.write_text("prompt\ttopic\nthe cat\tcats\na dog\tdogs\nwhy\twhy\n")
    elif kind == "arrow":
        with ArrowWriter(path=str(path), features=dataset.features) as writer:
            writer.write_table(dataset.data.table)
            writer.finalize()
    elif kind in ("folder", "pattern"):
        path = folder / "part"
        path.mkdir()
        for number, rows in enumerate((ROWS[:2], ROWS[2:])):
            (path / f"{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path if kind == "folder" else path / "*.jsonl")
    elif kind == "module":
        return "test_rows:made"
    elif kind == "file":
        path = folder / "source.py"
        path.write_text(f"def rows():\n    return {ROWS!r}\n")
        return f"{path}:rows"
    return str(path)


KINDS = ["jsonl", "json", "csv", "parquet", "saved", "saved dictionary", "module", "file"]
KINDS += ["compressed", "tsv", "arrow", "folder", "pattern"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_gives_the_same_rows(data_cache, kind):
    assert load_rows(write(data_cache, kind), required=("prompt",), setting="prompts") == ROWS


def test_rows_given_as_objects_are_copied_not_shared():
    rows = load_rows(iter(ROWS), required=("prompt",), setting="prompts")
    assert rows == ROWS
    rows[0]["prompt"] = "changed"
    assert ROWS[0]["prompt"] == "the cat"
    assert load_rows(Dataset.from_list(ROWS), required=("prompt",), setting="prompts") == ROWS


def test_a_text_file_gives_a_row_a_line(data_cache):
    path = data_cache / "lines.txt"
    path.write_text("the cat\na dog\n")
    assert load_rows(str(path), required=("text",), setting="data") == [{"text": "the cat"}, {"text": "a dog"}]


def test_a_file_that_changed_is_read_again(data_cache):
    path = data_cache / "rows.jsonl"
    for text in ("first", "second"):
        path.write_text(json.dumps({"prompt": text}) + "\n")
        assert load_rows(str(path), required=("prompt",), setting="prompts") == [{"prompt": text}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", None, "prompts: there is no file .*rows.jsonl"),
        ("rows.jsonl", "", "prompts: .*rows.jsonl is empty"),
        ("rows.json", "[]", "prompts: .*rows.json"),
        ("rows.csv", "prompt,topic\n", "prompts: .*rows.csv"),
        ("rows.jsonl", '{"promt": "a"}\n', "no column 'prompt', only promt. Did you mean promt"),
        ("rows.jsonl", '{"prompt": "a"}\n{"topic": "b"}\n', "row 1 of .* has no value in column 'prompt'"),
        ("rows.jsonl", '{"prompt": "a"}\n{"prompt": null}\n', "row 1 of .* has no value in column 'prompt'"),
        ("rows.jsonl", '{"prompt": "a"\n', "prompts: .*rows.jsonl cannot be loaded"),
        ("rows.parquet", "not parquet", "prompts: .*rows.parquet cannot be loaded"),
        ("rows.xyz", "?", "prompts: .*rows.xyz cannot be loaded"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(data_cache, name, content, message):
    if content is not None:
        (data_cache / name).write_text(content)
    with pytest.raises(UserError, match=message):
        load_rows(str(data_cache / name), required=("prompt",), setting="prompts")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "prompts: the given rows has no rows"),
        ([{"topic": "a"}], "prompts: the given rows has no column 'prompt', only topic"),
        ([{"prompt": "a"}, {"prompt": None}], "prompts: row 1 of the given rows has no value in column 'prompt'"),
        ([{"prompt": "a"}, {}], "prompts: the given rows has no column 'prompt'"),
    ],
)
def test_what_is_wrong_with_given_rows_is_named(rows, message):
    with pytest.raises(UserError, match=message):
        load_rows(rows, required=("prompt",), setting="prompts")


def test_a_folder_that_is_no_data_set_is_named(data_cache):
    with pytest.raises(UserError, match=r"prompts: .* cannot be loaded"):
        load_rows(str(data_cache), required=("prompt",), setting="prompts")


def test_a_saved_dictionary_without_a_train_split_is_named(data_cache):
    DatasetDict({"test": Dataset.from_list(ROWS)}).save_to_disk(data_cache / "rows")
    with pytest.raises(UserError, match=r"prompts: .*train"):
        load_rows(str(data_cache / "rows"), required=("prompt",), setting="prompts")


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("split=train", ROWS),
        ("split=train[1:]", ROWS[1:]),
        ("take=2", ROWS[:2]),
        ("streaming=true", ROWS),
        ("streaming=true&take=1", ROWS[:1]),
    ],
)
def test_options_of_load_dataset_follow_a_question_mark(data_cache, query, expected):
    assert load_rows(f"{write(data_cache, 'jsonl')}?{query}", required=("prompt",), setting="data") == expected


def test_a_split_of_a_saved_dictionary_is_named_so(data_cache):
    source = write(data_cache, "saved dictionary")
    assert load_rows(f"{source}?split=test", required=("prompt",), setting="data") == ROWS[:1]
    with pytest.raises(UserError, match=r"has no split 'dev', only test, train; name one of them: '.*\?split=test'"):
        load_rows(f"{source}?split=dev", required=("prompt",), setting="data")


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("splitt=train", r"unknown option 'splitt'. Did you mean split\?"),
        ("limit=3", "unknown option 'limit'."),
        ("take=0", "take=0 must be a number of rows, at least 1"),
        ("take=all", "take=all must be a number of rows"),
        ("streaming=yes", "streaming=yes must be true or false"),
        ("split=validation", "data: .*rows.jsonl.* cannot be loaded: .*validation"),
    ],
)
def test_an_option_that_cannot_be_is_named(data_cache, query, message):
    with pytest.raises(UserError, match=message):
        load_rows(f"{write(data_cache, 'jsonl')}?{query}", required=("prompt",), setting="data")


def test_a_name_on_the_hub_is_loaded_with_its_options(monkeypatch):
    asked = []

    def load_dataset(*names, **options):
        asked.append((names, options))
        return Dataset.from_list(ROWS)

    monkeypatch.setattr("ppo_rlhf.data.sources.load_dataset", load_dataset)
    assert load_rows("openai/gsm8k?name=main&split=test", required=(), setting="data") == ROWS
    assert load_rows("some/set", required=(), setting="data") == ROWS
    assert asked[0] == (("openai/gsm8k",), {"name": "main", "split": "test", "streaming": False})
    assert asked[1] == (("some/set",), {"split": "train"})


def test_columns_are_renamed_and_left_out():
    rows = [{"question": "a", "answer": "b", "source": "c"}, {"question": "d", "answer": "e"}]
    columns = {"question": "prompt", "answer": "completion", "source": None}
    assert load_rows(rows, required=("prompt",), setting="data", columns=columns) == [
        {"prompt": "a", "completion": "b"},
        {"prompt": "d", "completion": "e"},
    ]
    swapped = load_rows([{"a": 1, "b": 2}], required=(), setting="data", columns={"a": "b", "b": "a"})
    assert swapped == [{"b": 1, "a": 2}]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"qestion": "prompt"},
            r"data has no column 'qestion', only prompt, question. Did you mean question\?",
        ),
        ({"question": "prompt"}, r"columns: data has two columns for 'prompt'; leave one out: '\{prompt: null\}'"),
    ],
)
def test_names_that_do_not_fit_the_columns_are_named(columns, message):
    with pytest.raises(UserError, match=message):
        load_rows([{"question": "a", "prompt": "b"}], required=("prompt",), setting="data", columns=columns)


def test_a_value_that_is_not_text_or_is_blank_is_named():
    assert text_column([{"a": "x"}], "a", setting="data") == ["x"]
    with pytest.raises(UserError, match="data: row 1, column 'a' is int, not text"):
        text_column([{"a": "x"}, {"a": 3}], "a", setting="data")
    with pytest.raises(UserError, match="data: row 0, column 'a' is blank"):
        text_column([{"a": " \n"}], "a", setting="data")
    assert text_column([{"a": ""}], "a", setting="data", empty=True) == [""]


# ---------------------------------------------------------------------------------------------------- prompts


def test_prompts_carry_their_ids_texts_rows_and_other_columns(tokenizer):
    prompts = Prompts(ROWS, tokenizer, longest=20, setting="prompts")
    batch = prompts.batch([2, 0, 2], torch.device("cpu"))
    assert batch.texts == ["why", "the cat", "why"]
    assert batch.rows == [2, 0, 2]
    assert prompts.columns_of([2, 0]) == {"topic": ["why", "cats"]}
    for line, mask, text in zip(batch.ids, batch.mask, batch.texts, strict=True):
        assert line[mask].tolist() == tokenizer(text)["input_ids"]
        assert mask.tolist() == sorted(mask.tolist())  # padding is on the left
        assert (line[~mask] == tokenizer.pad_token_id).all()


def test_a_prompt_too_long_for_the_context_is_named(tokenizer):
    with pytest.raises(UserError, match="prompts: prompt 1 has 12 tokens; 10 fit"):
        Prompts([{"prompt": "xy"}, {"prompt": "xyzxyzxyzxyz"}], tokenizer, longest=10, setting="prompts")


def test_a_prompt_that_the_tokenizer_reads_as_nothing_is_named(tokenizer):
    assert tokenizer("ЖЖ")["input_ids"] == []
    with pytest.raises(UserError, match=r"prompts: .*prompt 1\b"):
        Prompts([{"prompt": "why"}, {"prompt": "ЖЖ"}], tokenizer, longest=10, setting="prompts")


# ---------------------------------------------------------------------------------------------------- held out


def grouped_rows(groups):
    return [{"prompt": f"p{group}", "number": number} for number, group in enumerate(groups)]


@given(st.lists(st.integers(0, 9), min_size=2, max_size=40), st.floats(0.05, 0.95), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_held_out_prompts_keep_their_rows_together_and_nothing_is_lost(groups, fraction, seed):
    rows = grouped_rows(groups)
    count = round(fraction * len(set(groups)))
    if count in (0, len(set(groups))):
        with pytest.raises(UserError, match="eval_fraction="):
            held_out(rows, fraction, seed, setting="eval_fraction")
        return
    train, test = held_out(rows, fraction, seed, setting="eval_fraction")
    assert sorted(row["number"] for row in train + test) == list(range(len(rows)))
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}
    assert len({row["prompt"] for row in test}) == count
    assert held_out(rows, fraction, seed, setting="eval_fraction") == (train, test)


def test_held_out_rows_differ_between_seeds_and_leave_the_global_generator_alone():
    rows = grouped_rows(range(100))
    before = torch.get_rng_state()
    splits = {tuple(row["number"] for row in held_out(rows, 0.2, seed, setting="f")[1]) for seed in range(5)}
    assert len(splits) == 5
    assert torch.equal(torch.get_rng_state(), before)


def test_rows_without_a_prompt_are_held_out_one_by_one():
    train, test = held_out([{"text": "same"} for _ in range(10)], 0.3, 0, setting="eval_fraction")
    assert (len(train), len(test)) == (7, 3)


# ---------------------------------------------------------------------------------------------------- the stream


@given(st.integers(1, 30), st.integers(0, 200), st.integers(1, 90), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_the_stream_can_be_resumed_anywhere(num_rows, start, length, seed):
    whole = stream(num_rows, 0, start + length, seed)
    assert torch.equal(stream(num_rows, start, start + length, seed), whole[start:])


def test_each_pass_of_the_stream_sees_each_row_once_in_an_order_of_its_own():
    passes = [stream(50, 50 * number, 50 * (number + 1), 0).tolist() for number in range(4)]
    assert all(sorted(rows) == list(range(50)) for rows in passes)
    assert len({tuple(rows) for rows in passes}) == 4
    assert stream(50, 0, 50, 1).tolist() != passes[0]


# ---------------------------------------------------------------------------------------------------- batches


def batches(num_rows, size, *, epochs=1.0, seed=0, lengths=None):
    config = SFTConfig(batch_size=size, num_epochs=epochs, seed=seed)
    lengths = lengths or [1 + (7 * row) % 23 for row in range(num_rows)]
    num_steps = max(1, round(epochs * num_rows / size))
    return [batch_of(step, num_steps, config, lengths) for step in range(num_steps)], lengths


@pytest.mark.parametrize("num_rows", [8, 40, 64, 4 * WINDOW, 10 * WINDOW, 12 * WINDOW + 8])
def test_each_pass_over_the_data_covers_each_example_exactly_once(num_rows):
    steps = num_rows // 4
    taken, _ = batches(num_rows, 4, epochs=3.0)
    assert all(len(batch) == 4 for batch in taken)
    for number in range(3):
        seen = [row for batch in taken[number * steps : (number + 1) * steps] for row in batch]
        assert sorted(seen) == list(range(num_rows))


@pytest.mark.parametrize(("num_rows", "size"), [(40, 4), (41, 7), (100, 32), (9, 9)])
def test_no_batch_holds_an_example_twice_where_the_batch_divides_the_data(num_rows, size):
    taken, _ = batches(num_rows, size, epochs=4.0)
    if num_rows % size == 0:
        assert all(len(set(batch)) == size for batch in taken)
    counts = Counter(row for batch in taken for row in batch)
    total = len(taken) * size
    assert set(counts.values()) <= {total // num_rows, total // num_rows + 1}
    assert sum(counts.values()) == total


def test_a_batchs_examples_are_of_like_length():
    taken, lengths = batches(WINDOW * 8, 8, lengths=[1 + (37 * row) % 101 for row in range(WINDOW * 8)])
    spreads = [max(lengths[row] for row in batch) - min(lengths[row] for row in batch) for batch in taken]
    assert max(spreads) < 20  # of 100, where a random batch spreads over about 78
    longest = [max(lengths[row] for row in batch) for batch in taken]
    assert longest != sorted(longest)  # and yet batches do not come in the order of length


def test_a_batch_depends_on_its_step_alone_and_on_the_seed():
    config = SFTConfig(batch_size=4, num_epochs=2.0)
    lengths = [1 + (7 * row) % 23 for row in range(90)]
    in_order = [batch_of(step, 45, config, lengths) for step in range(45)]
    assert [batch_of(step, 45, config, lengths) for step in reversed(range(45))][::-1] == in_order
    other = SFTConfig(batch_size=4, num_epochs=2.0, seed=1)
    assert [batch_of(step, 45, other, lengths) for step in range(45)] != in_order


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(30, 90), st.integers(1, 3), st.integers(0, 3))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_batches_of_tokens_hold_what_fits_in_the_order_of_the_data(lengths, budget, epochs, seed):
    config = SFTConfig(num_epochs=float(epochs), seed=seed)
    taken = token_batches(lengths, config, budget, 1)
    order = [row for batch in taken for row in batch]
    assert order == stream(len(lengths), 0, len(order), seed).tolist()
    assert len(order) >= epochs * len(lengths)  # every example is seen in every pass
    assert len(order) - len(taken[-1]) < epochs * len(lengths)  # and no batch is begun after the last pass
    following = stream(len(lengths), 0, len(order) + 1, seed).tolist()
    for number, batch in enumerate(taken):
        tokens = sum(lengths[row] for row in batch)
        first_left_out = following[sum(len(each) for each in taken[: number + 1])]
        assert tokens <= budget < tokens + lengths[first_left_out]


@pytest.mark.parametrize(
    ("lengths", "processes", "message"),
    [
        (
            [3, 50, 4],
            1,
            "batch_tokens=40 holds 0 demonstrations beside one of 50 tokens, fewer than the 1 processes",
        ),
        ([30, 30, 30], 2, "batch_tokens=40 holds 1 demonstrations beside one of 30 tokens, fewer than the 2 processes"),
    ],
)
def test_a_budget_of_tokens_that_is_too_small_is_refused(lengths, processes, message):
    with pytest.raises(UserError, match=message):
        token_batches(lengths, SFTConfig(), 40, processes)


def test_a_batch_larger_than_the_data_is_refused():
    from accelerate import Accelerator

    with pytest.raises(UserError, match="batch_size=32 is larger than the training data, 9 examples"):
        num_steps_of(SFTConfig(), 9, Accelerator(cpu=True))
    assert num_steps_of(SFTConfig(batch_size=4, num_epochs=2.5), 10, Accelerator(cpu=True)) == 6


# ---------------------------------------------------------------------------------------------------- seeding


def test_keyed_randomness_depends_on_its_key_alone():
    torch.manual_seed(0)
    random.seed(0)
    first = torch.rand(5, generator=keyed_generator(0, "sample", 3))
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    torch.rand(7)
    assert torch.equal(torch.rand(5, generator=keyed_generator(0, "sample", 3)), first)
    for key in ((1, "sample", 3), (0, "shuffle", 3), (0, "sample", 4), ("0", "sample", 3), (0, "sample", 3, 0)):
        assert not torch.equal(torch.rand(5, generator=keyed_generator(*key)), first)


def test_keyed_randomness_leaves_the_global_generators_alone():
    before = torch.get_rng_state(), random.getstate()
    keyed_generator(0, "a")
    permutation(10, 0, "b")
    uniform_rows([0, 1], 4, 0, "c")
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_a_rows_noise_is_the_same_however_rows_are_split():
    whole = uniform_rows([0, 1, 2, 3], 6, 0, "sample", 5)
    assert torch.equal(
        torch.cat([uniform_rows([0, 1], 6, 0, "sample", 5), uniform_rows([2, 3], 6, 0, "sample", 5)]), whole
    )
    assert whole.dtype == torch.float32
    assert ((whole >= 0) & (whole < 1)).all()
    assert len(set(map(tuple, whole.tolist()))) == 4


def test_a_permutation_is_one():
    assert sorted(permutation(20, 0, "x").tolist()) == list(range(20))
    assert permutation(20, 0, "x").tolist() != permutation(20, 0, "y").tolist()
