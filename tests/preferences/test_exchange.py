"""Comparisons in and out: the usual formats are read, and what is written trains the same reward model."""

import json

import pytest
from datasets import load_dataset

from ppo_rlhf.data import is_database, load_rows
from ppo_rlhf.errors import UserError
from ppo_rlhf.preferences import Choice, Pair, Store, choices_from, pair_rows, pairs_from, ranked_rows, write_rows
from ppo_rlhf.train.rankings import rankings_of

USER = {"role": "user", "content": "hello?"}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("good", "bad"))
HH = "\n\nHuman: hello?\n\nAssistant: hi\n\nHuman: how?\n\nAssistant:"

FORMATS = {
    "texts": ({"prompt": "p", "chosen": "good", "rejected": "bad"}, "p", ["good", "bad"]),
    "HH": ({"chosen": f"{HH} good", "rejected": f"{HH} bad"}, HH, [" good", " bad"]),
    "messages": ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, [USER], ["good", "bad"]),
    "whole chats": ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, [USER], ["good", "bad"]),
    "whole chats beside their prompt": (
        {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        [USER],
        ["good", "bad"],
    ),
    "a text prompt with messages": ({"prompt": "p", "chosen": [GOOD], "rejected": [BAD]}, "p", ["good", "bad"]),
    "whole chats with the prompt as text": (
        {"prompt": "hello?", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        [USER],
        ["good", "bad"],
    ),
    "equal chats": ({"chosen": [USER, GOOD], "rejected": [USER, GOOD]}, [USER], ["good", "good"]),
    "chats that part early": (
        {"chosen": [USER, GOOD, USER, GOOD], "rejected": [USER, BAD]},
        [USER],
        ["Assistant: good\n\nHuman: hello?\n\nAssistant: good", "bad"],
    ),
    "a ranking": ({"prompt": "p", "responses": ["good", "bad"], "ranks": [1, 7]}, "p", ["good", "bad"]),
}


@pytest.mark.parametrize(("row", "prompt", "responses"), FORMATS.values(), ids=FORMATS)
def test_the_usual_formats_are_read(row, prompt, responses):
    (choice,) = choices_from([row], name="file")
    assert choice == Choice(Pair(prompt, responses), "imported", "ranking", [1, 2])


def test_annotator_margin_and_ties_of_a_ranking_are_kept():
    row = {"prompt": "p", "responses": ["a", "b", "c"], "ranks": [3, 1, 1], "annotator": "ada", "margin": 0.5}
    (choice,) = choices_from([row], name="file")
    assert (choice.annotator, choice.margin, choice.ranks) == ("ada", 0.5, [2, 1, 1])


MALFORMED = {
    "no known columns": ({"text": "a"}, ["row 0", "text", "chosen"]),
    "no shared turn": ({"chosen": "a", "rejected": "b"}, ["prompt", "Assistant:"]),
    "no shared message": ({"chosen": [GOOD], "rejected": [BAD]}, ["share no message"]),
    "a number for a text": ({"prompt": "p", "chosen": 1, "rejected": "b"}, ["chosen"]),
    "an empty text": ({"prompt": "p", "chosen": "", "rejected": "b"}, ["chosen"]),
    "a blank prompt": ({"prompt": " ", "chosen": "a", "rejected": "b"}, ["prompt"]),
    "a message without content": ({"chosen": [USER, {"role": "x"}], "rejected": [USER]}, ["role", "content"]),
    "ranks that do not fit": ({"prompt": "p", "responses": ["a", "b"], "ranks": [1]}, ["ranks", "2"]),
    "a margin that is a word": ({"prompt": "p", "chosen": "a", "rejected": "b", "margin": "big"}, ["margin", "big"]),
}


@pytest.mark.parametrize(("row", "named"), MALFORMED.values(), ids=MALFORMED)
def test_a_row_that_cannot_be_read_is_named(row, named):
    with pytest.raises(UserError, match="file: row 0") as caught:
        choices_from([row], name="file")
    assert all(name in str(caught.value) for name in named)


def test_pairs_to_judge_are_read_with_their_sources_and_language():
    rows = [{"prompt": "p", "responses": ["a", "b", "c"], "sources": ["x", None, 3], "language": "ar"}]
    assert pairs_from(rows, name="file") == [Pair("p", ["a", "b", "c"], ["x", None, "3"], "ar")]
    assert pairs_from([{"prompt": "p", "chosen": "a", "rejected": "b"}], name="file") == [Pair("p", ["a", "b"])]


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"responses": ["a", "b"]}, "prompt"),
        ({"prompt": "p"}, "responses"),
        ({"prompt": "p", "responses": ["a"]}, "two or more"),
        ({"prompt": "p", "responses": "ab"}, "two or more"),
        ({"prompt": "p", "responses": ["a", 1]}, "texts"),
        ({"prompt": "p", "responses": ["a", "b"], "sources": ["x"]}, "sources"),
        ({"prompt": "p", "responses": ["a", "b"], "language": 3}, "language"),
    ],
)
def test_a_pair_that_cannot_be_read_is_named(row, named):
    with pytest.raises(UserError, match=f"file: row 0.*{named}"):
        pairs_from([row], name="file")


def judged(result, ranks, **more):
    texts = [f" response {index}" for index in range(len(ranks or "ab"))]
    return Choice(Pair(f"prompt {result} {ranks}", texts), "ada", result, ranks, **more)


CHOICES = [
    judged("left", [2, 1], margin=1.0),
    judged("tie", [1, 1]),
    judged("skip", None),
    judged("ranking", [1, 2, 2]),
]


@pytest.mark.parametrize(("ties", "weights"), [("drop", []), ("both", [1, 1]), ("half", [0.5, 0.5])])
def test_ties_are_dropped_or_become_both_orders(ties, weights):
    rows = pair_rows(CHOICES, ties=ties)
    of_the_tie = [row for row in rows if row["prompt"].startswith("prompt tie")]
    assert [row["weight"] for row in of_the_tie] == weights
    assert len({(row["chosen"], row["rejected"]) for row in of_the_tie}) == len(weights)


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
@pytest.mark.parametrize("ties", ["drop", "both", "half"])
def test_a_file_and_the_database_teach_the_same(ties, ending, tmp_path):
    path, url = tmp_path / f"comparisons.{ending}", f"sqlite:///{tmp_path}/preferences.db"
    write_rows(pair_rows(CHOICES, ties=ties), path)
    store = Store.open(url, setting="--db")
    store.import_choices("work", CHOICES)
    store.close()
    assert taught(load_rows(str(path), required=("prompt",), setting="data"), ties) == taught(
        load_rows(url, required=("prompt",), setting="data"), ties
    )


def taught(rows, ties):
    return sorted(
        (ranking.prompt, ranking.responses[a], ranking.responses[b], weight, ranking.margin)
        for ranking in rankings_of(rows, setting="data", ties=ties)
        for (a, b), weight in zip(ranking.pairs, ranking.weights, strict=True)
    )


def test_an_exported_file_is_loaded_by_datasets(tmp_path):
    write_rows(pair_rows(CHOICES, ties="drop"), tmp_path / "comparisons.jsonl")
    loaded = load_dataset("json", data_files=str(tmp_path / "comparisons.jsonl"), split="train")
    assert set(loaded.column_names) == {"prompt", "chosen", "rejected", "annotator", "margin", "weight"}
    assert loaded[0]["chosen"] == " response 1"
    assert loaded[0]["margin"] == 1.0


def test_an_exported_file_imports_again(tmp_path):
    rows = pair_rows([CHOICES[0]], ties="drop")
    (choice,) = choices_from(json.loads(json.dumps(rows)), name="file")
    assert pair_rows([choice], ties="drop") == rows


def test_a_chat_is_trained_on_as_human_and_assistant_turns():
    system = {"role": "system", "content": "be brief"}
    choice = Choice(Pair([system, USER, GOOD, USER], ["a", "b"]), "ada", "left", [1, 2])
    (row,) = ranked_rows([choice])
    assert row["prompt"] == ("\n\nSystem: be brief\n\nHuman: hello?\n\nAssistant: good\n\nHuman: hello?\n\nAssistant:")
    assert row["messages"] == [system, USER, GOOD, USER]


@pytest.mark.parametrize("name", ["comparisons.csv", "nowhere/comparisons.jsonl"])
def test_a_file_that_cannot_be_written_is_named(name, tmp_path):
    with pytest.raises(UserError, match=name.split("/")[0]):
        write_rows([], tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_database_s_address_is_told_from_a_file_and_a_function():
    assert is_database("sqlite:///a.db")
    assert is_database("postgresql+psycopg://user:word@host:5432/name")
    assert not any(map(is_database, ("a.jsonl", "user/name", "file.py:function", "hf://user/name", "sqlite:a.db")))
