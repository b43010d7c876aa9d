"""Users' mistakes with label, preferences and compare: exit code 2, one line that names the thing, no traceback."""

import json
import socket
import sys
from pathlib import Path

import pytest
from refusals import refusal
from tiny_runs import write_rows

from ppo_rlhf.cli import main
from ppo_rlhf.preferences import Choice, Pair, Store

DB = "sqlite:///new.db"
ROWS = {
    "good": [{"prompt": "p", "responses": ["a", "b"]}],
    "no_responses": [{"prompt": "p", "text": "a"}],
    "no_prompt": [{"responses": ["a", "b"]}],
    "one_response": [{"prompt": "p", "responses": ["a"]}],
    "numbers": [{"prompt": "p", "responses": [1, 2]}],
    "blank": [{"prompt": " ", "responses": ["a", "b"]}],
    "many": [{"prompt": "p", "responses": list("abcdefghij")}],
    "long": [{"prompt": "p", "responses": ["a", "b" * 200_001]}],
    "short_sources": [{"prompt": "p", "responses": ["a", "b"], "sources": ["x"]}],
    "texts": [{"text": "a"}],
    "equal": [{"prompt": "p", "responses": ["a", "b"], "ranks": [1]}],
}


@pytest.fixture
def paths(models, data, tmp_path):
    """What the command lines below name in braces."""
    files = {name: write_rows(tmp_path / f"{name}.jsonl", rows) for name, rows in ROWS.items()}
    (tmp_path / "broken.jsonl").write_text('{"prompt": "p", \n')
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "text.db").write_text("no database, but a text that is longer than a page's head" * 20)
    store = Store.open("sqlite:///labels.db", setting="--db")
    store.import_choices("work", [Choice(Pair("p", ["a", "b"]), "ada", "ranking", [1, 2])])
    store.close()
    Store.open("sqlite:///without.db", setting="--db").close()
    return models | data | files


COMMAND_LINES = [
    # pairs
    ("label --db {db}", ["--pairs", "--sample"]),
    ("label --pairs {good} --sample {gpt2} --db {db}", ["--pairs", "--sample"]),
    ("label --pairs a b c --db {db}", ["--pairs", "3"]),
    ("label --pairs nowhere.jsonl --db {db}", ["--pairs", "nowhere.jsonl"]),
    ("label --pairs broken.jsonl --db {db}", ["--pairs", "broken.jsonl"]),
    ("label --pairs empty.jsonl --db {db}", ["empty.jsonl", "empty"]),
    ("label --pairs {no_responses} --db {db}", ["row 0", "responses"]),
    ("label --pairs {no_prompt} --db {db}", ["row 0", "prompt"]),
    ("label --pairs {one_response} --db {db}", ["row 0", "two or more"]),
    ("label --pairs {numbers} --db {db}", ["row 0", "responses"]),
    ("label --pairs {blank} --db {db}", ["row 0", "prompt"]),
    ("label --pairs {long} --db {db}", ["row 0", "200001"]),
    ("label --pairs {short_sources} --db {db}", ["row 0", "sources"]),
    ("label --pairs {many} --rank --db {db}", ["--rank", "9"]),
    # runs
    ("label --sample nowhere --db {db}", ["nowhere"]),
    ("label --sample {gpt2} --db {db}", ["--prompts"]),
    ("label --sample {gpt2} --prompts nowhere.jsonl --db {db}", ["--prompts", "nowhere.jsonl"]),
    ("label --sample {gpt2} --prompts {texts} --db {db}", ["--prompts", "prompt"]),
    ("label --pairs nowhere {gpt2} --prompts {prompts} --db {db}", ["nowhere"]),
    ("compare {gpt2} nowhere --label --prompts {prompts} --db {db}", ["nowhere"]),
    ("compare {gpt2} {gpt2} --label --prompts {prompts} --db {db}", ["same run"]),
    ("compare {gpt2} --label --db {db}", ["run_b"]),
    ("compare {gpt2} {llama} --db sqlite:///labels.db", ["no choice", "--label"]),
    ("compare {gpt2} {llama} --db {db}", ["there is no database"]),
    # databases
    ("label --pairs {good} --db preferences.db", ["--db", "sqlite:///FILE.db"]),
    ("label --pairs {good} --db sqlite://", ["--db", "keeps nothing"]),
    ("label --pairs {good} --db sqlite:///no/folder.db", ["--db", "no"]),
    ("label --pairs {good} --db sqlite:///text.db", ["--db", "not a database"]),
    ("label --pairs {good} --db postgresql://user:secret@127.0.0.1:1/name", ["--db", "connection"]),
    ("label --pairs {good} --db nodatabase://host/name", ["--db", "driver"]),
    ("preferences stats --db {db}", ["there is no database"]),
    ("preferences stats --db sqlite:///without.db", ["no choices"]),
    ("preferences stats --db sqlite:///labels.db --collection wrk", ["no choices", "wrk"]),
    ("reward --policy {gpt2} --data {db}", ["data", "there is no database"]),
    ("reward --policy {gpt2} --data sqlite:///without.db", ["data", "no rows"]),
    ("reward --policy {gpt2} --data sqlite:///labels.db --ties maybe", ["ties", "maybe"]),
    # the server
    ("label --pairs {good} --host 0.0.0.0 --db {db}", ["0.0.0.0", "--token"]),
    ("label --pairs {good} --host example.org --db {db}", ["example.org", "--token"]),
    ("label --pairs {good} --token= --db {db}", ["--token", "empty"]),
    ("label --pairs {good} --port 70000 --db {db}", ["--port 70000"]),
    ("label --pairs {good} --port {taken} --db {db}", ["{taken}", "in use"]),
    ("label --pairs {good} --host 203.0.113.7 --token x --db {db}", ["203.0.113.7"]),
    ("label --pairs {good} --port many --db {db}", ["port", "many"]),
    # the rest
    ("label --pairs {good} --order uncertain --db {db}", ["--reward-model"]),
    ("label --pairs {good} --order uncertain --reward-model ./nowhere --db {db}", ["--reward-model", "nowhere"]),
    ("label --pairs {good} --order best --db {db}", ["order", "best"]),
    ("label --pairs {good} --overlap 0.5 --db {db}", ["--overlap", "0.5"]),
    ("label --pairs {good} --overlap .nan --db {db}", ["--overlap"]),
    ("label --sample {gpt2} --num-pairs 0 --db {db}", ["--num-pairs 0"]),
    ("label --sample {gpt2} --responses 1 --db {db}", ["--responses 1"]),
    ("label --pairs {good} --annotator= --db {db}", ["--annotator"]),
    ("label --pairs {good} --annotator {name} --db {db}", ["--annotator", "60"]),
    ("label --pair {good} --db {db}", ["pair"]),
    ("preferences", ["action"]),
    ("preferences exprot out.jsonl", ["exprot", "export"]),
    ("preferences export --db sqlite:///labels.db", ["needs a file"]),
    ("preferences export out.csv --db sqlite:///labels.db", ["out.csv", ".jsonl"]),
    ("preferences export no/out.jsonl --db sqlite:///labels.db", ["no folder no"]),
    ("preferences export out.jsonl --ties keep --db sqlite:///labels.db", ["ties", "keep"]),
    ("preferences import --db {db}", ["needs a file"]),
    ("preferences import nowhere.jsonl --db {db}", ["nowhere.jsonl"]),
    ("preferences import {texts} --db {db}", ["row 0", "chosen"]),
    ("preferences import {equal} --db {db}", ["row 0", "ranks"]),
    ("preferences import {comparisons} --db sqlite:///text.db", ["--db", "not a database"]),
]


@pytest.mark.parametrize(("line", "named"), COMMAND_LINES, ids=[line for line, _ in COMMAND_LINES])
def test_a_mistake_is_named_in_one_line(line, named, paths, capfd):
    before = {path.name for path in Path().iterdir()}
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        known = {**paths, "db": DB, "name": "x" * 61, "taken": taken.getsockname()[1]}
        told = refusal(main, [word.format(**known) for word in line.split()], capfd)
    assert "secret" not in told
    for name in named:
        assert name.format(**known) in told
    server = ("--port 70000", "--port {taken}", "203.0.113.7", "./nowhere")  # what is seen once the pairs are stored
    if not any(each in line for each in server):
        assert {path.name for path in Path().iterdir()} == before


@pytest.mark.parametrize("line", ["label --pairs {good}", "preferences stats", "compare {gpt2} {llama}"])
def test_a_missing_extra_is_named(line, paths, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "ppo_rlhf.preferences", None)
    assert main([word.format(**paths) for word in line.split()]) == 2
    assert "ppo-rlhf[label]" in capfd.readouterr().err


def test_the_commands_work_without_their_mistakes(paths, capfd, tmp_path):
    assert main(["preferences", "import", paths["comparisons"], "--db", DB, "--json"]) == 0
    assert json.loads(capfd.readouterr().out) == {"choices": 40}
    assert main(["preferences", "export", "out.jsonl", "--db", DB]) == 0
    assert "40" in capfd.readouterr().out
    exported = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    given = [json.loads(line) for line in Path(paths["comparisons"]).read_text().splitlines()]
    assert [{name: row[name] for name in given[0]} for row in exported] == given
    assert main(["preferences", "stats", "--db", DB]) == 0
    assert "40 choices on 40 pairs" in capfd.readouterr().out
    assert main(["preferences", "stats", "--db", DB, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["choices"] == 40


def test_a_reward_model_trains_from_the_database_itself(paths, capfd):
    main(["preferences", "import", paths["comparisons"], "--db", DB])
    small = "--batch-size 4 --eval-fraction 0.2 --normalization-prompts 4 --sampling.max-new-tokens 4 --log_with []"
    told = {}
    for name, source in (("file", paths["comparisons"]), ("database", DB)):
        capfd.readouterr()
        words = ["reward", "--policy", paths["gpt2"], "--data", source, *small.split(), "--output-dir", name, "--json"]
        assert main(words) == 0
        told[name] = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert told["file"]["loss_after"] == told["database"]["loss_after"]
