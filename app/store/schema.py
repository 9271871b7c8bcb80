"""Tell whether the schema of a database fits this release.

Every verb asks that. It needs the names of the revisions only, so it reads them from their
files; Alembic, which takes long to load, is left to `app.store.migrations`.
"""

import functools
import re
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from pathlib import Path

from sqlalchemy import inspect, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from app import __version__
from app.errors import SchemaMismatch
from app.store.models import ReleaseRow
from app.store.session import Database

ROOT = Path(__file__).resolve().parents[2]
# Long enough for a server that was just started, and for nobody's patience.
_LOOK = timedelta(seconds=10)

_REVISION = re.compile(r'^revision = "(\w+)"$', re.MULTILINE)
_FOLLOWED = re.compile(r'^down_revision = "(\w+)"$', re.MULTILINE)


class Fit(StrEnum):
    """How the schema of the database relates to this release."""

    EQUAL = "equal"
    COMPATIBLE = "newer, compatible"
    OLDER = "older"
    TOO_NEW = "too new"
    ABSENT = "absent"


@dataclass(frozen=True, slots=True)
class SchemaState:
    """The revision found in the database, and whether this release may serve it."""

    fit: Fit
    found: str | None
    needed: str

    @property
    def is_servable(self) -> bool:
        """True if this release may serve this schema."""
        return self.fit in {Fit.EQUAL, Fit.COMPATIBLE}

    def require(self) -> None:
        """Raise `SchemaMismatch`, with what to do, unless the schema can be served."""
        match self.fit:
            case Fit.ABSENT:
                raise SchemaMismatch("the database has no tables yet: run `python -m app migrate`")
            case Fit.OLDER:
                raise SchemaMismatch(
                    f"the database schema is at {self.found}, this release needs {self.needed}: "
                    "run `python -m app migrate`"
                )
            case Fit.TOO_NEW:
                raise SchemaMismatch(
                    f"the database schema {self.found} belongs to a newer release than "
                    f"{__version__}, and is not compatible with it: deploy the newer release"
                )


async def read_state(database: Database) -> SchemaState:
    """Compare the database's revision with the newest that this release knows."""
    async with database.begin(limit=_LOOK, is_reading=True) as connection:
        found, floor = await _read_revision(connection)
    needed, known = _revisions()
    return SchemaState(_fit(found, floor, needed=needed, known=known), found, needed)


async def _read_revision(connection: AsyncConnection) -> tuple[str | None, str]:
    """Give the revision found, and the oldest release that may serve it."""
    tables = await connection.run_sync(lambda c: set(inspect(c).get_table_names()))
    found, floor = None, "0"
    if "alembic_version" in tables:
        found = (await connection.execute(text("SELECT version_num FROM alembic_version"))).scalar()
    if "releases" in tables:
        floors = (await connection.execute(select(ReleaseRow.min_release))).scalars()
        floor = max(floors, key=_release, default="0")
    return found, floor


def _fit(found: str | None, floor: str, *, needed: str, known: frozenset[str]) -> Fit:
    if found is None:
        return Fit.ABSENT
    if _release(floor) > _release(__version__):
        return Fit.TOO_NEW
    if found not in known:
        return Fit.COMPATIBLE
    return Fit.EQUAL if found == needed else Fit.OLDER


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


@functools.cache
def _revisions() -> tuple[str, frozenset[str]]:
    """Give the newest revision of this release, and all."""
    texts = [path.read_text("utf-8") for path in (ROOT / "migrations" / "versions").glob("*.py")]
    known = {name for each in texts for name in _REVISION.findall(each)}
    (newest,) = known.difference(*map(_FOLLOWED.findall, texts))
    return newest, frozenset(known)
