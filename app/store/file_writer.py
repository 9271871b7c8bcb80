"""One thread that writes to a file of SQLite: a whole transaction at a time.

The asynchronous driver hands each statement over to a thread, and each of its rows lets other
threads run: where many events share a transaction, waiting for the turn took longer than all
the writing. Here the transaction is handed over once.
"""

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine

T = TypeVar("T")


class Immediate:
    """A connection whose statements are done when they are asked for: no `await` waits."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.dialect = connection.dialect
        self.info = connection.info

    async def execute(self, *arguments: Any, **options: Any) -> Any:
        """Run an expression."""
        return self._connection.execute(*arguments, **options)

    async def exec_driver_sql(self, *arguments: Any, **options: Any) -> Any:
        """Run a text."""
        return self._connection.exec_driver_sql(*arguments, **options)


class FileWriter:
    """Runs transactions on a thread of its own, one after the other."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._thread = self._new_thread()

    @staticmethod
    def _new_thread() -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, thread_name_prefix="file-writer")

    async def run(self, work: Callable[[Any], Coroutine[Any, Any, T]]) -> T:
        """Begin, run `work` on an `Immediate` connection, and commit, or roll back if it fails.

        Whoever is cut off while it waits does not cut it short: it may still commit.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._transact, work)

    def _transact(self, work: Callable[[Any], Coroutine[Any, Any, T]]) -> T:
        with self.engine.begin() as connection:
            return _finished(work(Immediate(connection)))

    async def close(self) -> None:
        """Let the transaction that is under way end, and close the file; it may be used again."""
        ended, self._thread = self._thread, self._new_thread()
        await asyncio.to_thread(ended.shutdown)
        self.engine.dispose()


def _finished(steps: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that never waits to its end."""
    try:
        steps.send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    steps.close()
    raise RuntimeError("a transaction on a file waited for something else")
