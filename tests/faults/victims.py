"""Callbacks for runs that break things: each notes its calls, and ends in a way of its own.

`CALLBACKS=tests.faults.victims:callbacks`, and `NOTES` names the file of the notes.
"""

import os

from app.callbacks import Callbacks, Event, GiveUp

callbacks = Callbacks()


def work(event: Event, name: str) -> None:
    """Do what a callback is there for: here, write a line that says so."""
    file = os.open(os.environ["NOTES"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    # One write appends one line, whoever else is writing.
    os.write(file, f"{event.delivery_id} {name} {event.id} {event.attempt}\n".encode())
    os.close(file)


@callbacks.on("envelope.*", name="steady", breaker=None)
async def steady(event: Event) -> None:
    work(event, "steady")


@callbacks.on("envelope.*", name="shaky", breaker=None, backoff=0.1)
async def shaky(event: Event) -> None:
    """Fails the first time, whatever it is."""
    work(event, "shaky")
    if event.attempt == 1:
        raise RuntimeError("not yet")


@callbacks.on("envelope.*", name="hopeless", breaker=None)
def hopeless(event: Event) -> None:
    """Refuses for good."""
    work(event, "hopeless")
    raise GiveUp("never")
