"""Dead letters: counted by what they died of, made due again, given up; a few at a time."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, Text, cast, func, literal_column, select
from sqlalchemy.ext.asyncio import AsyncConnection

from app.store.deliveries import DEAD, DISCARDED, EVERYTHING, PENDING, seen_by
from app.store.dialects import now
from app.store.models import DeliveryRow, EventRow
from app.store.sight import Sight


@dataclass(frozen=True, slots=True)
class Cause:
    """What dead letters have in common: a fingerprint, or a callback if they have none.

    To who sees only some accounts, those of others are not there.
    """

    fingerprint: str | None
    callback: str | None = None
    sight: Sight = EVERYTHING


@dataclass(frozen=True, slots=True)
class Group:
    """The dead letters of one cause, and the youngest of them as a sample."""

    fingerprint: str | None
    callback: str
    event_type: str | None
    count: int
    first_at: datetime | None
    last_at: datetime | None
    error: str | None
    delivery_id: UUID


@dataclass(frozen=True, slots=True)
class Extent:
    """How many dead letters of one cause there are, and the youngest of them."""

    count: int
    last: UUID
    callback: str


@dataclass(frozen=True, slots=True)
class Letter:
    """A dead letter as it was seen; with more attempts it is not the same any more."""

    id: UUID
    attempts: int
    sequence: int | None


_deliveries: Any = DeliveryRow.__table__
_events: Any = EventRow.__table__
# Written out, not sent as a value: only so does a plan made once and for all know that the
# small index of dead letters serves.
_IS_DEAD = literal_column("deliveries.state") == literal_column("'dead'")
# For a question that names ids: it must not imply what the small index knows, or the planner
# may walk over that instead of taking the primary key.
_IS_DEAD_HERE = func.coalesce(_deliveries.c.state, "") == DEAD
_COUNTED = (
    func.count(),
    func.min(_deliveries.c.settled_at),
    func.max(_deliveries.c.settled_at),
    # No release of PostgreSQL before 18 knows the largest of some UUIDs.
    func.max(cast(_deliveries.c.id, Text)),
)


async def groups(
    connection: AsyncConnection,
    *,
    callback: str | None = None,
    sight: Sight = EVERYTHING,
    limit: int = 100,
) -> list[Group]:
    """Give the causes of which there are dead letters, the latest first."""
    conditions = seen_by(sight)
    if callback is not None:
        conditions.append(_deliveries.c.callback == callback)
    counted = [
        row
        for columns in ((_deliveries.c.fingerprint,), (_deliveries.c.callback, _events.c.type))
        for row in await _count_by(connection, columns, conditions, limit=limit)
    ]
    samples = await _samples(connection, [UUID(row[-1]) for row in counted])
    found = [_group(row, samples[UUID(row[-1])]) for row in counted]
    found.sort(key=lambda group: (group.last_at is not None, group.last_at), reverse=True)
    return found[:limit]


async def _count_by(
    connection: AsyncConnection,
    columns: Sequence[Any],
    conditions: Sequence[ColumnElement[bool]],
    *,
    limit: int,
) -> Sequence[Any]:
    """Count by fingerprint; or by callback and type those that died without one."""
    source, is_known = _deliveries, _deliveries.c.fingerprint.is_not(None)
    if len(columns) > 1:
        source = _deliveries.outerjoin(_events, _events.c.id == _deliveries.c.event_id)
        is_known = _deliveries.c.fingerprint.is_(None)
    query = select(*columns, *_COUNTED).select_from(source)
    query = query.where(_IS_DEAD, is_known, *conditions)
    query = query.group_by(*columns).order_by(_COUNTED[2].desc()).limit(limit)
    return (await connection.execute(query)).all()


async def _samples(connection: AsyncConnection, ids: Sequence[UUID]) -> dict[UUID, Any]:
    joined = _deliveries.outerjoin(_events, _events.c.id == _deliveries.c.event_id)
    columns = [_deliveries.c[name] for name in ("id", "fingerprint", "callback", "last_error")]
    query = select(*columns, _events.c.type).select_from(joined)
    rows = await connection.execute(query.where(_deliveries.c.id.in_(ids)))
    return {row.id: row for row in rows}


def _group(counted: Any, sample: Any) -> Group:
    count, first_at, last_at, _ = counted[-len(_COUNTED) :]
    return Group(
        fingerprint=sample.fingerprint,
        callback=sample.callback,
        event_type=sample.type,
        count=count,
        first_at=first_at,
        last_at=last_at,
        error=sample.last_error,
        delivery_id=sample.id,
    )


def _of(cause: Cause) -> list[ColumnElement[bool]]:
    seen = seen_by(cause.sight)
    if cause.fingerprint is not None:
        return [_IS_DEAD, _deliveries.c.fingerprint == cause.fingerprint, *seen]
    has_none = _deliveries.c.fingerprint.is_(None)
    return [_IS_DEAD, has_none, _deliveries.c.callback == cause.callback, *seen]


async def measure(connection: AsyncConnection, cause: Cause) -> Extent | None:
    """Say how many there are now, and which is the last; None if there is none."""
    youngest = select(_deliveries.c.id, _deliveries.c.callback).where(*_of(cause))
    query = youngest.order_by(_deliveries.c.fingerprint.desc(), _deliveries.c.id.desc()).limit(1)
    last = (await connection.execute(query)).one_or_none()
    if last is None:
        return None
    counting = select(func.count()).select_from(_deliveries).where(*_of(cause))
    count = (await connection.execute(counting.where(_deliveries.c.id <= last.id))).scalar_one()
    return Extent(count, last.id, last.callback)


async def page(
    connection: AsyncConnection, cause: Cause, *, after: UUID, last: UUID, limit: int
) -> list[Letter]:
    """Give dead letters of one cause behind `after` and up to `last`, oldest first."""
    columns = (_deliveries.c.id, _deliveries.c.attempts, _deliveries.c.sequence)
    rows = await connection.execute(_between(select(*columns), cause, after, last, limit))
    return [Letter(*row) for row in rows]


def _between(query: Any, cause: Cause, after: UUID, last: UUID, limit: int) -> Any:
    span = (_deliveries.c.id > after, _deliveries.c.id <= last)
    order = (_deliveries.c.fingerprint, _deliveries.c.id)
    return query.where(*_of(cause), *span).order_by(*order).limit(limit)


async def revive(connection: AsyncConnection, letters: Iterable[Letter]) -> list[UUID]:
    """Make dead letters due now, each with a fresh round of attempts.

    Left out is what somebody else holds, has revived, or has given up meanwhile: also if
    it is dead again.
    """
    seen = {letter.id: letter.attempts for letter in letters}
    query = select(_deliveries.c.id, _deliveries.c.attempts)
    query = query.where(_deliveries.c.id.in_(seen), _IS_DEAD_HERE)
    locked = await connection.execute(query.with_for_update(skip_locked=True))
    ours = [row.id for row in locked if seen[row.id] == row.attempts]
    await _change(
        connection,
        ours,
        state=PENDING,
        due_at=now(connection),
        spent=_deliveries.c.attempts,
        settled_at=None,
    )
    return ours


async def give_up(
    connection: AsyncConnection, cause: Cause, *, after: UUID, last: UUID, limit: int
) -> list[UUID]:
    """Discard dead letters of one cause behind `after` and up to `last`; give their ids."""
    query = _between(select(_deliveries.c.id), cause, after, last, limit)
    locked = await connection.execute(query.with_for_update(skip_locked=True))
    ours = list(locked.scalars())
    token = _deliveries.c.token + 1
    await _change(connection, ours, state=DISCARDED, token=token, settled_at=now(connection))
    return ours


async def _change(connection: AsyncConnection, ids: Sequence[UUID], **values: Any) -> None:
    if ids:
        changed = _deliveries.update().where(_deliveries.c.id.in_(ids)).values(**values)
        await connection.execute(changed)


async def look(connection: AsyncConnection, ids: Iterable[UUID]) -> dict[UUID, tuple[str, int]]:
    """Give state and attempts of some deliveries."""
    columns = (_deliveries.c.id, _deliveries.c.state, _deliveries.c.attempts)
    rows = await connection.execute(select(*columns).where(_deliveries.c.id.in_(list(ids))))
    return {row.id: (row.state, row.attempts) for row in rows}
