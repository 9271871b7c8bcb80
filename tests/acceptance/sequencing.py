"""A process that gives places in the feed: started by tests that kill it, or freeze it.

    python -m tests.acceptance.sequencing URL HOLDER [--freeze]

With `--freeze` it stops in the middle of its first transaction, after it has given places.
"""

import argparse
import asyncio
import os
import signal
from dataclasses import replace
from datetime import timedelta

from app.store import feed
from app.store.session import Database, DatabaseAddress, Limits
from app.upkeep.sequencer import LEASE, Sequencer

LIMIT = timedelta(seconds=60)
# How long the server waits for a client that holds a transaction and says nothing; between two
# statements of its first one, a process on a busy machine is silent, too.
IDLE = timedelta(seconds=5)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("holder")
    parser.add_argument("--freeze", action="store_true")
    arguments = parser.parse_args()
    work = freeze if arguments.freeze else run
    asyncio.run(work(arguments.url, arguments.holder))


async def run(url: str, holder: str) -> None:
    await Sequencer(Database(DatabaseAddress(url), size=1), holder=holder).run()


async def freeze(url: str, holder: str) -> None:
    limits = replace(Limits(), idle=IDLE)
    database = Database(DatabaseAddress(url), size=1, limits=limits)
    async with database.begin(limit=LIMIT) as connection:
        placed = await feed.place(connection, holder=holder, span=LEASE, limit=10)
        assert placed is not None
        assert placed.count
        os.kill(os.getpid(), signal.SIGSTOP)


if __name__ == "__main__":
    main()
