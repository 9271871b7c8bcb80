"""Work that one process at a time does: held for a while, and by whoever comes next after it.

A lease is taken in the transaction that does the work, under the lock of its row. Two
holders can therefore never commit at once, however late a clock or a process is; the time
only says when somebody else may try.
"""

from datetime import timedelta

from sqlalchemy.ext.asyncio import AsyncConnection

from app.store.dialects import SQLITE_LATER, SQLITE_NOW, is_postgresql, seconds
from app.store.session import fetch

_HOLD_SQLITE = f"""
INSERT INTO leases (name, holder, token, until) VALUES (?, ?, 1, {SQLITE_LATER})
ON CONFLICT (name) DO UPDATE SET holder = excluded.holder, until = excluded.until,
    token = leases.token + CASE WHEN leases.holder = excluded.holder THEN 0 ELSE 1 END
WHERE leases.holder = excluded.holder OR leases.until <= {SQLITE_NOW}
RETURNING token
"""
# Whoever has locked it is at work: nobody waits for that.
_LOCK_POSTGRESQL = """
SELECT token, holder = $2::text AS is_own, until <= statement_timestamp() AS is_free,
    until > statement_timestamp() + $3::interval / 2 AS is_fresh
FROM leases WHERE name = $1::text FOR UPDATE SKIP LOCKED
"""
_CREATE_POSTGRESQL = """
INSERT INTO leases (name, holder, token, until)
SELECT $1::text, $2::text, 1, statement_timestamp() + $3::interval
WHERE NOT EXISTS (SELECT 1 FROM leases WHERE name = $1::text)
ON CONFLICT DO NOTHING RETURNING token
"""
_TAKE_POSTGRESQL = """
UPDATE leases SET holder = $2::text, until = statement_timestamp() + $3::interval,
    token = token + CASE WHEN holder = $2::text THEN 0 ELSE 1 END
WHERE name = $1::text RETURNING token
"""
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
        return await _hold_on_postgresql(connection, (name, holder, span))
    rows = await fetch(connection, _HOLD_SQLITE, (name, holder, seconds(span)))
    return rows[0][0] if rows else None


async def _hold_on_postgresql(
    connection: AsyncConnection, lease: tuple[str, str, timedelta]
) -> int | None:
    rows = await fetch(connection, _LOCK_POSTGRESQL, lease)
    if not rows:
        rows = await fetch(connection, _CREATE_POSTGRESQL, lease)
        return rows[0][0] if rows else None
    token, is_own, is_free, is_fresh = rows[0]
    if is_own and is_fresh:
        # Not written at each use: every version of the row stays for as long as any
        # transaction of the cluster might look at it.
        return int(token)
    if not (is_own or is_free):
        return None
    return int((await fetch(connection, _TAKE_POSTGRESQL, lease))[0][0])


async def holder_of(connection: AsyncConnection, name: str) -> str | None:
    """Say who holds a lease just now."""
    statement = _HOLDER_POSTGRESQL if is_postgresql(connection) else _HOLDER_SQLITE
    rows = await fetch(connection, statement, (name,))
    return rows[0][0] if rows else None


async def release(connection: AsyncConnection, name: str, *, holder: str) -> None:
    """Let the next one have it at once."""
    statement = _RELEASE_POSTGRESQL if is_postgresql(connection) else _RELEASE_SQLITE
    await fetch(connection, statement, (name, holder))
