"""What every verb needs at its edge: a database, a table, a time in words, an id read back."""

import asyncio
import getpass
import json
import os
import re
import socket
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, NoReturn, TypeVar
from uuid import UUID

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from app import telemetry
from app.settings import Settings, read_settings
from app.store.schema import read_state
from app.store.session import Database, Limits
from app.wiring import database_address

READ_LIMIT = timedelta(seconds=10)
# Between two columns; and the room that a long text has even where there is none.
GAP, NARROWEST = "  ", 24
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


# What a shell says of a program that Ctrl-C has ended.
INTERRUPTED = 130


def uninterrupted(action: Callable[[], T], hint: str) -> T:
    """Run something that may be stopped at any time, and say what that means."""
    try:
        return action()
    except KeyboardInterrupt:
        notes.print(f"interrupted: {hint}; the same command goes on")
        raise typer.Exit(INTERRUPTED) from None


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


def read_reason(text: str) -> str:
    """Read why somebody does something; nothing at all is a usage error."""
    if not text.strip():
        raise typer.BadParameter("say why: whoever finds this later will ask")
    return text.strip()


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
    if not sys.stdout.isatty():
        for line in (titles, *([cell(value) for value in row] for row in rows)):
            typer.echo("\t".join(line))
        return
    written = [[cell(_in_one_line(value)) for value in row] for row in rows]
    console = Console(markup=False, highlight=False, emoji=False, soft_wrap=True)
    header, *lines = _aligned([list(titles), *written], console.width)
    console.print(header, style="bold")
    for line in lines:
        console.print(line)


def _aligned(rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """Write rows below each other. Only the last column gives way: the others are copied."""
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    before = sum(widths[:-1]) + len(GAP) * (len(widths) - 1)
    last = min(widths[-1], max(width - before, NARROWEST))
    lines = []
    for row in rows:
        *cells, text = map(Text, row)
        for each, room in zip(cells, widths, strict=False):
            each.truncate(room, pad=True)
        text.truncate(last, overflow="ellipsis")
        lines.append(GAP.join(each.plain for each in (*cells, text)).rstrip())
    return lines


def _in_one_line(value: object) -> object:
    return " ".join(value.splitlines()) if isinstance(value, str) else value


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


_AGO = re.compile(r"(\d{1,6})\s*([dhm])(?:\s+ago)?")
_LENGTHS = {"d": timedelta(days=1), "h": timedelta(hours=1), "m": timedelta(minutes=1)}


def read_moment(text: str, now: datetime) -> datetime:
    """Read a time that a person typed: a date, a time, or how long ago it was."""
    if (ago := _AGO.fullmatch(text.strip())) is not None:
        try:
            return now - int(ago[1]) * _LENGTHS[ago[2]]
        except OverflowError:
            return datetime.min.replace(tzinfo=UTC)
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        raise typer.BadParameter(
            f"{printable(text)[:80]!r} is no time: 2026-07-01, 2026-07-01T09:30Z, 7d or 12h"
        ) from None
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Step:
    """Where something long stands: so many of so many, and what else there is to say."""

    done: int
    total: int
    text: str = ""


# Behind a pipe, not every step is worth a line.
LINE_EVERY = 5.0


async def follow(
    steps: AsyncGenerator[T, None], show: Callable[[T], Step], *, console: Console = notes
) -> T:
    """Show the steps of something long: a bar on a terminal, or lines; give the last step."""
    bar = Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}", markup=False),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    shown_at, last = -LINE_EVERY, None
    # Closed here and now, not when the memory is tidied up: what it writes down at its end
    # needs the database.
    async with aclosing(steps):
        with bar:
            task = bar.add_task("", total=None)
            async for last in steps:
                step = show(last)
                bar.update(task, completed=step.done, total=step.total, description=step.text)
                if not console.is_terminal and time.monotonic() - shown_at >= LINE_EVERY:
                    shown_at = time.monotonic()
                    console.print(f"{step.done}/{step.total} {step.text}".rstrip())
    assert last is not None  # each of them says at least where it begins
    return last


def ago(moment: datetime, now: datetime) -> str:
    """Say how long ago something was, in its largest unit."""
    seconds = int((now - moment).total_seconds())
    for unit, size in _UNITS:
        count = seconds // size
        if count > 0:
            return f"{count} {unit}{'s' if count > 1 else ''} ago"
    return "just now"
