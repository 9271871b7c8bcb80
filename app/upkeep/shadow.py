"""Compute an envelope anew from what was said of it: pure, and by the rules of intake.

The `version` that an event left behind is when it was applied; its `sequence` is its place
among those that had one. They differ only for what was applied again after a fix of the
parser: that keeps its place, and counts once more where its version says.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import Enum, auto
from uuid import UUID

from app.events.lifecycle import BLANK, Effect, Envelope, accept, ends_said, project, refresh
from app.events.payload import Event
from app.intake.projection import CONFLICT
from app.store.callbacks import OWN_EVENTS
from app.store.rebuilding import Said

_FIRST = datetime.min.replace(tzinfo=UTC)
_STANDING = frozenset({Effect.APPLIED, Effect.STALE})


class Kind(Enum):
    """What happened to an envelope at one moment."""

    SAY = auto()
    COPY = auto()
    ACCEPT = auto()
    DOUBT = auto()
    # A contradiction that spoke of another envelope was accepted there.
    SETTLE = auto()


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """A contradiction that speaks of another envelope, and whose word was taken there."""

    event_id: UUID
    original_id: UUID | None
    # None: nobody knows any more.
    at: datetime | None


@dataclass(frozen=True, slots=True)
class Step:
    """One moment in the life of an envelope."""

    place: tuple[int, int, int]
    kind: Kind
    # The event that it is about, and the one that this copies, contradicts or overrules.
    event_id: UUID
    original_id: UUID | None
    said: Said | None

    @property
    def needs_body(self) -> bool:
        return self.kind in {Kind.SAY, Kind.COPY, Kind.ACCEPT}


def doubts(history: Iterable[Said]) -> set[UUID]:
    """Name the events that contradicted what was known of an envelope."""
    return {
        said.original_id
        for said in history
        if said.type == CONFLICT and is_own(said) and said.original_id is not None
    }


def is_own(said: Said) -> bool:
    """Whether the service said it itself: no key proved it genuine."""
    return said.type.startswith(OWN_EVENTS) and said.key_label is None


def steps(history: Sequence[Said], elsewhere: Sequence[Elsewhere] = ()) -> list[Step]:
    """Put what was said in the order in which it was applied."""
    found = [*_sequenced(history), *_copies(history)]
    found += [_settlement(found, each) for each in elsewhere]
    return sorted(found, key=lambda step: (step.place, step.event_id))


def _sequenced(history: Sequence[Said]) -> Iterator[Step]:
    # From the end: what comes later among those that have a place was applied later.
    following = None
    placed = [said for said in history if said.sequence is not None]
    for said in sorted(placed, key=lambda said: said.sequence or 0, reverse=True):
        version = said.version or 0
        place = version if following is None else min(version, following)
        following = place
        if (kind := _kind(said)) is None:
            continue
        yield _step(said, kind, place)
        if version > place:
            yield _step(said, Kind.SAY, version)


def _step(said: Said, kind: Kind, version: int) -> Step:
    return Step((version, 0, said.sequence or 0), kind, said.id, said.original_id, said)


def _kind(said: Said) -> Kind | None:
    if is_own(said):
        return Kind.DOUBT if said.type == CONFLICT else None
    return Kind.SAY if said.original_id is None else Kind.ACCEPT


def _copies(history: Sequence[Said]) -> Iterator[Step]:
    for said in history:
        if said.effect == Effect.REFRESHED:
            place = (said.version or 0, 1, 0)
            yield Step(place, Kind.COPY, said.id, said.original_id, said)


def _settlement(found: Sequence[Step], settled: Elsewhere) -> Step:
    """Find the place of what left no trace among the events of this envelope but its time."""
    places = [
        step.place[0]
        for step in found
        if step.said is not None and (settled.at is None or step.said.received_at <= settled.at)
    ]
    place = (max(places, default=0), 2, 0)
    return Step(place, Kind.SETTLE, settled.event_id, settled.original_id, None)


class Shadow:
    """An envelope as its events make it, one step after the other."""

    def __init__(self, start: Envelope = BLANK) -> None:
        self.envelope = start
        self._latest = _FIRST
        self._doubted: set[UUID] = set()
        # Those whose word was taken, in that order, and whom each of them contradicted.
        self._accepted: dict[UUID, UUID | None] = {}
        self._standing: dict[UUID, set[str]] = {}

    def take(self, step: Step, event: Event | None) -> None:
        """Go one step further; `event` is what the bytes say today, where they are needed."""
        if step.kind is Kind.DOUBT:
            self._doubt(step)
        elif step.kind is Kind.SETTLE:
            self._settle(step)
        else:
            assert event is not None  # looked for before
            assert step.said is not None  # only what happened elsewhere has none
            self._apply(step, step.said, event)

    def _doubt(self, step: Step) -> None:
        assert step.original_id is not None  # a conflict is always about an event
        self._doubted.add(step.original_id)
        self.envelope = replace(self.envelope, disputed=True)

    def _settle(self, step: Step) -> None:
        if not self._is_disputed(step):
            self.envelope = replace(self.envelope, disputed=False)
        self._accepted[step.event_id] = step.original_id

    def _apply(self, step: Step, said: Said, event: Event) -> None:
        received_at = said.received_at
        self._latest = max(self._latest, received_at)
        if step.kind is Kind.COPY:
            # A copy that another replica received before the first moves no milestone.
            self.envelope = refresh(self.envelope, event, received_at=self._latest)
            return
        if step.kind is Kind.ACCEPT:
            self.envelope = accept(self.envelope, event, received_at=received_at)
            self._settle(step)
        else:
            self.envelope, _ = project(self.envelope, event, received_at=received_at)
        if said.effect in _STANDING:
            self._standing[said.id] = ends_said(said.type, said.core_status)

    def _is_disputed(self, step: Step) -> bool:
        """Whether anything else contradicts: an open conflict, or another end that was said."""
        if self._doubted - self._accepted.keys() - {step.event_id}:
            return True
        gone = {*self._overruled_by(step), *self._accepted.values()}
        ends = [ends for id_, ends in self._standing.items() if id_ not in gone]
        return bool(set().union(*ends) - {self.envelope.status})

    def _overruled_by(self, step: Step) -> set[UUID | None]:
        """Name whom this contradicts, and who had taken that one's place before."""
        root = self._root_of(step.original_id)
        others = [id_ for id_ in self._accepted if self._root_of(id_) == root]
        return {step.original_id, *others[-1:]}

    def _root_of(self, event_id: UUID | None) -> UUID | None:
        while event_id in self._accepted:
            event_id = self._accepted[event_id]
        return event_id


def onto(course: Sequence[Step]) -> list[Step]:
    """Give the steps that can be gone again from the row: those behind the last that lowers.

    What was said before that is in the row, as far as it still counts.
    """
    lowering = [i for i, step in enumerate(course) if step.kind in {Kind.ACCEPT, Kind.SETTLE}]
    rest = course[lowering[-1] + 1 :] if lowering else course
    return [step for step in rest if step.needs_body]
