"""What every verb needs at its edge: a database, a table, a time in words, an id read back."""

import asyncio
import getpass
import json
import os
import socket
import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NoReturn, TypeVar
from uuid import UUID

import typer
from rich.console import Console
from rich.table import Table

from app import telemetry
from app.settings import Settings, read_settings
from app.store.migrations import read_state
from app.store.session import Database, Limits
from app.wiring import database_address

READ_LIMIT = timedelta(seconds=10)
_UNITS = (("day", 86400), ("hour", 3600), ("minute", 60), ("second", 1))

T = TypeVar("T")

notes = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


def with_database(
    action: Callable[[Database, Settings], Awaitable[T]], *, limits: Limits | None = None
) -> T:
    """Run `action` on the database that the settings name, if its schema fits."""
    settings = read_settings()
    telemetry.configure(level="WARNING", form=settings.log_format, stream=sys.stderr.buffer)

    async def run() -> T:
        database = Database(database_address(settings), limits=limits)
        try:
            async with asyncio.timeout(READ_LIMIT.total_seconds()):
                state = await read_state(database)
            state.require()
            return await action(database, settings)
        finally:
            await database.close()

    return asyncio.run(run())


def actor() -> str:
    """Name who works here, for the audit."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        # In a container the user may have a number only.
        user = str(os.getuid())
    return f"cli:{user}@{socket.gethostname()[:64]}"


def read_id(text: str, what: str) -> UUID:
    """Read an id that a person typed; anything but a whole one is a usage error."""
    try:
        return UUID(text)
    except ValueError:
        raise typer.BadParameter(
            f"{printable(text)[:80]!r} is no id of {what}: give it in full, as the list shows it"
        ) from None


def printable(text: str) -> str:
    """Escape what would move the cursor or change the colours of a terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def cell(value: object) -> str:
    """Write a value for a table: nothing for None, times without fractions."""
    if value is None:
        return ""
    if isinstance(value, datetime):
        return value.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    if isinstance(value, bool):
        return "yes" if value else "no"
    return printable(str(value))


def print_table(titles: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table for eyes on a terminal, or lines with tabs for other programs."""
    written = [[cell(value) for value in row] for row in rows]
    if not sys.stdout.isatty():
        for line in (titles, *written):
            typer.echo("\t".join(line))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in titles:
        table.add_column(title, overflow="fold")
    for line in written:
        table.add_row(*line)
    Console(markup=False, highlight=False, emoji=False).print(table)


def print_fields(fields: Mapping[str, object]) -> None:
    """Print one thing, a line for each field that has a value."""
    width = max(map(len, fields))
    for name, value in fields.items():
        if value is not None:
            typer.echo(f"{name.ljust(width)}  {cell(value)}")


def print_json(value: Any) -> None:
    """Print a value as JSON that other programs read."""
    typer.echo(json.dumps(value, indent=2, default=_jsonable))


def _jsonable(value: object) -> str:
    return value.isoformat() if isinstance(value, datetime) else str(value)


def fail(message: str) -> NoReturn:
    """Say what went wrong in one line, and end with status 1."""
    notes.print(f"error: {message}")
    raise typer.Exit(1)


def ago(moment: datetime, now: datetime) -> str:
    """Say how long ago something was, in its largest unit."""
    seconds = int((now - moment).total_seconds())
    for unit, size in _UNITS:
        count = seconds // size
        if count > 0:
            return f"{count} {unit}{'s' if count > 1 else ''} ago"
    return "just now"
