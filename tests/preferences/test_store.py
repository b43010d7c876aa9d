"""The store: who is dealt what, and that no choice is ever lost or doubled, on SQLite and on PostgreSQL."""

import multiprocessing
import random
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from ppo_rlhf.errors import UserError
from ppo_rlhf.preferences import Choice, NotDealt, Pair, Progress, Store
from ppo_rlhf.preferences.store import LEASE, ranks_of


def pairs(count, responses=2):
    return [Pair(f"prompt {i}", [f"{letter} {i}" for letter in "abcdef"[:responses]]) for i in range(count)]


@pytest.fixture
def store(address):
    made = Store.open(address, setting="--db", shuffle=random.Random(0))
    yield made
    made.close()


def label_all(store, annotator, result="left", name="work"):
    """Judges until nothing is left; → the numbers of the pairs in the order in which they came."""
    seen = []
    while (deal := store.deal(name, annotator)) is not None:
        assert store.choose(deal.number, annotator, result)
        seen.append(deal.number)
    return seen


# -------------------------------------------------------------------------------------------------------------- dealing


def test_a_pair_is_dealt_to_as_many_people_as_were_asked_for_and_never_twice_to_one(store):
    store.add("work", pairs(10), overlap=2)
    seen = [label_all(store, name) for name in ("ada", "ben", "cleo")]
    assert [len(numbers) for numbers in seen] == [10, 10, 0]
    assert all(len(set(numbers)) == len(numbers) for numbers in seen)


def test_an_overlap_of_one_and_a_quarter_has_every_fourth_pair_judged_twice(store):
    store.add("work", pairs(20), overlap=1.25)
    seen = Counter(number for name in ("ada", "ben", "cleo") for number in label_all(store, name))
    assert Counter(seen.values()) == {1: 15, 2: 5}


def test_the_same_pair_is_added_once_and_the_overlap_can_be_raised(store):
    assert store.add("work", pairs(4)) == 4
    assert len(label_all(store, "ada")) == 4
    assert store.add("work", pairs(6), overlap=2) == 2
    assert len(label_all(store, "ada")) == 2
    assert len(label_all(store, "ben")) == 6


def test_collections_are_labelled_apart(store):
    store.add("one", pairs(2))
    store.add("two", pairs(3))
    assert len(label_all(store, "ada", name="two")) == 3
    assert store.progress("one", "ada") == Progress(done=0, remaining=2, elsewhere=0)
    assert len(store.choices("two")) == len(store.choices()) == 3


def test_a_reload_shows_the_same_pair_in_the_same_order(store):
    store.add("work", pairs(5, responses=4))
    assert store.deal("work", "ada") == store.deal("work", "ada")


def test_both_orders_are_shown_and_the_one_shown_is_recorded(store):
    store.add("work", pairs(60))
    dealt = {}
    while (deal := store.deal("work", "ada")) is not None:
        dealt[deal.pair.prompt] = deal.shown
        store.choose(deal.number, "ada", "left")
    assert 15 < sum(shown == [0, 1] for shown in dealt.values()) < 45
    for choice in store.choices():
        assert choice.shown == dealt[choice.pair.prompt]
        assert choice.ranks[choice.shown[0]] == 1


def test_pairs_come_in_a_random_order_or_in_the_one_that_was_arranged(store):
    store.add("work", pairs(30))
    assert (first := label_all(store, "ada")) != sorted(first)
    store.add("work", pairs(30), overlap=2)
    store.arrange({number: -number for number in store.pairs("work")})
    assert label_all(store, "ben") == sorted(first, reverse=True)


def test_two_people_have_different_pairs_before_them(store):
    store.add("work", pairs(2))
    ada, ben = store.deal("work", "ada"), store.deal("work", "ben")
    assert ada.number != ben.number
    assert store.deal("work", "cleo") is None
    assert store.progress("work", "cleo") == Progress(done=0, remaining=0, elsewhere=2)


def test_a_pair_left_for_longer_than_the_lease_goes_to_another_and_a_late_choice_still_counts(store, monkeypatch):
    store.add("work", pairs(1))
    left = store.deal("work", "ada")
    monkeypatch.setattr("ppo_rlhf.preferences.store.LEASE", -1.0)
    assert store.deal("work", "ben").number == left.number
    monkeypatch.setattr("ppo_rlhf.preferences.store.LEASE", LEASE)
    assert store.choose(left.number, "ada", "left")
    assert store.choose(left.number, "ben", "right")
    assert [choice.annotator for choice in store.choices()] == ["ada", "ben"]
    assert [store.deal("work", name) for name in ("ada", "ben", "cleo")] == [None] * 3


def test_one_who_comes_back_after_the_lease_gets_the_pair_again_if_it_is_free(store, monkeypatch):
    store.add("work", pairs(1))
    left = store.deal("work", "ada")
    monkeypatch.setattr("ppo_rlhf.preferences.store.LEASE", -1.0)
    ben = store.deal("work", "ben")
    store.choose(ben.number, "ben", "skip")
    assert store.deal("work", "ada").number == left.number


# ------------------------------------------------------------------------------------------------------------- choosing


def test_a_choice_sent_twice_is_kept_once(store):
    store.add("work", pairs(1))
    deal = store.deal("work", "ada")
    assert store.choose(deal.number, "ada", "left", margin=1.0, note="clearer", seconds=3.5)
    assert not store.choose(deal.number, "ada", "right")
    (choice,) = store.choices()
    assert (choice.result, choice.margin, choice.note, choice.seconds) == ("left", 1.0, "clearer", 3.5)


def test_what_was_not_dealt_cannot_be_judged(store):
    store.add("work", pairs(1))
    deal = store.deal("work", "ada")
    with pytest.raises(NotDealt):
        store.choose(deal.number, "ben", "left")


def test_a_result_that_does_not_fit_is_refused_and_nothing_changes(store):
    store.add("work", pairs(1, responses=3))
    deal = store.deal("work", "ada")
    for result, places in (("left", ()), ("ranking", (1, 2)), ("best", ())):
        with pytest.raises(ValueError, match=result):
            store.choose(deal.number, "ada", result, places=places)
    assert store.choices() == []
    assert store.deal("work", "ada") == deal


@pytest.mark.parametrize(
    ("result", "shown", "places", "ranks"),
    [
        ("left", [0, 1], (), [1, 2]),
        ("left", [1, 0], (), [2, 1]),
        ("right", [1, 0], (), [1, 2]),
        ("tie", [1, 0], (), [1, 1]),
        ("both bad", [0, 1, 2], (), [1, 1, 1]),
        ("skip", [1, 0], (), None),
        ("ranking", [2, 0, 1], (1, 2, 3), [2, 3, 1]),
        ("ranking", [2, 0, 1], (3, 1, 3), [1, 2, 2]),
    ],
)
def test_ranks_are_of_the_stored_responses_whatever_the_order_shown(result, shown, places, ranks):
    assert ranks_of(result, shown, places) == ranks


def test_undo_brings_the_last_pair_back_as_it_was_shown(store):
    store.add("work", pairs(3))
    first = store.deal("work", "ada")
    store.choose(first.number, "ada", "left")
    second = store.deal("work", "ada")
    assert store.undo("work", "ada")
    assert store.choices() == []
    assert store.deal("work", "ada") == first
    assert store.choose(first.number, "ada", "right")
    assert store.deal("work", "ada") == second  # which waited
    assert [choice.result for choice in store.choices()] == ["right"]


def test_undo_brings_the_note_back_but_only_to_its_author_and_its_pair(store):
    store.add("work", pairs(2), overlap=2)
    for name in ("ada", "ben"):
        while deal := store.deal("work", name):
            store.choose(deal.number, name, "tie", note=f"{name} on {deal.number}")
    assert store.undo("work", "ada")
    assert store.undo("work", "ada")
    again = store.deal("work", "ada")
    assert again.note == f"ada on {again.number}"
    store.choose(again.number, "ada", "left", note="better")
    assert store.deal("work", "ada").note != again.note
    assert "better" in [choice.note for choice in store.choices()]


def test_undo_takes_back_one_s_own_choices_alone_and_as_many_as_there_are(store):
    store.add("work", pairs(4))
    for name in ("ada", "ben", "ada"):
        store.choose(store.deal("work", name).number, name, "tie")
    assert [store.undo("work", "ada") for _ in range(3)] == [True, True, False]
    assert [choice.annotator for choice in store.choices()] == ["ben"]


def test_a_skipped_pair_goes_to_another_unless_the_skip_is_undone(store):
    store.add("work", pairs(1))
    deal = store.deal("work", "ada")
    store.choose(deal.number, "ada", "skip")
    assert store.deal("work", "ada") is None
    assert store.progress("work", "ben").remaining == 1
    store.undo("work", "ada")
    assert store.deal("work", "ben") is None
    assert store.deal("work", "ada") == deal


def test_progress_counts_what_is_done_and_what_is_left_for_this_annotator(store):
    store.add("work", pairs(5), overlap=2)
    store.choose(store.deal("work", "ada").number, "ada", "left")
    store.choose(store.deal("work", "ada").number, "ada", "skip")
    store.deal("work", "ada")
    assert store.progress("work", "ada") == Progress(done=2, remaining=3, elsewhere=0)
    assert store.progress("work", "ben") == Progress(done=0, remaining=5, elsewhere=1)


def test_text_of_any_kind_comes_back_as_it_was(store):
    hostile = "'; DROP TABLE choices; -- \x00 \ud800 \u202e עברית 漢字 <script>"
    store.add("work", [Pair([{"role": "user", "content": hostile}], [hostile, "b"], ["x", None], "he")])
    deal = store.deal("work", "ada")
    assert deal.pair == Pair([{"role": "user", "content": hostile}], [hostile, "b"], ["x", None], "he")


def test_imported_choices_are_added_once_and_are_dealt_to_nobody(store):
    choice = Choice(Pair("p", ["a", "b"]), "ada", "ranking", [1, 2], margin=0.5)
    assert store.import_choices("published", [choice, choice]) == 1
    assert store.import_choices("published", [choice]) == 0
    assert store.choices() == [choice]
    assert store.deal("published", "ben") is None
    assert not store.undo("published", "ada")


def test_an_import_leaves_what_is_being_labelled_as_it_is(store):
    store.add("work", pairs(2))
    store.import_choices("work", [Choice(Pair("p", ["a", "b"]), "ada", "ranking", [1, 2])])
    assert len(label_all(store, "ben")) == 2


# ------------------------------------------------------------------------------------------------------ several at once


def test_threads_that_deal_and_choose_at_once_lose_and_double_nothing(store):
    store.add("work", pairs(40), overlap=2)
    names = [f"annotator {number}" for number in range(8)]
    with ThreadPoolExecutor(len(names)) as threads:
        seen = list(threads.map(lambda name: label_all(store, name), names))
    assert Counter(number for numbers in seen for number in numbers) == dict.fromkeys(store.pairs("work"), 2)
    made = Counter((choice.pair.prompt, choice.annotator) for choice in store.choices())
    assert len(made) == 80
    assert set(made.values()) == {1}


def test_two_windows_of_one_annotator_send_every_choice_once(store):
    store.add("work", pairs(30))
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: label_twice(store), range(4)))
    assert len(store.choices()) == 30


def label_twice(store):
    while (deal := store.deal("work", "ada")) is not None:
        store.choose(deal.number, "ada", "left")
        store.choose(deal.number, "ada", "right")


def label_as(address, name):
    label_all(Store.open(address, setting="--db"), name)


def test_processes_that_share_a_database_lose_and_double_nothing(store, address):
    store.add("work", pairs(60))
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=label_as, args=(address, f"annotator {number}")) for number in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    assert len({choice.pair.prompt for choice in store.choices()}) == len(store.choices()) == 60


KILLED_AFTER_A_CHOICE = """
import os, signal, sys
from ppo_rlhf.preferences import Store
store = Store.open(sys.argv[1], setting="--db")
store.choose(store.deal("work", "ada").number, "ada", "left")
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_choice_outlives_the_process_that_took_it(store, address):
    store.add("work", pairs(2))
    done = subprocess.run([sys.executable, "-c", KILLED_AFTER_A_CHOICE, address], check=False, timeout=60)
    assert done.returncode == -9
    assert len(store.choices()) == 1


# ------------------------------------------------------------------------------------------------------------ addresses


@pytest.mark.parametrize(
    ("url", "named"),
    [
        ("preferences.db", "sqlite:///FILE.db"),
        ("", "sqlite:///FILE.db"),
        ("sqlite://", "keeps nothing"),
        ("sqlite:///:memory:", "keeps nothing"),
        ("sqlite:///nowhere/preferences.db", "no folder nowhere"),
        ("sqlite:///text.db", "not a database"),
        ("oracledb2://host/name", "driver"),
        ("mysql+nodriver://host/name", "driver"),
        ("postgresql://user:secret@127.0.0.1:1/name", "connection"),
    ],
)
def test_a_database_that_cannot_be_opened_is_named_in_one_line_without_its_password(url, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.db").write_text("not a database at all, but a text long enough to look like one" * 10)
    with pytest.raises(UserError, match=named) as caught:
        Store.open(url, setting="--db")
    assert "--db" in str(caught.value)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_reading_makes_no_database(tmp_path):
    with pytest.raises(UserError, match="there is no database"):
        Store.open(f"sqlite:///{tmp_path}/new.db", setting="data", create=False)
    assert not (tmp_path / "new.db").exists()


def test_a_database_of_something_else_is_refused_for_reading(tmp_path):
    (tmp_path / "empty.db").write_bytes(b"")
    with pytest.raises(UserError, match="holds no preferences"):
        Store.open(f"sqlite:///{tmp_path}/empty.db", setting="data", create=False)
