"""A connection that says nothing, says it slowly, or takes no answer, does not stay."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import uvicorn

from app.web.protocol import Protocol
from app.web.seats import CUT
from tests.replicas import eventually


class Impatient(Protocol):
    """With deadlines that a test can wait for."""

    head_time = 0.5
    reader_time = 0.3
    max_connections = 3


async def application(scope: Any, __: Any, send: Any) -> None:
    """Answers at once and reads nothing, as a refusal by the head does."""
    if scope["path"] in {"/long", "/rest"}:
        await answer_at_length(scope, send)
        return
    headers = [(b"content-length", b"0")]
    await send({"type": "http.response.start", "status": 401, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


PIECE = b"x" * 10_000


async def answer_at_length(scope: Any, send: Any) -> None:
    """Answer more than lies on a wire; at `/rest`, only until there is something left to send."""
    transport = scope[CUT].__self__
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for _ in range(2_000):
        await send({"type": "http.response.body", "body": PIECE, "more_body": True})
        if scope["path"] == "/rest" and transport.get_write_buffer_size():
            break
    await send({"type": "http.response.body", "body": b""})


@contextlib.asynccontextmanager
async def connected(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.close()


@pytest.fixture(name="state")
def _state() -> uvicorn.server.ServerState:
    return uvicorn.server.ServerState()


@pytest.fixture(name="port")
async def _port(state: uvicorn.server.ServerState) -> AsyncIterator[int]:
    config = uvicorn.Config(application, log_config=None, lifespan="off", http=Impatient)
    config.load()
    server = await asyncio.get_running_loop().create_server(
        lambda: Impatient(config, state, {}), "127.0.0.1", 0
    )
    async with server:
        yield server.sockets[0].getsockname()[1]


async def read_to_end(reader: asyncio.StreamReader) -> bytes:
    async with asyncio.timeout(10):
        with contextlib.suppress(ConnectionError):
            return await reader.read()
    return b""


class TestHead:
    @pytest.mark.parametrize(
        "said",
        [
            pytest.param(b"", id="nothing"),
            pytest.param(b"\r\n\r\n", id="empty-lines"),
            pytest.param(b"POST /webhooks/atlas HTTP/1.1\r\nX-A: b", id="half-a-head"),
        ],
    )
    async def test_that_does_not_come_is_not_waited_for(self, port: int, said: bytes) -> None:
        async with connected(port) as (reader, writer):
            writer.write(said)

            assert b"" == await read_to_end(reader)

    async def test_that_trickles_gets_no_time_on_top(self, port: int) -> None:
        async with connected(port) as (reader, writer):
            end = asyncio.create_task(read_to_end(reader))
            for byte in b"POST /" + b"x" * 1000:
                writer.write(bytes([byte]))
                await asyncio.wait([end], timeout=0.01)
                if end.done():
                    break

            assert end.done()

    async def test_may_come_late_on_a_connection_that_was_used(self, port: int) -> None:
        """Balancers keep connections, and must not find them closed."""
        async with connected(port) as (reader, writer):
            for _ in range(2):
                writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
                head = await reader.readuntil(b"\r\n\r\n")
                assert head.startswith(b"HTTP/1.1 401")
                await asyncio.sleep(3 * Impatient.head_time)

    async def test_of_the_second_request_must_come_in_time(self, port: int) -> None:
        async with connected(port) as (reader, writer):
            writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"GET / HT")

            assert b"" == await read_to_end(reader)

    async def test_that_began_with_the_request_before_must_come_in_time(self, port: int) -> None:
        async with connected(port) as (reader, writer):
            writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\nGET / HT")

            assert 1 == (await read_to_end(reader)).count(b"HTTP/1.1 ")


class TestBodyThatNobodyReads:
    async def test_is_thrown_away_for_a_while(self, port: int) -> None:
        async with connected(port) as (reader, writer):
            writer.write(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\n12")
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"34GET / HTTP/1.1\r\nHost: a\r\n\r\n")

            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 401")

    async def test_is_no_head_however_large(self, port: int) -> None:
        async with connected(port) as (reader, writer):
            writer.write(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2000000\r\n\r\n")
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"x" * 2_000_000 + b"GET / HT")
            writer.write(b"TP/1.1\r\nHost: a\r\n\r\n")

            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 401")

    async def test_may_be_broken_without_a_second_answer(self, port: int) -> None:
        async with connected(port) as (reader, writer):
            writer.write(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"no hex\r\n")

            assert b"" == await read_to_end(reader)

    async def test_is_not_waited_for_either(self, port: int) -> None:
        async with connected(port) as (reader, writer):
            writer.write(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 400\r\n\r\n12")
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"3")

            assert b"" == await read_to_end(reader)

    async def test_makes_room_for_a_request_that_must_come_soon(self, port: int) -> None:
        async with connected(port) as (reader, writer):
            writer.write(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\n")
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"1234")

            assert b"" == await read_to_end(reader)


# A little more than is allowed: what is not even read when the refusal is written would make
# the system answer with a reset, and that may overtake the refusal.
LINES = b"".join(b"X-%d: %s\r\n" % (number, b"x" * 1000) for number in range(70))


class TestTooMuch:
    @pytest.mark.parametrize(
        "said",
        [
            pytest.param(b"GET /" + b"x" * 66_000, id="target-without-end"),
            pytest.param(b"GET / HTTP/1.1\r\nA: " + b"x" * 66_000, id="line-without-end"),
            pytest.param(b"GET / HTTP/1.1\r\n" + LINES, id="lines-without-end"),
            pytest.param(b"GET / HTTP/1.1\r\n" + LINES + b"\r\n", id="complete"),
        ],
    )
    async def test_in_the_head_is_refused(self, port: int, said: bytes) -> None:
        async with connected(port) as (reader, writer):
            writer.write(said)

            assert (await read_to_end(reader)).startswith(b"HTTP/1.1 431 ")

    async def test_after_the_body_is_refused(self, port: int) -> None:
        async with connected(port) as (reader, writer):
            writer.write(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n")
            writer.write(LINES)

            assert 1 == (await read_to_end(reader)).count(b"HTTP/1.1 ")


class TestUpgrade:
    @pytest.mark.parametrize("size", [1, 7, 100_000], ids=["bytes", "pieces", "at-once"])
    async def test_is_read_as_if_nobody_had_asked(self, port: int, size: int) -> None:
        head = b"POST / HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 4\r\n"
        said = (head + b"\r\nGET ") * 3
        async with connected(port) as (reader, writer):
            for start in range(0, len(said), size):
                writer.write(said[start : start + size])
                await asyncio.sleep(0)

            for _ in range(3):
                assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 401")
            assert b"" == await read_to_end(reader)


@contextlib.contextmanager
def asking(port: int, said: bytes, *, room: int = 4096) -> Iterator[socket.socket]:
    """A client that asks, and does not read; the system keeps so much for it."""
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
        client.connect(("127.0.0.1", port))
        client.settimeout(0)
        client.send(said)
        yield client


class TestReader:
    @pytest.mark.parametrize("path", ["/long", "/rest"])
    @pytest.mark.parametrize("more", ["", "Connection: close\r\n"], ids=["kept", "closing"])
    async def test_that_takes_nothing_is_cut_off(
        self, port: int, state: uvicorn.server.ServerState, path: str, more: str
    ) -> None:
        said = f"GET {path} HTTP/1.1\r\nHost: a\r\n{more}\r\n".encode()

        with asking(port, said):
            await eventually(lambda: state.connections)
            if path == "/rest" and not more:
                # What is kept open is closed when it was idle for long, or by a stop.
                await eventually(lambda: state.total_requests)
                [connection] = state.connections
                assert isinstance(connection, Protocol)
                connection.timeout_keep_alive_handler()

            await eventually(lambda: not state.connections and not state.tasks)

    async def test_that_is_slow_is_given_all_of_it(self, port: int) -> None:
        loop = asyncio.get_running_loop()
        said = b"GET /long HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
        taken, began = 0, loop.time()
        with asking(port, said, room=1_000_000) as client:
            while piece := await loop.sock_recv(client, 500_000):
                taken += len(piece)
                if loop.time() - began < 3 * Impatient.reader_time:
                    await asyncio.sleep(0.01)

        assert taken > 2_000 * len(PIECE)


class TestTooManyConnections:
    async def test_are_told_to_come_again(
        self, port: int, state: uvicorn.server.ServerState
    ) -> None:
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(Impatient.max_connections):
                _, writer = await stack.enter_async_context(connected(port))
                writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            async with connected(port) as (reader, writer):
                writer.write(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n{}")
                refused = await read_to_end(reader)
        await eventually(lambda: not state.connections)
        async with connected(port) as (reader, writer):
            writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            head = await reader.readuntil(b"\r\n\r\n")

        assert refused.startswith(b"HTTP/1.1 503 ")
        assert b"\r\nretry-after: 1\r\n" in refused
        assert b"\r\ncontent-type: application/problem+json\r\n" in refused
        assert head.startswith(b"HTTP/1.1 401 ")

    async def test_make_nobody_end_the_process(self, port: int) -> None:
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(Impatient.max_connections):
                await stack.enter_async_context(connected(port))
            async with connected(port) as (reader, writer):
                writer.write(b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n")

                assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 401 ")

    async def test_are_not_told_if_there_is_no_end_of_them(self, port: int) -> None:
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(2 * Impatient.max_connections):
                await stack.enter_async_context(connected(port))
            async with connected(port) as (reader, _):
                assert b"" == await read_to_end(reader)
