"""Write many rows with one constant statement.

PostgreSQL takes one array per column (`unnest`), so that the text of the statement, and
with it its prepared plan, does not depend on the number of rows. SQLite takes the rows
one by one inside the driver. Core expressions would cost several times as much, and this
is the hot path.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from uuid import UUID

from pydantic_core import to_json
from sqlalchemy import Table, Uuid
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.types import BigInteger, Boolean, Integer, LargeBinary, TypeEngine

from app.store.base import Document, UtcDateTime, in_utc, text_to_time, time_to_text
from app.store.session import fetch


def dumps(value: Any) -> str | None:
    """Write a document as JSON; None stays None, as a NULL."""
    if value is None:
        return None
    text = to_json(value)
    # `jsonb` would give 1e+23 back as another number, an integer, so it gets one at once.
    return (text if b"e+" not in text else to_json(_written_out(value))).decode()


def _written_out(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _written_out(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_written_out(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _array_type(kind: TypeEngine[Any]) -> str:
    for known, name in (
        (UtcDateTime, "timestamptz"),
        (Uuid, "uuid"),
        (BigInteger, "int8"),
        (Integer, "int4"),
        (Boolean, "bool"),
        (LargeBinary, "bytea"),
    ):
        if isinstance(kind, known):
            return name
    return "text"


def _is_document(kind: TypeEngine[Any]) -> bool:
    return isinstance(kind, type(Document))


def _writer(kind: TypeEngine[Any], *, sqlite: bool) -> Callable[[Any], Any] | None:
    if _is_document(kind):
        return dumps
    if sqlite and isinstance(kind, UtcDateTime):
        return lambda value: None if value is None else time_to_text(value)
    if sqlite and isinstance(kind, Uuid):
        return lambda value: None if value is None else value.hex
    return None


def _from_sqlite(value: Any) -> Any:
    # A column that holds documents turns a bare number into one.
    return json.loads(value) if isinstance(value, str) else value


def _reader(kind: TypeEngine[Any], *, sqlite: bool) -> Callable[[Any], Any] | None:
    if _is_document(kind):
        # The driver of PostgreSQL has decoded it already: a text there is a document itself.
        return _from_sqlite if sqlite else None
    if isinstance(kind, UtcDateTime):
        read = text_to_time if sqlite else in_utc
        return lambda value: None if value is None else read(value)
    if sqlite and isinstance(kind, Uuid):
        return lambda value: None if value is None else UUID(value)
    if sqlite and isinstance(kind, Boolean):
        return lambda value: None if value is None else bool(value)
    return None


class Columns:
    """Some columns of one table, and how their values travel to and from each database."""

    def __init__(self, table: Table, names: Sequence[str]) -> None:
        self.table = table.name
        self.names = tuple(names)
        kinds = [table.c[name].type for name in names]
        self._arrays = [_array_type(kind) for kind in kinds]
        self._documents = [_is_document(kind) for kind in kinds]
        self._writers = {
            sqlite: [(i, w) for i, k in enumerate(kinds) if (w := _writer(k, sqlite=sqlite))]
            for sqlite in (True, False)
        }
        self._readers = {
            sqlite: [(i, r) for i, k in enumerate(kinds) if (r := _reader(k, sqlite=sqlite))]
            for sqlite in (True, False)
        }

    @property
    def listed(self) -> str:
        """The column names, as SQL lists them."""
        return ", ".join(self.names)

    def unnest(self, first: int = 1, *, alias: str = "incoming") -> str:
        """The rows as PostgreSQL sees them, from array parameters `$first` on."""
        arrays = ", ".join(f"${first + i}::{name}[]" for i, name in enumerate(self._arrays))
        return f"unnest({arrays}) AS {alias} ({self.listed})"

    def selected(self, alias: str = "incoming") -> str:
        """The columns of `unnest`, documents turned from text into jsonb."""
        return ", ".join(
            f"{alias}.{name}::jsonb" if document else f"{alias}.{name}"
            for name, document in zip(self.names, self._documents, strict=True)
        )

    def arrays(self, rows: Iterable[Sequence[Any]]) -> list[list[Any] | None]:
        """Turn rows into one array per column, as PostgreSQL takes them."""
        columns: list[Any] = [list(c) for c in zip(*rows, strict=True)] or [None] * len(self.names)
        for i, write in self._writers[False]:
            columns[i] = [write(value) for value in columns[i]]
        # `unnest` fills up shorter arrays with nulls, and most columns of most events are
        # null: the driver looks at each element, so what is not sent costs nothing.
        return [None if column.count(None) == len(column) else column for column in columns]

    def tuples(self, rows: Iterable[Sequence[Any]]) -> list[tuple[Any, ...]]:
        """Turn rows into tuples, as SQLite takes them."""
        return [_converted(row, self._writers[True]) for row in rows]

    def read(self, row: Sequence[Any], *, is_postgresql: bool) -> tuple[Any, ...]:
        """Turn one row of a driver's answer into Python values."""
        return _converted(row, self._readers[not is_postgresql])


def _converted(
    row: Sequence[Any], converters: Sequence[tuple[int, Callable[[Any], Any]]]
) -> tuple[Any, ...]:
    values = list(row)
    for i, convert in converters:
        values[i] = convert(values[i])
    return tuple(values)


class Insert:
    """Insert rows; those that a unique key refuses are left out if `lenient`."""

    def __init__(self, columns: Columns, *, lenient: bool = False) -> None:
        conflict = " ON CONFLICT DO NOTHING" if lenient else ""
        marks = ", ".join("?" for _ in columns.names)
        self.columns = columns
        self.postgresql = (
            f"INSERT INTO {columns.table} ({columns.listed}) "
            f"SELECT {columns.selected()} FROM {columns.unnest()}{conflict}"
        )
        self.sqlite = f"INSERT INTO {columns.table} ({columns.listed}) VALUES ({marks}){conflict}"

    async def run(self, connection: AsyncConnection, rows: Sequence[Sequence[Any]]) -> None:
        """Insert `rows`, in their order; none is fine."""
        if not rows:
            return
        if connection.dialect.name == "sqlite":
            await connection.exec_driver_sql(self.sqlite, self.columns.tuples(rows))
        else:
            await fetch(connection, self.postgresql, self.columns.arrays(rows))
