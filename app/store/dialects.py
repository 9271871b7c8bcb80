"""What PostgreSQL and SQLite say differently: the time, and lists of values."""

import json
from collections.abc import Iterable
from datetime import datetime, timedelta
from uuid import UUID

from sqlalchemy import ColumnElement, func, literal_column, type_coerce
from sqlalchemy.ext.asyncio import AsyncConnection

from app.store.base import UtcDateTime

SQLITE_NOW = "strftime('%Y-%m-%d %H:%M:%f000', 'now')"
# With a parameter, as `seconds` writes it.
SQLITE_LATER = "strftime('%Y-%m-%d %H:%M:%f000', 'now', ?)"


def is_postgresql(connection: AsyncConnection) -> bool:
    """Tell whose SQL this connection speaks."""
    return connection.dialect.name != "sqlite"


def seconds(wait: timedelta) -> str:
    """Write a length of time as SQLite adds it to a time."""
    return f"{wait.total_seconds():+.3f} seconds"


def hexes(ids: Iterable[UUID]) -> str:
    """Write ids as SQLite keeps them, as one parameter for `json_each`."""
    return json.dumps([id_.hex for id_ in ids])


def now(connection: AsyncConnection) -> ColumnElement[datetime]:
    """The time of the database, as an expression; read back, it is an instant on both."""
    moment = func.statement_timestamp() if is_postgresql(connection) else literal_column(SQLITE_NOW)
    return type_coerce(moment, UtcDateTime())
