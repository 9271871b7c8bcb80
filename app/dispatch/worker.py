"""The dispatcher, as the rest of the process sees it: one object, one thread, four verbs."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from threading import Thread

from app.dispatch import blame
from app.dispatch.engine import Engine
from app.dispatch.lanes import call
from app.dispatch.listening import listen_for_ever
from app.dispatch.options import DispatchOptions
from app.dispatch.registry import Callback
from app.dispatch.settling import Attempted
from app.store.session import Database, DatabaseAddress
from app.telemetry import get_logger

log = get_logger("dispatch")

# Beyond the grace, `stop` waits so long for the thread to wind up.
PATIENCE = timedelta(seconds=5)


class Dispatcher:
    """Delivers what is owed to `callbacks`, from `start` to `stop`.

    It needs no database to start: it comes to life when there is one. All methods may be
    called from any thread. `listens_at` is where other processes announce what is due;
    `is_pressed` tells whether something more urgent is going on in this one.
    """

    def __init__(
        self,
        address: DatabaseAddress,
        callbacks: Sequence[Callback],
        *,
        options: DispatchOptions | None = None,
        worker: str,
        listens_at: DatabaseAddress | None = None,
        is_pressed: Callable[[], bool] = lambda: False,
    ) -> None:
        self._address = address
        self._callbacks = tuple(callbacks)
        self._options = options or DispatchOptions()
        self._worker = worker
        self._listens_at = listens_at
        self._is_pressed = is_pressed
        # Called on the thread of the dispatcher; to be set before the start.
        self.on_attempted: Attempted = lambda _: None
        self._grace = timedelta(0)
        self._engine: Engine | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_stopping = False
        self._death: str | None = None
        self._thread = Thread(target=self._run, name="dispatch", daemon=True)

    def start(self) -> None:
        """Begin to deliver, in a thread of its own."""
        self._thread.start()

    def wake(self) -> None:
        """Say that something has just become due; cheap, and never an error."""
        if self._loop is not None and self._engine is not None:
            call(self._loop, self._engine.wake)

    def stop(self, grace: timedelta) -> None:
        """Claim no more, let calls end within `grace`, give back the rest; return when done.

        Blocks: from an event loop, call it in a thread (`asyncio.to_thread`).
        """
        self._grace = grace
        self._is_stopping = True
        if self._loop is not None and self._engine is not None:
            call(self._loop, self._engine.stop)
        if self._thread.ident is not None:
            self._thread.join((grace + PATIENCE).total_seconds())

    def problems(self) -> list[str]:
        """Say what is wrong; empty means healthy."""
        if self._is_stopping:
            return []
        if not self._thread.is_alive():
            return [f"the dispatch loop is not running: {self._death or 'it was not started'}"]
        return [] if self._engine is None else self._problems_of(self._engine)

    def _problems_of(self, engine: Engine) -> list[str]:
        found = [f"dispatch cannot {k}: {v}" for k, v in tuple(engine.troubles.items())]
        silence = time.monotonic() - engine.turned
        if silence > self._options.silence_limit.total_seconds():
            found.append(f"the dispatch loop has not turned for {silence:.0f} s")
        return found + engine.crew.problems()

    def counts(self) -> dict[str, int]:
        """Give what is under way, and what was done since the start."""
        if self._engine is None:
            return {}
        crew = self._engine.crew
        return {
            "running": crew.running.total(),
            "stuck": len(crew.stuck),
            "unsettled": len(self._engine.settler),
            **self._engine.totals,
        }

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=_loop_factory()) as runner:
                runner.run(self._main())
            self._death = "it has ended"
        except BaseException as error:  # noqa: BLE001  # the fence: readiness must show it
            self._death = blame.summarise(error)
            log.critical("dispatch.died", error=self._death)

    async def _main(self) -> None:
        database = Database(self._address)
        engine = Engine(
            database,
            self._callbacks,
            options=self._options,
            worker=self._worker,
            is_pressed=self._is_pressed,
            on_attempted=self.on_attempted,
        )
        self._loop, self._engine = asyncio.get_running_loop(), engine
        if self._is_stopping:
            engine.stop()
        listening = self._listen(engine)
        try:
            await engine.run(grace=lambda: self._grace)
        finally:
            for task in listening:
                task.cancel()
            # What a frozen server does not close is closed with the process.
            with contextlib.suppress(Exception):
                async with asyncio.timeout(1):
                    await database.close()

    def _listen(self, engine: Engine) -> list[asyncio.Task[None]]:
        if self._listens_at is None:
            return []
        return [asyncio.create_task(listen_for_ever(self._listens_at, engine.wake))]


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    try:
        import uvloop  # noqa: PLC0415  # there is none for Windows
    except ImportError:
        return asyncio.new_event_loop
    return uvloop.new_event_loop
