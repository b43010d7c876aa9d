"""Whatever is in a configuration or a data file is read, or refused in one line; never a traceback."""

import contextlib
import io
import json
import os
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

import hypothesis.strategies as st
import pytest
import tiny_runs
import yaml
from hypothesis import HealthCheck, example, given, settings
from tiny_runs import in_tmp_path

import classic.cli
import ppo_rlhf.cli
from ppo_rlhf.arguments import Command, CommandLine, run, settings_in
from ppo_rlhf.data import comparisons, demonstrations, load_rows
from ppo_rlhf.prompts import Prompts
from ppo_rlhf.train.rankings import rankings_of

__all__ = ["in_tmp_path"]

bounded = settings(
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
TEXTS = st.one_of(
    st.text(max_size=20),
    st.text(st.characters(), max_size=8),
    st.sampled_from(
        ["", " ", "{", "]", ": ", "- ", "%", "@", "${HOME}", "&a *a", "!!python/object:os.system x", "a" * 5000]
    ),
    st.sampled_from(
        ["null", "~", "true", "no", "1e3", "-0", ".nan", "0x1F", "1_000", "2026-11-22", "é\u202e\u0000", "💥"]
    ),
)
NUMBERS = st.one_of(
    st.integers(),
    st.sampled_from([0, -1, 1, 2**31, 2**63, 2**64, -(2**70), 10**400]),
    st.floats(),
    st.sampled_from([float("nan"), float("inf"), -float("inf"), 1e308, 5e-324, -0.0]),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS, st.dates(), st.binary(max_size=4))
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS | NUMBERS, inner, max_size=3)),
    max_leaves=6,
)


# ----------------------------------------------------------------------------------------------- configurations

PROGRAMS = {
    "sft": ppo_rlhf.cli.COMMAND_LINE,
    "ppo": ppo_rlhf.cli.COMMAND_LINE,
    "pipeline": ppo_rlhf.cli.COMMAND_LINE,
    "train": classic.cli.COMMAND_LINE,
}


def names_in(settings_class, prefix=""):
    """All settings of a dataclass by their dotted names, groups too."""
    hints = get_type_hints(settings_class)
    for field in fields(settings_class):
        yield prefix + field.name
        if is_dataclass(hints[field.name]):
            yield from names_in(hints[field.name], f"{prefix}{field.name}.")


def nested(dotted):
    """{"a.b": 1, "c": 2} as {"a": {"b": 1}, "c": 2}."""
    made = {}
    for name, value in dotted.items():
        *groups, last = name.split(".")
        place = made
        for group in groups:
            if not isinstance(place.get(group), dict):
                place[group] = {}
            place = place[group]
        place[last] = value
    return made


def assert_read_or_refused(line, execute, words):
    """A command ends with 0 and no word, or with 2 and one line; and leaves nothing behind."""
    before, told = sorted(os.listdir(".")), io.StringIO()
    with contextlib.redirect_stderr(told):
        code = run(line, execute, words)
    assert code in (0, 2)
    assert len(told.getvalue().splitlines()) == (1 if code else 0), told.getvalue()
    assert told.getvalue().startswith("error: " if code else "")
    assert sorted(os.listdir(".")) == before


@pytest.mark.parametrize("command", PROGRAMS)
@settings(bounded, max_examples=25)
@given(data=st.data())
def test_settings_of_any_value_are_read_or_refused_in_one_line(command, data):
    line = PROGRAMS[command]
    kind = line.commands[command].settings
    known = list(names_in(kind))
    named = st.dictionaries(st.sampled_from(known), VALUES, min_size=1, max_size=4)
    config = data.draw(st.one_of(named.map(nested), named, st.dictionaries(TEXTS, VALUES, max_size=3), VALUES))
    words = data.draw(st.just([]) | st.tuples(st.sampled_from(known).map(lambda name: f"--{name}"), TEXTS).map(list))
    Path("config.yaml").write_text(yaml.safe_dump(config, allow_unicode=True), "utf-8", "surrogatepass")
    assert_read_or_refused(
        line, lambda _, found: settings_in(found, kind) and None, [command, "--config", "config.yaml", *words]
    )


@settings(bounded, max_examples=25)
@given(st.binary(max_size=60) | TEXTS.map(lambda text: text.encode("utf-8", "surrogatepass")))
@example(b"[" * 3000)
@example(b"{a: " * 400)
@example(b"a: &a [*a]")
@example(b"optimizer: &a {lr: *a}")
@example(b"&a a: *a")
@example(b"? [1]\n: 2")
@example(b"seed: 1\nseed: 2")
@example(b"seed: " + b"9" * 5000)
@example(b"--- 1\n--- 2")
@example(b"\xef\xbb\xbfseed: 3")
def test_a_configuration_of_any_bytes_is_read_or_refused_in_one_line(content):
    Path("config.yaml").write_bytes(content)
    assert_read_or_refused(PROGRAMS["sft"], lambda *_: None, ["sft", "--config", "config.yaml"])


# ---------------------------------------------------------------------------------------------------------- data

COLUMNS = ["prompt", "completion", "text", "chosen", "rejected", "responses", "ranks", "margin", "weight", "promt", ""]
CELLS = st.one_of(
    st.sampled_from(["a fish", " the bird .", "", " ", "fish " * 80, "a" * 100_000, "\x00", "\ud800", "\u202e", "💥"]),
    st.lists(st.sampled_from(["a", " b", "", None, 3]), max_size=4),
    st.lists(st.sampled_from([1, 2, 1.5, None, True, float("nan"), 10**400]), max_size=4),
    VALUES.filter(lambda value: not isinstance(value, bytes)),
)
ROWS = st.dictionaries(st.sampled_from(COLUMNS), CELLS, max_size=5)
WHOLE = {
    "sft": {"prompt": "a fish", "completion": " the bird ."},
    "reward": {"prompt": "a fish", "chosen": " the bird", "rejected": " a"},
    "ppo": {"prompt": "a fish"},
}


def as_jsonl(rows):
    return "".join(json.dumps(row, default=str) + "\n" for row in rows).encode()


def as_csv(rows):
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [",".join(names), *(",".join(str(row.get(name, "")) for name in names) for row in rows)]
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def consumed(stage, path, tokenizer):
    """What a stage makes of a file of data before it trains."""
    rows = load_rows(path, required=("prompt",) if stage == "ppo" else (), setting="data")
    if stage == "sft":
        demonstrations(rows, tokenizer, longest=64, too_long="refuse", setting="data")
    elif stage == "reward":
        rankings_of(comparisons(rows, tokenizer, setting="data"), setting="data")
    else:
        Prompts(rows, tokenizer, longest=48, setting="data")


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_runs.tokenizer()


@pytest.mark.parametrize("stage", WHOLE)
@settings(bounded, max_examples=40)
@given(data=st.data())
def test_data_of_any_kind_are_read_or_refused_in_one_line(stage, tokenizer, data):
    rows = data.draw(st.lists(st.just(WHOLE[stage]) | ROWS.map(lambda row: WHOLE[stage] | row) | ROWS, max_size=4))
    name, content = data.draw(
        st.sampled_from([("data.jsonl", as_jsonl(rows)), ("data.json", as_jsonl(rows)), ("data.csv", as_csv(rows))])
        | st.tuples(
            st.sampled_from(["data.jsonl", "data.csv", "data.parquet", "data.txt", "data.xyz"]),
            st.binary(max_size=60) | TEXTS.map(lambda text: text.encode("utf-8", "surrogatepass")),
        )
    )
    Path(name).write_bytes(content)
    line = CommandLine("fuzz", "", {"sft": Command("")})
    assert_read_or_refused(line, lambda *_: consumed(stage, name, tokenizer), ["sft"])
    Path(name).unlink()
