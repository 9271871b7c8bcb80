"""Verbs that run the service: `serve`, `work`, `migrate`, `openapi`."""

import asyncio
import json
import time
from datetime import timedelta
from enum import StrEnum
from typing import Annotated

import typer
from rich.console import Console

from app import telemetry
from app.cli.findings import GENERATED
from app.errors import ConfigError
from app.settings import Settings, is_loopback, read_settings
from app.store.schema import SchemaState
from app.wiring import database_address, verification_keys

Host = Annotated[str, typer.Option(help="Address to listen on.")]
Port = Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.", envvar="PORT")]

# As long as this a process waits for another one that migrates.
_MIGRATION_WAIT = timedelta(minutes=10)

console = Console(stderr=True, highlight=False)


class Only(StrEnum):
    """The parts that a deployment may run apart."""

    WEBHOOKS = "webhooks"
    API = "api"


def serve(
    *,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    only: Annotated[Only | None, typer.Option(help="Run one part only.")] = None,
    no_work: Annotated[
        bool, typer.Option("--no-work", help="Take webhooks, but run no callbacks.")
    ] = False,
    migrate_first: Annotated[
        bool, typer.Option("--migrate", help="Bring the schema up to date first.")
    ] = False,
    expose_api: Annotated[
        bool, typer.Option("--expose-api", help="Let the public port answer the API, too.")
    ] = False,
) -> None:
    """Take webhooks, answer the API and run callbacks, in one process.

    For production run the parts apart: [b]serve --only webhooks[/b] behind the load
    balancer, [b]serve --only api[/b] inside, and [b]work[/b] for the callbacks.
    """
    settings = _settings()
    _require_keys(settings, only, host=host)
    _require_apart(settings, host=host, only=only, expose_api=expose_api)
    if migrate_first:
        asyncio.run(_migrate(settings, "head"))
    # Loaded where it is needed: the other verbs do not wait for FastAPI.
    from app.cli import listening  # noqa: PLC0415

    listening.serve(settings, host, port, only=only, works=only is None and not no_work)


def work(
    *,
    host: Annotated[str, typer.Option(help="Address of the health port.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Health port.", envvar="PORT")] = 8001,
) -> None:
    """Run callbacks alone, with a health port; start as many of these as the load needs."""
    settings = _settings()
    from app.cli import listening  # noqa: PLC0415

    listening.work(settings, host, port)


def migrate(
    revision: Annotated[str, typer.Argument(help="The revision to go to.")] = "head",
) -> None:
    """Bring the database schema up to date; several at once wait for one another."""
    settings = _settings()
    state = asyncio.run(_migrate(settings, revision))
    state.require()
    console.print(f"schema at {state.found} ({state.fit})")


def openapi() -> None:
    """Print the OpenAPI document of everything that the service answers."""
    from app.main import describe  # noqa: PLC0415

    typer.echo(json.dumps(describe(), indent=2, sort_keys=True, ensure_ascii=False))


def _settings() -> Settings:
    settings = read_settings()
    telemetry.configure(level=settings.log_level, form=settings.log_format)
    return settings


async def _migrate(settings: Settings, revision: str) -> SchemaState:
    # Loading Alembic takes as long as everything else of a start together.
    from app.store.migrations import migrate as bring_up_to_date  # noqa: PLC0415

    address = database_address(settings, is_migrating=True)
    started = time.monotonic()
    try:
        return await bring_up_to_date(
            address.url, schema=address.schema, revision=revision, wait=_MIGRATION_WAIT
        )
    except TimeoutError as error:
        if time.monotonic() - started < _MIGRATION_WAIT.total_seconds():
            # Too early for the lock: this one is the database's.
            raise
        raise ConfigError(
            f"another process has held the migration lock for {_MIGRATION_WAIT}: see whether "
            "it still migrates, end it if it hangs, and run `python -m app migrate` again"
        ) from error


def _require_keys(settings: Settings, only: Only | None, *, host: str) -> None:
    if only is Only.API:
        return
    keys = verification_keys(settings)
    if not keys:
        raise ConfigError(
            "ATLAS_API_KEY is not set: without a key nobody's events could be told from Atlas'. "
            'Set it, or ATLAS_API_KEYS with a key for use in "verify", in the environment or '
            "in .env (`make run` makes one)"
        )
    if not is_loopback(host) and any(key.secret.startswith(GENERATED) for key in keys):
        # It would be taken silently from a `.env` that was meant for a laptop.
        raise ConfigError(
            f"ATLAS_API_KEY was made by `make run`, so Atlas does not know it, and on {host} "
            "others may be let in by it: put the key of your Atlas account there"
        )


def _require_apart(settings: Settings, *, host: str, only: Only | None, expose_api: bool) -> None:
    if is_loopback(host) or only is not None or settings.api_port is not None or expose_api:
        return
    raise ConfigError(
        f"on {host} the port that webhook_url makes public would answer the internal API, too: "
        "say --only webhooks, or set API_PORT for everything but the door, or --expose-api"
    )
