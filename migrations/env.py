"""Run migrations on a connection that `app.store.migrations` opened and locked."""

from typing import Any, Literal

from alembic import context

from app.store import models  # noqa: F401  # fills the metadata
from app.store.base import Base
from app.store.migrations import command_line_connection

target_metadata = Base.metadata


def _render_item(kind: str, item: Any, _: Any) -> str | Literal[False]:
    # Our own types are written as the plain types they stand for.
    if kind == "type" and type(item).__name__ == "UtcDateTime":
        return "sa.DateTime(timezone=True)"
    return False


def _run(connection: Any) -> None:
    context.configure(
        connection=connection,
        target_metadata=target_metadata,
        render_item=_render_item,
        render_as_batch=False,
        transaction_per_migration=True,
    )
    with context.begin_transaction():
        context.run_migrations()


if "connection" in context.config.attributes:
    _run(context.config.attributes["connection"])
else:
    with command_line_connection() as connection:
        _run(connection)
