"""Write down, on its envelope, where the signed PDF is kept."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import CursorResult, Table, update
from sqlalchemy.ext.asyncio import AsyncSession

from app.store.models import EnvelopeRow

_TABLE: Table = EnvelopeRow.__table__  # type: ignore[assignment]


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
    """Record `archive` on the envelope; False if the same content is recorded already.

    An author's session does not look into our `schema` by itself, so it is named; SQLite
    has none. Committing is the caller's affair.
    """
    statement = (
        update(_TABLE)
        .where(_TABLE.c.account == account, _TABLE.c.id == envelope_id)
        .where(_TABLE.c.archive_sha256.is_distinct_from(archive.sha256))
        .values(
            archived_at=archive.at,
            archive_name=archive.name,
            archive_sha256=archive.sha256,
            archive_bytes=archive.size,
            version=_TABLE.c.version + 1,
            updated_at=archive.at,
        )
    )
    is_postgresql = session.get_bind().dialect.name == "postgresql"
    options = {"schema_translate_map": {None: schema}} if schema and is_postgresql else {}
    result: CursorResult[Any] = await session.execute(statement, execution_options=options)  # type: ignore[assignment]
    return result.rowcount > 0
