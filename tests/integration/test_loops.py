"""No process is half alive: a loop that dies takes readiness with it, whichever it is.

The loops are read from the code that starts them, so that a new one is tried, too.
"""

import asyncio
import inspect
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any

import pytest

from app import main, wiring
from app.dispatch.engine import Engine
from app.settings import Settings
from app.wiring import Services
from tests.acceptance.service import KEY
from tests.integration.ledger import until

# Readiness has to show it within so many seconds.
PROMISED = 10
LOOPS = re.findall(r'self\._keep\(\s*"(\w+)"', inspect.getsource(Services))
# This one comes to its end, and while it runs nothing is ready.
TRIED = [name for name in LOOPS if name != "preparation"]
DUTIES = re.findall(r'"(\w+)", self\.[\w.]*step\b', inspect.getsource(Engine.run))

Loop = Callable[[], Coroutine[Any, Any, None]]


def services_on(url: str) -> Services:
    """Build a process that has every loop there is."""
    values: dict[str, Any] = {"database_url": url, "atlas_api_key": KEY, "body_retention": "90d"}
    return Services(Settings(_env_file=None, **values), takes_webhooks=True, works=True)  # type: ignore[call-arg]


@pytest.fixture(name="services")
async def _services(sqlite_url: str) -> AsyncIterator[Services]:
    services = services_on(sqlite_url)
    yield services
    await services.stop()


async def raising() -> None:
    raise RuntimeError("planted")


async def cancelled() -> None:
    raise asyncio.CancelledError


async def ending() -> None:
    pass


def dying(loop: Loop, end: Loop) -> Loop:
    """Let a loop work for a moment, and then end in this way."""

    async def die() -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(loop(), 0.05)
        await end()

    return die


class TestLoop:
    @pytest.mark.parametrize("end", [raising, cancelled, ending])
    @pytest.mark.parametrize("name", TRIED)
    async def test_that_dies_makes_the_process_unready(
        self, services: Services, monkeypatch: pytest.MonkeyPatch, name: str, end: Loop
    ) -> None:
        keep = Services._keep

        def plant(self: Services, kept: str, loop: Loop) -> None:
            keep(self, kept, dying(loop, end) if kept == name else loop)

        monkeypatch.setattr(Services, "_keep", plant)
        await services.start()

        async def is_unready() -> bool:
            return (await services.probe())["loops"] == f"down: {name}"

        await until(is_unready, limit=PROMISED)

    async def test_is_tried_here_whichever_is_started(self, services: Services) -> None:
        await services.start()

        assert set(TRIED) == set(services._tasks)

    def test_is_started_in_no_other_way(self) -> None:
        """Else one could die without a word."""
        starts = [inspect.getsource(module).count("create_task(") for module in (wiring, main)]

        assert [1, 0] == starts
        assert "create_task(" in inspect.getsource(Services._keep)

    async def test_without_trouble_the_process_is_ready(self, services: Services) -> None:
        await services.start()

        async def is_ready() -> bool:
            return {"ok"} == set((await services.probe()).values())

        await until(is_ready, limit=PROMISED)


class TestDuty:
    @pytest.mark.parametrize("end", [raising, cancelled])
    @pytest.mark.parametrize("name", DUTIES)
    async def test_of_the_dispatcher_that_fails_makes_the_process_unready(
        self, services: Services, monkeypatch: pytest.MonkeyPatch, name: str, end: Loop
    ) -> None:
        forever = Engine._forever

        async def plant(self: Engine, duty: str, step: Callable[[], Awaitable[None]]) -> None:
            await forever(self, duty, end if duty == name else step)

        monkeypatch.setattr(Engine, "_forever", plant)
        await services.start()

        async def is_unready() -> bool:
            return (await services.probe())["dispatch"] == "not working"

        await until(is_unready, limit=PROMISED)
        assert services.dispatcher is not None
        assert [f"dispatch cannot {name}"] == [
            each.partition(":")[0] for each in services.dispatcher.problems()
        ]

    async def test_is_tried_here_whichever_is_started(
        self, services: Services, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        started: list[str] = []
        forever = Engine._forever

        async def note(self: Engine, duty: str, step: Callable[[], Awaitable[None]]) -> None:
            started.append(duty)
            await forever(self, duty, step)

        monkeypatch.setattr(Engine, "_forever", note)
        await services.start()

        await until(lambda: len(started) >= len(DUTIES))
        assert sorted(DUTIES) == sorted(started)
