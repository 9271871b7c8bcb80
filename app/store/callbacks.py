"""Who is owed an event: the callbacks that some process has loaded, and what they ask for.

Intake reads this table; it does not know the callbacks themselves. What was recorded while
it did not know of one yet is found by `sweep`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from app.store import breakers, deliveries
from app.store.base import text_to_time, time_to_text
from app.store.bulk import dumps
from app.store.dialects import SQLITE_LATER, SQLITE_NOW, is_postgresql, now, seconds
from app.store.ids import first_id_at
from app.store.models import CallbackRow

# Events of the service about itself: only who names them is owed them.
OWN_EVENTS = "receiver."
# An event's id is made when its request arrives; it is seen here once it is committed.
OVERLAP = timedelta(seconds=60)
# A request that was under way when a callback was first registered, by a clock that differs.
CLOCK_ALLOWANCE = timedelta(seconds=5)
UNPARKED_AT_ONCE = 2000


@dataclass(frozen=True, slots=True)
class Subscription:
    """What one callback asks for: types by pattern, of one account or of all."""

    name: str
    patterns: tuple[str, ...]
    account: str | None = None
    # How it is delivered; kept to be shown.
    options: Mapping[str, Any] = field(default_factory=dict, compare=False, hash=False)

    def wants(self, event_type: str, account: str) -> bool:
        """Whether an event of this type and account is owed to the callback."""
        if self.account not in {None, account}:
            return False
        return any(matches(pattern, event_type) for pattern in self.patterns)


def matches(pattern: str, event_type: str) -> bool:
    """Whether `event_type` fits: exactly, by `prefix.*`, or by `*` unless it is our own."""
    if pattern == "*":
        return not event_type.startswith(OWN_EVENTS)
    if pattern.endswith(".*"):
        return event_type.startswith(pattern[:-1])
    return event_type == pattern


_callbacks = CallbackRow.__table__


_REGISTER = """
INSERT INTO callbacks (name, patterns, account, options, first_seen_at, last_seen_at, swept_at)
VALUES ({values}, {now}, {now}, {now})
ON CONFLICT (name) DO UPDATE SET patterns = excluded.patterns, account = excluded.account,
    options = excluded.options, last_seen_at = excluded.last_seen_at
"""
_REGISTER_POSTGRESQL = _REGISTER.format(
    values="$1, $2::text::jsonb, $3, $4::text::jsonb", now="statement_timestamp()"
)
_REGISTER_SQLITE = _REGISTER.format(values="?, ?, ?, ?", now=SQLITE_NOW)
_TOUCH_POSTGRESQL = (
    "UPDATE callbacks SET last_seen_at = statement_timestamp() WHERE name = ANY ($1::text[])"
)
_TOUCH_SQLITE = (
    f"UPDATE callbacks SET last_seen_at = {SQLITE_NOW} "
    "WHERE name IN (SELECT value FROM json_each(?))"
)


async def register(connection: AsyncConnection, subscriptions: Sequence[Subscription]) -> None:
    """Write down that these are served from now on, and owe again what was set aside."""
    statement = _REGISTER_POSTGRESQL if is_postgresql(connection) else _REGISTER_SQLITE
    # One order for every process, so that two of them never wait for each other crosswise.
    for each in sorted(subscriptions, key=lambda s: s.name):
        parameters = (each.name, dumps(each.patterns), each.account, dumps(dict(each.options)))
        await connection.exec_driver_sql(statement, parameters)
    # A release without the breaker must not wait for one that nobody closes.
    unguarded = [s.name for s in subscriptions if s.options.get("breaker") is False]
    if unguarded:
        await breakers.forget(connection, sorted(unguarded))
    await unpark(connection, [s.name for s in subscriptions])


async def unpark(connection: AsyncConnection, names: Sequence[str]) -> int:
    """Owe again what was set aside for these, a bounded number at once; say how many.

    Not only at registration: meanwhile another process may have parked some more.
    """
    return await deliveries.unpark(connection, names, limit=UNPARKED_AT_ONCE)


async def touch(connection: AsyncConnection, names: Sequence[str]) -> bool:
    """Say that these are still served; False if some of them must be registered first."""
    if is_postgresql(connection):
        result = await connection.exec_driver_sql(_TOUCH_POSTGRESQL, (sorted(names),))
    else:
        result = await connection.exec_driver_sql(_TOUCH_SQLITE, (json.dumps(list(names)),))
    return result.rowcount == len(set(names))


async def read(connection: AsyncConnection) -> list[Subscription]:
    """Give every callback that was ever registered: what is owed to it is never dropped."""
    query = select(
        _callbacks.c.name, _callbacks.c.patterns, _callbacks.c.account, _callbacks.c.options
    )
    rows = await connection.execute(query.order_by(_callbacks.c.name))
    return [Subscription(row[0], tuple(row[1]), row[2], row[3]) for row in rows]


@dataclass(frozen=True, slots=True)
class Registered:
    """A callback as operators see it."""

    subscription: Subscription
    first_seen_at: datetime
    last_seen_at: datetime
    paused_at: datetime | None
    is_served: bool


async def read_all(connection: AsyncConnection, *, unserved_after: timedelta) -> list[Registered]:
    """Give every callback with its times; unserved is who was not seen for so long."""
    moment = await _read_clock(connection)
    rows = await connection.execute(select(_callbacks).order_by(_callbacks.c.name))
    return [
        Registered(
            Subscription(row.name, tuple(row.patterns), row.account, row.options),
            first_seen_at=row.first_seen_at,
            last_seen_at=row.last_seen_at,
            paused_at=row.paused_at,
            is_served=row.last_seen_at >= moment - unserved_after,
        )
        for row in rows
    ]


async def _read_clock(connection: AsyncConnection) -> datetime:
    moment: datetime = (await connection.execute(select(now(connection)))).scalar_one()
    return moment


@dataclass(frozen=True, slots=True)
class Swept:
    """What a sweep found: how many deliveries were missing, and whether it is behind."""

    owed: int
    is_behind: bool


@dataclass(frozen=True, slots=True)
class _Task:
    subscription: Subscription
    first_seen_at: datetime
    swept_at: datetime


_TASKS = (
    "SELECT name, patterns, account, first_seen_at, swept_at FROM callbacks "
    "WHERE swept_at <= {before} ORDER BY name"
)
# Two replicas do not sweep for the same callback at once.
_TASKS_POSTGRESQL = (
    _TASKS.format(before="statement_timestamp() - $1::interval") + " FOR UPDATE SKIP LOCKED"
)
_TASKS_SQLITE = _TASKS.format(before=SQLITE_LATER)
_SWEPT_POSTGRESQL = "UPDATE callbacks SET swept_at = $1::timestamptz WHERE name = $2"
_SWEPT_SQLITE = "UPDATE callbacks SET swept_at = ? WHERE name = ?"


async def sweep(connection: AsyncConnection, *, every: timedelta, limit: int = 10_000) -> Swept:
    """Owe what was recorded since a callback's first registration and is not owed to it.

    Looks at no more than `limit` events for each callback, from where the last sweep of
    any process ended, and at none that was swept less than `every` ago.
    """
    moment = await _read_clock(connection)
    owed, is_behind = 0, False
    for task in await _tasks(connection, every=every):
        missing, last = await _missing(connection, task, limit=limit)
        await deliveries.enqueue(connection, missing)
        reached = moment if last is None else _time_of(last) + OVERLAP
        await _mark_swept(connection, task.subscription.name, max(task.swept_at, reached))
        owed += len(missing)
        is_behind = is_behind or last is not None
    return Swept(owed, is_behind)


def _time_of(event_id: UUID) -> datetime:
    return datetime.fromtimestamp((event_id.int >> 80) / 1000, UTC)


async def _tasks(connection: AsyncConnection, *, every: timedelta) -> list[_Task]:
    if is_postgresql(connection):
        rows = (await connection.exec_driver_sql(_TASKS_POSTGRESQL, (every,))).all()
    else:
        rows = (await connection.exec_driver_sql(_TASKS_SQLITE, (seconds(-every),))).all()
    return [_task(row) for row in rows]


def _task(row: Any) -> _Task:
    name, patterns, account, first_seen_at, swept_at = row
    if isinstance(patterns, str):
        patterns = json.loads(patterns)
    if isinstance(swept_at, str):
        first_seen_at, swept_at = text_to_time(first_seen_at), text_to_time(swept_at)
    return _Task(Subscription(name, tuple(patterns), account), first_seen_at, swept_at)


# The types are chosen by the database, so that a narrow pattern does not drag every event
# of the last minute here; the one rule is `matches`.
_MISSING = """
SELECT span.id, span.account, span.envelope_id, span.sequence FROM (
    SELECT id, type, account, envelope_id, sequence, effect, received_at
    FROM events WHERE id >= {first} AND id <= {last}
) AS span
WHERE span.received_at >= {since} AND span.effect NOT IN ('conflict', 'quarantined', 'refreshed')
  AND ({account} IS NULL OR span.account = {account})
  AND (EXISTS (SELECT 1 FROM {exact} WHERE pattern = span.type)
    OR EXISTS (SELECT 1 FROM {prefixes} WHERE substr(span.type, 1, length(pattern)) = pattern)
    OR ({is_all} AND substr(span.type, 1, 9) <> 'receiver.'))
  AND NOT EXISTS (
    SELECT 1 FROM deliveries d
    WHERE d.event_id = span.id AND d.callback = {name} AND d.generation = 1)
ORDER BY span.id
"""
_MISSING_POSTGRESQL = _MISSING.format(
    first="$1::uuid",
    last="$2::uuid",
    since="$3::timestamptz",
    account="$4::text",
    exact="unnest($5::text[]) AS exact (pattern)",
    prefixes="unnest($6::text[]) AS prefixes (pattern)",
    is_all="$7::bool",
    name="$8",
)
_MISSING_SQLITE = _MISSING.format(
    first="?1",
    last="?2",
    since="?3",
    account="?4",
    exact="(SELECT value AS pattern FROM json_each(?5))",
    prefixes="(SELECT value AS pattern FROM json_each(?6))",
    is_all="?7",
    name="?8",
)


async def _missing(
    connection: AsyncConnection, task: _Task, *, limit: int
) -> tuple[list[deliveries.Owed], UUID | None]:
    """Give what is missing, and the last event looked at if there are more behind it."""
    first = first_id_at((task.swept_at - OVERLAP).timestamp())
    last = await _end_of_span(connection, first, limit=limit)
    name, patterns = task.subscription.name, task.subscription.patterns
    rows = await _rows(
        connection,
        _MISSING_POSTGRESQL,
        _MISSING_SQLITE,
        (
            first,
            last or _LAST_ID,
            task.first_seen_at - CLOCK_ALLOWANCE,
            task.subscription.account,
            [p for p in patterns if not p.endswith("*")],
            [p[:-1] for p in patterns if p.endswith(".*")],
            "*" in patterns,
            name,
        ),
    )
    missing = [(_id(id_), name, account, envelope, n) for id_, account, envelope, n in rows]
    return missing, last


_LAST_ID = UUID(int=(1 << 128) - 1)
_SPAN_END_POSTGRESQL = "SELECT id FROM events WHERE id >= $1 ORDER BY id LIMIT 1 OFFSET $2"
_SPAN_END_SQLITE = "SELECT id FROM events WHERE id >= ? ORDER BY id LIMIT 1 OFFSET ?"


async def _end_of_span(connection: AsyncConnection, first: UUID, *, limit: int) -> UUID | None:
    rows = await _rows(connection, _SPAN_END_POSTGRESQL, _SPAN_END_SQLITE, (first, limit))
    return _id(rows[0][0]) if rows else None


async def _rows(
    connection: AsyncConnection, postgresql: str, sqlite: str, parameters: Sequence[Any]
) -> Sequence[Any]:
    if is_postgresql(connection):
        return (await connection.exec_driver_sql(postgresql, tuple(parameters))).all()
    written = tuple(_for_sqlite(value) for value in parameters)
    return (await connection.exec_driver_sql(sqlite, written)).all()


def _for_sqlite(value: Any) -> Any:
    match value:
        case UUID():
            return value.hex
        case datetime():
            return time_to_text(value)
        case list():
            return json.dumps(value)
        case _:
            return value


def _id(value: UUID | str) -> UUID:
    return value if isinstance(value, UUID) else UUID(value)


async def _mark_swept(connection: AsyncConnection, name: str, at: datetime) -> None:
    if is_postgresql(connection):
        await connection.exec_driver_sql(_SWEPT_POSTGRESQL, (at, name))
    else:
        await connection.exec_driver_sql(_SWEPT_SQLITE, (time_to_text(at), name))
