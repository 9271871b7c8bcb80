"""Each fault of the proxy, as a client and a server on its two ends see it."""

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from urllib.parse import urlsplit

import pytest

from tests.faults.proxy import Cut, Proxy, proxy, proxy_aside
from tests.replicas import eventually

# Long enough for any answer on the loopback; whatever is to be silent, is so for shorter.
SOON, A_WHILE = 10.0, 0.2


class Parrot:
    """A server that says its name and whatever it hears, and remembers it."""

    def __init__(self, name: bytes = b"") -> None:
        self.name = name
        self.heard = b""
        self.endings: list[str] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1024):
                self.heard += data
                writer.write(self.name + data)
            self.endings.append("end")
        except ConnectionResetError:
            self.endings.append("reset")
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[tuple[str, int]]:
        server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        async with server:
            yield server.sockets[0].getsockname()


class Client:
    """One end of a connection through the proxy."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    def say(self, data: bytes) -> None:
        self._writer.write(data)

    def finish(self) -> None:
        self._writer.write_eof()

    async def hear(self) -> bytes:
        """Give what comes next; nothing at the end."""
        return await asyncio.wait_for(self._reader.read(1024), SOON)

    async def ask(self, data: bytes) -> bytes:
        self.say(data)
        return await self.hear()

    async def hears_nothing(self) -> bool:
        """Whether there is neither an answer nor an end."""
        try:
            await asyncio.wait_for(self._reader.read(1024), A_WHILE)
        except TimeoutError:
            return True
        return False


@pytest.fixture(name="parrot")
def _parrot() -> Parrot:
    return Parrot()


@pytest.fixture(name="wire")
async def _wire(parrot: Parrot) -> AsyncIterator[Proxy]:
    async with parrot.listening() as address, Proxy(address) as wire:
        yield wire


@pytest.fixture(name="client")
async def _client(wire: Proxy) -> AsyncIterator[Client]:
    async with connected(wire) as client:
        yield client


@asynccontextmanager
async def connected(wire: Proxy) -> AsyncIterator[Client]:
    reader, writer = await asyncio.open_connection("127.0.0.1", wire.port)
    try:
        yield Client(reader, writer)
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


class TestNoFault:
    async def test_everything_passes_both_ways(self, client: Client, parrot: Parrot) -> None:
        assert b"hello" == await client.ask(b"hello")
        assert b"again" == await client.ask(b"again")
        assert b"helloagain" == parrot.heard

    async def test_an_end_is_passed_on_and_answers_may_follow_it(
        self, client: Client, parrot: Parrot
    ) -> None:
        client.say(b"last words")
        client.finish()

        assert b"last words" == await client.hear()
        assert b"" == await client.hear()
        assert ["end"] == parrot.endings

    async def test_a_server_that_is_not_there_resets(self) -> None:
        with socket.socket() as nobody:
            nobody.bind(("127.0.0.1", 0))
            async with Proxy(nobody.getsockname()) as wire, connected(wire) as client:
                with pytest.raises(ConnectionResetError):
                    await client.hear()


class TestDelay:
    async def test_a_piece_arrives_later_each_way(self, wire: Proxy, client: Client) -> None:
        wire.delay = 0.1
        start = time.monotonic()

        assert b"slow" == await client.ask(b"slow")

        assert time.monotonic() - start >= 0.2


class TestStall:
    async def test_nothing_passes_until_it_is_resumed_and_nothing_is_lost(
        self, wire: Proxy, client: Client
    ) -> None:
        wire.stall()
        client.say(b"early")
        assert await client.hears_nothing()

        wire.resume()

        assert b"early" == await client.hear()

    async def test_a_new_connection_is_taken_and_waits(self, wire: Proxy) -> None:
        wire.stall()
        async with connected(wire) as late:
            late.say(b"late")
            assert await late.hears_nothing()

            wire.resume()

            assert b"late" == await late.hear()

    async def test_an_end_is_held_back_too(
        self, wire: Proxy, client: Client, parrot: Parrot
    ) -> None:
        await client.ask(b"hello")
        wire.stall()
        client.finish()
        assert await client.hears_nothing()
        assert [] == parrot.endings

        wire.resume()

        assert b"" == await client.hear()
        assert ["end"] == parrot.endings


class TestCut:
    async def test_a_reset_reaches_both_sides(
        self, wire: Proxy, client: Client, parrot: Parrot
    ) -> None:
        await client.ask(b"hello")

        wire.cut(Cut.RESET)

        with pytest.raises(ConnectionResetError):
            await client.hear()
        await eventually(lambda: parrot.endings == ["reset"])

    async def test_silence_reaches_nobody(
        self, wire: Proxy, client: Client, parrot: Parrot
    ) -> None:
        await client.ask(b"hello")

        wire.cut(Cut.SILENCE)
        client.say(b"anybody?")

        assert await client.hears_nothing()
        assert (b"hello", []) == (parrot.heard, parrot.endings)

    @pytest.mark.parametrize("how", list(Cut))
    async def test_new_connections_work(self, wire: Proxy, client: Client, how: Cut) -> None:
        await client.ask(b"hello")

        wire.cut(how)

        async with connected(wire) as new:
            assert b"hello" == await new.ask(b"hello")
        assert 2 == wire.accepted


class TestHalfClose:
    async def test_the_client_hears_an_end_and_the_server_goes_on_hearing(
        self, wire: Proxy, client: Client, parrot: Parrot
    ) -> None:
        await client.ask(b"hello")

        wire.half_close()
        assert b"" == await client.ask(b", more")

        await eventually(lambda: parrot.heard == b"hello, more")


class TestSwallowedReply:
    @pytest.mark.parametrize("then", list(Cut))
    async def test_the_server_acts_and_the_client_does_not_hear(
        self, wire: Proxy, client: Client, parrot: Parrot, then: Cut
    ) -> None:
        wire.swallow_reply(to=b"PAY", then=then)
        assert b"hello" == await client.ask(b"hello")

        client.say(b"PAY 5")

        if then is Cut.RESET:
            with pytest.raises(ConnectionResetError):
                await client.hear()
        else:
            assert await client.hears_nothing()
        assert (b"helloPAY 5", 1) == (parrot.heard, wire.swallowed)

    async def test_it_happens_once(self, wire: Proxy, client: Client) -> None:
        wire.swallow_reply(to=b"PAY")
        client.say(b"PAY 5")
        with pytest.raises(ConnectionResetError):
            await client.hear()

        async with connected(wire) as new:
            assert b"PAY 5" == await new.ask(b"PAY 5")


class TestForgottenConnections:
    async def test_whoever_speaks_after_a_long_silence_is_reset(
        self, wire: Proxy, client: Client, parrot: Parrot
    ) -> None:
        await client.ask(b"hello")
        wire.forget_idle(after=0.05)
        await asyncio.sleep(0.1)

        with pytest.raises(ConnectionResetError):
            await client.ask(b"still there?")

        assert b"hello" == parrot.heard

    async def test_or_hears_nothing_at_all(self, wire: Proxy, client: Client) -> None:
        await client.ask(b"hello")
        wire.forget_idle(after=0.05, then=Cut.SILENCE)
        await asyncio.sleep(0.1)

        client.say(b"still there?")

        assert await client.hears_nothing()

    async def test_who_speaks_often_enough_is_remembered(self, wire: Proxy, client: Client) -> None:
        wire.forget_idle(after=SOON)

        assert b"hello" == await client.ask(b"hello")
        assert b"again" == await client.ask(b"again")


class TestSwitch:
    async def test_new_connections_reach_the_other_server_and_old_ones_stay(
        self, wire: Proxy, client: Client
    ) -> None:
        assert b"hello" == await client.ask(b"hello")
        async with Parrot(b"other: ").listening() as address:
            wire.switch_to(address)

            assert b"hello" == await client.ask(b"hello")
            async with connected(wire) as new:
                assert b"other: hello" == await new.ask(b"hello")


class TestAddress:
    async def test_a_url_keeps_its_user_and_leads_through_the_proxy(self) -> None:
        async with proxy("postgresql://me:secret@127.0.0.1:6000/receiver") as (wire, url):
            assert f"postgresql://me:secret@127.0.0.1:{wire.port}/receiver" == url.split("?")[0]

    async def test_a_url_may_have_no_user(self) -> None:
        async with proxy("http://127.0.0.1:6000/path") as (wire, url):
            assert f"http://127.0.0.1:{wire.port}/path" == url

    async def test_it_runs_on_a_thread_of_its_own(self, parrot: Parrot) -> None:
        """Tests that block could not serve it on theirs."""
        async with parrot.listening() as (_, port):
            with proxy_aside(f"http://127.0.0.1:{port}") as (wire, url):
                assert wire.port == urlsplit(url).port
                async with connected(wire) as client:
                    assert b"hello" == await client.ask(b"hello")

                    wire.cut(Cut.RESET)

                    with pytest.raises(ConnectionResetError):
                        await client.hear()
