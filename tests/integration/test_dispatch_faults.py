"""Dispatch in trouble: lost workers, a database that stays away, everything due at once."""

import asyncio
import os
import threading
from collections import Counter
from datetime import timedelta
from typing import Any

import pytest

from app.callbacks import Callbacks, Event
from app.dispatch.crew import AHEAD
from app.dispatch.engine import Engine
from app.store import replays
from app.store.migrations import migrate
from app.store.replays import Owed
from tests.factories import make_body
from tests.integration.ledger import WORKER, Ledger, until
from tests.postgres import Postgres
from tests.replicas import replica

MOMENT = timedelta(milliseconds=1)
HOUR = timedelta(hours=1)
# `DUE_AT_ONCE=100000` is what the catalogue asks for.
DUE_AT_ONCE = int(os.environ.get("DUE_AT_ONCE", "3000"))


async def owe_many(ledger: Ledger, number: int) -> None:
    """Owe one event many times, each under a number of its own."""
    event_id = await ledger.record()
    async with ledger.transaction() as connection:
        owed = [Owed(event_id, "file", "default", None, None, n) for n in range(1, number + 1)]
        await replays.owe(connection, owed)


class TestLostWorkers:
    """There is no process that rescues: whoever claims finds the leases that are over."""

    async def test_two_who_look_at_once_find_each_of_them_once(self, ledger: Ledger) -> None:
        await ledger.register("file")
        await owe_many(ledger, 40)
        lost = await ledger.claim(limit=40, is_ordered=False, lease=-MOMENT)

        found = await asyncio.gather(
            *(ledger.claim(limit=40, is_ordered=False, worker=f"w{n}") for n in range(2))
        )

        ids = Counter(claim.id for claims in found for claim in claims)
        assert {claim.id for claim in lost} == set(ids)
        assert {1} == set(ids.values())
        assert ["lost"] * 40 == await ledger.verdicts()

    async def test_are_found_behind_any_number_of_calls_that_take_long(
        self, ledger: Ledger
    ) -> None:
        await ledger.register("file")
        await owe_many(ledger, 2000)
        assert 2000 == len(await ledger.claim(limit=2000, is_ordered=False, lease=HOUR))
        (lost,) = await ledger.owe("file")
        assert [lost] == [claim.id for claim in await ledger.claim(lease=-MOMENT)]

        assert [lost] == [claim.id for claim in await ledger.claim(limit=1)]

    async def test_that_come_back_under_their_name_run_what_they_had(
        self, ledger: Ledger, callbacks: Callbacks
    ) -> None:
        """Nothing is known of workers but leases, so nothing can be known wrongly."""
        seen: list[int] = []
        callbacks.on("*", name="file")(lambda event: seen.append(event.attempt))
        await ledger.register("file")
        await ledger.owe_one()
        await ledger.claim(worker=WORKER, lease=timedelta(seconds=1))
        await ledger.change("DELETE FROM callbacks")

        with ledger.dispatching(callbacks, worker=WORKER):
            await until(lambda: bool(seen))
            await until(lambda: self.is_done(ledger))

        assert [2] == seen
        assert ["lost", "done"] == await ledger.verdicts()

    @staticmethod
    async def is_done(ledger: Ledger) -> bool:
        return ["done"] == await ledger.states()


class TestALongAbsence:
    async def test_of_the_database_is_waited_for_however_long(
        self, callbacks: Callbacks, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Hundreds of failures in a row, each with its pause: by a clock that runs faster."""
        rests: list[float] = []

        async def rest(_: Engine, seconds: float) -> None:
            rests.append(seconds)
            await asyncio.sleep(seconds / 1000)

        monkeypatch.setattr(Engine, "_rest", rest)
        seen: list[str | None] = []
        callbacks.on("*", name="file")(lambda event: seen.append(event.envelope_id))
        with Postgres() as server:
            await migrate(server.url())
            ledger = Ledger(server.url())
            with ledger.dispatching(callbacks) as dispatcher:
                await until(lambda: dispatcher.problems() == [])
                await until(lambda: self.is_registered(ledger))
                await ledger.owe_one(envelope="env_1")
                await until(lambda: seen == ["env_1"])
                await ledger.database.close()
                server.stop("immediate")
                rests.clear()
                # At five seconds each, they are more than ten minutes of each duty.
                await until(lambda: sum(rests) > 3000)
                server.start()
                await ledger.owe_one(envelope="env_2")
                await until(lambda: seen == ["env_1", "env_2"])
                await until(lambda: dispatcher.problems() == [])
            await ledger.database.close()

        # So long it takes at most until work goes on; promised are 30 seconds.
        assert max(rests) <= 5

    @staticmethod
    async def is_registered(ledger: Ledger) -> bool:
        async with ledger.reading() as connection:
            query = "SELECT count(*) FROM callbacks"
            return bool((await connection.exec_driver_sql(query)).scalar())


class TestEverythingAtOnce:
    async def test_is_worked_off_with_so_many_calls_at_once_and_no_more(
        self, postgres_ledger: Ledger, callbacks: Callbacks
    ) -> None:
        ledger, slots = postgres_ledger, 16
        count, lock = Counter[str](), threading.Lock()

        @callbacks.on("envelope.signed", name="file", ordered=False)
        async def file(_: Event) -> None:
            with lock:
                count["running"] += 1
                count["most"] = max(count["most"], count["running"])
            await asyncio.sleep(0)
            with lock:
                count["running"] -= 1
                count["ended"] += 1

        await ledger.register("file", patterns=["envelope.signed"])
        await owe_many(ledger, DUE_AT_ONCE)
        held: list[int] = []

        async with replica(ledger.address.url, interested=lambda *_: ()) as one:
            with ledger.dispatching(callbacks, slots=slots) as dispatcher:
                answers = []
                while count["ended"] < DUE_AT_ONCE:
                    held.append(self.held_by(dispatcher))
                    answers.append(await one.outcome(make_body(event="envelope.viewed")))
                    await asyncio.sleep(0.02)
                await until(lambda: self.are_done(ledger))

        assert DUE_AT_ONCE == count["ended"]
        assert count["most"] <= slots
        # What is claimed ahead of its turn is bounded, too: so is the memory that it takes.
        assert max(held) <= (AHEAD + 1) * slots
        assert {"recorded"} == set(answers)

    @staticmethod
    def held_by(dispatcher: Any) -> int:
        return len(dispatcher._engine.crew.held) if dispatcher._engine else 0

    @staticmethod
    async def are_done(ledger: Ledger) -> bool:
        async with ledger.reading() as connection:
            query = "SELECT count(*) FROM deliveries WHERE state <> 'done'"
            return not (await connection.exec_driver_sql(query)).scalar()


@pytest.fixture(name="callbacks")
def _callbacks() -> Callbacks:
    return Callbacks()
