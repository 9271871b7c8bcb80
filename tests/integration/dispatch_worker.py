"""A process that dispatches: started by tests that count what several do, or that kill one.

    python dispatch_worker.py URL JOURNAL [--dispatchers N] [--lease SECONDS] [--hang]
                             [--session [--die POINT]]

Each call of the callback appends the delivery's id to JOURNAL. SIGTERM ends it as a deploy does,
once JOURNAL.ready has its line.
With `--session` the callback writes with a session; with `--die` the process kills itself there.
"""

import argparse
import asyncio
import os
import signal
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from app.callbacks import Callbacks, Event
from app.dispatch.options import DispatchOptions
from app.dispatch.worker import Dispatcher
from app.store import sessions, verdicts
from app.store.session import DatabaseAddress
from app.store.sessions import AuthorSession

GRACE = timedelta(seconds=1)


def main() -> None:
    arguments = parsed()
    journal = os.open(arguments.journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    callbacks = Callbacks()

    def note(event: Event) -> None:
        # One write appends one line, whoever else is writing.
        os.write(journal, f"{event.delivery_id} {event.attempt}\n".encode())

    async def file(event: Event) -> None:
        note(event)
        if arguments.hang:
            await asyncio.sleep(3600)

    async def write(event: Event, session: AsyncSession) -> None:
        note(event)
        die_at("before", arguments.die)
        await session.execute(
            text("INSERT INTO notes (delivery_id) VALUES (:id)"), {"id": event.delivery_id}
        )
        die_at("written", arguments.die)

    plant(arguments.die)
    callbacks.on("*", name="file")(write if arguments.session else file)

    dispatchers = [
        Dispatcher(
            DatabaseAddress(arguments.url),
            tuple(callbacks),
            options=DispatchOptions(
                lease=timedelta(seconds=arguments.lease), poll=timedelta(milliseconds=50)
            ),
            worker=f"process-{os.getpid()}-{number}",
        )
        for number in range(arguments.dispatchers)
    ]
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    with Path(f"{arguments.journal}.ready").open("a") as ready:
        ready.write(f"{os.getpid()}\n")
    for dispatcher in dispatchers:
        dispatcher.start()
    ended.wait()
    for dispatcher in dispatchers:
        dispatcher.stop(GRACE)


def die_at(point: str, chosen: str | None) -> None:
    if point == chosen:
        os.kill(os.getpid(), signal.SIGKILL)


def plant(chosen: str | None) -> None:
    """Let the process die around the statements of the service, too."""
    settle, commit = verdicts.settle, sessions._commit

    async def settle_and_die(*arguments: Any, **options: Any) -> Any:
        die_at("returned", chosen)
        settled = await settle(*arguments, **options)
        die_at("settled", chosen)
        return settled

    async def commit_and_die(session: AuthorSession, ours: Any, *, is_postgresql: bool) -> None:
        await commit(session, ours, is_postgresql=is_postgresql)
        die_at("committed", chosen)

    if chosen is not None:
        verdicts.settle, sessions._commit = settle_and_die, commit_and_die


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("journal")
    parser.add_argument("--dispatchers", type=int, default=1)
    parser.add_argument("--lease", type=float, default=30)
    parser.add_argument("--hang", action="store_true")
    parser.add_argument("--session", action="store_true")
    parser.add_argument("--die")
    return parser.parse_args()


if __name__ == "__main__":
    main()
