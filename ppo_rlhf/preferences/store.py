"""The store of human comparisons: pairs are added, dealt to people, and judged; nothing is lost and nothing doubled.

Every change is a transaction of its own, committed before the call returns. Who is dealt what is decided by one process
at a time, which holds the collection's row; several servers may share a database.
"""

from __future__ import annotations

import hashlib
import json
import random
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import (
    URL,
    Connection,
    Engine,
    create_engine,
    event,
    insert,
    inspect,
    make_url,
    select,
    update,
)
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, NoSuchModuleError, SQLAlchemyError

from ppo_rlhf.errors import UserError
from ppo_rlhf.messages import Message
from ppo_rlhf.preferences import queries
from ppo_rlhf.preferences.tables import STANDING, choices, collections, deals, metadata, pairs

RESULTS = ("left", "right", "tie", "both bad", "skip", "ranking")
LEASE = 30 * 60.0  # seconds; a pair that its annotator has left for so long may be dealt to another
BUSY_TIMEOUT = 30.0  # seconds that SQLite waits for another process's write

Prompt = str | list[Message]  # a text, or a chat's messages with `role` and `content`


@dataclass(frozen=True)
class Pair:
    """Two or more responses to one prompt, to be judged."""

    prompt: Prompt
    responses: list[str]
    sources: list[str | None] = field(default_factory=list)  # who wrote each; empty: not known
    language: str | None = None

    @property
    def digest(self) -> str:
        """The same for the same prompt, responses and sources."""
        return hashlib.sha256(json.dumps([self.prompt, self.responses, self.sources]).encode()).hexdigest()


@dataclass(frozen=True)
class Deal:
    """A pair as one annotator sees it."""

    number: int  # of the pair
    pair: Pair
    shown: list[int]  # positions in pair.responses, from left to right
    note: str = ""  # of the choice on it that the annotator took back last


@dataclass(frozen=True)
class Choice:
    """What one annotator thinks of one pair."""

    pair: Pair
    annotator: str
    result: str  # one of RESULTS
    ranks: list[int] | None  # of each of pair.responses, 1 the best, equal for a tie; None for a skip
    shown: list[int] | None = None  # None where the choice was imported
    margin: float | None = None
    note: str = ""
    seconds: float | None = None


@dataclass(frozen=True)
class Progress:
    """How far an annotator is with a collection."""

    done: int  # pairs judged or skipped by this annotator
    remaining: int  # pairs that this annotator can still get
    elsewhere: int  # pairs that others have before them now


class NotDealt(Exception):
    """The annotator was never dealt this pair."""


def ranks_of(result: str, shown: Sequence[int], places: Sequence[int] = ()) -> list[int] | None:
    """Ranks of the responses in their stored order, 1 the best, from what was chosen of them as they were shown.

    places: for a ranking, each shown response's place; gaps close, so that 1, 3, 3 are the ranks 1, 2, 2. Raises
    ValueError for a result that there is not, or that does not fit so many responses.
    """
    if result == "skip":
        return None
    if result in ("tie", "both bad"):
        places = [1] * len(shown)
    elif result in ("left", "right") and len(shown) == 2:
        places = [1, 2] if result == "left" else [2, 1]
    elif result != "ranking" or len(places) != len(shown):
        raise ValueError(f"{result!r} with {len(places)} places for {len(shown)} responses")
    distinct = sorted(set(places))
    ranks = [0] * len(shown)
    for position, place in zip(shown, places, strict=True):
        ranks[position] = distinct.index(place) + 1
    return ranks


class Store:
    """A database of pairs and choices."""

    def __init__(self, engine: Engine, shuffle: random.Random | None = None) -> None:
        """shuffle: draws the order in which responses are shown; None: from the system's randomness."""
        self.engine = engine
        self._shuffle = shuffle or random.SystemRandom()
        # Threads that wait for SQLite's file lock sleep in growing steps; those that wait for this one do not.
        is_file = engine.dialect.name == "sqlite"
        self._turn: AbstractContextManager[Any] = threading.Lock() if is_file else nullcontext()

    @classmethod
    def open(cls, address: str, *, setting: str, create: bool = True, shuffle: random.Random | None = None) -> Store:
        """The database at a URL; create: where there is none, it is made. Raises UserError, which says why not."""
        url = check_address(address, setting=setting)
        shown = url.render_as_string(hide_password=True)
        is_file = url.get_backend_name() == "sqlite"
        if is_file and not create and not Path(url.database or "").is_file():
            raise UserError(f"{setting}: there is no database {url.database}.")
        try:
            engine = _engine(url)
            if create:
                metadata.create_all(engine)
            elif not inspect(engine).has_table(choices.name):
                raise UserError(f"{setting}: {shown} holds no preferences.")
        except (ModuleNotFoundError, NoSuchModuleError) as error:
            extra = "install 'ppo-rlhf[postgres]'" if url.get_backend_name() == "postgresql" else "install its driver"
            raise UserError(f"{setting}: {shown} needs a driver that is not installed: {extra}.") from error
        except SQLAlchemyError as error:
            cause = error.orig if isinstance(error, DBAPIError) else error
            first = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
            raise UserError(f"{setting}: {shown} cannot be opened: {first}") from error
        return cls(engine, shuffle)

    def close(self) -> None:
        """Closes all connections."""
        self.engine.dispose()

    @contextmanager
    def _writing(self) -> Iterator[Connection]:
        """A transaction that may write from its start on; committed at the end, or all of it undone."""
        with self._turn, self.engine.execution_options(writing=True).begin() as connection:
            yield connection

    # ------------------------------------------------------------------------------------------------ adding pairs

    def add(self, name: str, added: Iterable[Pair], *, overlap: float | None = 1.0, seed: int = 0) -> int:
        """Puts pairs into a collection, in a random order, each to be judged by `overlap` people; → how many were new.

        overlap: 1.25 has every pair judged once and every fourth twice. It holds for the pairs that were there, too.
        None: nobody is to judge the new ones.
        """
        with self._writing() as connection:
            number = self._collection(connection, name)
            known = set(connection.scalars(select(pairs.c.digest).where(pairs.c.collection == number)))
            rows = []
            for pair in added:
                digest = pair.digest
                if digest not in known:
                    known.add(digest)
                    place = random.Random(f"{seed} {digest}").random()
                    rows.append({"collection": number, "digest": digest, "place": place, **_columns(pair)})
            if rows:
                connection.execute(insert(pairs), [{**row, "people": 0, "open": 0} for row in rows])
            if overlap is not None:
                self._set_people(connection, number, overlap)
        return len(rows)

    def _collection(self, connection: Connection, name: str) -> int:
        """The collection's number, made where there is none, held until the transaction ends."""
        number = connection.scalar(queries.collection_held, {"name": name})
        if number is None:
            with suppress(IntegrityError), connection.begin_nested():  # another server may be quicker
                connection.execute(insert(collections).values(name=name))
            number = connection.scalar(queries.collection_held, {"name": name})
        assert number is not None
        return number

    def _set_people(self, connection: Connection, collection: int, overlap: float) -> None:
        query = select(pairs.c.id, pairs.c.people).where(pairs.c.collection == collection).order_by(pairs.c.id)
        for index, (number, people) in enumerate(connection.execute(query).all()):
            more = int((index + 1) * overlap) - int(index * overlap) - people
            if more:
                changed = {"people": pairs.c.people + more, "open": pairs.c.open + more}
                connection.execute(update(pairs).where(pairs.c.id == number).values(changed))

    def pairs(self, name: str) -> dict[int, Pair]:
        """The pairs of a collection by number."""
        query = select(pairs).join(collections).where(collections.c.name == name).order_by(pairs.c.id)
        with self.engine.connect() as connection:
            return {row.id: _pair(row) for row in connection.execute(query)}

    def arrange(self, places: Mapping[int, float]) -> None:
        """Sets the places of pairs, by number: the smallest is dealt first."""
        with self._writing() as connection:
            for number, place in places.items():
                connection.execute(update(pairs).where(pairs.c.id == number).values(place=place))

    # ---------------------------------------------------------------------------------------------------- labelling

    def deal(self, name: str, annotator: str) -> Deal | None:
        """What the annotator has before him, else the next pair for him, now his; None where nothing is left.

        A pair is dealt to as many people as are to judge it, never twice to one.
        """
        with self._writing() as connection:
            collection = self._collection(connection, name)
            me: dict[str, Any] = {"its_collection": collection, "who": annotator}
            row = connection.execute(queries.deal_at_hand, me).first()
            if row is not None:
                if row.state == queries.RELEASED:
                    self._set_state(connection, row.id, annotator, queries.OPEN)
                    self._change_open(connection, row.id, -1)
                note = connection.scalar(queries.note_taken_back, {"number": row.id, "who": annotator})
                return Deal(row.id, _pair(row), row.shown, note or "")
            row = connection.execute(queries.next_pair, me).first()
            if row is None and self._release(connection, collection):
                row = connection.execute(queries.next_pair, me).first()
            if row is None:
                return None
            pair = _pair(row)
            shown = self._shuffle.sample(range(len(pair.responses)), len(pair.responses))
            values = {
                "pair": row.id,
                "annotator": annotator,
                "shown": shown,
                "state": queries.OPEN,
                "time": time.time(),
            }
            connection.execute(insert(deals), values)
            self._change_open(connection, row.id, -1)
            return Deal(row.id, pair, shown)

    def _release(self, connection: Connection, collection: int) -> bool:
        """Frees the pairs that their annotators have left for longer than the lease; whether there were any."""
        left = connection.execute(
            queries.deals_left, {"its_collection": collection, "since": time.time() - LEASE}
        ).all()
        released = 0
        for number, annotator in left:
            if connection.execute(queries.release, {"number": number, "who": annotator}).rowcount:
                self._change_open(connection, number, 1)
                released += 1
        return released > 0

    def _set_state(self, connection: Connection, number: int, annotator: str, state: str) -> None:
        connection.execute(queries.set_state, {"number": number, "who": annotator, "new": state, "now": time.time()})

    def _change_open(self, connection: Connection, number: int, change: int) -> None:
        connection.execute(queries.change_open, {"number": number, "change": change})

    def choose(
        self,
        number: int,
        annotator: str,
        result: str,
        *,
        places: Sequence[int] = (),
        margin: float | None = None,
        note: str = "",
        seconds: float | None = None,
    ) -> bool:
        """Records a choice on a pair that was dealt; False where the annotator has judged it already: nothing changes.

        Raises NotDealt, or ValueError for a result that does not fit the pair.
        """
        with self._writing() as connection:
            deal = connection.execute(queries.deal_held, {"number": number, "who": annotator}).first()
            if deal is None:
                raise NotDealt(f"pair {number} was not dealt to {annotator}")
            ranks = ranks_of(result, deal.shown, places)
            if deal.state in (queries.JUDGED, queries.SKIPPED):
                return False
            values = {
                "pair": number,
                "annotator": annotator,
                "shown": deal.shown,
                "result": result,
                "ranks": ranks,
                "margin": margin,
                "note": note,
                "seconds": seconds,
                "time": time.time(),
            }
            connection.execute(insert(choices), values)
            self._set_state(connection, number, annotator, queries.SKIPPED if result == "skip" else queries.JUDGED)
            if result == "skip":  # somebody else may judge it
                self._change_open(connection, number, 1)
            if deal.state == queries.RELEASED:  # his choice came late, and counts
                self._change_open(connection, number, -1)
        return True

    def undo(self, name: str, annotator: str) -> bool:
        """Takes the annotator's last choice back and puts its pair before him again; False where there is none."""
        with self._writing() as connection:
            query = (
                select(choices.c.id, choices.c.pair, choices.c.result)
                .join(pairs, pairs.c.id == choices.c.pair)
                .join(collections)
                .where(
                    collections.c.name == name, choices.c.annotator == annotator, STANDING, choices.c.shown.is_not(None)
                )
                .order_by(choices.c.id.desc())
                .limit(1)
            )
            last = connection.execute(query.with_for_update(of=choices)).first()
            if last is None:
                return False
            connection.execute(update(choices).where(choices.c.id == last.id).values(undone=True))
            self._set_state(connection, last.pair, annotator, queries.OPEN)
            if last.result == "skip":
                self._change_open(connection, last.pair, -1)
        return True

    def progress(self, name: str, annotator: str) -> Progress:
        """How far the annotator is, and how much is left for him."""
        with self.engine.connect() as connection:
            return Progress(*connection.execute(queries.progress, {"name": name, "who": annotator}).one())

    # ------------------------------------------------------------------------------------------------------- reading

    def choices(self, name: str | None = None) -> list[Choice]:
        """All choices that stand, in the order in which they were made; of one collection, or of all."""
        query = select(choices, *(column for column in pairs.c if column.name in PAIR_COLUMNS))
        query = query.join(pairs, pairs.c.id == choices.c.pair).where(STANDING).order_by(choices.c.id)
        if name is not None:
            query = query.join(collections).where(collections.c.name == name)
        with self.engine.connect() as connection:
            return [
                Choice(
                    pair=_pair(row),
                    annotator=row.annotator,
                    result=row.result,
                    ranks=row.ranks,
                    shown=row.shown,
                    margin=row.margin,
                    note=row.note,
                    seconds=row.seconds,
                )
                for row in connection.execute(query)
            ]

    def import_choices(self, name: str, imported: Iterable[Choice]) -> int:
        """Adds pairs with the choices made on them elsewhere; → how many were new.

        One that the annotator has made already is left out. Nobody is dealt these pairs.
        """
        imported = list(imported)
        self.add(name, (choice.pair for choice in imported), overlap=None)
        with self._writing() as connection:
            collection = self._collection(connection, name)
            query = select(pairs.c.digest, pairs.c.id).where(pairs.c.collection == collection)
            numbers: dict[str, int] = dict(map(tuple, connection.execute(query)))
            judged = select(choices.c.pair, choices.c.annotator).where(STANDING)
            known = set(map(tuple, connection.execute(judged)))
            rows = []
            for choice in imported:
                key = (numbers[choice.pair.digest], choice.annotator)
                if key not in known:
                    known.add(key)
                    told = {
                        name: getattr(choice, name)
                        for name in ("result", "ranks", "shown", "margin", "note", "seconds")
                    }
                    rows.append({"pair": key[0], "annotator": choice.annotator, "time": time.time(), **told})
            if rows:
                connection.execute(insert(choices), rows)
        return len(rows)


PAIR_COLUMNS = ("prompt", "responses", "sources", "language")


def _columns(pair: Pair) -> dict[str, Any]:
    return {name: getattr(pair, name) for name in PAIR_COLUMNS}


def _pair(row: Any) -> Pair:
    return Pair(**{name: getattr(row, name) for name in PAIR_COLUMNS})


def check_address(address: str, *, setting: str) -> URL:
    """A database's URL, with our driver. Raises UserError for one that can be none."""
    try:
        url = make_url(address)
    except ArgumentError as error:
        raise UserError(
            f"{setting}: {address!r} is no database URL; write sqlite:///FILE.db or postgresql://USER@HOST/NAME."
        ) from error
    if url.drivername in ("postgres", "postgresql"):
        return url.set(drivername="postgresql+psycopg")
    if url.get_backend_name() == "sqlite" and url.database in (None, "", ":memory:"):
        raise UserError(f"{setting}: {address} keeps nothing; name a file: sqlite:///FILE.db.")
    if url.get_backend_name() == "sqlite" and not Path(str(url.database)).parent.is_dir():
        raise UserError(f"{setting}: there is no folder {Path(str(url.database)).parent}.")
    return url


def _engine(url: URL) -> Engine:
    if url.get_backend_name() != "sqlite":
        return create_engine(url, pool_size=20, pool_pre_ping=True)
    engine = create_engine(url, pool_size=20, connect_args={"timeout": BUSY_TIMEOUT})

    @event.listens_for(engine, "connect")
    def _prepare(connection: Any, _: object) -> None:
        connection.isolation_level = None  # BEGIN is ours
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode = WAL")
        cursor.execute("PRAGMA synchronous = FULL")  # a choice outlives a power cut
        cursor.execute("PRAGMA foreign_keys = ON")
        cursor.close()

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        # A transaction that reads first and then finds another one writing could not go on: it takes its turn at once.
        writing = connection.get_execution_options().get("writing")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")

    return engine
