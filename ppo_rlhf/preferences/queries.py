"""The statements of dealing and choosing, built once: building one takes longer than SQLite takes to answer it."""

from typing import Any

from sqlalchemy import ScalarSelect, and_, bindparam, exists, func, or_, select, update

from ppo_rlhf.preferences.tables import AVAILABLE, choices, collections, deals, pairs

OPEN, JUDGED, SKIPPED, RELEASED = "open", "judged", "skipped", "released"

MINE = deals.c.annotator == bindparam("who")
HERE = pairs.c.collection == bindparam("its_collection")
THIS_PAIR: Any = bindparam("number")
THIS_DEAL = and_(deals.c.pair == THIS_PAIR, MINE)

# The collection's number; whoever has read it deals alone until his transaction ends.
collection_held = select(collections.c.id).where(collections.c.name == bindparam("name")).with_for_update()

# What the annotator has before him, the latest first; else what was released because he left it, if it is still free.
deal_at_hand = (
    select(pairs, deals.c.shown, deals.c.state)
    .join(deals, deals.c.pair == pairs.c.id)
    .where(HERE, MINE, or_(deals.c.state == OPEN, and_(deals.c.state == RELEASED, AVAILABLE)))
    .order_by(deals.c.state, deals.c.time.desc())  # "open" comes before "released"
    .limit(1)
)

note_taken_back = (
    select(choices.c.note)
    .where(choices.c.pair == THIS_PAIR, choices.c.annotator == bindparam("who"), choices.c.undone)
    .order_by(choices.c.id.desc())
    .limit(1)
)

next_pair = (
    select(pairs)
    .where(HERE, AVAILABLE, ~exists().where(deals.c.pair == pairs.c.id, MINE))
    .order_by(pairs.c.place, pairs.c.id)
    .limit(1)
)

deals_left = (
    select(deals.c.pair, deals.c.annotator)
    .join(pairs)
    .where(HERE, deals.c.state == OPEN, deals.c.time < bindparam("since"))
)

deal_held = select(deals).where(THIS_DEAL).with_for_update()
set_state = update(deals).where(THIS_DEAL).values(state=bindparam("new"), time=bindparam("now"))
release = update(deals).where(THIS_DEAL, deals.c.state == OPEN).values(state=RELEASED)
change_open = update(pairs).where(pairs.c.id == THIS_PAIR).values(open=pairs.c.open + bindparam("change"))


def _count(*conditions: Any) -> ScalarSelect[int]:
    dealt = select(func.count()).select_from(pairs).join(deals, deals.c.pair == pairs.c.id)
    return dealt.where(pairs.c.collection == _NAMED, *conditions).scalar_subquery()


_NAMED = select(collections.c.id).where(collections.c.name == bindparam("name")).scalar_subquery()
_AVAILABLE = select(func.count()).select_from(pairs).where(pairs.c.collection == _NAMED, AVAILABLE).scalar_subquery()

progress = select(
    _count(MINE, deals.c.state.in_((JUDGED, SKIPPED))).label("done"),
    (_AVAILABLE - _count(MINE, AVAILABLE, deals.c.state != RELEASED) + _count(MINE, deals.c.state == OPEN)).label(
        "remaining"
    ),
    _count(deals.c.annotator != bindparam("who"), deals.c.state == OPEN).label("elsewhere"),
)
