"""How many may wait at once: for each token, and in all."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from app.errors import TooMany


class Seats:
    """Seats for those who wait; nobody can take all of them."""

    def __init__(self, total: int, *, each: int) -> None:
        self._total = total
        self._each = each
        self._taken: Counter[str] = Counter()

    @property
    def taken(self) -> int:
        """How many wait just now."""
        return self._taken.total()

    @contextmanager
    def take(self, name: str) -> Iterator[None]:
        """Take a seat for the consumer of this name. Raises `TooMany`."""
        if self._taken[name] >= self._each:
            raise TooMany(
                f"{self._each} requests of this token wait already (API_WAITERS_PER_TOKEN)"
            )
        if self.taken >= self._total:
            raise TooMany(f"{self._total} requests wait already (API_WAITERS)")
        self._taken[name] += 1
        try:
            yield
        finally:
            self._taken[name] -= 1
