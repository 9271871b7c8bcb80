"""How far each follower of the feed has come: one row each, and its lock is the right to go on."""

import json
from collections.abc import Sequence

from sqlalchemy.ext.asyncio import AsyncConnection

from app.store.dialects import is_postgresql
from app.store.session import fetch

_ADD = "INSERT INTO followers (name, position) VALUES ({name}, 0) ON CONFLICT DO NOTHING"
_ADD_POSTGRESQL = _ADD.format(name="$1::text")
_ADD_SQLITE = _ADD.format(name="?")
_BEHIND = (
    "SELECT name FROM followers WHERE name {named} "
    "AND position < (SELECT coalesce(max(position), 0) FROM feed)"
)
_BEHIND_POSTGRESQL = _BEHIND.format(named="= ANY ($1::text[])")
_BEHIND_SQLITE = _BEHIND.format(named="IN (SELECT value FROM json_each(?))")
_TAKE_POSTGRESQL = "SELECT position FROM followers WHERE name = $1::text FOR UPDATE SKIP LOCKED"
_TAKE_SQLITE = "SELECT position FROM followers WHERE name = ?"
_MOVE_POSTGRESQL = "UPDATE followers SET position = $2::int8 WHERE name = $1::text"
_MOVE_SQLITE = "UPDATE followers SET position = ?2 WHERE name = ?1"


async def add(connection: AsyncConnection, names: Sequence[str]) -> None:
    """Write down followers; one that is new begins with the first item of the feed."""
    statement = _ADD_POSTGRESQL if is_postgresql(connection) else _ADD_SQLITE
    # One order for every process, so that two of them never wait for each other crosswise.
    for name in sorted(names):
        await fetch(connection, statement, (name,))


async def behind(connection: AsyncConnection, names: Sequence[str]) -> set[str]:
    """Name those of these who have not been given the newest item yet."""
    if is_postgresql(connection):
        rows = await fetch(connection, _BEHIND_POSTGRESQL, (list(names),))
    else:
        rows = await fetch(connection, _BEHIND_SQLITE, (json.dumps(list(names)),))
    return {row[0] for row in rows}


async def take(connection: AsyncConnection, name: str) -> int | None:
    """Take the place of a follower until this transaction ends; give its position.

    None if another process has it just now.
    """
    statement = _TAKE_POSTGRESQL if is_postgresql(connection) else _TAKE_SQLITE
    rows = await fetch(connection, statement, (name,))
    return rows[0][0] if rows else None


async def move(connection: AsyncConnection, name: str, position: int) -> None:
    """Write down that a follower was given everything up to `position`."""
    statement = _MOVE_POSTGRESQL if is_postgresql(connection) else _MOVE_SQLITE
    await fetch(connection, statement, (name, position))
