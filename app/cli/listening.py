"""A process that listens: its ports, its servers, and how they stop together.

Apart from the verbs, because only those that listen have to wait until FastAPI is loaded.
"""

import asyncio
import gc
import resource
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import uvicorn

from app.errors import ConfigError
from app.main import Application, Face, create_app
from app.settings import Settings, is_loopback
from app.store.session import DatabaseError
from app.web.protocol import Protocol, listening
from app.wiring import Services

# Signals nearer to each other than this, in seconds, are one.
_ECHO = 1.0
# Those who wait for news are told of the end, and have so many seconds to take it.
_LEAVE = 2.0
# Descriptors for what is no connection of a client: database, files, calls to others.
_OTHER_FILES = 128

Listener = tuple[Face, str, int]


def serve(settings: Settings, host: str, port: int, *, only: str | None, works: bool) -> None:
    """Listen as the door, as the API or as both, until a signal comes."""
    listeners = _listeners(settings, only, host, port)
    _run(settings, [*listeners, *_metrics_listener(settings, host)], works=works)


def work(settings: Settings, host: str, port: int) -> None:
    """Run callbacks, and listen for health checks only, until a signal comes."""
    listeners = [(Face.HEALTH, host, port), *_metrics_listener(settings, host)]
    _run(settings, listeners, works=True)


def _listeners(settings: Settings, only: str | None, host: str, port: int) -> list[Listener]:
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
    room = _room(settings.max_connections, listeners=len(apps))
    servers = [_server(app, services, room=room) for app in apps]
    sockets = [_bind(host, port) for _, host, port in listeners]
    _tune()
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(_serve(servers, sockets, on_stop=services.tail.close))


def _tune() -> None:
    """Set up the interpreter for a process that runs for long, with several busy threads."""
    # A thread that wants its turn waits for so long at most, not for 5 ms: the loop of the
    # webhooks does not wait for callbacks that compute.
    sys.setswitchinterval(0.0005)
    # What is there now stays; what comes and goes is looked through less often.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


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


def _server(app: Application, services: Services, *, room: int) -> Server:
    config = uvicorn.Config(
        app,
        http=listening(
            max_connections=room,
            on_refusal=services.counting.rejected,
            door=app.door,
        ),
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


def _room(wanted: int, *, listeners: int) -> int:
    """Say how many connections fit, when each that is refused takes a descriptor, too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 2 * wanted * listeners + _OTHER_FILES
    if soft == resource.RLIM_INFINITY:
        return wanted
    if soft < needed:
        # What shells set by default is for programs that use `select`.
        with suppress(ValueError, OSError):
            more = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (more, hard))
            soft = more
    return max(1, min(wanted, (soft - _OTHER_FILES) // (2 * listeners)))


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
