"""What a request for one envelope waits for, and the wait itself, which holds no connection.

`until` and `min_version` say what must have come before the answer leaves. Without them, a
wait that knows a version (`If-None-Match`) ends with the next one, and any other as soon as
the envelope is there.
"""

import asyncio
from collections.abc import Awaitable, Callable
from hashlib import blake2b
from typing import Any

from app.events.frozen import frozen
from app.events.lifecycle import TERMINAL, rank_of
from app.upkeep.tail import Tail


def tag_of(row: Any) -> str:
    """Write the ETag of a row: no other envelope and no other version has it."""
    whole = f"{row.account}\n{row.id}\n{row.version}\n{row.updated_at.isoformat()}"
    digest = blake2b(whole.encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()
    return f'"{row.version}-{digest}"'


def matches(header: str, tag: str) -> bool:
    """Whether `If-None-Match` names this tag."""
    tags = (part.strip().removeprefix("W/") for part in header.split(","))
    return header.strip() == "*" or tag in tags


@frozen
class Wanted:
    """What must be true of an envelope before the answer leaves."""

    until: str | None = None
    min_version: int | None = None
    known: str | None = None

    def is_met(self, row: Any) -> bool:
        """Whether nothing is left to wait for."""
        if self.until is None and self.min_version is None:
            return not self.is_known(row)
        return self.is_new_enough(row) and self._has_come(row.status)

    def is_known(self, row: Any) -> bool:
        """Whether the caller has this very version already."""
        return self.known is not None and matches(self.known, tag_of(row))

    def is_new_enough(self, row: Any) -> bool:
        """Whether the row has the version that was asked for."""
        return self.min_version is None or row.version >= self.min_version

    def _has_come(self, status: str | None) -> bool:
        # One that is further along the lattice has passed it.
        if self.until is None or status in TERMINAL:
            return True
        return status is not None and rank_of(status) >= rank_of(self.until)


async def watch(
    look: Callable[[], Awaitable[Any | None]],
    wanted: Wanted,
    *,
    tail: Tail,
    envelope_id: str,
    until: float,
) -> Any | None:
    """Look at an envelope whenever something may have happened to it, until it is as wanted.

    Gives the row as it is at the end: as wanted, or once it is `until`, or when the process
    stops; None if there is none.
    """
    while True:
        # In this order: what comes after the look, comes after the position.
        position = tail.end
        row = await look()
        if row is not None and wanted.is_met(row):
            return row
        if tail.is_closed or asyncio.get_running_loop().time() >= until:
            return row
        await tail.about(envelope_id, position, until=until)
