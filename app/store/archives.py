"""Write down, on its envelope, where the signed PDF is kept."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import CursorResult, Table, insert, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from app.store.dialects import now
from app.store.feed import Kind
from app.store.models import ChangeRow, EnvelopeRow

_TABLE: Table = EnvelopeRow.__table__  # type: ignore[assignment]
_CHANGES: Table = ChangeRow.__table__  # type: ignore[assignment]


@dataclass(frozen=True, slots=True)
class Archive:
    """A signed PDF that is kept: its name in the archive, and what it is like."""

    name: str
    sha256: str
    size: int
    at: datetime


async def record_archive(
    session: AsyncSession, *, schema: str | None, account: str, envelope_id: str, archive: Archive
) -> bool:
    """Record `archive` on the envelope, and note it for the feed.

    False if the same content is recorded already, or the envelope is erased.

    An author's session does not look into our `schema` by itself, so it is named; SQLite
    has none. Committing is the caller's affair.
    """
    statement = (
        update(_TABLE)
        .where(_TABLE.c.account == account, _TABLE.c.id == envelope_id)
        .where(_TABLE.c.archive_sha256.is_distinct_from(archive.sha256))
        .where(_TABLE.c.erased_at.is_(None))
        .values(
            archived_at=archive.at,
            archive_name=archive.name,
            archive_sha256=archive.sha256,
            archive_bytes=archive.size,
            version=_TABLE.c.version + 1,
            updated_at=archive.at,
        )
    )
    options = _options(session, schema)
    result: CursorResult[Any] = await session.execute(statement, execution_options=options)  # type: ignore[assignment]
    if not result.rowcount:
        return False
    # Behind the update, whose lock makes this the order of the envelope's changes.
    changes = insert(_CHANGES).values(
        kind=Kind.ARCHIVE.value,
        account=account,
        envelope_id=envelope_id,
        at=now(await session.connection()),
    )
    await session.execute(changes, execution_options=options)
    return True


async def is_erased(
    session: AsyncSession, *, schema: str | None, account: str, envelope_id: str
) -> bool:
    """Whether a person has had an envelope erased, as of now."""
    query = select(_TABLE.c.erased_at)
    query = query.where(_TABLE.c.account == account, _TABLE.c.id == envelope_id)
    result = await session.execute(query, execution_options=_options(session, schema))
    return result.scalar() is not None


def _options(session: AsyncSession, schema: str | None) -> dict[str, Any]:
    is_postgresql = session.get_bind().dialect.name == "postgresql"
    return {"schema_translate_map": {None: schema}} if schema and is_postgresql else {}
