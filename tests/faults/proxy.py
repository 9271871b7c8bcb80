"""A wire between a client and a server that can be made to fail in every way a network can.

Usage::

    async with proxy(database_url) as (wire, url):
        ...                                # through `url`, as if nothing stood between
        wire.delay = 0.05                  # every piece arrives 50 ms later, both ways
        wire.stall(); ...; wire.resume()   # nothing passes, nobody hears of it; then it does
        wire.cut(Cut.RESET)                # all connections break
        wire.cut(Cut.SILENCE)              # they are dead, and nobody is told
        wire.half_close()                  # the server seems to have said all
        wire.swallow_reply()               # the next COMMIT is carried out, its reply is lost
        wire.forget_idle(after=1.0)        # as a NAT does: the next piece finds no connection
        wire.switch_to(("127.0.0.1", 5433))  # new connections reach another server

`proxy_aside` is the same on a thread of its own, for tests that block. Every verb may be
called from any thread. Bytes are never looked into, except for what swallows a reply.
"""

import asyncio
import socket
import ssl
import struct
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit, urlunsplit

Address = tuple[str, int]

# As asyncpg sends it; SQLAlchemy and everybody else here goes through asyncpg.
COMMIT = b"COMMIT;"
# A reset instead of an orderly end.
_AT_ONCE = struct.pack("ii", 1, 0)


class Cut(Enum):
    """How a connection ends."""

    RESET = "both sides are told at once"
    SILENCE = "nobody is told, and nothing passes any more"


@dataclass(frozen=True, slots=True)
class _Trap:
    trigger: bytes
    then: Cut


@dataclass(frozen=True, slots=True)
class _Oblivion:
    after: float
    then: Cut


@dataclass(eq=False, slots=True)
class _Link:
    """One connection of a client, and ours to the server on its behalf."""

    client: asyncio.StreamWriter
    heard_at: float
    server: asyncio.StreamWriter | None = None
    # What becomes of the next thing that the server says, and then of the link.
    trapped: Cut | None = None
    is_silent: bool = False
    # The client was told that nothing will follow.
    is_half_closed: bool = False
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def break_off(self) -> None:
        """End it so that both sides notice."""
        for writer in (self.client, self.server):
            if writer is not None:
                _reset(writer)
        for task in self.tasks:
            task.cancel()


class Proxy:
    """Passes bytes on, until it is told to do otherwise."""

    def __init__(
        self, upstream: Address, *, port: int = 0, tls: ssl.SSLContext | None = None
    ) -> None:
        """Forward to `upstream` what comes to `port`; 0 takes a free one."""
        self.port = port
        # Seconds by which every piece arrives later, in both directions.
        self.delay = 0.0
        # How many connections there ever were, and how many replies were swallowed.
        self.accepted = 0
        self.swallowed = 0
        self._upstream = upstream
        self._tls = tls
        self._trap: _Trap | None = None
        self._oblivion: _Oblivion | None = None
        self._links: set[_Link] = set()

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._flows = asyncio.Event()
        self._flows.set()
        self._server = await asyncio.start_server(
            self._accept, "127.0.0.1", self.port, ssl=self._tls
        )
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._server.close()
        tasks = [task for link in self._links for task in link.tasks]
        self.cut(Cut.RESET)
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._server.wait_closed()

    @property
    def connections(self) -> int:
        """How many connections are open, including those that are silent."""
        return len(self._links)

    def stall(self) -> None:
        """Hold everything back, in both directions; connections stay open and seem well.

        New ones are taken, too, and hear nothing.
        """
        self._do(self._flows.clear)

    def resume(self) -> None:
        """Pass on what was held back, and everything that follows."""
        self._do(self._flows.set)

    def cut(self, how: Cut) -> None:
        """End all connections that there are; new ones work."""

        def end_all() -> None:
            for link in self._links:
                self._end(link, how)

        self._do(end_all)

    def half_close(self) -> None:
        """Tell all clients that the server has said everything; what they say still arrives."""

        def finish_all() -> None:
            for link in self._links:
                link.is_half_closed = True
                link.client.write_eof()

        self._do(finish_all)

    def swallow_reply(self, *, to: bytes = COMMIT, then: Cut = Cut.RESET) -> None:
        """Let the server carry out the next request with `to` in it, and lose its reply.

        The connection goes with it. It happens once; `swallowed` counts.
        """
        self._trap = _Trap(to, then)

    def forget_idle(self, *, after: float, then: Cut = Cut.RESET) -> None:
        """Forget connections on which nothing passed for `after` seconds, as a NAT does.

        Neither side is told before it says something.
        """
        self._oblivion = _Oblivion(after, then)

    def switch_to(self, upstream: Address) -> None:
        """Lead new connections to another server; those that there are stay with theirs."""
        self._upstream = upstream

    def _do(self, act: Callable[[], object]) -> None:
        """Act on the loop, and return when it is done, from whichever thread."""
        try:
            is_here = asyncio.get_running_loop() is self._loop
        except RuntimeError:
            is_here = False
        if is_here:
            act()
            return
        done = threading.Event()
        self._loop.call_soon_threadsafe(act)
        self._loop.call_soon_threadsafe(done.set)
        done.wait()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        link = _Link(writer, self._loop.time())
        task = asyncio.ensure_future(self._serve(link, reader))
        link.tasks.append(task)
        self._links.add(link)
        task.add_done_callback(lambda _: self._links.discard(link))

    async def _serve(self, link: _Link, reader: asyncio.StreamReader) -> None:
        await self._flows.wait()
        try:
            server_reader, link.server = await asyncio.open_connection(*self._upstream)
        except OSError:
            link.break_off()
            return
        pumps = [
            asyncio.ensure_future(self._to_server(link, reader, link.server)),
            asyncio.ensure_future(self._to_client(link, server_reader)),
        ]
        link.tasks.extend(pumps)
        try:
            await asyncio.gather(*pumps)
            for writer in (link.client, link.server):
                writer.close()
        except (OSError, asyncio.CancelledError):
            link.break_off()

    async def _to_server(
        self, link: _Link, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        while data := await reader.read(65536):
            if await self._is_lost(link):
                continue
            if self._trap is not None and self._trap.trigger in data:
                link.trapped, self._trap = self._trap.then, None
                self.swallowed += 1
            writer.write(data)
            await writer.drain()
        await self._pass_end(link, writer)

    async def _to_client(self, link: _Link, reader: asyncio.StreamReader) -> None:
        while data := await reader.read(65536):
            if await self._is_lost(link) or link.is_half_closed:
                continue
            if link.trapped is not None:
                self._end(link, link.trapped)
                continue
            link.client.write(data)
            await link.client.drain()
        await self._pass_end(link, link.client)

    async def _is_lost(self, link: _Link) -> bool:
        """Wait as long as a piece is under way; say whether it never arrives."""
        idle = self._loop.time() - link.heard_at
        if self._oblivion is not None and idle > self._oblivion.after:
            self._end(link, self._oblivion.then)
        if self.delay:
            await asyncio.sleep(self.delay)
        await self._flows.wait()
        link.heard_at = self._loop.time()
        return link.is_silent

    async def _pass_end(self, link: _Link, writer: asyncio.StreamWriter) -> None:
        """One side has said everything: the other one is told, if anything passes at all."""
        await self._flows.wait()
        if link.is_silent:
            await asyncio.Event().wait()
        if link.is_half_closed and writer is link.client:
            return
        if writer.can_write_eof():
            with suppress(OSError):
                writer.write_eof()
        else:
            # TLS knows no half of an end.
            writer.close()

    @staticmethod
    def _end(link: _Link, how: Cut) -> None:
        if how is Cut.SILENCE:
            link.is_silent = True
        else:
            link.break_off()


def _reset(writer: asyncio.StreamWriter) -> None:
    plain = writer.get_extra_info("socket")
    if plain is not None:
        with suppress(OSError):
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
    writer.transport.abort()


@asynccontextmanager
async def proxy(url: str) -> AsyncIterator[tuple[Proxy, str]]:
    """A proxy before the server of a database's `url`, and the URL that goes through it."""
    async with Proxy(_address(url)) as wire:
        yield wire, _through(url, wire.port)


@contextmanager
def proxy_aside(url: str) -> Iterator[tuple[Proxy, str]]:
    """`proxy`, on a thread of its own."""
    started, stop = threading.Event(), asyncio.Event()
    wire = Proxy(_address(url))

    async def run() -> None:
        async with wire:
            started.set()
            await stop.wait()

    thread = threading.Thread(target=asyncio.run, args=[run()], name="proxy")
    thread.start()
    started.wait()
    try:
        yield wire, _through(url, wire.port)
    finally:
        # Not waited for: the loop may be closed before it could say that it is done.
        wire._loop.call_soon_threadsafe(stop.set)
        thread.join()


def _address(url: str) -> Address:
    parts = urlsplit(url)
    return parts.hostname or "127.0.0.1", parts.port or 5432


def _through(url: str, port: int) -> str:
    parts = urlsplit(url)
    user = parts.netloc.rpartition("@")[0]
    netloc = f"{user}@127.0.0.1:{port}" if user else f"127.0.0.1:{port}"
    # What is encrypted could not be looked into.
    query = "sslmode=disable" if parts.scheme.startswith("postgres") else parts.query
    return urlunsplit(parts._replace(netloc=netloc, query=query))
