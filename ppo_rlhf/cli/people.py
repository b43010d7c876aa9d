"""The commands about what people think: label, compare, preferences."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from jsonargparse import ArgumentParser, Namespace

from ppo_rlhf.cli.outcome import Outcome
from ppo_rlhf.errors import UserError
from ppo_rlhf.settings import Ties

if TYPE_CHECKING:
    from ppo_rlhf.preferences import Choice, Pair, Store

DATABASE = "sqlite:///preferences.db"


def _add_db(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--db", default=DATABASE, help="the database's URL: sqlite:///FILE or postgresql://USER@HOST/NAME"
    )


def _add_labelling(parser: ArgumentParser) -> None:
    """What the two commands share that open the labelling app."""
    _add_db(parser)
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen at; beyond this machine --token")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    parser.add_argument("--token", type=str, help="what annotators must know to get in")
    parser.add_argument("--annotator", type=str, help="whose choices these are; without it each gives a name")
    parser.add_argument(
        "--overlap", type=float, default=1.0, help="people per pair; 1.25: every fourth pair is seen twice"
    )
    parser.add_argument("--strength", action="store_true", help="ask how much better")
    parser.add_argument("--prompts", type=str, help="rows with `prompt` to sample for, instead of the run's own")
    parser.add_argument("--num_pairs", type=int, default=100, help="prompts to sample for")
    parser.add_argument("--seed", type=int, default=0, help="of the samples and of the order of pairs")


def add_label(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--pairs", nargs="+", metavar="FILE", help="rows of `prompt` and `responses`; or two runs' folders"
    )
    parser.add_argument("--sample", type=str, metavar="RUN", help="draw responses from this run's policy")
    parser.add_argument("--responses", type=int, default=2, help="to sample for each prompt")
    parser.add_argument("--rank", action="store_true", help="rank all responses at once, not two by two")
    parser.add_argument("--order", choices=["random", "uncertain"], default="random", help="which pairs come first")
    parser.add_argument("--reward_model", type=str, help="whose smallest margins are the uncertain ones")
    _add_labelling(parser)


def add_compare(parser: ArgumentParser) -> None:
    parser.add_argument("run_a", help="a run's folder")
    parser.add_argument("run_b", help="another's")
    parser.add_argument("--label", action="store_true", help="sample pairs and judge them blind in the labelling app")
    _add_labelling(parser)


def add_preferences(parser: ArgumentParser) -> None:
    parser.add_argument("action", choices=["export", "import", "stats"])
    parser.add_argument("file", nargs="?", help="JSONL or Parquet to write; or any file of comparisons to read")
    _add_db(parser)
    parser.add_argument("--collection", type=str, help="of what is labelled together, by its name; without it all")
    parser.add_argument("--ties", choices=get_args(Ties), default="drop", help="left out, or exported in both orders")


def label(given: Namespace) -> Outcome:
    """Serves the labelling app until it is interrupted; → what was chosen."""
    if (given.pairs is None) == (given.sample is None):
        raise UserError("give --pairs FILE, --pairs RUN_A RUN_B, or --sample RUN: what is to be judged.")
    if given.order == "uncertain" and given.reward_model is None:
        raise UserError("--order uncertain needs --reward-model: the folder of the one that is to learn.")
    name = f"samples of {given.sample}" if given.pairs is None else " and ".join(given.pairs)
    _check_labelling(given)
    pairs = _pairs_to_label(given)
    if given.rank and max(len(pair.responses) for pair in pairs) > 9:
        raise UserError("--rank asks for at most 9 responses to a prompt; without it they are compared two by two.")
    order_by = given.reward_model if given.order == "uncertain" else None
    choices = _labelled(name, pairs, given, rank=given.rank, order_by=order_by)
    line = f"{len(choices)} choices in {given.db}; ppo-rlhf reward --data {given.db} trains on them."
    return {"choices": len(choices), "collection": name}, [line]


def _pairs_to_label(given: Namespace) -> list[Pair]:
    """The pairs that `label` is about: of a file, of two runs, or sampled of one."""
    from ppo_rlhf.preferences import all_pairs

    drawn = {"prompts": given.prompts, "count": given.num_pairs, "seed": given.seed}
    if given.pairs is not None and len(given.pairs) == 1:
        from ppo_rlhf.data import load_rows
        from ppo_rlhf.preferences import pairs_from

        (path,) = given.pairs
        pairs = pairs_from(load_rows(path, required=(), setting="--pairs"), name=f"--pairs: {path}")
    else:
        from ppo_rlhf.candidates import samples_of_one, samples_of_two

        if given.pairs is None:
            pairs = samples_of_one(given.sample, responses=given.responses, **drawn)
        elif len(given.pairs) == 2:
            pairs = samples_of_two(*given.pairs, **drawn)
        else:
            raise UserError(f"--pairs takes a file or two runs, not {len(given.pairs)} names.")
    if not pairs:
        raise UserError("there is nothing to judge: all sampled responses are the same.")
    return pairs if given.rank else all_pairs(pairs)


def _check_labelling(given: Namespace) -> None:
    """Raises UserError for what can be seen to be wrong before anything is sampled or written."""
    from ppo_rlhf.label import check_host, is_name

    check_host(given.host, given.token)
    for name, least in (("overlap", 1), ("num_pairs", 1), ("responses", 2)):
        value = given.get(name, least)
        if not least <= value < 1_000_000:
            raise UserError(f"--{name.replace('_', '-')} {value} must be at least {least}.")
    if given.annotator is not None and not is_name(given.annotator):
        raise UserError(
            f"--annotator {given.annotator!r} is no name: it has 1 to 60 characters, none of them invisible."
        )


def _store(given: Namespace, *, create: bool) -> Store:
    from ppo_rlhf.data import preferences_store

    return preferences_store(given.db, setting="--db", create=create)


def _stored_choices(given: Namespace, collection: str | None) -> list[Choice]:
    store = _store(given, create=False)
    choices = store.choices(collection)
    store.close()
    return choices


def _labelled(
    name: str,
    pairs: list[Pair],
    given: Namespace,
    *,
    rank: bool = False,
    order_by: str | None = None,
    blind: bool = False,
) -> list[Choice]:
    """Puts pairs into the store and serves the labelling app over them; → the choices."""
    from ppo_rlhf.label import LabelSettings, serve

    store = _store(given, create=True)
    store.add(name, pairs, overlap=given.overlap, seed=given.seed)
    if order_by is not None:
        from ppo_rlhf.candidates import uncertainty_order

        store.arrange(uncertainty_order(store.pairs(name), order_by))
    settings = LabelSettings(
        name, annotator=given.annotator, token=given.token, strength=given.strength, rank=rank, blind=blind
    )

    def announce(address: str) -> None:
        print(f"label at {address}\nCtrl-C ends.", flush=True)

    serve(store, settings, host=given.host, port=given.port, announce=announce, finishable=blind)
    choices = store.choices(name)
    store.close()
    return choices


def compare(given: Namespace) -> Outcome:
    """The win rate of one run over another: by new choices, or by those that the database has."""
    from ppo_rlhf.preferences import win_rate

    name = f"{given.run_a} and {given.run_b}"
    if given.label:
        from ppo_rlhf.candidates import samples_of_two

        _check_labelling(given)
        pairs = samples_of_two(given.run_a, given.run_b, prompts=given.prompts, count=given.num_pairs, seed=given.seed)
        choices = _labelled(name, pairs, given, blind=True)
    else:
        choices = _stored_choices(given, name)
    rate = win_rate(choices, given.run_a, given.run_b)
    if rate is None:
        raise UserError(f"{given.db} has no choice between {given.run_a} and {given.run_b}; --label asks for some.")
    line = (
        f"{given.run_a} wins {rate.share:.1%} against {given.run_b}: {rate.low:.1%} to {rate.high:.1%} with 95 % "
        f"confidence, {rate.count} pairs, a tie is half a win."
    )
    return {"win_rate": rate.share, "low": rate.low, "high": rate.high, "pairs": rate.count}, [line]


def preferences(given: Namespace) -> Outcome:
    """Exports, imports or summarises the choices of a database."""
    from ppo_rlhf.preferences import choices_from, pair_rows, statistics_lines, statistics_of, write_rows

    if given.action == "import":
        from ppo_rlhf.data import load_rows

        path = _file_of(given)
        imported = choices_from(load_rows(path, required=(), setting="file"), name=path)
        store = _store(given, create=True)
        count = store.import_choices(given.collection or path, imported)
        store.close()
        return {"choices": count}, [f"imported {count} new choices of {len(imported)} into {given.db}"]
    choices = _stored_choices(given, given.collection)
    if not choices:
        of_collection = "" if given.collection is None else f" in collection {given.collection!r}"
        raise UserError(f"{given.db} holds no choices{of_collection}.")
    if given.action == "export":
        path = _file_of(given)
        rows = pair_rows(choices, ties=given.ties)
        write_rows(rows, Path(path))
        return {"rows": len(rows), "file": path}, [f"wrote {len(rows)} comparisons to {path}"]
    found = statistics_of(choices)
    return asdict(found), statistics_lines(found)


def _file_of(given: Namespace) -> str:
    if given.file is None:
        raise UserError(f"preferences {given.action} needs a file: ppo-rlhf preferences {given.action} FILE --db URL")
    return str(given.file)
