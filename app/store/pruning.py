"""Bodies that are no longer needed: which they are, and how they go.

A body may go once its event is old and nobody will ask for the bytes again. What makes a copy
recognisable is the event's: before the bytes go, their digest is written beside it.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import bindparam, case, func, literal, select
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.orm import aliased

from app.events.identity import ONCE_TYPES, content_digest
from app.store.callbacks import OWN_EVENTS
from app.store.deliveries import DEAD, PARKED
from app.store.dialects import now
from app.store.ids import first_id_at
from app.store.models import BodyRow, DeliveryRow, EnvelopeRow, EventRow

_bodies: Any = BodyRow.__table__
_events: Any = EventRow.__table__
_envelopes: Any = EnvelopeRow.__table__
_deliveries: Any = DeliveryRow.__table__

# Why a body stays. What is young is not even looked at.
OWED, OWN, QUARANTINED, CONFLICTING, BUSY = "owed", "own", "quarantined", "conflicting", "busy"
# An id may be made a moment before or behind the time of receipt beside it.
_MARGIN = timedelta(minutes=1)
_EARLIEST = datetime(1970, 1, 1, tzinfo=UTC)
_CONFLICT = "receiver.conflict"
_READ_AT_ONCE = 50
_WRITE_DIGEST: Any = (
    _events.update().where(_events.c.id == bindparam("of")).values(content=bindparam("said"))
)


@dataclass(frozen=True, slots=True)
class Aged:
    """Some bodies that are old enough: those that may go, why others stay, and the last one."""

    free: list[UUID]
    skipped: Mapping[str, int]
    last: UUID


async def cutoff(connection: AsyncConnection, age: timedelta) -> datetime:
    """Give the time before which an event is of that age, by the clock of the database."""
    moment: datetime = (await connection.execute(select(now(connection)))).scalar_one()
    # No event is older than this, and no date much older.
    return moment - min(age, moment - _EARLIEST)


async def count(connection: AsyncConnection, before: datetime) -> int:
    """Count the bodies that were received before a time."""
    query = select(func.count()).select_from(_bodies)
    ended = query.where(_bodies.c.event_id < first_id_at(before.timestamp()))
    return int((await connection.execute(ended)).scalar_one())


async def page(
    connection: AsyncConnection,
    *,
    after: UUID,
    before: datetime,
    limit: int,
    is_locking: bool,
) -> Aged | None:
    """Look at the next bodies behind `after`; None behind the last.

    While `is_locking`, those that somebody is just changing, or owing again, are left alone.
    """
    end = first_id_at((before + _MARGIN).timestamp())
    query = select(_bodies.c.event_id).order_by(_bodies.c.event_id).limit(limit)
    between = query.where(_bodies.c.event_id > after, _bodies.c.event_id < end)
    ids: list[UUID] = list((await connection.execute(between)).scalars())
    if not ids:
        return None
    ours = await _lock(connection, ids) if is_locking else ids
    free, skipped = await _sort(connection, ours, before)
    if len(ids) > len(ours):
        skipped[BUSY] = len(ids) - len(ours)
    return Aged(free, skipped, ids[-1])


async def _lock(connection: AsyncConnection, ids: Sequence[UUID]) -> list[UUID]:
    query = select(_events.c.id).where(_events.c.id.in_(ids)).order_by(_events.c.id)
    return list((await connection.execute(query.with_for_update(skip_locked=True))).scalars())


async def _sort(
    connection: AsyncConnection, ids: Sequence[UUID], before: datetime
) -> tuple[list[UUID], dict[str, int]]:
    rows = (await connection.execute(_reasons(ids, before))).all()
    contested = await _contested(
        connection, {row.account for row in rows if row.envelope_id is None and not row.reason}
    )
    free: list[UUID] = []
    skipped: dict[str, int] = {}
    for row in rows:
        reason = CONFLICTING if not row.reason and row.id in contested else row.reason
        if reason:
            skipped[reason] = skipped.get(reason, 0) + 1
        else:
            free.append(row.id)
    return free, skipped


def _reasons(ids: Sequence[UUID], before: datetime) -> Any:
    """Ask of some events that are old enough why their bodies stay: for no reason is ''."""
    reason = case(
        (func.coalesce(_events.c.type, "").startswith(OWN_EVENTS), literal(OWN)),
        (_events.c.effect == "quarantined", literal(QUARANTINED)),
        (_events.c.effect == "conflict", literal(CONFLICTING)),
        (func.coalesce(_envelopes.c.disputed, literal(value=False)), literal(CONFLICTING)),
        else_=func.coalesce(_unsettled().scalar_subquery(), ""),
    )
    about = (_envelopes.c.account == _events.c.account) & (_envelopes.c.id == _events.c.envelope_id)
    columns = (_events.c.id, _events.c.account, _events.c.envelope_id, reason.label("reason"))
    query = select(*columns).select_from(_events.outerjoin(_envelopes, about))
    return query.where(_events.c.id.in_(ids), _events.c.received_at < before)


def _unsettled() -> Any:
    """Ask of the deliveries of an event whether one may still be made.

    By the event alone: asked for what is owed or dead, the planner might take one of the small
    indexes of these for a better way, and walk over all of it for each event.
    """
    state = _deliveries.c.state
    kinds = case(
        (_deliveries.c.due_at.is_not(None), literal(OWED)),
        (state.in_([DEAD, PARKED]), state),
    )
    # "owed" stands between the others; any of them will do.
    return select(func.min(kinds)).where(_deliveries.c.event_id == _events.c.id)


async def _contested(connection: AsyncConnection, accounts: set[str]) -> set[UUID]:
    """Name the events about no envelope that an open conflict contradicts.

    Those of envelopes are known by these, which are disputed.
    """
    said, conflict = aliased(EventRow), aliased(EventRow)
    query = select(conflict.original_id).join(said, said.original_id == conflict.id)
    query = query.where(
        said.account.in_(sorted(accounts)),
        said.envelope_id.is_(None),
        said.type == _CONFLICT,
        conflict.effect == "conflict",
    )
    if not accounts:
        return set()
    return {event_id for event_id in (await connection.execute(query)).scalars() if event_id}


async def digest(connection: AsyncConnection, ids: Sequence[UUID]) -> int:
    """Write down what some bodies say where a copy may be compared with it; say of how many."""
    # A few at a time: each of them may be as large as a body may be.
    parts = [ids[start : start + _READ_AT_ONCE] for start in range(0, len(ids), _READ_AT_ONCE)]
    return sum([await _digest(connection, part) for part in parts])


async def _digest(connection: AsyncConnection, ids: Sequence[UUID]) -> int:
    query = select(_events.c.id, _bodies.c.body).join(_bodies, _bodies.c.event_id == _events.c.id)
    query = query.where(_events.c.id.in_(ids), _events.c.content.is_(None))
    rows = (await connection.execute(query.where(_events.c.type.in_(sorted(ONCE_TYPES))))).all()
    digests = await asyncio.to_thread(lambda: [content_digest(row.body) for row in rows])
    if rows:
        values = [{"of": row.id, "said": said} for row, said in zip(rows, digests, strict=True)]
        await connection.execute(_WRITE_DIGEST, sorted(values, key=lambda each: each["of"]))
    return len(rows)


async def empty(connection: AsyncConnection, ids: Sequence[UUID]) -> int:
    """Take away the bodies of some events; say how many there were."""
    if not ids:
        return 0
    return (await connection.execute(_bodies.delete().where(_bodies.c.event_id.in_(ids)))).rowcount
