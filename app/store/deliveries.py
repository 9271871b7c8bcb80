"""What is owed to callbacks: claimed, settled, given back; every query, no decision.

Times are the database's, and those of the statement: the clock of a long transaction
stands still, and a lease that begins in the past is no lease. SQLite has no row locks
and needs none, because its writers take turns.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import Row, func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from app.store.base import text_to_time
from app.store.bulk import Columns, Insert
from app.store.ids import new_id
from app.store.models import AttemptRow, AuditRow, DeliveryRow, EnvelopeRow, EventRow
from app.store.session import fetch

PENDING, RUNNING, DONE, DEAD = "pending", "running", "done", "dead"
DISCARDED, PARKED = "discarded", "parked"
LOST = "the worker did not come back before its lease ran out"

SQLITE_NOW = "strftime('%Y-%m-%d %H:%M:%f000', 'now')"
SQLITE_LATER = "strftime('%Y-%m-%d %H:%M:%f000', 'now', ?)"

# An event, a callback, and the event's account, envelope and sequence.
Owed = tuple[UUID, str, str, str | None, int | None]


@dataclass(frozen=True, slots=True)
class Room:
    """How many deliveries a worker has room for, of one callback."""

    callback: str
    limit: int
    is_ordered: bool


@dataclass(frozen=True, slots=True)
class Claim:
    """A delivery that is ours until its lease ends; `attempt` counts this one, too."""

    id: UUID
    token: int
    attempt: int
    spent: int
    callback: str
    generation: int
    event_id: UUID
    envelope_id: str | None


@dataclass(frozen=True, slots=True)
class Content:
    """What a claimed delivery is about, still as the driver gave it: see `decode`."""

    row: Sequence[Any]
    is_postgresql: bool
    event_type: str | None
    fields_status: str | None


@dataclass(frozen=True, slots=True)
class Settlement:
    """The end of one attempt, as it is written down. Without a `wait` nothing is owed."""

    id: UUID
    token: int
    attempt: int
    verdict: str
    state: str
    wait: timedelta | None
    error: str | None
    fingerprint: str | None
    started_at: datetime | None
    finished_at: datetime


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


def _is_postgresql(connection: AsyncConnection) -> bool:
    return connection.dialect.name != "sqlite"


def _hexes(ids: Iterable[UUID]) -> str:
    return json.dumps([id_.hex for id_ in ids])


def _seconds(wait: timedelta) -> str:
    return f"{wait.total_seconds():+.3f} seconds"


_OWED = Columns(
    _deliveries,  # type: ignore[arg-type]
    ["id", "event_id", "callback", "account", "envelope_id", "sequence"],
)
_ENQUEUE_POSTGRESQL = (
    f"INSERT INTO deliveries ({_OWED.listed}, due_at, created_at) "
    f"SELECT {_OWED.selected()}, statement_timestamp(), statement_timestamp() "
    f"FROM {_OWED.unnest()} ON CONFLICT DO NOTHING"
)
_ENQUEUE_SQLITE = (
    f"INSERT INTO deliveries ({_OWED.listed}, due_at, created_at) "
    f"VALUES (?, ?, ?, ?, ?, ?, {SQLITE_NOW}, {SQLITE_NOW}) ON CONFLICT DO NOTHING"
)


async def enqueue(connection: AsyncConnection, rows: Sequence[Owed]) -> None:
    """Owe events to callbacks, due now; what is owed already stays as it is."""
    if not rows:
        return
    owed = [(new_id(), *row) for row in rows]
    if _is_postgresql(connection):
        await fetch(connection, _ENQUEUE_POSTGRESQL, _OWED.arrays(owed))
    else:
        await connection.exec_driver_sql(_ENQUEUE_SQLITE, _OWED.tuples(owed))


# A delivery is held back while an earlier one of its envelope is owed. One that has waited
# too long overtakes, but only an earlier one that is backing off: a backlog is worked off in
# order, however old it is. One without an attempt in its round (attempts = spent) does not
# back off: it was postponed. And two of one envelope are never at work at once, so that one
# which was overtaken learns that it is late. The CASE hides a condition from the planner,
# which would walk over everything that is running, for each row.
_HELD_BACK = """(EXISTS (
    SELECT 1 FROM deliveries earlier
    WHERE earlier.callback = d.callback AND earlier.account = d.account
      AND earlier.envelope_id = d.envelope_id AND earlier.sequence < d.sequence
      AND earlier.due_at IS NOT NULL
      AND (d.created_at > {patience} OR earlier.due_at <= {now} OR earlier.state = 'running'
           OR earlier.attempts = earlier.spent)
) OR EXISTS (
    SELECT 1 FROM deliveries later
    WHERE later.callback = d.callback AND later.account = d.account
      AND later.envelope_id = d.envelope_id AND later.sequence > d.sequence
      AND later.due_at IS NOT NULL AND CASE later.state WHEN 'running' THEN later.due_at > {now} END
))"""

_CLAIMED = "id, token, attempts, spent, callback, generation, event_id, envelope_id"
_LOST_COLUMNS = "delivery_id, token, number, worker, finished_at, verdict, error"

# Of one callback, a claim looks at so many deliveries more than it has room for. If all of
# them are held back, `postpone` takes them out of its way.
WINDOW = 1000

_HELD_BACK_POSTGRESQL = _HELD_BACK.format(
    patience="statement_timestamp() - $6::interval", now="statement_timestamp()"
)
# A delivery is locked only once it is known to be free: the lock is in a query of its own. What
# that one asks about `due_at` must not imply that it is known, or the planner may take the
# small index of what is owed for a better way to an id than the primary key, and walk over it.
_CLAIM_POSTGRESQL = f"""
WITH wanted AS (
    SELECT room.* FROM unnest($1::text[], $2::int4[], $3::bool[]) AS room (name, places, ordered)
    JOIN callbacks c ON c.name = room.name AND c.paused_at IS NULL
), due AS MATERIALIZED (
    SELECT found.* FROM wanted CROSS JOIN LATERAL (
        SELECT free.* FROM (
            SELECT seen.id FROM deliveries seen
            WHERE seen.callback = wanted.name AND seen.due_at <= statement_timestamp()
            ORDER BY seen.due_at LIMIT wanted.places + {WINDOW}
        ) AS seen CROSS JOIN LATERAL (
            SELECT d.id, d.state, d.token, d.attempts, d.worker FROM deliveries d
            WHERE d.id = seen.id AND coalesce(d.due_at, 'infinity') <= statement_timestamp()
              AND NOT (wanted.ordered AND {_HELD_BACK_POSTGRESQL})
            FOR UPDATE OF d SKIP LOCKED
        ) AS free
        LIMIT wanted.places
    ) AS found
), lost AS (
    INSERT INTO attempts ({_LOST_COLUMNS})
    SELECT id, token, attempts, coalesce(worker, ''), statement_timestamp(), 'lost', '{LOST}'
    FROM due WHERE state = 'running' ON CONFLICT DO NOTHING
)
UPDATE deliveries
SET state = 'running', token = token + 1, attempts = attempts + 1, worker = $4,
    due_at = statement_timestamp() + $5::interval, settled_at = NULL
WHERE id = ANY (ARRAY(SELECT id FROM due))
RETURNING {_CLAIMED}
"""

_DUE_SQLITE = f"""
SELECT d.id FROM (
    SELECT * FROM deliveries WHERE callback = ? AND due_at <= {SQLITE_NOW}
    ORDER BY due_at LIMIT ? + {WINDOW}
) AS d
WHERE NOT (? AND {_HELD_BACK.format(patience=SQLITE_LATER, now=SQLITE_NOW)})
  AND EXISTS (SELECT 1 FROM callbacks c WHERE c.name = d.callback AND c.paused_at IS NULL)
ORDER BY d.due_at LIMIT ?
"""
_LOST_SQLITE = f"""
INSERT INTO attempts ({_LOST_COLUMNS})
SELECT id, token, attempts, coalesce(worker, ''), {SQLITE_NOW}, 'lost', '{LOST}'
FROM deliveries WHERE id IN (SELECT value FROM json_each(?)) AND state = 'running'
ON CONFLICT DO NOTHING
"""
_CLAIM_SQLITE = f"""
UPDATE deliveries
SET state = 'running', token = token + 1, attempts = attempts + 1, worker = ?,
    due_at = {SQLITE_LATER}, settled_at = NULL
WHERE id IN (SELECT value FROM json_each(?))
RETURNING {_CLAIMED}
"""


async def claim(
    connection: AsyncConnection,
    rooms: Sequence[Room],
    *,
    worker: str,
    lease: timedelta,
    patience: timedelta,
) -> list[Claim]:
    """Take due deliveries into `rooms`; nobody else gets them before the lease ends.

    The attempt is counted here, not when the callback returns, so that a callback which
    kills its process still runs out of attempts. A delivery that has waited for an earlier
    one of its envelope longer than `patience` no longer does.
    """
    if _is_postgresql(connection):
        arrays = zip(*((r.callback, r.limit, r.is_ordered) for r in rooms), strict=True)
        parameters = (*map(list, arrays), worker, lease, patience)
        rows = (await connection.exec_driver_sql(_CLAIM_POSTGRESQL, parameters)).all()
        return [Claim(*tuple(row)) for row in rows]
    due = await _due_on_sqlite(connection, rooms, patience=patience)
    if not due:
        return []
    ids = json.dumps(due)
    await connection.exec_driver_sql(_LOST_SQLITE, (ids,))
    rows = (await connection.exec_driver_sql(_CLAIM_SQLITE, (worker, _seconds(lease), ids))).all()
    return [_claim_of_sqlite(row) for row in rows]


async def _due_on_sqlite(
    connection: AsyncConnection, rooms: Sequence[Room], *, patience: timedelta
) -> list[str]:
    due: list[str] = []
    for room in rooms:
        waited = _seconds(-patience)
        parameters = (room.callback, room.limit, room.is_ordered, waited, room.limit)
        due += (await connection.exec_driver_sql(_DUE_SQLITE, parameters)).scalars()
    return due


def _claim_of_sqlite(row: Any) -> Claim:
    id_, token, attempt, spent, callback, generation, event_id, envelope_id = row
    return Claim(
        UUID(id_), token, attempt, spent, callback, generation, UUID(event_id), envelope_id
    )


# How long what is held back stays out of the way: until a moment after the first of its
# envelope is due or its lease ends, but no longer than until it may overtake. `wake` ends the
# wait sooner, but not that of one which was attempted: that may be its back-off.
SHORTLY, SOON = timedelta(seconds=5), timedelta(seconds=30)
_FIRST_OF_ITS_ENVELOPE = """(
    SELECT first.due_at FROM deliveries first
    WHERE first.callback = d.callback AND first.account = d.account
      AND first.envelope_id = d.envelope_id AND first.sequence < d.sequence
      AND first.due_at IS NOT NULL
    ORDER BY first.sequence LIMIT 1
)"""
_POSTPONE_POSTGRESQL = f"""
WITH held AS MATERIALIZED (
    SELECT d.id, d.due_at, CASE WHEN d.attempts > d.spent THEN statement_timestamp() + $4::interval
        ELSE LEAST(
            GREATEST({_FIRST_OF_ITS_ENVELOPE}, statement_timestamp()) + $4::interval,
            CASE WHEN d.created_at > statement_timestamp() - $6::interval
                THEN d.created_at + $6::interval ELSE statement_timestamp() + $5::interval END
        ) END AS later
    FROM unnest($1::text[], $2::int4[], $3::bool[]) AS room (name, places, ordered)
    CROSS JOIN LATERAL (
        SELECT seen.* FROM deliveries seen
        WHERE seen.callback = room.name AND seen.due_at <= statement_timestamp()
        ORDER BY seen.due_at LIMIT room.places + {WINDOW}
    ) AS d
    WHERE room.ordered AND d.state = 'pending' AND {_HELD_BACK_POSTGRESQL}
), ours AS MATERIALIZED (
    SELECT mine.id, held.later FROM held CROSS JOIN LATERAL (
        SELECT d.id FROM deliveries d
        WHERE d.id = held.id AND d.state = 'pending' AND d.due_at IS NOT DISTINCT FROM held.due_at
        FOR UPDATE OF d SKIP LOCKED
    ) AS mine
)
UPDATE deliveries d SET due_at = ours.later FROM ours
WHERE d.id = ours.id AND d.id = ANY (ARRAY(SELECT id FROM ours))
"""
_SQLITE_FORMAT = "%Y-%m-%d %H:%M:%f000"
_POSTPONE_SQLITE = f"""
UPDATE deliveries SET due_at = held.later FROM (
    SELECT d.id, CASE WHEN d.attempts > d.spent THEN strftime('{_SQLITE_FORMAT}', 'now', :shortly)
        ELSE min(
            strftime('{_SQLITE_FORMAT}',
                max(coalesce({_FIRST_OF_ITS_ENVELOPE}, ''), {SQLITE_NOW}), :shortly),
            CASE WHEN d.created_at > strftime('{_SQLITE_FORMAT}', 'now', :waited)
                THEN strftime('{_SQLITE_FORMAT}', d.created_at, :patience)
                ELSE strftime('{_SQLITE_FORMAT}', 'now', :soon) END
        ) END AS later
    FROM (
        SELECT * FROM deliveries WHERE callback = :callback AND due_at <= {SQLITE_NOW}
        ORDER BY due_at LIMIT :places + {WINDOW}
    ) AS d
    WHERE d.state = 'pending' AND {
    _HELD_BACK.format(patience=f"strftime('{_SQLITE_FORMAT}', 'now', :waited)", now=SQLITE_NOW)
}
) AS held
WHERE deliveries.id = held.id
"""


async def postpone(
    connection: AsyncConnection, rooms: Sequence[Room], *, patience: timedelta
) -> int:
    """Take what is held back out of the way of the next claim; say how many.

    Nothing stays away for longer than it would have to wait anyway, or a moment more: the
    end of what it waits for wakes it, and if that goes wrong, its time comes by itself.
    """
    if _is_postgresql(connection):
        arrays = zip(*((r.callback, r.limit, r.is_ordered) for r in rooms), strict=True)
        parameters = (*map(list, arrays), SHORTLY, SOON, patience)
        return (await connection.exec_driver_sql(_POSTPONE_POSTGRESQL, parameters)).rowcount
    waits = {"shortly": SHORTLY, "soon": SOON, "patience": patience, "waited": -patience}
    times = {name: _seconds(wait) for name, wait in waits.items()}
    postponed = 0
    for room in [room for room in rooms if room.is_ordered]:
        named = times | {"callback": room.callback, "places": room.limit}
        postponed += (await connection.exec_driver_sql(_POSTPONE_SQLITE, named)).rowcount
    return postponed


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
    AND following.state = 'pending' AND following.attempts = following.spent
    AND following.due_at > {now}"""
_WAKE_POSTGRESQL = f"""
UPDATE deliveries SET due_at = statement_timestamp() WHERE id = ANY (ARRAY(
    SELECT woken.id FROM deliveries d CROSS JOIN LATERAL (
        SELECT following.id FROM deliveries following
        WHERE {_FOLLOWING.format(now="statement_timestamp()")}
        FOR UPDATE OF following SKIP LOCKED
    ) AS woken
    WHERE d.id = ANY ($1::uuid[])
))
"""
_WAKE_SQLITE = f"""
UPDATE deliveries SET due_at = {SQLITE_NOW} WHERE id IN (
    SELECT following.id FROM deliveries d
    CROSS JOIN deliveries following ON {_FOLLOWING.format(now=SQLITE_NOW)}
    WHERE d.id IN (SELECT value FROM json_each(?))
)
"""


async def _wake(connection: AsyncConnection, ended: Sequence[UUID]) -> None:
    """Make due now what was postponed right behind deliveries that are owed no longer."""
    if not ended:
        return
    if _is_postgresql(connection):
        await connection.exec_driver_sql(_WAKE_POSTGRESQL, (list(ended),))
    else:
        await connection.exec_driver_sql(_WAKE_SQLITE, (_hexes(ended),))


_ANY_DUE_SQLITE = (
    "SELECT EXISTS (SELECT 1 FROM deliveries WHERE callback IN (SELECT value FROM json_each(?)) "
    f"AND due_at <= {SQLITE_NOW})"
)


async def is_any_due(connection: AsyncConnection, callbacks: Iterable[str]) -> bool:
    """Tell SQLite's poll, in a transaction that only reads, whether a claim is worth a lock."""
    names = json.dumps(list(callbacks))
    return bool((await connection.exec_driver_sql(_ANY_DUE_SQLITE, (names,))).scalar())


_EVENT = Columns(
    EventRow.__table__,  # type: ignore[arg-type]
    [
        "id",
        "type",
        "account",
        "envelope_id",
        "atlas_event_id",
        "occurred_at",
        "received_at",
        "sequence",
        "effect",
        "status",
    ],
)
# All but what only the projection of the next event needs.
_ENVELOPE = Columns(
    EnvelopeRow.__table__,  # type: ignore[arg-type]
    [c.name for c in EnvelopeRow.__table__.columns if c.name not in {"marks", "sequence"}],
)
_LATER_IS_DONE = """EXISTS (
    SELECT 1 FROM events following
    JOIN deliveries later ON later.event_id = following.id AND later.callback = d.callback
    WHERE following.account = d.account AND following.envelope_id = d.envelope_id
      AND following.sequence > d.sequence AND later.state = 'done'
)"""
_LOAD = (
    f"SELECT d.id, {_LATER_IS_DONE}, body.body, "
    + ", ".join(f"e.{name}" for name in _EVENT.names)
    + ", "
    + ", ".join(f"v.{name}" for name in _ENVELOPE.names)
    + " FROM deliveries d LEFT JOIN events e ON e.id = d.event_id "
    "LEFT JOIN bodies body ON body.event_id = d.event_id "
    "LEFT JOIN envelopes v ON v.account = d.account AND v.id = d.envelope_id "
)
_LOAD_POSTGRESQL = _LOAD + "WHERE d.id = ANY ($1::uuid[])"
_LOAD_SQLITE = _LOAD + "WHERE d.id IN (SELECT value FROM json_each(?))"

_FIRST_OF_EVENT = 3
_FIRST_OF_ENVELOPE = _FIRST_OF_EVENT + len(_EVENT.names)
_EVENT_TYPE = _FIRST_OF_EVENT + _EVENT.names.index("type")
_FIELDS_STATUS = _FIRST_OF_ENVELOPE + _ENVELOPE.names.index("fields_status")
_ENVELOPE_STATES = _FIRST_OF_ENVELOPE + _ENVELOPE.names.index("id")


async def load(connection: AsyncConnection, ids: Sequence[UUID]) -> dict[UUID, Content]:
    """Read what these deliveries are about: event, bytes, envelope, in one query."""
    is_postgresql = _is_postgresql(connection)
    query, ask = (
        (_LOAD_POSTGRESQL, (list(ids),)) if is_postgresql else (_LOAD_SQLITE, (_hexes(ids),))
    )
    rows = (await connection.exec_driver_sql(query, ask)).all()
    return {
        row[0] if is_postgresql else UUID(row[0]): Content(
            row, is_postgresql, row[_EVENT_TYPE], row[_FIELDS_STATUS]
        )
        for row in rows
    }


@dataclass(frozen=True, slots=True)
class Decoded:
    """What a delivery is about, as Python values; the body stays bytes."""

    event: Mapping[str, Any] | None
    envelope: Mapping[str, Any] | None
    body: bytes | None
    is_late: bool


def decode(content: Content) -> Decoded:
    """Read a row's values; raises whatever a damaged one deserves, so call it in an attempt."""
    row, is_postgresql = content.row, content.is_postgresql
    event = envelope = None
    if row[_FIRST_OF_EVENT] is not None:
        values = _EVENT.read(row[_FIRST_OF_EVENT:_FIRST_OF_ENVELOPE], is_postgresql=is_postgresql)
        event = dict(zip(_EVENT.names, values, strict=True))
    if row[_ENVELOPE_STATES] is not None:
        values = _ENVELOPE.read(row[_FIRST_OF_ENVELOPE:], is_postgresql=is_postgresql)
        envelope = dict(zip(_ENVELOPE.names, values, strict=True))
    return Decoded(event, envelope, row[2], is_late=bool(row[1]))


_VERDICTS_POSTGRESQL = (
    "unnest($1::uuid[], $2::int8[], $3::int4[], $4::text[], $5::text[], $6::interval[], "
    "$7::text[], $8::text[], $9::timestamptz[], $10::timestamptz[]) AS verdicts "
    "(id, token, number, verdict, state, wait, error, fingerprint, started_at, finished_at)"
)
_SETTLE_POSTGRESQL = f"""
WITH verdicts AS MATERIALIZED (
    SELECT * FROM {_VERDICTS_POSTGRESQL}
), ours AS MATERIALIZED (
    SELECT v.* FROM verdicts v JOIN deliveries d ON d.id = v.id AND d.token = v.token
    WHERE d.state = 'running' ORDER BY d.id FOR UPDATE OF d
), settled AS (
    UPDATE deliveries d
    SET state = v.state, due_at = statement_timestamp() + v.wait, last_error = v.error,
        fingerprint = v.fingerprint,
        settled_at = CASE WHEN v.wait IS NULL THEN statement_timestamp() END
    FROM ours v WHERE d.id = v.id
    RETURNING d.id, d.due_at
), history AS (
    INSERT INTO attempts
        (delivery_id, token, number, worker, started_at, finished_at, verdict, error)
    SELECT v.id, v.token, v.number, $11, v.started_at, v.finished_at, v.verdict, v.error
    FROM ours v ON CONFLICT DO NOTHING
)
SELECT id, due_at FROM settled
"""
_SETTLE_SQLITE = f"""
UPDATE deliveries
SET state = v.state, due_at = strftime('%Y-%m-%d %H:%M:%f000', 'now', v.wait),
    last_error = v.error, fingerprint = v.fingerprint,
    settled_at = CASE WHEN v.wait IS NULL THEN {SQLITE_NOW} END
FROM (
    SELECT value ->> 0 AS id, value ->> 1 AS token, value ->> 2 AS state, value ->> 3 AS wait,
        value ->> 4 AS error, value ->> 5 AS fingerprint
    FROM json_each(?)
) AS v
WHERE deliveries.id = v.id AND deliveries.token = v.token AND deliveries.state = 'running'
RETURNING id, due_at
"""
_HISTORY = Insert(
    Columns(
        _attempts,  # type: ignore[arg-type]
        [
            "delivery_id",
            "token",
            "number",
            "worker",
            "started_at",
            "finished_at",
            "verdict",
            "error",
        ],
    ),
    lenient=True,
)


async def settle(
    connection: AsyncConnection, settlements: Sequence[Settlement], *, worker: str
) -> dict[UUID, datetime | None]:
    """Write verdicts and history; give the new due time of each delivery that was ours.

    A delivery that somebody else has claimed meanwhile carries another token: its row
    stays as it is, and it is missing from the answer.
    """
    ordered = sorted(settlements, key=lambda each: each.id)
    if _is_postgresql(connection):
        arrays = [list(column) for column in zip(*map(_verdict_row, ordered), strict=True)]
        result = await connection.exec_driver_sql(_SETTLE_POSTGRESQL, (*arrays, worker))
        settled = {row.id: row.due_at for row in result}
    else:
        settled = await _settle_on_sqlite(connection, ordered, worker=worker)
    await _wake(connection, [id_ for id_, due_at in settled.items() if due_at is None])
    return settled


def _verdict_row(each: Settlement) -> tuple[Any, ...]:
    return (
        each.id,
        each.token,
        each.attempt,
        each.verdict,
        each.state,
        each.wait,
        each.error,
        each.fingerprint,
        each.started_at,
        each.finished_at,
    )


async def _settle_on_sqlite(
    connection: AsyncConnection, settlements: Sequence[Settlement], *, worker: str
) -> dict[UUID, datetime | None]:
    verdicts = json.dumps([_sqlite_verdict(each) for each in settlements])
    rows = (await connection.exec_driver_sql(_SETTLE_SQLITE, (verdicts,))).all()
    settled = {UUID(row.id): row.due_at and text_to_time(row.due_at) for row in rows}
    history = [
        (e.id, e.token, e.attempt, worker, e.started_at, e.finished_at, e.verdict, e.error)
        for e in settlements
        if e.id in settled
    ]
    await _HISTORY.run(connection, history)
    return settled


def _sqlite_verdict(each: Settlement) -> tuple[Any, ...]:
    wait = None if each.wait is None else _seconds(each.wait)
    return each.id.hex, each.token, each.state, wait, each.error, each.fingerprint


# A delivery and the token of its claim, to be compared with the row's.
Held = tuple[UUID, int]

_OURS_POSTGRESQL = (
    "FROM unnest($1::uuid[], $2::int8[]) AS held (id, token) "
    "WHERE d.id = held.id AND d.id = ANY ($1::uuid[]) AND d.token = held.token "
    "AND d.state = 'running' RETURNING d.id"
)
_OURS_SQLITE = (
    "FROM (SELECT json_extract(value, '$[0]') AS id, json_extract(value, '$[1]') AS token "
    "FROM json_each(?)) AS held "
    "WHERE deliveries.id = held.id AND deliveries.token = held.token "
    "AND deliveries.state = 'running' RETURNING deliveries.id"
)
_RENEW_POSTGRESQL = (
    "UPDATE deliveries d SET due_at = statement_timestamp() + $3::interval " + _OURS_POSTGRESQL
)
_RENEW_SQLITE = f"UPDATE deliveries SET due_at = {SQLITE_LATER} " + _OURS_SQLITE
_RELEASE_POSTGRESQL = (
    "UPDATE deliveries d SET state = 'pending', attempts = attempts - 1, "
    "due_at = statement_timestamp() " + _OURS_POSTGRESQL
)
_RELEASE_SQLITE = (
    "UPDATE deliveries SET state = 'pending', attempts = attempts - 1, "
    f"due_at = {SQLITE_NOW} " + _OURS_SQLITE
)


async def renew(
    connection: AsyncConnection, held: Sequence[Held], *, lease: timedelta
) -> set[UUID]:
    """Begin the leases anew; give the deliveries that are still ours."""
    if _is_postgresql(connection):
        parameters: tuple[Any, ...] = (*_held_arrays(held), lease)
        return await _ids(connection, _RENEW_POSTGRESQL, parameters)
    return await _ids(connection, _RENEW_SQLITE, (_seconds(lease), _held_text(held)))


async def release(connection: AsyncConnection, held: Sequence[Held]) -> set[UUID]:
    """Give deliveries back as if they had never been claimed: due now, attempt not counted."""
    if _is_postgresql(connection):
        return await _ids(connection, _RELEASE_POSTGRESQL, _held_arrays(held))
    return await _ids(connection, _RELEASE_SQLITE, (_held_text(held),))


def _held_arrays(held: Sequence[Held]) -> tuple[list[UUID], list[int]]:
    ordered = sorted(held)
    return [id_ for id_, _ in ordered], [token for _, token in ordered]


def _held_text(held: Sequence[Held]) -> str:
    return json.dumps([(id_.hex, token) for id_, token in held])


async def _ids(
    connection: AsyncConnection, statement: str, parameters: tuple[Any, ...]
) -> set[UUID]:
    found = (await connection.exec_driver_sql(statement, parameters)).scalars().all()
    return {each if isinstance(each, UUID) else UUID(each) for each in found}


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
    INSERT INTO attempts ({_LOST_COLUMNS})
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
    if _is_postgresql(connection):
        rows = (await connection.exec_driver_sql(_PARK_POSTGRESQL, (after, limit))).all()
        return len(rows)
    parameters = (_seconds(-after), limit)
    found = list((await connection.exec_driver_sql(_UNSERVED_SQLITE, parameters)).scalars())
    if found:
        ids = json.dumps(found)
        await connection.exec_driver_sql(_LOST_SQLITE, (ids,))
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
    if _is_postgresql(connection):
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


async def page(
    connection: AsyncConnection,
    *,
    filters: Mapping[str, Any],
    limit: int,
    before: UUID | None = None,
) -> list[Delivery]:
    """Give deliveries, newest first, whose columns have the values of `filters` (None: any)."""
    query = _shown().order_by(_deliveries.c.id.desc()).limit(limit)
    for name, value in filters.items():
        if value is not None:
            query = query.where(_deliveries.c[name] == value)
    if before is not None:
        query = query.where(_deliveries.c.id < before)
    return [Delivery(*row) for row in await connection.execute(query)]


def _shown() -> Any:
    joined = _deliveries.outerjoin(EventRow.__table__, EventRow.id == _deliveries.c.event_id)
    return select(*_SHOWN).select_from(joined)


async def lock(connection: AsyncConnection, delivery_id: UUID) -> Delivery | None:
    """Give one delivery, and keep others from changing it until the transaction ends."""
    query = _shown().where(_deliveries.c.id == delivery_id)
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
    await _wake(connection, [delivery_id])


async def _change(connection: AsyncConnection, statement: str, delivery_id: UUID) -> None:
    if _is_postgresql(connection):
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


async def count_unsettled(connection: AsyncConnection) -> dict[tuple[str, str], int]:
    """Count, by callback and state, the deliveries that are owed, dead or parked."""
    is_unsettled = _deliveries.c.due_at.is_not(None) | _deliveries.c.state.in_([DEAD, PARKED])
    columns = (_deliveries.c.callback, _deliveries.c.state)
    query = select(*columns, func.count()).where(is_unsettled).group_by(*columns)
    return {(row[0], row[1]): row[2] for row in await connection.execute(query)}


async def attempts_of(
    connection: AsyncConnection, delivery_ids: Sequence[UUID]
) -> Sequence[Row[Any]]:
    """Give every attempt at these deliveries, in the order in which they ended."""
    table = _attempts
    query = table.select().where(table.c.delivery_id.in_(delivery_ids))
    query = query.order_by(table.c.finished_at, table.c.token)
    return (await connection.execute(query)).all()
