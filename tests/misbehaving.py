"""A local HTTP server that misbehaves on purpose: it sends the bytes it is told to send.

Usage::

    async with Misbehaving(answer(503, {"Retry-After": "7"})) as server:
        await outbound.request("POST", server.url)
    assert "POST" == server.received[0].method
"""

import asyncio
import socket
import ssl
import struct
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Self

# Larger than what the system keeps for a connection whose other side does not read.
PIECE = b"x" * 65536


@dataclass(frozen=True, slots=True)
class Received:
    """One request as it arrived; headers by lower-case name."""

    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes


# What the server does with one request; it may write anything, at any time, or nothing.
Behaviour = Callable[[Received, asyncio.StreamWriter], Awaitable[None]]


class Misbehaving:
    """Answers each request by the next behaviour; the last one is for all that follow."""

    def __init__(
        self,
        *behaviours: Behaviour,
        tls: ssl.SSLContext | None = None,
        greeting: bytes = b"",
    ) -> None:
        self.received: list[Received] = []
        self.connections = 0
        self._behaviours = behaviours
        self._tls = tls
        self._greeting = greeting
        self._open: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, ssl=self._tls)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._server.close()
        for task in self._open:
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)
        await self._server.wait_closed()

    @property
    def url(self) -> str:
        """Where it listens, with a path and a query that should appear in no message."""
        return self.at("127.0.0.1")

    def at(self, host: str) -> str:
        """Where it listens, under another name of this machine."""
        scheme = "https" if self._tls else "http"
        return f"{scheme}://{host}:{self.port}/hook/path-secret?key=query-secret"

    async def is_left(self) -> None:
        """Return once nobody is connected any more."""
        while self._open:
            await asyncio.wait(set(self._open))

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.ensure_future(self._serve(reader, writer))
        self._open.add(task)
        task.add_done_callback(self._open.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            writer.write(self._greeting)
            with suppress(OSError, asyncio.IncompleteReadError):
                while not writer.is_closing():
                    await self._behave(await _read(reader), writer)
        finally:
            writer.transport.abort()

    async def _behave(self, request: Received, writer: asyncio.StreamWriter) -> None:
        self.received.append(request)
        number = min(len(self.received), len(self._behaviours)) - 1
        await self._behaviours[number](request, writer)
        await writer.drain()


async def _read(reader: asyncio.StreamReader) -> Received:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    first, *lines = head[:-4].split("\r\n")
    method, target, _ = first.split(" ")
    headers = dict(_header(line) for line in lines)
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return Received(method, target, headers, body)


def _header(line: str) -> tuple[str, str]:
    name, _, value = line.partition(":")
    return name.lower(), value.strip()


def answer(
    status: int = 200, headers: Mapping[str, str] | None = None, body: bytes = b""
) -> Behaviour:
    """Answer as one should."""
    every = {**(headers or {}), "Content-Length": str(len(body))}
    lines = [f"HTTP/1.1 {status} Said", *(f"{name}: {value}" for name, value in every.items())]
    return send("\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body)


def send(data: bytes) -> Behaviour:
    """Send these bytes, and keep the connection."""

    async def behave(_: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(data)

    return behave


def send_and_hang_up(data: bytes) -> Behaviour:
    """Send these bytes, and close the connection."""

    async def behave(_: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        writer.close()
        await writer.wait_closed()

    return behave


def send_and_reset(data: bytes) -> Behaviour:
    """Send these bytes, and break the connection instead of ending it."""

    async def behave(_: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        at_once = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
        writer.transport.abort()

    return behave


def never_end(head: bytes, piece: bytes = PIECE) -> Behaviour:
    """Send `head`, then `piece` for ever, and fast: a limit is meant to end it, not a deadline."""
    pieces = piece * max(1, 16_384 // len(piece))

    async def behave(_: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(head)
        while True:
            writer.write(pieces)
            await writer.drain()

    return behave


def drip(head: bytes, *, seconds: float) -> Behaviour:
    """Send `head`, then one byte now and then: too slow to end, too often to be silent."""

    async def behave(_: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(head)
        while True:
            await asyncio.sleep(seconds)
            writer.write(b"x")
            await writer.drain()

    return behave


async def say_nothing(_: Received, __: asyncio.StreamWriter) -> None:
    """Take the request, and keep silent."""
    await asyncio.Event().wait()
