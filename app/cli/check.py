"""`check`: say whether the service would run here, and keep its promises."""

import asyncio
from collections.abc import Iterator
from datetime import UTC, datetime

import typer
from rich.console import Console

from app import telemetry
from app.cli import findings
from app.cli.findings import Finding, Level
from app.cli.terminal import printable
from app.errors import AppError
from app.settings import Settings, read_settings
from app.store.session import Database, DatabaseError
from app.wiring import database_address, load_callbacks

_STYLES = {Level.OK: "green", Level.WARN: "yellow", Level.FAIL: "bold red"}


def check() -> None:
    """Look at settings, keys, tokens, callbacks and the database; say what to do.

    Each line begins with [b]ok[/b], [b]warn[/b] or [b]fail[/b]; the exit status is 1 if
    one of them is a [b]fail[/b]. No secret is shown. Run it before a deployment:

      python -m app check

    It wants the settings of the parts that it stands for: DATABASE_URL, the keys, CALLBACKS.
    """
    console = Console(markup=False, highlight=False, emoji=False, soft_wrap=True)
    has_failed = False
    for finding in _findings():
        console.print(printable(str(finding)), style=_STYLES[finding.level])
        has_failed = has_failed or finding.level is Level.FAIL
    if has_failed:
        raise typer.Exit(1)


def _findings() -> Iterator[Finding]:
    telemetry.configure(level="ERROR")
    try:
        settings = read_settings()
    except AppError as error:
        yield Finding(Level.FAIL, "settings", str(error))
        return
    yield Finding(Level.OK, "settings can be read")
    yield from findings.of_env_file()
    yield from findings.of_keys(settings, now=datetime.now(UTC))
    yield from findings.of_tokens(settings)
    yield from _of_callbacks(settings)
    yield from asyncio.run(_of_database(settings))
    yield from asyncio.run(_of_migrations(settings))


def _of_callbacks(settings: Settings) -> Iterator[Finding]:
    try:
        yield from findings.of_callbacks(load_callbacks(settings), settings)
    except AppError as error:
        yield Finding(Level.FAIL, "callbacks", str(error))


async def _of_database(settings: Settings) -> list[Finding]:
    try:
        address = database_address(settings)
        database = Database(address)
    except (AppError, ValueError) as error:
        return [Finding(Level.FAIL, "database", str(error))]
    found = list(findings.of_address(settings, address))
    try:
        await database.ping()
        found += await findings.of_server(database)
        found += await findings.of_schema(database, settings)
    except DatabaseError as error:
        found.append(findings.of_failure(error, database))
    finally:
        await database.close()
    return found


async def _of_migrations(settings: Settings) -> list[Finding]:
    """See whether the address for migrations answers, if it is another one."""
    if settings.migrate_database_url is None:
        return []
    try:
        database = Database(database_address(settings, is_migrating=True))
    except (AppError, ValueError) as error:
        return [Finding(Level.FAIL, "MIGRATE_DATABASE_URL", str(error))]
    try:
        await database.ping()
    except DatabaseError as error:
        return [findings.of_failure(error, database, setting="MIGRATE_DATABASE_URL")]
    finally:
        await database.close()
    return [Finding(Level.OK, "MIGRATE_DATABASE_URL answers")]
