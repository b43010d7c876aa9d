"""The tables: what is to be judged, who has been dealt what, and what they chose."""

from sqlalchemy import (
    JSON,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    false,
    literal_column,
)

metadata = MetaData()

collections = Table(
    "collections",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", String(500), nullable=False, unique=True),  # a file, a run, two runs: what is labelled together
)

pairs = Table(
    "pairs",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("collection", ForeignKey("collections.id"), nullable=False),
    Column("digest", String(64), nullable=False),  # of prompt and responses: the same pair is added once
    Column("prompt", JSON, nullable=False),  # a text, or a chat's messages
    Column("responses", JSON, nullable=False),  # [two or more texts]
    Column("sources", JSON, nullable=False),  # [who wrote each, or null]
    Column("language", String(35)),  # a BCP 47 tag where it is known
    Column("place", Float, nullable=False),  # pairs are dealt in this order
    Column("people", Integer, nullable=False),  # so many are to judge it
    Column("open", Integer, nullable=False),  # so many more may be dealt it
    UniqueConstraint("collection", "digest"),
)

deals = Table(
    "deals",
    metadata,
    Column("pair", ForeignKey("pairs.id"), primary_key=True),
    Column("annotator", String(200), primary_key=True),
    Column("shown", JSON, nullable=False),  # positions in responses, from left to right
    Column("state", String(10), nullable=False),  # open, judged, skipped, or released: open for too long
    Column("time", Float, nullable=False),  # seconds since 1970
)

choices = Table(
    "choices",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("pair", ForeignKey("pairs.id"), nullable=False),
    Column("annotator", String(200), nullable=False),
    Column("shown", JSON(none_as_null=True)),  # positions in responses, from left to right; null where it was imported
    Column("result", String(10), nullable=False),  # left, right, tie, both bad, skip, ranking
    Column("ranks", JSON(none_as_null=True)),  # of each response, 1 the best; null for a skip
    Column("margin", Float),  # how much better the chosen one is, where it was said
    Column("note", Text, nullable=False, default=""),
    Column("seconds", Float),  # that the pair was looked at
    Column("time", Float, nullable=False),  # seconds since 1970
    Column("undone", Boolean, nullable=False, default=False),
)

# Literal numbers: a query's `open > ?` would not use a partial index.
AVAILABLE = pairs.c.open > literal_column("0")
STANDING = choices.c.undone == false()

Index("available_pairs", pairs.c.collection, pairs.c.place, sqlite_where=AVAILABLE, postgresql_where=AVAILABLE)
Index("deals_by_annotator", deals.c.annotator, deals.c.state)
Index("deals_by_state", deals.c.state)
Index("choices_by_annotator", choices.c.annotator)
Index(
    "one_choice_each",
    choices.c.pair,
    choices.c.annotator,
    unique=True,
    sqlite_where=choices.c.undone == literal_column("0"),
    postgresql_where=STANDING,
)
