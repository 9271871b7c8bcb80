"""What is owed to callbacks: rows made, shown, changed and set aside; no decision.

They are claimed in `app.store.claims` and settled in `app.store.verdicts`.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, Row, func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from app.store.bulk import Columns, RowsOfSqlite
from app.store.dialects import SQLITE_LATER, SQLITE_NOW, hexes, is_postgresql, seconds
from app.store.ids import new_id
from app.store.models import AttemptRow, AuditRow, DeliveryRow, EnvelopeRow, EventRow
from app.store.session import fetch
from app.store.sight import Sight

PENDING, RUNNING, DONE, DEAD = "pending", "running", "done", "dead"
DISCARDED, PARKED = "discarded", "parked"
LOST = "the worker did not come back before its lease ran out"
EVERYTHING = Sight(None)

# An event, a callback, and the event's account, envelope and sequence.
Owed = tuple[UUID, str, str, str | None, int | None]


@dataclass(frozen=True, slots=True)
class Delivery:
    """A delivery as operators see it."""

    id: UUID
    event_id: UUID
    event_type: str | None
    callback: str
    generation: int
    account: str
    envelope_id: str | None
    sequence: int | None
    state: str
    due_at: datetime | None
    attempts: int
    spent: int
    last_error: str | None
    fingerprint: str | None
    worker: str | None
    created_at: datetime
    settled_at: datetime | None


_deliveries = DeliveryRow.__table__
_attempts = AttemptRow.__table__
_audit = AuditRow.__table__


OWED = Columns(
    _deliveries,  # type: ignore[arg-type]
    ["id", "event_id", "callback", "account", "envelope_id", "sequence"],
)


def enqueuing(incoming: str) -> str:
    """Write the statement for PostgreSQL; `incoming` is where rows of `OWED` come from."""
    return (
        f"INSERT INTO deliveries ({OWED.listed}, due_at, created_at) "
        f"SELECT {OWED.selected}, statement_timestamp(), statement_timestamp() "
        f"FROM {incoming} ON CONFLICT DO NOTHING"
    )


_ENQUEUE_POSTGRESQL = enqueuing(OWED.unnested)
SQLITE_ENQUEUE = RowsOfSqlite(
    f"INSERT INTO deliveries ({OWED.listed}, due_at, created_at)",
    f"(?, ?, ?, ?, ?, ?, {SQLITE_NOW}, {SQLITE_NOW})",
    "ON CONFLICT DO NOTHING",
)


async def enqueue(connection: AsyncConnection, rows: Sequence[Owed]) -> None:
    """Owe events to callbacks, due now; what is owed already stays as it is."""
    if not rows:
        return
    owed = numbered(rows)
    if is_postgresql(connection):
        await fetch(connection, _ENQUEUE_POSTGRESQL, OWED.arrays(owed))
    else:
        await SQLITE_ENQUEUE.run(connection, OWED.tuples(owed))


def numbered(rows: Iterable[Owed]) -> list[tuple[Any, ...]]:
    """Give each delivery its id, as the columns of `OWED` have it."""
    return [(new_id(), *row) for row in rows]


# The next of an envelope; a replay has the same place in the order as what it repeats.
_FOLLOWING = """
    following.callback = d.callback AND following.account = d.account
    AND following.envelope_id = d.envelope_id AND following.due_at IS NOT NULL
    AND following.sequence = (
        SELECT min(n.sequence) FROM deliveries n
        WHERE n.callback = d.callback AND n.account = d.account
          AND n.envelope_id = d.envelope_id AND n.sequence > d.sequence
          AND n.due_at IS NOT NULL
    )
    AND following.state = 'pending' AND following.attempts = following.spent"""
# With rows called `d` in front, those that wait behind them. A `postpone` that is just under
# way is waited for, since what it writes has to be undone; it waits for nobody itself.
BEHIND_POSTGRESQL = f"""CROSS JOIN LATERAL (
    SELECT following.id FROM deliveries following WHERE {_FOLLOWING} FOR UPDATE OF following
) AS woken"""
# The token rises also of what is due already: a `postpone` that has read the row before, and
# would write it after, sees that its reason is gone.
WAKING = "due_at = LEAST(due_at, statement_timestamp()), token = token + 1"
_WAKE_POSTGRESQL = f"""
UPDATE deliveries SET {WAKING} WHERE id = ANY (ARRAY(
    SELECT woken.id FROM deliveries d {BEHIND_POSTGRESQL} WHERE d.id = ANY ($1::uuid[])
))
"""
_WAKE_SQLITE = f"""
UPDATE deliveries SET due_at = {SQLITE_NOW} WHERE id IN (
    SELECT following.id FROM deliveries d
    CROSS JOIN deliveries following ON {_FOLLOWING} AND following.due_at > {SQLITE_NOW}
    WHERE d.id IN (SELECT value FROM json_each(?))
)
"""


async def wake(connection: AsyncConnection, ended: Sequence[UUID]) -> None:
    """Make due now what was postponed right behind deliveries that are owed no longer."""
    if not ended:
        return
    if is_postgresql(connection):
        await connection.exec_driver_sql(_WAKE_POSTGRESQL, (list(ended),))
    else:
        await connection.exec_driver_sql(_WAKE_SQLITE, (hexes(ended),))


LOST_COLUMNS = "delivery_id, token, number, worker, finished_at, verdict, error"
LOST_SQLITE = f"""
INSERT INTO attempts ({LOST_COLUMNS})
SELECT id, token, attempts, coalesce(worker, ''), {SQLITE_NOW}, 'lost', '{LOST}'
FROM deliveries WHERE id IN (SELECT value FROM json_each(?)) AND state = 'running'
ON CONFLICT DO NOTHING
"""

# A running delivery is parked only once its lease has run out.
_UNSERVED = """callback IN (SELECT name FROM callbacks WHERE last_seen_at < {before})
    AND (state = 'pending' OR (state = 'running' AND due_at <= {now}))
    AND due_at IS NOT NULL"""
_UNSERVED_POSTGRESQL = _UNSERVED.format(
    before="statement_timestamp() - $1::interval", now="statement_timestamp()"
)
_PARK_POSTGRESQL = f"""
WITH unserved AS MATERIALIZED (
    SELECT id, state, token, attempts, worker FROM deliveries
    WHERE {_UNSERVED_POSTGRESQL}
    LIMIT $2 FOR UPDATE SKIP LOCKED
), lost AS (
    INSERT INTO attempts ({LOST_COLUMNS})
    SELECT id, token, attempts, coalesce(worker, ''), statement_timestamp(), 'lost', '{LOST}'
    FROM unserved WHERE state = 'running' ON CONFLICT DO NOTHING
)
UPDATE deliveries SET state = 'parked', due_at = NULL, token = token + 1
WHERE id = ANY (ARRAY(SELECT id FROM unserved)) RETURNING id
"""
_UNSERVED_SQLITE = (
    f"SELECT id FROM deliveries WHERE {_UNSERVED.format(before=SQLITE_LATER, now=SQLITE_NOW)} "
    "LIMIT ?"
)
_PARK_SQLITE = (
    "UPDATE deliveries SET state = 'parked', due_at = NULL, token = token + 1 "
    "WHERE id IN (SELECT value FROM json_each(?))"
)


async def park(connection: AsyncConnection, *, after: timedelta, limit: int) -> int:
    """Set aside what is owed to callbacks that nobody has served for so long; say how many."""
    if is_postgresql(connection):
        rows = (await connection.exec_driver_sql(_PARK_POSTGRESQL, (after, limit))).all()
        return len(rows)
    parameters = (seconds(-after), limit)
    found = list((await connection.exec_driver_sql(_UNSERVED_SQLITE, parameters)).scalars())
    if found:
        ids = json.dumps(found)
        await connection.exec_driver_sql(LOST_SQLITE, (ids,))
        await connection.exec_driver_sql(_PARK_SQLITE, (ids,))
    return len(found)


_UNPARK_POSTGRESQL = """
UPDATE deliveries SET state = 'pending', due_at = statement_timestamp()
WHERE id = ANY (ARRAY(
    SELECT id FROM deliveries WHERE state = 'parked' AND callback = ANY ($1::text[])
    LIMIT $2 FOR UPDATE SKIP LOCKED
))
"""
_UNPARK_SQLITE = f"""
UPDATE deliveries SET state = 'pending', due_at = {SQLITE_NOW}
WHERE id IN (
    SELECT id FROM deliveries
    WHERE state = 'parked' AND callback IN (SELECT value FROM json_each(?)) LIMIT ?
)
"""


async def unpark(connection: AsyncConnection, callbacks: Sequence[str], *, limit: int) -> int:
    """Owe again, now, what was set aside for these callbacks; say how many."""
    if is_postgresql(connection):
        statement, names = _UNPARK_POSTGRESQL, list(callbacks)
        return (await connection.exec_driver_sql(statement, (names, limit))).rowcount
    parameters = (json.dumps(list(callbacks)), limit)
    return (await connection.exec_driver_sql(_UNPARK_SQLITE, parameters)).rowcount


_SHOWN = (
    _deliveries.c.id,
    _deliveries.c.event_id,
    EventRow.type,
    *(
        _deliveries.c[name]
        for name in (
            "callback",
            "generation",
            "account",
            "envelope_id",
            "sequence",
            "state",
            "due_at",
            "attempts",
            "spent",
            "last_error",
            "fingerprint",
            "worker",
            "created_at",
            "settled_at",
        )
    ),
)


# The smallest index that holds all of a state, in the order of the list.
_ANY, OWED_YET = "true", "d.due_at IS NOT NULL"
_REACHES: Mapping[str | None, str] = {
    None: _ANY,
    DONE: _ANY,
    PENDING: OWED_YET,
    RUNNING: OWED_YET,
    # Written out, not sent as values: a plan made once and for all must know them. The second
    # half is what the index says of itself, which SQLite does not infer from the first.
    **{
        state: f"d.state = '{state}' AND d.state IN ('{DEAD}', '{PARKED}', '{DISCARDED}')"
        for state in (DEAD, PARKED, DISCARDED)
    },
}
_FITS = """
    ({state} IS NULL OR d.state = {state}) AND ({callback} IS NULL OR d.callback = {callback})
    AND ({accounts} IS NULL OR d.account {among})
    AND ({tenant} IS NULL OR EXISTS (
        SELECT 1 FROM envelopes v
        WHERE v.account = d.account AND v.id = d.envelope_id AND v.tenant = {tenant}))"""
_SCAN = """
SELECT d.id, {fits} AS fits FROM deliveries d
WHERE {reach} AND d.id < {before} ORDER BY d.id DESC LIMIT {limit}
"""
# Accounts are few: each is one step in the index of events.
_SCAN_ENVELOPE = """
WITH RECURSIVE known (account) AS (
    SELECT min(account) FROM events
    UNION ALL
    SELECT (SELECT min(account) FROM events WHERE account > known.account)
    FROM known WHERE known.account IS NOT NULL
)
SELECT d.id, {fits} AS fits FROM known
CROSS JOIN events e CROSS JOIN deliveries d
WHERE e.account = known.account AND e.envelope_id = {envelope} AND d.event_id = e.id
    AND d.id < {before}
ORDER BY d.id DESC LIMIT {limit}
"""
_MARKS_POSTGRESQL = {
    "before": "$1::uuid",
    "limit": "$2::int8",
    "state": "$3::text",
    "callback": "$4::text",
    "accounts": "$5::text[]",
    "among": "= ANY ($5::text[])",
    "tenant": "$6::text",
    "envelope": "$7::text",
}
_MARKS_SQLITE = {
    "before": "?1",
    "limit": "?2",
    "state": "?3",
    "callback": "?4",
    "accounts": "?5",
    "among": "IN (SELECT value FROM json_each(?5))",
    "tenant": "?6",
    "envelope": "?7",
}
_LAST_ID = UUID(int=(1 << 128) - 1)


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which deliveries a list is to show; None is any."""

    state: str | None = None
    callback: str | None = None
    envelope_id: str | None = None

    def is_narrow(self, sight: Sight) -> bool:
        """Whether not each one that is looked at is shown."""
        return self != Wanted(self.state) or self.state not in _EXACT or sight != Sight(None)


# Of these states every row that is looked at is one.
_EXACT = {None, DEAD, PARKED, DISCARDED}


def scanning(wanted: Wanted, *, is_postgresql: bool) -> str:
    """Write the statement that looks for deliveries: by the index that holds the fewest."""
    marks = _MARKS_POSTGRESQL if is_postgresql else _MARKS_SQLITE
    fits = _FITS.format(**marks)
    if wanted.envelope_id is not None:
        return _SCAN_ENVELOPE.format(fits=fits, **marks)
    return _SCAN.format(fits=fits, reach=_REACHES[wanted.state], **marks)


async def scan(
    connection: AsyncConnection,
    wanted: Wanted,
    sight: Sight,
    *,
    before: UUID | None,
    limit: int,
) -> list[tuple[UUID, bool]]:
    """Look at `limit` deliveries, newest first; give each with whether it is wanted and seen."""
    on_postgresql = is_postgresql(connection)
    accounts = None if sight.accounts is None else list(sight.accounts)
    parameters: list[Any] = [
        before or _LAST_ID,
        limit,
        wanted.state,
        wanted.callback,
        accounts,
        sight.tenant,
    ]
    if not on_postgresql:
        parameters[0] = (before or _LAST_ID).hex
        parameters[4] = None if accounts is None else json.dumps(accounts)
    if wanted.envelope_id is not None:
        parameters.append(wanted.envelope_id)
    rows = await fetch(connection, scanning(wanted, is_postgresql=on_postgresql), parameters)
    return [(row[0] if on_postgresql else UUID(row[0]), bool(row[1])) for row in rows]


def seen_by(sight: Sight) -> list[ColumnElement[bool]]:
    """Say which deliveries may be seen, for a query on them."""
    conditions: list[ColumnElement[bool]] = []
    if sight.accounts is not None:
        conditions.append(_deliveries.c.account.in_(sight.accounts))
    if sight.tenant is not None:
        envelope: Any = EnvelopeRow.__table__
        of_tenant = select(envelope.c.id).where(
            envelope.c.account == _deliveries.c.account,
            envelope.c.id == _deliveries.c.envelope_id,
            envelope.c.tenant == sight.tenant,
        )
        conditions.append(of_tenant.exists())
    return conditions


async def page(
    connection: AsyncConnection,
    *,
    filters: Mapping[str, Any],
    limit: int,
    before: UUID | None = None,
) -> list[Delivery]:
    """Give deliveries, newest first, whose columns have the values of `filters`."""
    query = _shown().order_by(_deliveries.c.id.desc()).limit(limit)
    for name, value in filters.items():
        query = query.where(_deliveries.c[name] == value)
    if before is not None:
        query = query.where(_deliveries.c.id < before)
    return [Delivery(*row) for row in await connection.execute(query)]


def _shown() -> Any:
    joined = _deliveries.outerjoin(EventRow.__table__, EventRow.id == _deliveries.c.event_id)
    return select(*_SHOWN).select_from(joined)


async def read(
    connection: AsyncConnection, delivery_ids: Sequence[UUID], sight: Sight = EVERYTHING
) -> list[Delivery]:
    """Give those of these deliveries that may be seen, oldest first."""
    query = _shown().where(_deliveries.c.id.in_(delivery_ids), *seen_by(sight))
    query = query.order_by(_deliveries.c.id)
    return [Delivery(*row) for row in await connection.execute(query)]


async def dead_fingerprints(
    connection: AsyncConnection, fingerprints: Iterable[str], *, but: Sequence[UUID]
) -> set[str]:
    """Tell of which of these causes there are dead letters, `but` those."""
    known = set()
    for fingerprint in sorted(fingerprints):
        query = select(_deliveries.c.id).limit(1)
        query = query.where(_deliveries.c.state == DEAD, _deliveries.c.id.not_in(but))
        query = query.where(_deliveries.c.fingerprint == fingerprint)
        if (await connection.execute(query)).first() is not None:
            known.add(fingerprint)
    return known


async def lock(
    connection: AsyncConnection, delivery_id: UUID, sight: Sight = EVERYTHING
) -> Delivery | None:
    """Give one delivery, and keep others from changing it until the transaction ends."""
    query = _shown().where(_deliveries.c.id == delivery_id, *seen_by(sight))
    locked = query.with_for_update(of=_deliveries)
    row = (await connection.execute(locked)).one_or_none()
    return None if row is None else Delivery(*row)


_RETRY = (
    "UPDATE deliveries SET state = 'pending', due_at = {now}, spent = attempts, settled_at = NULL "
    "WHERE id = {id}"
)
# The token rises, so that the verdict of an attempt under way no longer counts.
_DISCARD = (
    "UPDATE deliveries SET state = 'discarded', due_at = NULL, token = token + 1, "
    "settled_at = {now} WHERE id = {id}"
)


async def retry(connection: AsyncConnection, delivery_id: UUID) -> None:
    """Make a delivery due now, with a fresh round of attempts; `attempts` counts on."""
    await _change(connection, _RETRY, delivery_id)


async def discard(connection: AsyncConnection, delivery_id: UUID) -> None:
    """Owe a delivery no longer."""
    await _change(connection, _DISCARD, delivery_id)
    await wake(connection, [delivery_id])


async def _change(connection: AsyncConnection, statement: str, delivery_id: UUID) -> None:
    if is_postgresql(connection):
        text = statement.format(now="statement_timestamp()", id="$1")
        await connection.exec_driver_sql(text, (delivery_id,))
    else:
        text = statement.format(now=SQLITE_NOW, id="?")
        await connection.exec_driver_sql(text, (delivery_id.hex,))


async def audit(
    connection: AsyncConnection,
    *,
    actor: str,
    action: str,
    subject: str,
    details: Mapping[str, Any],
) -> None:
    """Write down what an operator does, in the transaction that does it."""
    await connection.execute(
        _audit.insert().values(  # type: ignore[attr-defined]
            id=new_id(),
            at=datetime.now(UTC),
            actor=actor,
            action=action,
            subject=subject,
            details=dict(details),
        )
    )


async def count_unsettled(
    connection: AsyncConnection, sight: Sight = EVERYTHING
) -> dict[tuple[str, str], int]:
    """Count, by callback and state, the deliveries that are owed, dead or parked."""
    is_unsettled = _deliveries.c.due_at.is_not(None) | _deliveries.c.state.in_([DEAD, PARKED])
    columns = (_deliveries.c.callback, _deliveries.c.state)
    query = select(*columns, func.count()).where(is_unsettled, *seen_by(sight)).group_by(*columns)
    return {(row[0], row[1]): row[2] for row in await connection.execute(query)}


async def attempts_of(
    connection: AsyncConnection, delivery_ids: Sequence[UUID]
) -> Sequence[Row[Any]]:
    """Give every attempt at these deliveries, in the order in which they ended."""
    table = _attempts
    query = table.select().where(table.c.delivery_id.in_(delivery_ids))
    query = query.order_by(table.c.finished_at, table.c.token)
    return (await connection.execute(query)).all()
