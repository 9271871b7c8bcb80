"""Write many rows with few statements, whose texts stay the same.

PostgreSQL takes one array per column (`unnest`), so that the text of the statement, and
with it its prepared plan, does not depend on the number of rows. SQLite takes the rows
in portions whose sizes are powers of two. Core expressions would cost several times as
much, and this is the hot path.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any
from uuid import UUID

from pydantic_core import to_json
from sqlalchemy import Table, Uuid
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.types import BigInteger, Boolean, Integer, LargeBinary, TypeEngine

from app.store.base import Document, UtcDateTime, in_utc, text_to_time, time_to_text
from app.store.session import fetch

# So many rows of the widest table have fewer parameters than SQLite takes, which are 32,766.
MOST_ROWS = 256


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

    @property
    def unnested(self) -> str:
        """The rows as PostgreSQL sees them, `incoming`: from array parameters, one a column."""
        arrays = ", ".join(f"${i}::{name}[]" for i, name in enumerate(self._arrays, 1))
        return f"unnest({arrays}) AS incoming ({self.listed})"

    @property
    def selected(self) -> str:
        """The columns of `incoming` rows, documents turned from text into jsonb."""
        return ", ".join(
            f"incoming.{name}::jsonb" if document else f"incoming.{name}"
            for name, document in zip(self.names, self._documents, strict=True)
        )

    def arrays(self, rows: Iterable[Sequence[Any]]) -> list[list[Any] | None]:
        """Turn rows, at least one, into one array per column, as PostgreSQL takes them."""
        columns: list[Any] = [list(c) for c in zip(*rows, strict=True)]
        for i, write in self._writers[False]:
            columns[i] = [write(value) for value in columns[i]]
        # `unnest` fills up shorter arrays with nulls, and most columns of most events are
        # null: the driver looks at each element, so what is not sent costs nothing.
        return [None if column.count(None) == len(column) else column for column in columns]

    def tuples(
        self, rows: Iterable[Sequence[Any]], *, is_postgresql: bool = False
    ) -> list[tuple[Any, ...]]:
        """Turn rows into tuples, as SQLite takes them, or PostgreSQL as rows of a type."""
        writers = self._writers[not is_postgresql]
        return [_converted(row, writers) for row in rows]

    def read(self, row: Sequence[Any], *, is_postgresql: bool) -> tuple[Any, ...]:
        """Turn one row of a driver's answer into Python values."""
        return _converted(row, self._readers[not is_postgresql])


def _converted(
    row: Sequence[Any], converters: Sequence[tuple[int, Callable[[Any], Any]]]
) -> tuple[Any, ...]:
    if not converters:
        return tuple(row)
    values = list(row)
    for i, convert in converters:
        values[i] = convert(values[i])
    return tuple(values)


class RowsOfSqlite:
    """One statement of SQLite for many rows: `head VALUES (…), (…) tail`.

    Several rows in one step take the place of many: between two steps, other threads run. The
    numbers of rows are powers of two, so that few texts are prepared.
    """

    def __init__(self, head: str, row: str, tail: str = "") -> None:
        self._head, self._row, self._tail = head, row, tail
        self._texts: dict[int, str] = {}

    async def run(self, connection: AsyncConnection, rows: Sequence[Sequence[Any]]) -> None:
        """Insert `rows`, in their order."""
        start = 0
        while start < len(rows):
            size = min(MOST_ROWS, 1 << (len(rows) - start).bit_length() - 1)
            values = tuple(chain.from_iterable(rows[start : start + size]))
            await connection.exec_driver_sql(self.text(size), values)
            start += size

    def text(self, size: int) -> str:
        """Write the statement for so many rows."""
        text = self._texts.get(size)
        if text is None:
            listed = ", ".join([self._row] * size)
            text = self._texts[size] = f"{self._head} VALUES {listed} {self._tail}"
        return text


class Insert:
    """Insert rows; those that a unique key refuses are left out if `lenient`."""

    def __init__(self, columns: Columns, *, lenient: bool = False) -> None:
        self._conflict = " ON CONFLICT DO NOTHING" if lenient else ""
        marks = ", ".join("?" for _ in columns.names)
        self.columns = columns
        self.postgresql = self.text(columns.unnested)
        head = f"INSERT INTO {columns.table} ({columns.listed})"
        self._sqlite = RowsOfSqlite(head, f"({marks})", self._conflict)
        self.one_of_sqlite = f"{head} VALUES ({marks}){self._conflict}"

    def text(self, incoming: str) -> str:
        """Write the statement for PostgreSQL; `incoming` is where the rows come from."""
        columns = self.columns
        return (
            f"INSERT INTO {columns.table} ({columns.listed}) "
            f"SELECT {columns.selected} FROM {incoming}{self._conflict}"
        )

    async def run(self, connection: AsyncConnection, rows: Sequence[Sequence[Any]]) -> None:
        """Insert `rows`, in their order; none is fine."""
        if not rows:
            return
        if connection.dialect.name == "sqlite":
            await self._sqlite.run(connection, self.columns.tuples(rows))
        else:
            await fetch(connection, self.postgresql, self.columns.arrays(rows))
