"""What operators did, read back from the audit; `deliveries.audit` writes it."""

from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from app.store.models import AuditRow

_audit: Any = AuditRow.__table__


async def of(connection: AsyncConnection, subject: str) -> Sequence[Any]:
    """Give what was done to one thing, in the order in which it was done."""
    chosen = select(_audit).where(_audit.c.subject == subject)
    return (await connection.execute(chosen.order_by(_audit.c.id))).all()


async def latest(
    connection: AsyncConnection, subjects: Iterable[str], action: str
) -> dict[str, Any]:
    """Give, by subject, the last act of one kind."""
    chosen = select(_audit).where(_audit.c.subject.in_(list(subjects)), _audit.c.action == action)
    rows = await connection.execute(chosen.order_by(_audit.c.id))
    return {row.subject: row for row in rows}
