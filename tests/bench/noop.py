"""Callbacks that do nothing but say when they were called, so that what is around them shows."""

import asyncio

from app.callbacks import Callbacks, Event
from tests.bench.notes import notes

# Each is what one `CALLBACKS` names; the name `bench` is the one that the audit looks for.
drained = Callbacks()
noting = Callbacks()
crowded = Callbacks()


@drained.on("*", name="bench")
async def do_nothing(_: Event) -> None:
    notes.count()


@noting.on("*", name="bench")
@crowded.on("*", name="bench")
async def note(event: Event) -> None:
    notes.write(event.id)


@crowded.on("*", name="backlog")
async def take_a_moment(_: Event) -> None:
    await asyncio.sleep(0.02)
