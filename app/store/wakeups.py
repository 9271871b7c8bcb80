"""Tell other processes that something has become due, and hear it from them.

A hint and no more: whoever misses it finds the deliveries at its next poll. It is never
sent in the transaction that makes them due, because PostgreSQL lets only one transaction
with a notification commit at a time.
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta

import asyncpg

from app.store.session import Connection, DatabaseAddress, fetch

# A connection that nobody has heard from for so long is asked whether it is there.
QUIET = timedelta(seconds=30)
CONNECT_LIMIT = timedelta(seconds=5)


def channel_of(schema: str) -> str:
    """Name the channel of one installation; several may share a database."""
    return f"{schema[:50]}_owed"


async def announce(connection: Connection, *, schema: str) -> None:
    """Wake the workers that listen, once this transaction commits."""
    await fetch(connection, "SELECT pg_notify($1, '')", [channel_of(schema)])


async def listen(
    address: DatabaseAddress, heard: Callable[[], object], *, quiet: timedelta = QUIET
) -> None:
    """Call `heard` once listening, and at each announcement, until the connection is gone.

    Raises what the driver raises; the address must lead to a server, not to a transaction
    pooler, which would give the session to others.
    """

    def notified(*_: object) -> None:
        heard()

    limit = CONNECT_LIMIT.total_seconds()
    connection = await asyncpg.connect(address.dsn, timeout=limit)
    try:
        ended = asyncio.Event()
        connection.add_termination_listener(lambda _: ended.set())
        await connection.add_listener(channel_of(address.schema), notified)
        # Whatever was announced before this moment.
        heard()
        while not ended.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(quiet.total_seconds()):
                    await ended.wait()
            if not ended.is_set():
                await connection.execute("SELECT 1", timeout=limit)
    finally:
        connection.terminate()
