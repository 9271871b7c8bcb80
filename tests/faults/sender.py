"""Atlas, as a sender: signs, waits ten seconds, and tries again after 1, 5, 30, 120 minutes.

It is an open loop: what is to be sent at a moment is sent at that moment, whether or not
anything was answered, unless more requests are under way than it may have. It does what a
balancer does between Atlas and several replicas, too: requests go round, and one that finds
nobody listening is led to the next at once.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress

from tests.acceptance.raw import request
from tests.acceptance.service import DOOR
from tests.factories import signed
from tests.faults.ledger import BROKEN, TOO_LATE, Ledger
from tests.faults.traffic import Sending

# As Atlas has them, in seconds.
PATIENCE = 10.0
GAPS = (60.0, 300.0, 1800.0, 7200.0)
# After a long outage an operator has Atlas send once more what it had given up; so often here.
ASKED_FOR = 10
# What could not be sent in time is made up for, but of no more than this many seconds.
BEHIND = 1.0

Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Door:
    """One address that takes webhooks, and the connections to it that are kept."""

    def __init__(self, port: int) -> None:
        self._port = port
        # Last in, first out: what is not needed stays idle, as in any client.
        self._idle: deque[Stream] = deque()

    async def post(self, data: bytes) -> tuple[int, bytes]:
        """Send one request; give status and body of the answer."""
        reader, writer = stream = await self._connection()
        try:
            writer.write(data)
            status, body = await _read(reader)
        except BaseException:
            writer.transport.abort()
            raise
        self._idle.append(stream)
        return status, body

    async def _connection(self) -> Stream:
        while self._idle:
            reader, writer = self._idle.pop()
            if not (reader.at_eof() or writer.is_closing()):
                return reader, writer
            writer.transport.abort()
        return await asyncio.open_connection("127.0.0.1", self._port)

    def close(self) -> None:
        while self._idle:
            _, writer = self._idle.pop()
            writer.transport.abort()


async def _read(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    head = await reader.readuntil(b"\r\n\r\n")
    length = head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]
    return int(head.split(b" ", 2)[1]), await reader.readexactly(int(length))


class Sender:
    """Delivers traffic at a rate, until everything is acknowledged."""

    def __init__(
        self,
        ports: Sequence[int],
        ledger: Ledger,
        *,
        keys: Mapping[str, str],
        compress: float = 60.0,
        patience: float = PATIENCE,
        in_flight: int = 1000,
    ) -> None:
        """Send to `ports` in turn, with the key of each account.

        The waits between tries are `compress` times as short as those of Atlas. With fewer
        requests `in_flight` a machine that does not keep the rate sets a slower one.
        """
        self._doors = [Door(port) for port in ports]
        self._ledger = ledger
        self._keys = keys
        self._compress = compress
        self._patience = patience
        self._room = asyncio.Semaphore(in_flight)

    async def send(
        self,
        sendings: Iterable[Sending],
        *,
        rate: float,
        on_sent: Callable[[], object] = lambda: None,
    ) -> None:
        """Send so many a second, and return when the last is answered for."""
        start = time.monotonic()
        try:
            async with asyncio.TaskGroup() as group:
                for position, sending in enumerate(sendings):
                    # Also without a wait now and then the answers have to be read.
                    await asyncio.sleep(max(0.0, start + position / rate - time.monotonic()))
                    async with self._room:
                        start = max(start, time.monotonic() - position / rate - BEHIND)
                    group.create_task(self._deliver(position, sending))
                    on_sent()
        finally:
            for door in self._doors:
                door.close()

    async def _deliver(self, position: int, sending: Sending) -> None:
        data = request(
            "POST", DOOR, [signed(sending.body, self._keys[sending.account])], sending.body
        )
        for attempt, gap in enumerate(self._waits()):
            if attempt == len(GAPS) + 1:
                self._ledger.given_up += 1
            await asyncio.sleep(gap)
            if await self._is_acknowledged(position + attempt, sending, data):
                return

    def _waits(self) -> Iterator[float]:
        """Give the wait before each try; what Atlas gives up, it is asked for now and then."""
        yield 0.0
        yield from (gap / self._compress for gap in GAPS)
        for _ in range(ASKED_FOR):
            yield GAPS[2] / self._compress

    async def _is_acknowledged(self, turn: int, sending: Sending, data: bytes) -> bool:
        async with self._room:
            return await self._try(turn, sending, data)

    async def _try(self, turn: int, sending: Sending, data: bytes) -> bool:
        start = time.monotonic()
        try:
            async with asyncio.timeout(self._patience):
                status, body = await self._post(turn, data)
        except TimeoutError:
            self._ledger.note_silence(TOO_LATE)
            return False
        except (OSError, EOFError):
            self._ledger.note_silence(BROKEN)
            return False
        return self._ledger.note(sending, status, body, time.monotonic() - start)

    async def _post(self, turn: int, data: bytes) -> tuple[int, bytes]:
        turn %= len(self._doors)
        for door in self._doors[turn:] + self._doors[:turn]:
            with suppress(ConnectionRefusedError):
                return await door.post(data)
        raise ConnectionRefusedError
