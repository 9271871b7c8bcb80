"""Notice that another server has taken the place of the database.

What the old one had not passed on to it is gone, although it was acknowledged; only a
synchronous standby has everything. Nobody else would say so: the tables look as they should.
"""

from app.store import durability
from app.store.session import Database, DatabaseError, is_disconnect
from app.telemetry import get_logger

log = get_logger("service")

REMEDY = (
    "unless it was a synchronous standby, events of the last seconds before may be lost: "
    "compare with Atlas (docs/reliability.md)"
)


class Succession:
    """Compares the server with the one of the last look."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._known: str | None = None
        # Some hosted servers do not tell.
        self._is_untold = not database.is_postgresql
        self.seen = 0

    async def look(self) -> None:
        """Look once; say so if it is another server."""
        if self._is_untold:
            return
        try:
            found = await durability.timeline_of(self._database)
        except DatabaseError as error:
            self._is_untold = not (is_disconnect(error) or isinstance(error, TimeoutError))
            return
        if found is None:
            return
        if self._known not in {None, found}:
            self.seen += 1
            log.error("database.succeeded", timeline=found, was=self._known, remedy=REMEDY)
        self._known = found
