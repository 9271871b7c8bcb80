"""Events owed again because somebody asked for it: new generations, and what went before."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import exists, func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from app.store.dialects import SQLITE_LATER, SQLITE_NOW, is_postgresql, seconds
from app.store.ids import new_id
from app.store.models import DeliveryRow, EventRow

_deliveries: Any = DeliveryRow.__table__
_events: Any = EventRow.__table__


@dataclass(frozen=True, slots=True)
class Owed:
    """An event that is to be delivered to a callback, as which generation, and how soon."""

    event_id: UUID
    callback: str
    account: str
    envelope_id: str | None
    sequence: int | None
    generation: int = 1
    wait: timedelta = timedelta()


_OWE = (
    "INSERT INTO deliveries (id, event_id, callback, account, envelope_id, sequence, generation, "
    "due_at, created_at) {rows} ON CONFLICT DO NOTHING RETURNING id"
)
_OWE_POSTGRESQL = _OWE.format(
    rows="SELECT id, event_id, callback, account, envelope_id, sequence, generation, "
    "statement_timestamp() + wait, statement_timestamp() "
    "FROM unnest($1::uuid[], $2::uuid[], $3::text[], $4::text[], $5::text[], $6::int8[], "
    "$7::int4[], $8::interval[]) "
    "AS r (id, event_id, callback, account, envelope_id, sequence, generation, wait)"
)
_OWE_SQLITE = _OWE.format(rows=f"VALUES (?, ?, ?, ?, ?, ?, ?, {SQLITE_LATER}, {SQLITE_NOW})")


async def owe(connection: AsyncConnection, rows: Sequence[Owed]) -> dict[UUID, Owed]:
    """Owe these; give those that were not owed as that generation before, by delivery."""
    made = {new_id(): row for row in rows}
    written = [
        (
            id_,
            row.event_id,
            row.callback,
            row.account,
            row.envelope_id,
            row.sequence,
            row.generation,
            row.wait,
        )
        for id_, row in made.items()
    ]
    if not written:
        return {}
    if is_postgresql(connection):
        arrays = tuple(list(column) for column in zip(*written, strict=True))
        found = (await connection.exec_driver_sql(_OWE_POSTGRESQL, arrays)).scalars()
        return {id_: made[id_] for id_ in found}
    return {UUID(id_): made[UUID(id_)] for id_ in await _owe_on_sqlite(connection, written)}


async def _owe_on_sqlite(connection: AsyncConnection, rows: Sequence[Any]) -> list[str]:
    found: list[str] = []
    for id_, event_id, *columns, wait in rows:
        values = (id_.hex, event_id.hex, *columns, seconds(wait))
        found += (await connection.exec_driver_sql(_OWE_SQLITE, values)).scalars()
    return found


async def generations(connection: AsyncConnection, event_id: UUID) -> dict[str, int]:
    """Give, for each callback that was ever owed this event, the latest generation."""
    latest = func.max(_deliveries.c.generation)
    query = select(_deliveries.c.callback, latest).group_by(_deliveries.c.callback)
    rows = await connection.execute(query.where(_deliveries.c.event_id == event_id))
    return {row[0]: row[1] for row in rows}


@dataclass(frozen=True, slots=True)
class Past:
    """An event of the past, and whether some callback was ever owed it."""

    row: Any
    is_owed: bool


async def span(
    connection: AsyncConnection, callback: str, *, after: UUID, last: UUID, limit: int
) -> list[Past]:
    """Give the events behind `after` and up to `last`, in the order of their receipt."""
    owed = exists().where(
        _deliveries.c.event_id == _events.c.id, _deliveries.c.callback == callback
    )
    names = ("id", "type", "account", "envelope_id", "sequence", "effect", "received_at")
    columns = [_events.c[name] for name in names]
    query = select(*columns, owed.label("is_owed"))
    query = query.where(_events.c.id > after, _events.c.id <= last)
    rows = await connection.execute(query.order_by(_events.c.id).limit(limit))
    return [Past(row, bool(row.is_owed)) for row in rows]
