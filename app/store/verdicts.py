"""How attempts ended: verdicts and history, written many at a time."""

import json
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncConnection

from app.events.frozen import frozen
from app.store.base import text_to_time
from app.store.bulk import Columns, Insert
from app.store.deliveries import BEHIND_POSTGRESQL, WAKING, wake
from app.store.dialects import SQLITE_NOW, is_postgresql, seconds
from app.store.models import AttemptRow
from app.store.session import fetch


@frozen
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


_VERDICTS_POSTGRESQL = (
    "unnest($1::uuid[], $2::int8[], $3::int4[], $4::text[], $5::text[], $6::interval[], "
    "$7::text[], $8::text[], $9::timestamptz[], $10::timestamptz[]) AS verdicts "
    "(id, token, number, verdict, state, wait, error, fingerprint, started_at, finished_at)"
)
# The rows are locked in the order of their ids, each found by its id and by nothing else.
# What waits behind them is woken with the same statement: it is found by its sequence, which
# no verdict changes.
_SETTLE_POSTGRESQL = f"""
WITH verdicts AS MATERIALIZED (
    SELECT * FROM {_VERDICTS_POSTGRESQL}
), ours AS MATERIALIZED (
    SELECT v.*, held.callback, held.account, held.envelope_id, held.sequence
    FROM verdicts v CROSS JOIN LATERAL (
        SELECT d.callback, d.account, d.envelope_id, d.sequence FROM deliveries d
        WHERE d.id = v.id AND d.token = v.token AND d.state = 'running' FOR UPDATE OF d
    ) AS held
), settled AS (
    UPDATE deliveries d
    SET state = v.state, due_at = statement_timestamp() + v.wait, last_error = v.error,
        fingerprint = v.fingerprint,
        settled_at = CASE WHEN v.wait IS NULL THEN statement_timestamp() END
    FROM ours v WHERE d.id = v.id AND d.id = ANY (ARRAY(SELECT id FROM ours))
    RETURNING d.id, d.due_at
), history AS (
    INSERT INTO attempts
        (delivery_id, token, number, worker, started_at, finished_at, verdict, error)
    SELECT v.id, v.token, v.number, $11, v.started_at, v.finished_at, v.verdict, v.error
    FROM ours v ON CONFLICT DO NOTHING
), woken AS (
    UPDATE deliveries SET {WAKING}
    WHERE id = ANY (ARRAY(SELECT woken.id FROM ours d {BEHIND_POSTGRESQL} WHERE d.wait IS NULL))
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
        AttemptRow.__table__,  # type: ignore[arg-type]
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
    if is_postgresql(connection):
        # `unnest` fills up with nulls what is shorter, and the driver looks at each element.
        arrays = [
            None if column.count(None) == len(column) else column
            for column in zip(*map(_verdict_row, ordered), strict=True)
        ]
        rows = await fetch(connection, _SETTLE_POSTGRESQL, (*arrays, worker))
        return {row[0]: row[1] for row in rows}
    settled = await _settle_on_sqlite(connection, ordered, worker=worker)
    await wake(connection, [id_ for id_, due_at in settled.items() if due_at is None])
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
    wait = None if each.wait is None else seconds(each.wait)
    return each.id.hex, each.token, each.state, wait, each.error, each.fingerprint
