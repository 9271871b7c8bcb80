"""Learn what the bodies of each type look like, and notice what was never seen before.

A follower of the feed: it is off the path of a webhook, and only one process does it at a
time. Of the first events of a type everything is learned; what is new after that is drift.
"""

import asyncio
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple
from uuid import UUID

from app.errors import PayloadRejected
from app.events.reading import read
from app.events.shape import Trait, shape_of
from app.store import bodies, shapes
from app.store.callbacks import OWN_EVENTS
from app.store.feed import Item
from app.store.session import Connection
from app.store.shapes import LEARNED, SEEN, TYPE, Fresh, Known
from app.telemetry import get_logger

log = get_logger("upkeep")

# So many events of a type are looked at before anything new in one is worth a word.
LEARNING = 20
# Longer ones are not looked at; those above the other hold up the loop for a moment.
LONGEST, LARGE = 256 * 1024, 16 * 1024
MOST_TRAITS, MOST_TYPES, MOST_SHAPES = 1000, 500, 50_000
# How many of the new traits of one event its line names.
NAMED = 20


class _Type:
    """What is known of the events of one type."""

    def __init__(self) -> None:
        self.traits: set[Trait] = set()
        # So many were seen by this process; one that comes later begins to count anew.
        self.seen = 0
        self.is_learned = False
        self.is_full = False


class _New(NamedTuple):
    """Something that this process has not seen before."""

    known: Known
    item: Item
    event_id: UUID
    is_drift: bool

    @property
    def row(self) -> Fresh:
        return (*self.known, self.item.received_at or self.item.at, self.event_id)


class Drift:
    """The follower that learns shapes. `noticed` counts drift by its kind, `known` all traits."""

    name = "drift"

    def __init__(self) -> None:
        self.noticed: Counter[str] = Counter()
        # Events with names that there was no room for: those are somebody's data.
        self.ignored = 0
        self.known = 0
        self._types: dict[str, _Type] = {}
        self._is_loaded = False
        self._end = 0

    async def follow(self, connection: Connection, items: Sequence[Item]) -> None:
        """Look at the bodies of the events among these."""
        if not self._is_loaded or items[0].position <= self._end:
            # The first, or given once more: then what was written last was taken back.
            await self._load(connection)
        self._end = items[-1].position
        events = [(item, item.event_id) for item in items if item.event_id and _is_theirs(item)]
        if not events:
            return
        found = await bodies.read(connection, [id_ for _, id_ in events], longest=LONGEST)
        new: list[_New] = []
        for item, event_id in events:
            if (body := found.get(event_id)) is not None:
                new += await self._look(item, event_id, body)
        if new:
            added = await shapes.add(connection, [each.row for each in new])
            self._tell([each for each in new if each.known in added])

    async def _load(self, connection: Connection) -> None:
        self._types, self.known, self._is_loaded = {}, 0, True
        for known in await shapes.read_known(connection, limit=MOST_SHAPES):
            each = self._types.setdefault(known.type, _Type())
            if known.kind != TYPE:
                self._keep(each, {Trait(known.kind, known.path)})
            elif known.path == LEARNED:
                each.is_learned = True

    def _keep(self, each: _Type, traits: set[Trait]) -> None:
        each.traits |= traits
        self.known += len(traits)

    async def _look(self, item: Item, event_id: UUID, body: bytes) -> list[_New]:
        """Compare one body with what is known of its type; what is new is known from now on."""
        if len(body) > LARGE:
            await asyncio.sleep(0)
        try:
            document, _ = read(body)
        except PayloadRejected:
            return []
        words = self._count(item.type or "")
        each = self._types.get(item.type or "")
        if each is None:
            self.ignored += 1
            return []
        traits = shape_of(document) - each.traits
        if traits and not self._has_room(each, item, len(traits)):
            traits = set()
        self._keep(each, traits)
        found = [*(Trait(TYPE, word) for word in words), *sorted(traits)]
        is_drift = each.is_learned and LEARNED not in words
        return [_New(Known(item.type or "", *trait), item, event_id, is_drift) for trait in found]

    def _count(self, event_type: str) -> list[str]:
        """Count an event of a type; give what is to be noted of the type itself."""
        words = []
        each = self._types.get(event_type)
        if each is None:
            if len(self._types) >= MOST_TYPES:
                return []
            each = self._types[event_type] = _Type()
            words.append(SEEN)
        each.seen += 1
        if each.seen >= LEARNING and not each.is_learned:
            each.is_learned = True
            words.append(LEARNED)
        return words

    def _has_room(self, each: _Type, item: Item, count: int) -> bool:
        if len(each.traits) + count <= MOST_TRAITS and self.known + count <= MOST_SHAPES:
            return True
        self.ignored += 1
        if not each.is_full:
            each.is_full = True
            log.warning("drift.ignored", event_type=item.type, event_id=str(item.event_id))
        return False

    def _tell(self, new: Sequence[_New]) -> None:
        """Write a line for each event that has shown something new."""
        for (event_id, is_drift), group in groupby(new, lambda n: (n.event_id, n.is_drift)):
            traits = [each.known for each in group]
            said = {
                "event_type": traits[0].type,
                "event_id": str(event_id),
                "traits": [f"{known.kind} {known.path}" for known in traits[:NAMED]],
                "count": len(traits),
            }
            if is_drift:
                self.noticed.update(known.kind for known in traits)
                log.warning("drift.noticed", **said)
            else:
                log.info("drift.learned", **said)


def _is_theirs(item: Item) -> bool:
    """Whether Atlas has said it, and it was understood."""
    return item.type is not None and not item.type.startswith(OWN_EVENTS)
