"""A process that dispatches: started by tests that count what several do, or that kill one.

    python dispatch_worker.py URL JOURNAL [--dispatchers N] [--lease SECONDS] [--hang]

Each call of the callback appends the delivery's id to JOURNAL. SIGTERM ends it as a deploy does.
"""

import argparse
import asyncio
import os
import signal
import threading
from datetime import timedelta

from app.callbacks import Callbacks, Event
from app.dispatch.options import DispatchOptions
from app.dispatch.worker import Dispatcher
from app.store.session import DatabaseAddress

GRACE = timedelta(seconds=1)


def main() -> None:
    arguments = parsed()
    journal = os.open(arguments.journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    callbacks = Callbacks()

    @callbacks.on("*")
    async def file(event: Event) -> None:
        # One write appends one line, whoever else is writing.
        os.write(journal, f"{event.delivery_id} {event.attempt}\n".encode())
        if arguments.hang:
            await asyncio.sleep(3600)

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
    for dispatcher in dispatchers:
        dispatcher.start()
    ended.wait()
    for dispatcher in dispatchers:
        dispatcher.stop(GRACE)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("journal")
    parser.add_argument("--dispatchers", type=int, default=1)
    parser.add_argument("--lease", type=float, default=30)
    parser.add_argument("--hang", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
