"""`receiver.dead`: whoever asks for it hears of dead letters, in the same transaction."""

import json

import pytest

from app.callbacks import Callbacks, Event, GiveUp
from app.store import events
from tests.integration.ledger import Ledger, until


@pytest.fixture(name="callbacks")
def _callbacks() -> Callbacks:
    callbacks = Callbacks()

    @callbacks.on("envelope.*", name="file")
    async def file(event: Event) -> None:
        raise GiveUp(f"no folder for {event.account}")

    return callbacks


async def obituaries(ledger: Ledger) -> list[dict[str, object]]:
    found = []
    for event_id in await ledger.events("receiver.dead"):
        async with ledger.transaction() as connection:
            body = await events.read_body(connection, event_id)
        found.append(json.loads(body or b""))
    return found


async def dead(ledger: Ledger) -> int:
    return (await ledger.states()).count("dead")


class TestObituary:
    async def test_tells_who_died_of_what(self, ledger: Ledger, callbacks: Callbacks) -> None:
        heard: list[Event] = []
        callbacks.on("receiver.dead", name="alarm")(heard.append)
        await ledger.envelope(status="signed")
        delivery_id = await ledger.owe_one("file")

        with ledger.dispatching(callbacks):
            await until(lambda: heard)

        (event,) = heard
        delivery = await ledger.delivery(delivery_id)
        assert {
            "event": "receiver.dead",
            "event_id": event.id,
            "about": str(delivery.event_id),
            "type": "envelope.signed",
            "envelope_id": "env_1",
            "delivery_id": str(delivery_id),
            "callback": "file",
            "attempts": 1,
            "error": "GiveUp: no folder for default",
            "fingerprint": delivery.fingerprint,
            "is_first": True,
        } == event.data
        assert event.envelope is not None
        assert "signed" == event.envelope.status

    async def test_says_which_is_the_first_of_its_cause(
        self, ledger: Ledger, callbacks: Callbacks
    ) -> None:
        for number in range(3):
            await ledger.owe("file", envelope=f"env_{number}")

        with ledger.dispatching(callbacks):
            await until(lambda: number_is(ledger, 3))

        firsts = [said["is_first"] is True for said in await obituaries(ledger)]
        assert [False, False, True] == sorted(firsts)

    async def test_a_death_long_after_the_first_is_not_the_first(
        self, ledger: Ledger, callbacks: Callbacks
    ) -> None:
        with ledger.dispatching(callbacks):
            await ledger.owe("file", envelope="env_1")
            await until(lambda: number_is(ledger, 1))
            await ledger.owe("file", envelope="env_2")
            await until(lambda: number_is(ledger, 2))

        assert [True, False] == [said["is_first"] is True for said in await obituaries(ledger)]

    async def test_nobody_needs_to_ask_for_it(self, ledger: Ledger, callbacks: Callbacks) -> None:
        """It is history all the same; who asks for everything does not ask for our own."""
        heard: list[Event] = []
        callbacks.on("*", name="everything")(heard.append)
        await ledger.owe("file")

        with ledger.dispatching(callbacks):
            await until(lambda: number_is(ledger, 1))

        assert 1 == len(await obituaries(ledger))
        assert [] == [event for event in heard if event.type == "receiver.dead"]

    async def test_of_one_about_no_envelope_names_none(
        self, ledger: Ledger, callbacks: Callbacks
    ) -> None:
        await ledger.owe("file", envelope=None)

        with ledger.dispatching(callbacks):
            await until(lambda: number_is(ledger, 1))

        (said,) = await obituaries(ledger)
        assert "envelope_id" not in said

    async def test_one_who_is_told_and_dies_of_it_is_not_told_of(
        self, ledger: Ledger, callbacks: Callbacks
    ) -> None:
        @callbacks.on("receiver.dead", name="alarm")
        async def alarm(_: Event) -> None:
            raise GiveUp("no network")

        await ledger.owe("file")

        with ledger.dispatching(callbacks):
            await until(lambda: number_is(ledger, 2))

        assert 1 == len(await obituaries(ledger))

    async def test_one_of_another_account_is_not_told(
        self, ledger: Ledger, callbacks: Callbacks
    ) -> None:
        heard: list[Event] = []
        callbacks.on("receiver.dead", name="alarm", account="another")(heard.append)
        await ledger.owe("file")

        with ledger.dispatching(callbacks):
            await until(lambda: number_is(ledger, 1))

        assert 1 == len(await ledger.deliveries())


async def number_is(ledger: Ledger, number: int) -> bool:
    return await dead(ledger) == number
