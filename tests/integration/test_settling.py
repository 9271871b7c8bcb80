"""The queue of verdicts: each is written, told of, or given up loudly, and none is forgotten."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import structlog

from app.callbacks import Callbacks
from app.dispatch.attempt import COMMITTED, DONE, Call, Dead, Failed, Outcome, Verdict
from app.dispatch.settling import Settler
from app.store import contents
from app.store.claims import Claim
from app.store.verdicts import Settlement
from tests.integration.ledger import Ledger
from tests.said import said

MINUTE = timedelta(minutes=1)
FAILED = Failed("ValueError: no", "0123456789abcdef", MINUTE)
DEAD = Dead("GiveUp: gone", "fedcba9876543210")


@pytest.fixture(name="ledger")
async def _ledger(ledger: Ledger) -> Ledger:
    await ledger.register("file")
    return ledger


@pytest.fixture(name="postgres_ledger")
async def _postgres_ledger(postgres_ledger: Ledger) -> Ledger:
    await postgres_ledger.register("file")
    return postgres_ledger


class Desk:
    """A settler, and what those who asked to be told have heard."""

    def __init__(self, ledger: Ledger) -> None:
        self.told: list[tuple[Outcome, Settlement]] = []
        self.times_settled = 0
        self.transactions = 0
        # Raised by the next transaction, before it begins.
        self.trouble: Exception | None = None
        # Put into the queue while the next transaction is under way.
        self.meanwhile: list[Outcome] = []
        self._ledger = ledger
        self.settler = Settler(
            self._begin,
            worker="worker-7",
            on_settled=self._count,
            on_attempted=self.told.extend,
        )

    @asynccontextmanager
    async def _begin(self, *, is_split: bool = False) -> AsyncIterator[Any]:
        self.transactions += 1
        trouble, self.trouble = self.trouble, None
        if trouble is not None:
            raise trouble
        async with self._ledger.database.begin(limit=MINUTE, is_split=is_split) as connection:
            yield connection
        meanwhile, self.meanwhile = self.meanwhile, []
        if meanwhile:
            self.settler.put(meanwhile)

    def _count(self) -> None:
        self.times_settled += 1

    async def is_empty(self) -> bool:
        """Whether somebody who waits for the queue to be empty would go on."""
        waiting = asyncio.ensure_future(self.settler.wait_until_empty())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        waiting.cancel()
        return waiting.done() and not waiting.cancelled()

    @property
    def verdicts_told(self) -> list[str]:
        return [row.verdict for _, row in self.told]


@pytest.fixture(name="desk")
def _desk(ledger: Ledger) -> Desk:
    return Desk(ledger)


async def ended(ledger: Ledger, *verdicts: Verdict) -> list[Outcome]:
    """Deliveries of as many envelopes, claimed and called; this is how the calls ended."""
    for number in range(len(verdicts)):
        await ledger.owe_one(envelope=f"env_{number}")
    claims = sorted(await ledger.claim(), key=lambda claim: str(claim.envelope_id))
    async with ledger.reading() as connection:
        found = await contents.load(connection, [claim.id for claim in claims])
    callbacks = Callbacks()
    callbacks.on("*", name="file")(lambda _: None)
    (callback,) = callbacks
    now = datetime.now(UTC)
    return [
        Outcome(Call(callback, claim, found[claim.id]), verdict, now, now)
        for claim, verdict in zip(claims, verdicts, strict=True)
    ]


def claim_of(outcome: Outcome) -> Claim:
    return outcome.call.claim


class TestAVerdict:
    async def test_is_written_and_told_of(self, ledger: Ledger, desk: Desk) -> None:
        outcomes = await ended(ledger, DONE, FAILED, DEAD)

        desk.settler.put(outcomes)
        assert (3, False) == (len(desk.settler), await desk.is_empty())
        await desk.settler.step()

        assert (0, True, 1) == (len(desk.settler), await desk.is_empty(), desk.times_settled)
        assert outcomes == [outcome for outcome, _ in desk.told]
        assert ["done", "failed", "dead"] == desk.verdicts_told
        assert ["done", "pending", "dead"] == await ledger.states()
        assert {"worker-7"} == {row.worker for row in await ledger.attempts()}
        assert FAILED.error == (await ledger.delivery(claim_of(outcomes[1]).id)).last_error

    async def test_is_waited_for(self, ledger: Ledger, desk: Desk) -> None:
        assert await desk.is_empty()
        writing = asyncio.ensure_future(desk.settler.step())
        await asyncio.sleep(0)
        assert not writing.done()

        desk.settler.put(await ended(ledger, DONE))
        await writing

        assert ["done"] == await ledger.states()

    async def test_that_comes_meanwhile_is_written_next(self, ledger: Ledger, desk: Desk) -> None:
        first, second = await ended(ledger, DONE, FAILED)
        desk.settler.put([first])
        desk.meanwhile = [second]

        await desk.settler.step()
        assert (1, False, ["done"]) == (
            len(desk.settler),
            await desk.is_empty(),
            desk.verdicts_told,
        )
        await desk.settler.step()

        assert (0, True, ["done", "failed"]) == (
            len(desk.settler),
            await desk.is_empty(),
            desk.verdicts_told,
        )

    async def test_is_needed_for_a_transaction(self, ledger: Ledger, desk: Desk) -> None:
        """A queue that is empty must leave the database alone."""
        desk.settler.put(await ended(ledger, DONE))
        await desk.settler.step()

        waiting = asyncio.ensure_future(desk.settler.step())
        await asyncio.sleep(0)

        assert 1 == desk.transactions
        waiting.cancel()

    async def test_of_which_the_database_knows_nothing_yet_is_tried_again(
        self, ledger: Ledger, desk: Desk
    ) -> None:
        (outcome,) = await ended(ledger, DONE)
        desk.settler.put([outcome])
        desk.trouble = ConnectionResetError()

        with pytest.raises(ConnectionResetError):
            await desk.settler.step()
        assert (1, False, []) == (len(desk.settler), await desk.is_empty(), desk.told)
        await desk.settler.step()

        assert (0, True, ["done"]) == (
            len(desk.settler),
            await desk.is_empty(),
            desk.verdicts_told,
        )

    async def test_that_is_committed_already_is_only_told_of(
        self, ledger: Ledger, desk: Desk
    ) -> None:
        committed, other = await ended(ledger, COMMITTED, FAILED)

        with structlog.testing.capture_logs() as lines:
            desk.settler.put([committed])

        assert (0, True, 1) == (len(desk.settler), await desk.is_empty(), desk.times_settled)
        assert [committed] == [outcome for outcome, _ in desk.told]
        assert ["delivery.attempted"] == said(lines, "delivery")
        desk.settler.put([other])
        assert (1, ["done"], 1) == (len(desk.settler), desk.verdicts_told, desk.times_settled)
        await desk.settler.step()
        assert ["running", "pending"] == await ledger.states()

    async def test_beside_one_that_is_committed_is_written(
        self, ledger: Ledger, desk: Desk
    ) -> None:
        desk.settler.put(await ended(ledger, COMMITTED, DONE))

        assert 1 == len(desk.settler)
        await desk.settler.step()

        assert ["running", "done"] == await ledger.states()

    async def test_on_what_somebody_else_has_claimed_is_dropped(
        self, ledger: Ledger, desk: Desk
    ) -> None:
        """Its lease was lost: who has it now will say how it ended."""
        await ledger.register("file", "own")
        zombie, honest = await ended(ledger, DEAD, DONE)
        await ledger.shift("deliveries", "due_at", -MINUTE, envelope_id="env_0")
        await ledger.claim(worker="worker-8")

        desk.settler.put([zombie, honest])
        with structlog.testing.capture_logs() as lines:
            await desk.settler.step()

        assert [honest] == [outcome for outcome, _ in desk.told]
        assert "running" == (await ledger.delivery(claim_of(zombie).id)).state
        assert [] == await ledger.events("receiver.dead")
        (line,) = [line for line in lines if line["event"] == "verdict.dropped"]
        assert [str(claim_of(zombie).id)] == [each["delivery_id"] for each in line["each"]]
        assert "warning" == line["log_level"]

    async def test_that_nobody_lost_is_no_reason_to_say_so(
        self, ledger: Ledger, desk: Desk
    ) -> None:
        desk.settler.put(await ended(ledger, DONE))
        with structlog.testing.capture_logs() as lines:
            await desk.settler.step()

        assert [] == said(lines, "verdict")


class TestADeadLetter:
    async def test_is_an_event_of_our_own(self, ledger: Ledger, desk: Desk) -> None:
        desk.settler.put(await ended(ledger, DONE, FAILED, DEAD))

        await desk.settler.step()

        assert 1 == len(await ledger.events("receiver.dead"))

    async def test_is_none_without_that_event(self, postgres_ledger: Ledger) -> None:
        """Both or neither: who asks to be told of dead letters is told of every one."""
        ledger = postgres_ledger
        await ledger.change(
            "ALTER TABLE events ADD CONSTRAINT silent CHECK (type <> 'receiver.dead')"
        )
        desk = Desk(ledger)
        desk.settler.put(await ended(ledger, DEAD, DONE))

        await desk.settler.step()

        assert ["running", "done"] == await ledger.states()


class TestAVerdictThatTheDatabaseRefuses:
    """It holds up nobody, and loses its words before it loses the delivery."""

    async def test_is_written_without_its_words(self, postgres_ledger: Ledger) -> None:
        ledger = postgres_ledger
        await ledger.change(
            "ALTER TABLE deliveries ADD CONSTRAINT picky CHECK (last_error NOT LIKE '%gone%')"
        )
        desk = Desk(ledger)
        outcomes = await ended(ledger, DONE, DEAD, FAILED)
        desk.settler.put(outcomes)

        await desk.settler.step()

        assert ["done", "dead", "pending"] == await ledger.states()
        assert ["done", "dead", "failed"] == desk.verdicts_told
        dead = await ledger.delivery(claim_of(outcomes[1]).id)
        assert ("the verdict could not be written as it was", None) == (
            dead.last_error,
            dead.fingerprint,
        )
        failed = await ledger.delivery(claim_of(outcomes[2]).id)
        assert (FAILED.error, FAILED.fingerprint) == (failed.last_error, failed.fingerprint)

    async def test_is_named_if_it_cannot_be_written_at_all(self, postgres_ledger: Ledger) -> None:
        ledger = postgres_ledger
        await ledger.change(
            "ALTER TABLE deliveries ADD CONSTRAINT stubborn "
            "CHECK (state <> 'done' OR envelope_id <> 'env_0')"
        )
        desk = Desk(ledger)
        stuck, other = await ended(ledger, DONE, DONE)
        desk.settler.put([stuck, other])

        with structlog.testing.capture_logs() as lines:
            await desk.settler.step()

        assert ["running", "done"] == await ledger.states()
        assert [other] == [outcome for outcome, _ in desk.told]
        (line,) = [line for line in lines if line["event"] == "verdict.unwritable"]
        assert str(claim_of(stuck).id) == line["delivery_id"]
        assert (0, True) == (len(desk.settler), await desk.is_empty())


class TestTheLine:
    async def test_says_all_that_is_known_of_an_attempt(self, ledger: Ledger, desk: Desk) -> None:
        (outcome,) = await ended(ledger, FAILED)
        call = outcome.call
        assert call.content is not None
        outcome = replace(
            outcome, call=replace(call, content=replace(call.content, fields_status="ready"))
        )
        desk.settler.put([outcome])

        with structlog.testing.capture_logs() as lines:
            await desk.settler.step()

        claim = claim_of(outcome)
        due_at = (await ledger.delivery(claim.id)).due_at
        assert due_at is not None
        (line,) = [line for line in lines if line["event"] == "delivery.attempted"]
        assert ("info", "dispatch") == (line["log_level"], line["part"])
        assert [
            {
                "delivery_id": str(claim.id),
                "event_id": str(claim.event_id),
                "envelope_id": "env_0",
                "event_type": "envelope.signed",
                "fields_status": "ready",
                "callback": "file",
                "attempt": 1,
                "verdict": "failed",
                "error": FAILED.error,
                "due_at": due_at.isoformat(),
            }
        ] == line["each"]

    async def test_of_a_dead_letter_is_a_warning(self, ledger: Ledger, desk: Desk) -> None:
        desk.settler.put(await ended(ledger, DEAD, DONE))

        with structlog.testing.capture_logs() as lines:
            await desk.settler.step()

        attempted = [line for line in lines if line["event"] == "delivery.attempted"]
        levels = {
            line["log_level"]: [(each["verdict"], each["due_at"]) for each in line["each"]]
            for line in attempted
        }
        assert {"warning": [("dead", None)], "info": [("done", None)]} == levels

    async def test_is_written_also_of_an_event_that_is_gone(
        self, ledger: Ledger, desk: Desk
    ) -> None:
        (outcome,) = await ended(ledger, FAILED)
        desk.settler.put([replace(outcome, call=replace(outcome.call, content=None))])

        with structlog.testing.capture_logs() as lines:
            await desk.settler.step()

        (line,) = [line for line in lines if line["event"] == "delivery.attempted"]
        assert [("", None)] == [
            (each["event_type"], each["fields_status"]) for each in line["each"]
        ]
