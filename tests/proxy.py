"""A wire between a client and PostgreSQL that can be cut at the worst moment."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from enum import Enum
from urllib.parse import urlsplit, urlunsplit


class Trap(Enum):
    """What becomes of the reply to the next COMMIT, which the server does carry out."""

    RESET = "swallow the reply and reset the connection"
    STALL = "swallow the reply and everything after it"


class Proxy:
    """Passes bytes on, until a trap is set; a trap springs once."""

    def __init__(self, upstream: tuple[str, int]) -> None:
        self.trap: Trap | None = None
        self.sprung = 0
        self._upstream = upstream
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_connection(*self._upstream)
        sprung: list[Trap] = []
        pumps = [
            asyncio.create_task(self._to_server(reader, server_writer, sprung)),
            asyncio.create_task(self._to_client(server_reader, writer, sprung)),
        ]
        self._tasks.update(pumps)
        await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        for each in (writer, server_writer):
            each.transport.abort()

    async def _to_server(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, sprung: list[Trap]
    ) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                if b"COMMIT;" in data and self.trap is not None:
                    sprung.append(self.trap)
                    self.trap = None
                    self.sprung += 1
                writer.write(data)
                await writer.drain()

    async def _to_client(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, sprung: list[Trap]
    ) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                if Trap.RESET in sprung:
                    return
                if not sprung:
                    writer.write(data)
                    await writer.drain()

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()


@asynccontextmanager
async def proxy(url: str) -> AsyncIterator[tuple[Proxy, str]]:
    """A proxy before the server of `url`, and the URL that goes through it."""
    parts = urlsplit(url)
    wire = Proxy((parts.hostname or "", parts.port or 5432))
    server = await asyncio.start_server(wire.serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    netloc = parts.netloc.rpartition(":")[0] + f":{port}"
    try:
        yield wire, urlunsplit(parts._replace(netloc=netloc, query="sslmode=disable"))
    finally:
        server.close()
        wire.close()
