"""What an operator may do about a delivery, and what is written down of it."""

import asyncio
from collections import Counter
from datetime import timedelta
from typing import NoReturn

import pytest

from app.callbacks import Callbacks, Event
from app.dispatch import control
from app.errors import NotAllowed, NotFound
from app.store import forgetting
from app.store.claims import Claim
from app.store.sight import Sight
from tests.integration.ledger import Ledger, until

ACTOR = "ada"


@pytest.fixture(name="ledger")
async def _ledger(ledger: Ledger) -> Ledger:
    await ledger.register("file")
    return ledger


async def in_state(ledger: Ledger, state: str) -> str:
    delivery_id = await ledger.owe_one(envelope=f"env_{state}")
    due_at = "due_at" if state in {"pending", "running"} else "NULL"
    await ledger.change(
        f"UPDATE deliveries SET state = :state, due_at = {due_at}, attempts = 12 "  # noqa: S608
        "WHERE envelope_id = :envelope_id",
        state=state,
        envelope_id=f"env_{state}",
    )
    return str(delivery_id)


class TestList:
    async def test_pages_follow_each_other(self, ledger: Ledger) -> None:
        owed = [await ledger.owe_one(envelope=f"env_{n}") for n in range(5)]

        pages = [await control.list_deliveries(ledger.database, limit=2)]
        while (cursor := pages[-1].next_cursor) is not None:
            pages.append(await control.list_deliveries(ledger.database, limit=2, cursor=cursor))

        assert [2, 2, 1] == [len(page.items) for page in pages]
        assert owed[::-1] == [item.id for page in pages for item in page.items]

    async def test_filters_narrow(self, ledger: Ledger) -> None:
        await ledger.register("mail")
        await ledger.owe("file", "mail", envelope="env_1")
        await ledger.owe_one("file", envelope="env_2", account="acme")
        await in_state(ledger, "dead")

        found = [
            len((await control.list_deliveries(ledger.database, **wanted)).items)
            for wanted in (
                {},
                {"state": "dead"},
                {"callback": "mail"},
                {"envelope_id": "env_1"},
                {"sight": Sight(("acme",))},
            )
        ]

        assert [4, 1, 1, 2, 1] == found

    async def test_what_is_misspelt_is_explained(self, ledger: Ledger) -> None:
        with pytest.raises(NotFound, match="the states are pending, running"):
            await control.list_deliveries(ledger.database, state="failed")
        with pytest.raises(NotFound, match="is not the id of a cursor"):
            await control.list_deliveries(ledger.database, cursor="2")

    async def test_of_a_callback_that_is_misspelt_names_those_there_are(
        self, ledger: Ledger
    ) -> None:
        with pytest.raises(NotFound, match="there is no callback 'fiel'; registered: file"):
            await control.list_deliveries(ledger.database, callback="fiel")

    async def test_of_a_callback_with_nothing_or_without_a_register_is_given(
        self, ledger: Ledger
    ) -> None:
        assert () == (await control.list_deliveries(ledger.database, callback="file")).items

        await in_state(ledger, "dead")
        await ledger.change("DELETE FROM callbacks")

        assert 1 == len((await control.list_deliveries(ledger.database, callback="file")).items)


class TestFind:
    async def test_gives_a_delivery_with_its_history(self, ledger: Ledger) -> None:
        delivery_id = await ledger.owe_one()
        await ledger.claim(lease=timedelta(seconds=-1))
        await ledger.claim()

        found = await control.find(ledger.database, str(delivery_id))

        assert (delivery_id, "running", 2) == (
            found.delivery.id,
            found.delivery.state,
            found.delivery.attempts,
        )
        assert ["lost"] == [each.verdict for each in found.attempts]

    async def test_gives_what_operators_did_to_it_and_why(self, ledger: Ledger) -> None:
        delivery_id = await in_state(ledger, "dead")
        other = await in_state(ledger, "parked")
        await control.retry(ledger.database, delivery_id, actor=ACTOR)
        await control.discard(ledger.database, other, reason="another", actor=ACTOR)
        await control.discard(ledger.database, delivery_id, reason="a test", actor="bob")

        found = await control.find(ledger.database, delivery_id)

        assert [
            ("delivery.retried", ACTOR, None),
            ("delivery.discarded", "bob", "a test"),
        ] == [(act.action, act.actor, act.details["reason"]) for act in found.acts]

    async def test_what_is_not_there_is_not_found(self, ledger: Ledger) -> None:
        with pytest.raises(NotFound, match="there is no delivery 01890a5d"):
            await control.find(ledger.database, "01890a5d-ac96-774b-bcce-b302099a8057")


class TestRetry:
    @pytest.mark.parametrize("state", ["dead", "pending"])
    async def test_makes_it_due_now_with_a_fresh_round(self, ledger: Ledger, state: str) -> None:
        delivery_id = await in_state(ledger, state)

        before = await control.retry(ledger.database, delivery_id, actor=ACTOR)

        (claim,) = await ledger.claim()
        assert state == before.state
        assert (delivery_id, 13, 12) == (str(claim.id), claim.attempt, claim.spent)

    @pytest.mark.parametrize(
        "state, words",
        [
            ("done", "new generation"),
            ("discarded", r"`events redispatch .{36} --callback file` delivers its event"),
            ("running", "right now"),
            ("parked", "no process serves"),
        ],
    )
    async def test_what_it_cannot_do_is_explained(
        self, ledger: Ledger, state: str, words: str
    ) -> None:
        delivery_id = await in_state(ledger, state)

        with pytest.raises(NotAllowed, match=words):
            await control.retry(ledger.database, delivery_id, actor=ACTOR)

        assert [] == await ledger.audit()

    @pytest.mark.parametrize("wrong", ["7", "01890a5d-ac96-774b-bcce-b302099a8057"])
    async def test_what_is_not_there_is_not_found(self, ledger: Ledger, wrong: str) -> None:
        with pytest.raises(NotFound, match=wrong):
            await control.retry(ledger.database, wrong, actor=ACTOR)

    async def test_of_a_callback_that_was_forgotten_is_refused(self, ledger: Ledger) -> None:
        delivery_id = await in_state(ledger, "dead")
        await ledger.change("DELETE FROM callbacks")

        with pytest.raises(NotFound, match="there is no callback 'file'"):
            await control.retry(ledger.database, delivery_id, actor=ACTOR)

        assert ["dead"] == await ledger.states()

    async def test_two_operators_at_once_make_it_run_once(self, ledger: Ledger) -> None:
        delivery_id = await in_state(ledger, "dead")

        await asyncio.gather(
            *(control.retry(ledger.database, delivery_id, actor=who) for who in ("ada", "bob"))
        )
        claims: list[Claim] = [*await ledger.claim(), *await ledger.claim()]

        assert [delivery_id] == [str(claim.id) for claim in claims]
        assert {"ada", "bob"} == {row.actor for row in await ledger.audit()}

    async def test_a_retried_dead_letter_gets_a_whole_round_and_keeps_counting(
        self, ledger: Ledger
    ) -> None:
        callbacks = Callbacks()
        keys: set[str] = set()
        attempts: list[int] = []

        @callbacks.on("*", max_attempts=2, backoff=timedelta(milliseconds=1))
        async def file(event: Event) -> NoReturn:
            keys.add(event.delivery_id)
            attempts.append(event.attempt)
            raise ValueError

        async def is_dead() -> bool:
            return await ledger.states() == ["dead"]

        delivery_id = await ledger.owe_one()
        with ledger.dispatching(callbacks):
            await until(is_dead)
            await control.retry(ledger.database, delivery_id, actor=ACTOR)
            await until(lambda: len(attempts) == 4)
            await until(is_dead)

        assert [1, 2, 3, 4] == attempts
        assert {str(delivery_id)} == keys


class TestDiscard:
    @pytest.mark.parametrize("state", ["dead", "pending", "parked", "running"])
    async def test_owes_it_no_longer(self, ledger: Ledger, state: str) -> None:
        delivery_id = await in_state(ledger, state)

        await control.discard(ledger.database, delivery_id, reason="a test", actor=ACTOR)

        (row,) = await ledger.deliveries()
        assert ("discarded", None) == (row.state, row.due_at)
        assert row.settled_at is not None

    @pytest.mark.parametrize("state", ["done", "discarded"])
    async def test_what_is_over_stays_as_it_is(self, ledger: Ledger, state: str) -> None:
        delivery_id = await in_state(ledger, state)

        with pytest.raises(NotAllowed, match=f"is {state}"):
            await control.discard(ledger.database, delivery_id, reason="a test", actor=ACTOR)

        assert [state] == await ledger.states()

    async def test_is_written_down_in_the_same_transaction(self, ledger: Ledger) -> None:
        delivery_id = await in_state(ledger, "dead")

        await control.discard(ledger.database, delivery_id, reason="a test", actor=ACTOR)

        (row,) = await ledger.audit()
        assert (ACTOR, "delivery.discarded") == (row.actor, row.action)
        assert f"delivery:{delivery_id}" == row.subject
        assert {"from_state": "dead", "attempts": 12, "reason": "a test"} == row.details


class TestListCallbacks:
    async def test_says_who_is_served_and_what_is_owed(self, ledger: Ledger) -> None:
        await ledger.register("gone")
        await ledger.shift("callbacks", "last_seen_at", -timedelta(seconds=31), name="gone")
        await ledger.change("UPDATE callbacks SET paused_at = last_seen_at WHERE name = 'gone'")
        for state in ("done", "dead", "parked", "pending", "discarded"):
            await in_state(ledger, state)

        served, gone = sorted(
            await control.list_callbacks(ledger.database),
            key=lambda each: not each.registered.is_served,
        )

        assert {"dead": 1, "parked": 1, "pending": 1} == served.counts
        assert ("file", None) == (
            served.registered.subscription.name,
            served.registered.paused_at,
        )
        assert {} == gone.counts
        assert gone.pause_reason is None
        assert gone.registered.paused_at is not None
        assert (None, None) == (served.flow.paused_at, served.flow.open_until)
        assert gone.registered.paused_at == gone.flow.paused_at

    async def test_says_why_one_is_paused(self, ledger: Ledger) -> None:
        for reason in ("first", "last"):
            await control.pause(ledger.database, "file", reason=reason, actor=ACTOR)
            (paused,) = await control.list_callbacks(ledger.database)
            assert reason == paused.pause_reason
            await control.resume(ledger.database, "file", actor=ACTOR)

        (resumed,) = await control.list_callbacks(ledger.database)
        assert resumed.pause_reason is None


class TestForget:
    @pytest.fixture(name="gone")
    async def _gone(self, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> Ledger:
        """A ledger with a callback that nobody serves any more."""
        monkeypatch.setattr(control, "MEMORY", timedelta(milliseconds=1))
        monkeypatch.setattr(control, "DISCARDED_AT_ONCE", 2)
        await ledger.shift("callbacks", "last_seen_at", -timedelta(minutes=1), name="file")
        return ledger

    async def forget(self, ledger: Ledger, name: str = "file") -> int:
        return await control.forget(ledger.database, name, reason="it is over", actor=ACTOR)

    async def test_gives_up_what_waits_and_keeps_the_rest(self, gone: Ledger) -> None:
        await gone.register("mail")
        await gone.owe_one("mail", envelope="env_mail")
        for state in ("pending", "running", "parked", "done", "dead"):
            await in_state(gone, state)
        for number in range(5):
            await gone.owe_one(envelope=f"env_{number}")

        discarded = await self.forget(gone)

        assert 8 == discarded
        states = Counter((row.callback, row.state) for row in await gone.deliveries())
        assert {
            ("mail", "pending"): 1,
            ("file", "discarded"): 8,
            ("file", "done"): 1,
            ("file", "dead"): 1,
        } == states
        listed = await control.list_callbacks(gone.database)
        assert ["mail"] == [each.registered.subscription.name for each in listed]

    async def test_is_written_down(self, gone: Ledger) -> None:
        await self.forget(gone)

        (row,) = await gone.audit()
        assert (ACTOR, "callback.forgotten", "callback:file") == (
            row.actor,
            row.action,
            row.subject,
        )
        assert {"reason": "it is over"} == row.details

    async def test_one_that_is_served_is_refused(self, ledger: Ledger) -> None:
        await ledger.owe_one()

        with pytest.raises(NotAllowed, match=r"a process served 'file' \d s ago: take it out"):
            await self.forget(ledger)

        assert ["pending"] == await ledger.states()
        assert [] == await ledger.audit()

    async def test_finds_what_intake_owed_it_meanwhile(
        self, gone: Ledger, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(control, "MEMORY", timedelta(milliseconds=500))
        under_way = asyncio.create_task(self.forget(gone))
        await until(gone.audit)
        await gone.owe_one()

        assert 1 == await under_way
        assert ["discarded"] == await gone.states()

    async def test_one_that_is_registered_again_begins_anew(self, gone: Ledger) -> None:
        await gone.owe_one(envelope="env_1")
        await self.forget(gone)
        await gone.register("file")
        await gone.owe_one(envelope="env_2")

        async with gone.transaction() as connection:
            assert 0 == await forgetting.give_up(connection, "file", limit=10)

        assert ["discarded", "pending"] == await gone.states()

    async def test_cut_off_in_the_middle_it_goes_on(self, gone: Ledger) -> None:
        await in_state(gone, "parked")
        await gone.change("DELETE FROM callbacks")

        assert 1 == await self.forget(gone)
        with pytest.raises(NotFound, match="there is no callback 'file'"):
            await self.forget(gone)
