"""What the workers of a fault run call: three callbacks that leave traces of every call."""

import os
from datetime import timedelta

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from app.callbacks import Callbacks, Event, GiveUp
from tests.faults.script import DIES, FAILS, NOTED, ONCE, TRIED, luck

callbacks = Callbacks()
# One write of one line at its end is whole, whoever else writes at the same moment.
_notes = os.open(os.environ["NOTES"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
_insert = text(f"INSERT INTO {os.environ['ONCE']} VALUES (:delivery, :event)")  # noqa: S608


@callbacks.on(*NOTED)
async def note(event: Event) -> None:
    """Write down who was called, and in which order."""
    place = f"{event.account} {event.envelope_id} {event.sequence} {int(event.is_late)}"
    os.write(_notes, f"{event.delivery_id} {event.id} {place}\n".encode())


@callbacks.on(*TRIED, backoff=timedelta(seconds=0.5), breaker=None)
async def try_hard(event: Event) -> None:
    """Fail at first for some events, and give up others."""
    if luck(event.id) in DIES:
        raise GiveUp("this event is to be a dead letter")
    if luck(event.id) in FAILS and event.attempt == 1:
        raise RuntimeError("the first attempt at this event is to fail")


@callbacks.on(*ONCE)
async def write_once(event: Event, session: AsyncSession) -> None:
    """Write in the transaction that settles the delivery, so that it happens once."""
    await session.execute(_insert, {"delivery": event.delivery_id, "event": event.id})
