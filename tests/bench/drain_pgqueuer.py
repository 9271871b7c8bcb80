"""PgQueuer's worker with a job that does nothing, as its own command line would run it."""

import asyncio
import os
import signal
from datetime import timedelta

import asyncpg
import uvloop
from pgqueuer import AsyncpgPoolDriver, Job, Queries, QueueManager

from tests.bench.notes import notes

# The best of 100, 500 and 1,000 on one connection, and of 500 on four.
BATCH = 500
CONNECTIONS = 4


async def main() -> None:
    url = os.environ["DATABASE_URL"]
    pool = await asyncpg.create_pool(url, min_size=CONNECTIONS, max_size=CONNECTIONS)
    manager = QueueManager(Queries(AsyncpgPoolDriver(pool)))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, manager.shutdown.set)

    @manager.entrypoint("noop")
    async def do_nothing(_: Job) -> None:
        notes.count()

    await manager.run(batch_size=BATCH, dequeue_timeout=timedelta(seconds=1))


if __name__ == "__main__":
    uvloop.run(main())
