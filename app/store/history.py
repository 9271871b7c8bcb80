"""Everything that was written down about one envelope, as `explain` reads it.

Each question is about one envelope, or about what belongs to some of its events, and is
answered by an index; each has a limit.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Row, exists, or_, select
from sqlalchemy.ext.asyncio import AsyncConnection

from app.store.bulk import Columns
from app.store.dialects import is_postgresql
from app.store.models import (
    AttemptRow,
    AuditRow,
    DeliveryRow,
    EnvelopeRow,
    EventRow,
    ExpectationRow,
    KeyRow,
)
from app.store.session import fetch
from app.store.sight import Sight

DELIVERIES, ATTEMPTS, ACTS = 2000, 5000, 2000
_AT_ONCE = 500

_envelopes: Any = EnvelopeRow.__table__
_events: Any = EventRow.__table__
_deliveries: Any = DeliveryRow.__table__
_attempts: Any = AttemptRow.__table__
_audit: Any = AuditRow.__table__
_expectations: Any = ExpectationRow.__table__
_keys: Any = KeyRow.__table__


@dataclass(frozen=True, slots=True)
class Said:
    """One event of an envelope, what it did, and whether its bytes are kept."""

    id: UUID
    type: str
    atlas_event_id: str | None
    occurred_at: datetime | None
    received_at: datetime
    sequence: int | None
    effect: str
    status: str | None
    version: int | None
    reason: str | None
    degraded: list[str] | None
    original_id: UUID | None
    copies: int
    last_copy_at: datetime | None
    key_label: str | None
    is_kept: bool


_SAID = Columns(_events, [name for name in Said.__dataclass_fields__ if name != "is_kept"])
# First the envelope's events, by their index; along the ids, which are the order, lie those
# of everybody.
_SAY = """
WITH said AS MATERIALIZED (
    SELECT id FROM events WHERE account = {account} AND envelope_id = {envelope}
)
SELECT {columns}, EXISTS (SELECT 1 FROM bodies b WHERE b.event_id = e.id)
FROM (SELECT id FROM said WHERE id > {after} ORDER BY id LIMIT {limit}) AS chosen
CROSS JOIN events e WHERE e.id = chosen.id ORDER BY chosen.id
"""
_COLUMNS = ", ".join(f"e.{name}" for name in _SAID.names)
SAY_POSTGRESQL = _SAY.format(
    columns=_COLUMNS, account="$1::text", envelope="$2::text", after="$3::uuid", limit="$4::int8"
)
SAY_SQLITE = _SAY.format(columns=_COLUMNS, account="?", envelope="?", after="?", limit="?")
_FIRST = UUID(int=0)


async def accounts_of(connection: AsyncConnection, sight: Sight, envelope_id: str) -> list[str]:
    """Name the accounts in which anything is known of an envelope, and may be seen."""
    is_known = [
        exists().where(table.c.account == _keys.c.account, column == envelope_id)
        for table, column in (
            (_envelopes, _envelopes.c.id),
            (_events, _events.c.envelope_id),
            (_expectations, _expectations.c.envelope_id),
        )
    ]
    query = select(_keys.c.account).where(or_(*is_known))
    if sight.accounts is not None:
        query = query.where(_keys.c.account.in_(sight.accounts))
    if sight.tenant is not None:
        mine = exists().where(
            _envelopes.c.account == _keys.c.account,
            _envelopes.c.id == envelope_id,
            _envelopes.c.tenant == sight.tenant,
        )
        query = query.where(mine)
    return sorted(set((await connection.execute(query)).scalars()))


_HEAD = (
    "tenant",
    "status",
    "version",
    "disputed",
    "first_seen_at",
    "updated_at",
    "erased_at",
    "archived_at",
    "archive_bytes",
)


async def envelope(connection: AsyncConnection, account: str, envelope_id: str) -> Row[Any] | None:
    """Give what an envelope is now; None if only others have spoken of it."""
    query = select(*(_envelopes.c[name] for name in _HEAD))
    query = query.where(_envelopes.c.account == account, _envelopes.c.id == envelope_id)
    return (await connection.execute(query)).one_or_none()


async def expectation(
    connection: AsyncConnection, account: str, envelope_id: str
) -> Row[Any] | None:
    """Give who said that an envelope was created; None if nobody did."""
    query = select(_expectations).where(
        _expectations.c.account == account, _expectations.c.envelope_id == envelope_id
    )
    return (await connection.execute(query)).one_or_none()


async def events(
    connection: AsyncConnection,
    account: str,
    envelope_id: str,
    *,
    after: UUID | None,
    limit: int,
) -> list[Said]:
    """Give what was said of an envelope behind an event, in the order of receipt."""
    on_postgresql = is_postgresql(connection)
    statement = SAY_POSTGRESQL if on_postgresql else SAY_SQLITE
    place = after or _FIRST
    wanted = (account, envelope_id, place if on_postgresql else place.hex, limit)
    rows = await fetch(connection, statement, wanted)
    return [
        Said(*(*_SAID.read(tuple(row)[:-1], is_postgresql=on_postgresql), bool(row[-1])))
        for row in rows
    ]


async def deliveries(connection: AsyncConnection, event_ids: Sequence[UUID]) -> list[Row[Any]]:
    """Give what some events were owed to: no more than `DELIVERIES` and one more."""
    query = select(_deliveries)
    found = await _in_parts(connection, query, _deliveries.c.event_id, event_ids, DELIVERIES + 1)
    return sorted(found, key=lambda row: row.id)


async def attempts(connection: AsyncConnection, delivery_ids: Sequence[UUID]) -> list[Row[Any]]:
    """Give the attempts at some deliveries: no more than `ATTEMPTS` and one more."""
    query = select(_attempts)
    return await _in_parts(connection, query, _attempts.c.delivery_id, delivery_ids, ATTEMPTS + 1)


async def acts(connection: AsyncConnection, subjects: Sequence[str]) -> list[Row[Any]]:
    """Give what was done to some things: no more than `ACTS` and one more."""
    found = await _in_parts(connection, select(_audit), _audit.c.subject, subjects, ACTS + 1)
    return sorted(found, key=lambda row: row.id)


async def _in_parts(
    connection: AsyncConnection, query: Any, column: Any, values: Sequence[Any], limit: int
) -> list[Row[Any]]:
    """Ask for so many values at a time that a statement is never too long."""
    found: list[Row[Any]] = []
    for part in _parts(values):
        rows = await connection.execute(query.where(column.in_(part)).limit(limit - len(found)))
        found += rows.all()
        if len(found) == limit:
            break
    return found


def _parts(values: Sequence[Any]) -> Iterable[Sequence[Any]]:
    return (values[start : start + _AT_ONCE] for start in range(0, len(values), _AT_ONCE))
