"""Envelopes that a consumer says it has created, so that the silence of one is noticed."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection

from app.store.bulk import Columns
from app.store.dialects import SQLITE_LATER, SQLITE_NOW, is_postgresql, seconds
from app.store.envelopes import EnvelopeKey
from app.store.models import ExpectationRow
from app.store.session import fetch


@dataclass(frozen=True, slots=True)
class Expectation:
    """What is expected, by whom, and until when: never again once it has shown itself."""

    account: str
    envelope_id: str
    consumer: str
    created_at: datetime
    due_at: datetime | None
    silent_at: datetime | None


@dataclass(frozen=True, slots=True)
class Overdue:
    """An expectation whose time is over, and whether its envelope was heard of meanwhile."""

    expectation: Expectation
    is_seen: bool


_COLUMNS = Columns(
    ExpectationRow.__table__,  # type: ignore[arg-type]
    ["account", "envelope_id", "consumer", "created_at", "due_at", "silent_at"],
)
# Every envelope that an event was about has a row; our own events make none.
_IS_SEEN = "EXISTS (SELECT 1 FROM envelopes v WHERE v.account = {account} AND v.id = {envelope})"
_EXPECT = f"""
INSERT INTO expectations AS x (account, envelope_id, consumer, created_at, due_at)
VALUES ({{account}}, {{envelope}}, {{consumer}}, {{now}},
    CASE WHEN {_IS_SEEN} THEN NULL ELSE {{later}} END)
ON CONFLICT (account, envelope_id) DO UPDATE SET due_at = {{again}}
WHERE x.due_at IS NOT NULL
"""
_EXPECT_POSTGRESQL = _EXPECT.format(
    account="$1::text",
    envelope="$2::text",
    consumer="$3::text",
    now="statement_timestamp()",
    later="statement_timestamp() + $4::interval",
    again="x.created_at + $4::interval",
)
_EXPECT_SQLITE = _EXPECT.format(
    account="?1",
    envelope="?2",
    consumer="?3",
    now=SQLITE_NOW,
    later=SQLITE_LATER.replace("?", "?4"),
    again="strftime('%Y-%m-%d %H:%M:%f000', x.created_at, ?4)",
)
_READ = (
    f"SELECT {_COLUMNS.listed}, {_IS_SEEN} FROM expectations "
    "WHERE account = {account} AND envelope_id = {envelope}"
)
_READ_POSTGRESQL = _READ.format(account="$1::text", envelope="$2::text")
_READ_SQLITE = _READ.format(account="?1", envelope="?2")


async def expect(
    connection: AsyncConnection,
    account: str,
    envelope_id: str,
    *,
    consumer: str,
    within: timedelta,
) -> tuple[Expectation, bool]:
    """Expect an envelope to be heard of, counted from the first time it was expected.

    Gives the expectation, and whether the envelope was heard of already. What was noticed, in
    time or too late, stays as it is.
    """
    on_postgresql = is_postgresql(connection)
    if on_postgresql:
        await fetch(connection, _EXPECT_POSTGRESQL, (account, envelope_id, consumer, within))
        rows = await fetch(connection, _READ_POSTGRESQL, (account, envelope_id))
    else:
        values = (account, envelope_id, consumer, seconds(within))
        await fetch(connection, _EXPECT_SQLITE, values)
        rows = await fetch(connection, _READ_SQLITE, (account, envelope_id))
    overdue = _overdue(rows[0], is_postgresql=on_postgresql)
    return overdue.expectation, overdue.is_seen


def _overdue(row: Sequence[Any], *, is_postgresql: bool) -> Overdue:
    *values, is_seen = row
    read = _COLUMNS.read(values, is_postgresql=is_postgresql)
    return Overdue(Expectation(*read), bool(is_seen))


_OVERDUE = (
    f"SELECT {', '.join(f'x.{name}' for name in _COLUMNS.names)}, "
    f"{_IS_SEEN.format(account='x.account', envelope='x.envelope_id')} FROM expectations x "
    "WHERE x.due_at <= {now} ORDER BY x.due_at LIMIT {limit}"
)
# Two processes never notice the same silence.
_OVERDUE_POSTGRESQL = (
    _OVERDUE.format(now="statement_timestamp()", limit="$1::int8") + " FOR UPDATE OF x SKIP LOCKED"
)
_OVERDUE_SQLITE = _OVERDUE.format(now=SQLITE_NOW, limit="?")
_IS_ANY_POSTGRESQL = (
    "SELECT 1 FROM expectations WHERE due_at <= statement_timestamp() ORDER BY due_at LIMIT 1"
)
_IS_ANY_SQLITE = f"SELECT 1 FROM expectations WHERE due_at <= {SQLITE_NOW} ORDER BY due_at LIMIT 1"


async def is_any_overdue(connection: AsyncConnection) -> bool:
    """Say whether there is anything to notice, without locking it."""
    statement = _IS_ANY_POSTGRESQL if is_postgresql(connection) else _IS_ANY_SQLITE
    return bool(await fetch(connection, statement))


async def take_overdue(connection: AsyncConnection, *, limit: int) -> list[Overdue]:
    """Lock what is overdue and held by nobody else, the longest overdue first."""
    on_postgresql = is_postgresql(connection)
    statement = _OVERDUE_POSTGRESQL if on_postgresql else _OVERDUE_SQLITE
    rows = await fetch(connection, statement, (limit,))
    return [_overdue(row, is_postgresql=on_postgresql) for row in rows]


_SETTLE = (
    "UPDATE expectations SET due_at = NULL, silent_at = CASE WHEN {is_silent} THEN {now} END "
    "WHERE account = {account} AND envelope_id = {envelope}"
)
_SETTLE_POSTGRESQL = _SETTLE.format(
    is_silent="$3::bool",
    now="statement_timestamp()",
    account="$1::text",
    envelope="$2::text",
)
_SETTLE_SQLITE = _SETTLE.format(is_silent="?3", now=SQLITE_NOW, account="?1", envelope="?2")


async def settle(connection: AsyncConnection, key: EnvelopeKey, *, is_silent: bool) -> None:
    """Expect it no longer: it was heard of, or its silence was noticed."""
    statement = _SETTLE_POSTGRESQL if is_postgresql(connection) else _SETTLE_SQLITE
    await fetch(connection, statement, (*key, is_silent))


_ACCOUNTS = "SELECT DISTINCT account FROM keys ORDER BY account LIMIT 1000"


async def accounts(connection: AsyncConnection) -> list[str]:
    """Give every account that was ever known here."""
    return [row[0] for row in await fetch(connection, _ACCOUNTS)]
