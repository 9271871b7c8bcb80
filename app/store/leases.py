"""Work that one process at a time does: held for a while, and by whoever comes next after it.

A lease is taken in the transaction that does the work, under the lock of its row. Two
holders can therefore never commit at once, however late a clock or a process is; the time
only says when somebody else may try.
"""

from datetime import timedelta

from sqlalchemy.ext.asyncio import AsyncConnection

from app.store.dialects import SQLITE_LATER, SQLITE_NOW, is_postgresql, seconds
from app.store.session import fetch

_HOLD = """
INSERT INTO leases (name, holder, token, until) VALUES ({name}, {holder}, 1, {until})
ON CONFLICT (name) DO UPDATE SET holder = excluded.holder, until = excluded.until,
    token = leases.token + CASE WHEN leases.holder = excluded.holder THEN 0 ELSE 1 END
WHERE leases.holder = excluded.holder OR leases.until <= {now}
RETURNING token
"""
_HOLD_POSTGRESQL = _HOLD.format(
    name="$1::text",
    holder="$2::text",
    until="statement_timestamp() + $3::interval",
    now="statement_timestamp()",
)
_HOLD_SQLITE = _HOLD.format(name="?", holder="?", until=SQLITE_LATER, now=SQLITE_NOW)
_HOLDER_POSTGRESQL = (
    "SELECT holder FROM leases WHERE name = $1::text AND until > statement_timestamp()"
)
_HOLDER_SQLITE = f"SELECT holder FROM leases WHERE name = ? AND until > {SQLITE_NOW}"
_RELEASE_POSTGRESQL = (
    "UPDATE leases SET until = statement_timestamp() WHERE name = $1::text AND holder = $2::text"
)
_RELEASE_SQLITE = f"UPDATE leases SET until = {SQLITE_NOW} WHERE name = ? AND holder = ?"


async def hold(
    connection: AsyncConnection, name: str, *, holder: str, span: timedelta
) -> int | None:
    """Take or renew a lease; give its token, which rises with each new holder.

    None if another one holds it. Until this transaction ends, nobody else can take it.
    """
    if is_postgresql(connection):
        rows = await fetch(connection, _HOLD_POSTGRESQL, (name, holder, span))
    else:
        rows = await fetch(connection, _HOLD_SQLITE, (name, holder, seconds(span)))
    return rows[0][0] if rows else None


async def holder_of(connection: AsyncConnection, name: str) -> str | None:
    """Say who holds a lease just now."""
    statement = _HOLDER_POSTGRESQL if is_postgresql(connection) else _HOLDER_SQLITE
    rows = await fetch(connection, statement, (name,))
    return rows[0][0] if rows else None


async def release(connection: AsyncConnection, name: str, *, holder: str) -> None:
    """Let the next one have it at once."""
    statement = _RELEASE_POSTGRESQL if is_postgresql(connection) else _RELEASE_SQLITE
    await fetch(connection, statement, (name, holder))
