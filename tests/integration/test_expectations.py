"""An envelope that is expected and of which nothing is heard: noticed once, and told."""

import asyncio
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from app.callbacks import Callbacks, Event
from app.store import events, expectations
from app.store.callbacks import Subscription
from app.store.callbacks import register as register_callbacks
from app.store.expectations import Expectation
from app.upkeep import silence
from app.upkeep.silence import SILENT, Silence
from tests.integration.ledger import Ledger, until

HOUR = timedelta(hours=1)


@pytest.fixture(name="owed")
def _owed() -> list[set[str]]:
    """To whom something was owed, each time."""
    return []


@pytest.fixture(name="silence")
def _silence(ledger: Ledger, owed: list[set[str]]) -> Silence:
    return Silence(ledger.database, on_owed=owed.append)


async def expect(
    ledger: Ledger, envelope_id: str = "env_1", *, account: str = "default", within: Any = HOUR
) -> tuple[Expectation, bool]:
    async with ledger.transaction() as connection:
        return await expectations.expect(
            connection, account, envelope_id, consumer="office", within=within
        )


async def let_time_pass(ledger: Ledger) -> None:
    for column in ("created_at", "due_at"):
        await ledger.shift("expectations", column, timedelta(hours=-2))


async def raised(ledger: Ledger) -> list[dict[str, Any]]:
    found = []
    for event_id in await ledger.events(SILENT):
        async with ledger.reading() as connection:
            found.append(json.loads(await events.read_body(connection, event_id) or b""))
    return found


class TestExpect:
    async def test_is_due_after_its_time(self, ledger: Ledger) -> None:
        expectation, is_seen = await expect(ledger)

        assert not is_seen
        assert expectation.due_at == expectation.created_at + HOUR
        assert abs(datetime.now(UTC) - expectation.created_at) < timedelta(minutes=1)
        assert ("default", "env_1", "office", None) == (
            expectation.account,
            expectation.envelope_id,
            expectation.consumer,
            expectation.silent_at,
        )

    async def test_again_changes_nothing(self, ledger: Ledger) -> None:
        first = await expect(ledger)

        assert first == await expect(ledger)

    async def test_again_with_another_time_counts_from_the_first(self, ledger: Ledger) -> None:
        first, _ = await expect(ledger)

        again, _ = await expect(ledger, within=2 * HOUR)

        assert (first.created_at, first.created_at + 2 * HOUR) == (again.created_at, again.due_at)

    async def test_of_one_that_was_heard_of_is_never_due(self, ledger: Ledger) -> None:
        await ledger.envelope("env_1")

        expectation, is_seen = await expect(ledger)

        assert (True, None) == (is_seen, expectation.due_at)
        assert (expectation, True) == await expect(ledger)

    async def test_of_many_at_once_is_one(self, ledger: Ledger) -> None:
        answers = await asyncio.gather(*(expect(ledger) for _ in range(3)))

        assert [answers[0]] * 3 == list(answers)

    async def test_is_of_one_account(self, ledger: Ledger) -> None:
        await ledger.envelope("env_1")

        _, is_seen = await expect(ledger, account="beta")

        assert not is_seen


class TestSilence:
    async def test_is_none_before_the_time(self, ledger: Ledger, silence: Silence) -> None:
        await expect(ledger)

        assert 0 == await silence.step()
        assert [] == await raised(ledger)

    async def test_is_noticed_once(self, ledger: Ledger, silence: Silence) -> None:
        first, _ = await expect(ledger)
        await let_time_pass(ledger)

        steps = [await silence.step() for _ in range(3)]

        (said,) = await raised(ledger)
        after, is_seen = await expect(ledger)
        assert [1, 0, 0] == steps
        assert (SILENT, "env_1", "office") == (
            said["event"],
            said["envelope_id"],
            said["expected_by"],
        )
        assert datetime.fromisoformat(said["expected_at"]) == first.created_at - 2 * HOUR
        assert (False, None) == (is_seen, after.due_at)
        assert after.silent_at is not None

    async def test_is_none_if_something_was_heard(self, ledger: Ledger, silence: Silence) -> None:
        await expect(ledger)
        await ledger.envelope("env_1")
        await let_time_pass(ledger)

        assert 1 == await silence.step()

        after, is_seen = await expect(ledger)
        assert [] == await raised(ledger)
        assert (True, None, None) == (is_seen, after.due_at, after.silent_at)

    async def test_is_told_to_those_who_ask_for_it(
        self, ledger: Ledger, silence: Silence, owed: list[set[str]]
    ) -> None:
        """`*` asks for what Atlas says; what we say of ourselves is asked for by name."""
        wanted = [
            Subscription("alarm", (SILENT,)),
            Subscription("ours", ("receiver.*",)),
            Subscription("everything", ("*",)),
            Subscription("others", (SILENT,), account="beta"),
        ]
        async with ledger.transaction() as connection:
            await register_callbacks(connection, wanted)
        await expect(ledger)
        await let_time_pass(ledger)

        await silence.step()

        assert {"alarm", "ours"} == {each.callback for each in await ledger.deliveries()}
        assert [{"alarm", "ours"}] == owed

    async def test_reaches_a_callback_that_is_running(
        self, ledger: Ledger, silence: Silence
    ) -> None:
        heard: list[Event] = []
        callbacks = Callbacks()
        callbacks.on(SILENT, name="alarm")(heard.append)
        await expect(ledger)
        await let_time_pass(ledger)

        with ledger.dispatching(callbacks):
            await until(lambda: registered(ledger))
            await silence.step()
            await until(lambda: heard)

        (event,) = heard
        assert (SILENT, "env_1", None) == (event.type, event.envelope_id, event.envelope)
        assert "office" == event.data["expected_by"]

    async def test_that_ends_later_is_an_envelope_like_others(
        self, ledger: Ledger, silence: Silence
    ) -> None:
        await expect(ledger)
        await let_time_pass(ledger)
        await silence.step()

        await ledger.envelope("env_1")

        _, is_seen = await expect(ledger)
        assert is_seen
        assert 0 == await silence.step()

    async def test_of_many_is_noticed_by_several_processes_together(self, ledger: Ledger) -> None:
        for number in range(silence.AT_ONCE + 5):
            await expect(ledger, f"env_{number}")
        await let_time_pass(ledger)
        processes = [Silence(ledger.database, on_owed=lambda _: None) for _ in range(3)]

        await asyncio.gather(*(process.step() for process in processes))
        while await processes[0].step():
            pass

        said = [each["envelope_id"] for each in await raised(ledger)]
        assert silence.AT_ONCE + 5 == len(said) == len(set(said))


class TestLoop:
    async def test_goes_on_after_a_failure(
        self, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(silence, "PAUSE", timedelta(milliseconds=20))
        monkeypatch.setattr(silence, "TICK", timedelta(milliseconds=20))
        await expect(ledger)
        await let_time_pass(ledger)
        await ledger.change("ALTER TABLE expectations RENAME TO away")

        running = asyncio.create_task(Silence(ledger.database, on_owed=lambda _: None).run())
        await asyncio.wait([running], timeout=0.2)
        assert not running.done()
        await ledger.change("ALTER TABLE away RENAME TO expectations")
        await until(lambda: raised(ledger))

        running.cancel()
        assert 1 == len(await raised(ledger))


async def registered(ledger: Ledger) -> bool:
    async with ledger.reading() as connection:
        rows = await connection.exec_driver_sql("SELECT name FROM callbacks")
        return bool(rows.all())
