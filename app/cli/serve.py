"""Verbs that run the service: `serve`, `work`, `migrate`, `openapi`."""

import asyncio
import gc
import json
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from enum import StrEnum
from typing import Annotated

import typer
import uvicorn
from rich.console import Console

from app import telemetry
from app.cli.findings import GENERATED
from app.errors import ConfigError
from app.main import Application, Face, create_app, describe
from app.settings import Settings, is_loopback, read_settings
from app.store.schema import SchemaState
from app.store.session import DatabaseError
from app.web.protocol import Protocol, telling
from app.wiring import Services, database_address, verification_keys

Host = Annotated[str, typer.Option(help="Address to listen on.")]
Port = Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.", envvar="PORT")]

# Signals nearer to each other than this, in seconds, are one.
_ECHO = 1.0
# Those who wait for news are told of the end, and have so many seconds to take it.
_LEAVE = 2.0
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
    works = only is None and not no_work
    listeners = _listeners(settings, only, host, port)
    _run(settings, [*listeners, *_metrics_listener(settings, host)], works=works)


def work(
    *,
    host: Annotated[str, typer.Option(help="Address of the health port.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Health port.", envvar="PORT")] = 8001,
) -> None:
    """Run callbacks alone, with a health port; start as many of these as the load needs."""
    settings = _settings()
    listeners = [(Face.HEALTH, host, port), *_metrics_listener(settings, host)]
    _run(settings, listeners, works=True)


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
    typer.echo(json.dumps(describe(), indent=2, sort_keys=True, ensure_ascii=False))


def _tune() -> None:
    """Set up the interpreter for a process that runs for long, with several busy threads."""
    # A thread that wants its turn waits for so long at most, not for 5 ms: the loop of the
    # webhooks does not wait for callbacks that compute.
    sys.setswitchinterval(0.0005)
    # What is there now stays; what comes and goes is looked through less often.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


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


Listener = tuple[Face, str, int]


def _listeners(settings: Settings, only: Only | None, host: str, port: int) -> list[Listener]:
    if only is not None:
        return [(Face(only), host, port)]
    if settings.api_port is not None:
        return [(Face.WEBHOOKS, host, port), (Face.API, host, settings.api_port)]
    return [(Face.EVERYTHING, host, port)]


def _metrics_listener(settings: Settings, host: str) -> list[Listener]:
    """A port of its own for metrics: the one that is public must not show them."""
    return [] if settings.metrics_port is None else [(Face.HEALTH, host, settings.metrics_port)]


def _require_ports_apart(listeners: Sequence[Listener]) -> None:
    """Refuse one port for two: the system would let both have it, and one of them answer."""
    ports = [port for _, _, port in listeners]
    if twice := {port for port in ports if ports.count(port) > 1}:
        raise ConfigError(
            f"port {min(twice)} is named twice: --port (or PORT), API_PORT and METRICS_PORT "
            "have to differ"
        )


def _run(settings: Settings, listeners: Sequence[Listener], *, works: bool) -> None:
    _require_ports_apart(listeners)
    takes = any(face in {Face.EVERYTHING, Face.WEBHOOKS} for face, _, _ in listeners)
    services = Services(settings, takes_webhooks=takes, works=works)
    asyncio.run(_prepare(services))
    apps = [
        create_app(
            services,
            face=face,
            is_owner=position == 0,
            is_production=services.database.is_postgresql or not is_loopback(host),
        )
        for position, (face, host, _) in enumerate(listeners)
    ]
    servers = [_server(app, services) for app in apps]
    sockets = [_bind(host, port) for _, host, port in listeners]
    _tune()
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(_serve(servers, sockets, on_stop=services.tail.close))


def _bind(host: str, port: int) -> list[socket.socket]:
    """Take the port before anything is started; nobody is listened to yet."""
    sockets = []
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        ):
            sockets.append(taken := socket.socket(family, kind, protocol))
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                taken.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            taken.bind(address)
    except OSError as error:
        for taken in sockets:
            taken.close()
        raise ConfigError(
            f"cannot listen on {host}, port {port}: {error.strerror}; say another --host or --port"
        ) from error
    return sockets


async def _prepare(services: Services) -> None:
    """Refuse a schema or keys that do not fit; a database that is away may still come."""
    try:
        await services.prepare()
    except DatabaseError:
        return
    finally:
        await services.database.close()


def _loop_factory() -> type[asyncio.AbstractEventLoop] | None:
    try:
        import uvloop  # noqa: PLC0415  # absent on Windows
    except ImportError:
        return None
    return uvloop.Loop


class Server(uvicorn.Server):
    """Leaves signals to `_serve`, so that one signal stops every listener in order."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield


def _server(app: Application, services: Services) -> Server:
    config = uvicorn.Config(
        app,
        http=telling(services.counting.rejected),
        ws="none",
        access_log=False,
        log_config=None,
        proxy_headers=False,
        server_header=False,
        # Longer than any balancer keeps a connection, so that it never finds one closed.
        timeout_keep_alive=75,
        timeout_graceful_shutdown=10,
    )
    return Server(config)


def _leave(servers: Sequence[Server]) -> None:
    for server in servers:
        for connection in list(server.server_state.connections):
            if isinstance(connection, Protocol):
                connection.leave()


async def _serve(
    servers: Sequence[Server],
    sockets: Sequence[list[socket.socket]],
    *,
    on_stop: Callable[[], None],
) -> None:
    loop = asyncio.get_running_loop()

    stopped_at: list[float] = []

    def stop() -> None:
        # A later signal does not wait for open requests. One that follows at once is the
        # same: a terminal sends it to everybody, and make passes its own on.
        is_again = bool(stopped_at) and loop.time() - stopped_at[0] > _ECHO
        stopped_at.append(loop.time())
        for server in servers:
            server.should_exit, server.force_exit = True, is_again
        # Open requests are waited for before anything is stopped, so those that wait for
        # something to happen have to end now.
        on_stop()
        loop.call_later(_LEAVE, _leave, servers)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    async with asyncio.TaskGroup() as group:
        for server, bound in zip(servers, sockets, strict=True):
            group.create_task(server.serve(bound))
