"""Who may work on what: deliveries are claimed, and claims renewed or given back.

Times are the database's, and those of the statement: the clock of a long transaction
stands still, and a lease that begins in the past is no lease. SQLite has no row locks
and needs none, because its writers take turns.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncConnection

from app.events.frozen import frozen
from app.store.deliveries import LOST, LOST_COLUMNS, LOST_SQLITE
from app.store.dialects import SQLITE_LATER, SQLITE_NOW, is_postgresql, seconds
from app.store.session import fetch


@dataclass(frozen=True, slots=True)
class Room:
    """How many deliveries a worker has room for, of one callback."""

    callback: str
    limit: int
    is_ordered: bool
    # True for the few calls that show whether an open breaker may close.
    is_probe: bool = False


# A delivery and the token of its claim, to be compared with the row's.
Held = tuple[UUID, int]


@frozen
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

    @property
    def held(self) -> Held:
        """What its row is compared with, to tell whether it is ours still."""
        return self.id, self.token


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
    SELECT room.*
    FROM unnest($1::text[], $2::int4[], $3::bool[], $7::bool[])
        AS room (name, places, ordered, probing)
    JOIN callbacks c ON c.name = room.name AND c.paused_at IS NULL
        AND (c.open_until IS NULL OR room.probing)
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
    INSERT INTO attempts ({LOST_COLUMNS})
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
  AND EXISTS (
    SELECT 1 FROM callbacks c
    WHERE c.name = d.callback AND c.paused_at IS NULL AND (c.open_until IS NULL OR ?)
  )
ORDER BY d.due_at LIMIT ?
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
    if is_postgresql(connection):
        parameters = (*_arrays(rooms), worker, lease, patience, [r.is_probe for r in rooms])
        rows = await fetch(connection, _CLAIM_POSTGRESQL, parameters)
        return [Claim(*row) for row in rows]
    due = await _due_on_sqlite(connection, rooms, patience=patience)
    if not due:
        return []
    ids = json.dumps(due)
    await connection.exec_driver_sql(LOST_SQLITE, (ids,))
    rows = (await connection.exec_driver_sql(_CLAIM_SQLITE, (worker, seconds(lease), ids))).all()
    return [_claim_of_sqlite(row) for row in rows]


def _arrays(rooms: Sequence[Room]) -> tuple[list[str], list[int], list[bool]]:
    return (
        [room.callback for room in rooms],
        [room.limit for room in rooms],
        [room.is_ordered for room in rooms],
    )


async def _due_on_sqlite(
    connection: AsyncConnection, rooms: Sequence[Room], *, patience: timedelta
) -> list[str]:
    due: list[str] = []
    for room in rooms:
        waited = seconds(-patience)
        asked = (room.callback, room.limit, room.is_ordered, waited)
        parameters = (*asked, room.is_probe, room.limit)
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
    SELECT d.id, d.due_at, d.token,
        CASE WHEN d.attempts > d.spent THEN statement_timestamp() + $4::interval
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
        WHERE d.id = held.id AND d.state = 'pending' AND d.token = held.token
          AND d.due_at IS NOT DISTINCT FROM held.due_at
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
    if is_postgresql(connection):
        parameters = (*_arrays(rooms), SHORTLY, SOON, patience)
        return (await connection.exec_driver_sql(_POSTPONE_POSTGRESQL, parameters)).rowcount
    waits = {"shortly": SHORTLY, "soon": SOON, "patience": patience, "waited": -patience}
    times = {name: seconds(wait) for name, wait in waits.items()}
    postponed = 0
    for room in [room for room in rooms if room.is_ordered]:
        named = times | {"callback": room.callback, "places": room.limit}
        postponed += (await connection.exec_driver_sql(_POSTPONE_SQLITE, named)).rowcount
    return postponed


_ANY_DUE_SQLITE = (
    "SELECT EXISTS (SELECT 1 FROM deliveries WHERE callback IN (SELECT value FROM json_each(?)) "
    f"AND due_at <= {SQLITE_NOW})"
)


async def is_any_due(connection: AsyncConnection, callbacks: Iterable[str]) -> bool:
    """Tell SQLite's poll, in a transaction that only reads, whether a claim is worth a lock."""
    names = json.dumps(list(callbacks))
    return bool((await connection.exec_driver_sql(_ANY_DUE_SQLITE, (names,))).scalar())


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
    if is_postgresql(connection):
        parameters: tuple[Any, ...] = (*_held_arrays(held), lease)
        return await _ids(connection, _RENEW_POSTGRESQL, parameters)
    return await _ids(connection, _RENEW_SQLITE, (seconds(lease), _held_text(held)))


async def release(connection: AsyncConnection, held: Sequence[Held]) -> set[UUID]:
    """Give deliveries back as if they had never been claimed: due now, attempt not counted."""
    if is_postgresql(connection):
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
