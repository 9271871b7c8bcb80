"""What the service has written, read past it: straight from its tables."""

import asyncio
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import asyncpg

Row = tuple[Any, ...]
# How long a busy database may let us wait, in seconds.
PATIENCE = 30


def rows(database_url: str, query: str, *values: object) -> list[Row]:
    """Run a query with parameters `$1`, `$2`, … on either database."""
    if database_url.startswith("sqlite:///"):
        named = {str(number): value for number, value in enumerate(values, start=1)}
        path = database_url.removeprefix("sqlite:///")
        with closing(sqlite3.connect(path, timeout=PATIENCE)) as connection:
            return connection.execute(query, named).fetchall()
    # In a thread of its own: the caller may be a test with a running event loop.
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, _fetch(database_url, query, *values)).result()


async def _fetch(database_url: str, query: str, *values: object) -> list[Row]:
    connection = await asyncpg.connect(
        database_url, timeout=PATIENCE, server_settings={"search_path": "atlas_receiver"}
    )
    try:
        return [tuple(row) for row in await connection.fetch(query, *values)]
    finally:
        await connection.close()


def count(database_url: str, table: str) -> int:
    return int(rows(database_url, f"SELECT count(*) FROM {table}")[0][0])  # noqa: S608


def bodies_of(database_url: str, envelope_id: str) -> list[bytes]:
    """Give the stored bytes of an envelope's events, in the order of receipt."""
    query = (
        "SELECT b.body FROM events e JOIN bodies b ON b.event_id = e.id "
        "WHERE e.envelope_id = $1 ORDER BY e.id"
    )
    return [bytes(row[0]) for row in rows(database_url, query, envelope_id)]
