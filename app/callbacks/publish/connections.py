"""Keep one connection per event loop: opened when it is needed, shared, replaced when broken.

Callbacks run on event loops that come and go, and a connection belongs to the loop that
opened it. Here a task of that loop owns the connection. A loop cancels its tasks before
it closes, so a connection is closed with its loop, and by that loop.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Final, Protocol

from app.callbacks.publish.cloudevent import Message
from app.callbacks.publish.failures import BrokerAway, Refused
from app.errors import GiveUp

# Closing is a courtesy, and not every library notices that nobody is there to answer it.
CLOSING: Final = 1.0


class Connection(Protocol):
    """An open connection, used by many calls at a time."""

    @property
    def is_open(self) -> bool:
        """False once it is known that nothing will get through any more."""
        ...

    async def publish(self, message: Message) -> None:
        """Return once the broker has confirmed that it has the message."""
        ...

    async def close(self) -> None:
        """Let go of it; what nobody waits for may be lost."""
        ...


Connect = Callable[[], Awaitable[Connection]]

# A loop refers to its tasks weakly, and nothing else may refer to one that only waits.
_tasks: set[asyncio.Task[None]] = set()


async def let_go(close: Callable[[], Awaitable[object]]) -> None:
    """Close what is not needed any more, or what never was complete; takes a second at most."""
    with suppress(Exception):
        async with asyncio.timeout(CLOSING):
            await close()


class Connections:
    """The connections of one process to one broker."""

    def __init__(self, connect: Connect) -> None:
        """`connect` opens one, and says with `BrokerAway` or `Refused` why it cannot."""
        self._connect = connect
        # Each loop touches its own entry only. A weak key would not help: a connection
        # refers to its loop.
        self._links: dict[asyncio.AbstractEventLoop, _Link] = {}

    @asynccontextmanager
    async def borrow(self) -> AsyncIterator[Connection]:
        """Lend the connection of the running loop; after a failure nobody gets it again."""
        link = self._link(asyncio.get_running_loop())
        link.users += 1
        try:
            yield await link.connection()
        except (Refused, GiveUp):
            # The broker has answered, so the connection is as good as it was.
            raise
        except BaseException:
            link.retire()
            raise
        finally:
            link.users -= 1
            link.close_if_unused()

    async def close(self) -> None:
        """Close the connection of the running loop, once those who use it have ended."""
        link = self._links.pop(asyncio.get_running_loop(), None)
        if link is not None:
            link.retire()
            link.close_if_unused()
            await link.closed()

    def _link(self, loop: asyncio.AbstractEventLoop) -> "_Link":
        link = self._links.get(loop)
        if link is not None and link.is_usable:
            return link
        if link is not None:
            link.retire()
            link.close_if_unused()
        self._forget_closed_loops()
        link = self._links[loop] = _Link(self._connect, loop)
        return link

    def _forget_closed_loops(self) -> None:
        for loop in list(self._links):
            if loop.is_closed():
                self._links.pop(loop, None)


class _Link:
    """One connection, and the task that opens it, holds it and closes it."""

    def __init__(self, connect: Connect, loop: asyncio.AbstractEventLoop) -> None:
        self.users = 0
        self._is_retired = False
        self._opened: asyncio.Future[Connection] = loop.create_future()
        self._task = loop.create_task(self._live(connect))
        _tasks.add(self._task)
        self._task.add_done_callback(_tasks.discard)

    @property
    def is_usable(self) -> bool:
        if self._is_retired or self._task.done():
            return False
        return not self._opened.done() or self._opened.result().is_open

    async def connection(self) -> Connection:
        # Shielded: one caller that is cut off must not take the connection from the others.
        return await asyncio.shield(self._opened)

    def retire(self) -> None:
        """Give it to nobody any more; calls that are under way may end."""
        self._is_retired = True

    def close_if_unused(self) -> None:
        if self._is_retired and not self.users:
            self._task.cancel()

    async def closed(self) -> None:
        """Wait until it is."""
        await asyncio.wait({self._task})

    async def _live(self, connect: Connect) -> None:
        try:
            connection = await connect()
        except BaseException as error:
            self._fail(error)
            if isinstance(error, Exception):
                return
            raise
        self._opened.set_result(connection)
        try:
            await asyncio.Event().wait()
        finally:
            await let_go(connection.close)

    def _fail(self, error: BaseException) -> None:
        if not isinstance(error, Exception):
            error = BrokerAway("the connection was given up while it was being opened")
        self._opened.set_exception(error)
        # Looked at once, so that nobody complains if all callers have left meanwhile.
        self._opened.exception()
