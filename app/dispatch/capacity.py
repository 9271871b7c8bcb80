"""How many deliveries of which callback to claim next: a fair share for each."""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from app.dispatch.registry import Callback
from app.store.claims import Room

# A callback with a backlog may take so many times the share of one without.
BACKLOG_WEIGHT = 4
# Places that the slow calls of others cannot take away.
RESERVED = 2


@dataclass(frozen=True, slots=True)
class Load:
    """What is under way: calls by callback, and which of them have more waiting.

    Claims of a callback whose calls end quickly may be `ahead` of their places; never those
    of a slow one, which would keep them from workers that have places.
    """

    slots: int
    running: Mapping[str, int]
    hungry: AbstractSet[str]
    ahead: Mapping[str, int] = field(default_factory=dict)

    @property
    def free(self) -> int:
        """Places that nobody has."""
        places = self.slots + sum(self.ahead.values())
        return max(0, places - sum(self.running.values()))


def share(callbacks: Sequence[Callback], load: Load) -> list[Room]:
    """Divide the free places, so that a callback with a long backlog does not starve others.

    Whoever stands first in `callbacks` is served first if there are fewer places than
    callbacks: give them in another order each time.
    """
    reserve = min(RESERVED, load.slots // (2 * len(callbacks)) if callbacks else 0)
    weights = {c.name: BACKLOG_WEIGHT if c.name in load.hungry else 1 for c in callbacks}
    total, left = sum(weights.values()), load.free
    rooms = []
    for callback in callbacks:
        fair = max(1, load.free * weights[callback.name] // total)
        limit = min(fair, left, _most(callback, callbacks, load, reserve))
        if limit > 0:
            rooms.append(Room(callback.name, limit, callback.is_ordered))
            left -= limit
    return rooms


def _most(callback: Callback, callbacks: Sequence[Callback], load: Load, reserve: int) -> int:
    """Give the places that one callback may take at most, whoever else wants some."""
    held_for_others = sum(
        max(0, reserve - load.running.get(other.name, 0))
        for other in callbacks
        if other.name != callback.name
    )
    own = load.slots + load.ahead.get(callback.name, 0)
    most = own - load.running.get(callback.name, 0) - held_for_others
    if callback.concurrency is not None:
        most = min(most, callback.concurrency - load.running.get(callback.name, 0))
    return most
