"""Compare envelopes with what their stored events make of them; nothing is locked for it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import timedelta

from app.errors import PayloadRejected
from app.events.lifecycle import BLANK, Effect, Envelope
from app.events.payload import Event, parse
from app.events.redaction import Json
from app.store import bodies, rebuilding
from app.store.bulk import dumps
from app.store.rebuilding import Live, Said
from app.store.session import Connection, Database
from app.upkeep.shadow import Elsewhere, Shadow, Step, doubts, onto, steps

LIMIT = timedelta(seconds=10)
BODIES_AT_ONCE = 200


@dataclass(frozen=True, slots=True)
class Difference:
    """One column of one envelope, as it is and as its events make it."""

    account: str
    envelope_id: str
    column: str
    is_now: Json
    would_be: Json


@dataclass(frozen=True, slots=True)
class Compared:
    """An envelope beside what its events make of it."""

    live: Live
    envelope: Envelope
    # Some of the bytes are gone, or not understood: computed from the row onwards.
    is_from_row: bool

    @property
    def differences(self) -> tuple[Difference, ...]:
        if self.envelope == self.live.envelope:
            return ()
        is_now, would_be = _plain(self.live.envelope), _plain(self.envelope)
        return tuple(
            Difference(*self.live.key, name, is_now[name], would_be[name])
            for name in is_now
            if is_now[name] != would_be[name]
        )


def _plain(envelope: Envelope) -> dict[str, Json]:
    """Give the columns as they read once they are stored."""
    return {each.name: _stored(getattr(envelope, each.name)) for each in fields(envelope)}


def _stored(value: Json) -> Json:
    is_document = isinstance(value, (dict, list, tuple))
    return json.loads(dumps(value) or "null") if is_document else value


class _Course:
    """One envelope on its way: what is still to be taken, and what was not there."""

    def __init__(self, live: Live, course: Sequence[Step]) -> None:
        self.live = live
        self.steps = course
        self.shadow = Shadow(BLANK)
        self.is_from_row = False
        self._lacks_some = False

    def take(self, step: Step, body: bytes | None) -> None:
        event = _read(step.said, body) if step.said is not None and body is not None else None
        if step.needs_body and event is None:
            self._lacks_some = True
        elif not self._lacks_some or self.is_from_row:
            self.shadow.take(step, event)

    def begins_anew(self) -> bool:
        """Whether all of it has to be gone again, from the row, because something is gone."""
        if not self._lacks_some or self.is_from_row:
            return False
        self.is_from_row, self.shadow = True, Shadow(self.live.envelope)
        self.steps = onto(self.steps)
        return True


def _read(said: Said, body: bytes) -> Event | None:
    """Give what bytes say today; None if that is nothing, or about another envelope."""
    try:
        event = parse(body, received_at=said.received_at)
    except PayloadRejected:
        return None
    return event if event.envelope_id == said.envelope_id else None


async def compare(database: Database, lives: Sequence[Live]) -> list[Compared]:
    """Compute these envelopes anew, in the order that they are given."""
    if not lives:
        return []
    async with database.begin(limit=LIMIT, is_reading=True) as connection:
        histories = await rebuilding.histories(connection, [live.key for live in lives])
        courses = [_Course(live, await _course(connection, histories[live.key])) for live in lives]
    await _go(database, courses)
    # What lacks something is gone once more, onto what its row says already.
    await _go(database, [course for course in courses if course.begins_anew()])
    return [Compared(course.live, course.shadow.envelope, course.is_from_row) for course in courses]


async def _course(connection: Connection, history: Sequence[Said]) -> list[Step]:
    here = {said.id for said in history}
    if not (foreign := doubts(history) - here):
        return steps(history)
    found = await rebuilding.effects(connection, foreign)
    accepted = [row for row in found if row.effect != Effect.CONFLICT]
    at = await rebuilding.accepted_at(connection, [row.id for row in accepted])
    return steps(history, [Elsewhere(row.id, row.original_id, at.get(row.id)) for row in accepted])


async def _go(database: Database, courses: Sequence[_Course]) -> None:
    """Go all steps of all these envelopes, with not too many bodies at once in memory."""
    pending = [(course, step) for course in courses for step in course.steps]
    for start in range(0, len(pending), BODIES_AT_ONCE):
        share = pending[start : start + BODIES_AT_ONCE]
        async with database.begin(limit=LIMIT, is_reading=True, is_split=True) as connection:
            needed = [step.event_id for _, step in share if step.needs_body]
            found = await bodies.read(connection, needed)
        for course, step in share:
            course.take(step, found.get(step.event_id))
