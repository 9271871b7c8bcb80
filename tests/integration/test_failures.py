"""Dead letters by their cause: listed, tried again with care, given up."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest

from app.dispatch import control, failures
from app.dispatch.failures import Pace, Progress
from app.errors import NotAllowed, NotFound
from app.store import deliveries
from app.store import failures as rows
from app.store.failures import Cause, Letter
from app.store.ids import new_id
from app.store.session import Database
from tests.integration.ledger import Ledger

ACTOR = "ada"
PRINT = "0123456789abcdef"
CAUSE = Cause(PRINT)
FAST = 10_000.0


@pytest.fixture(name="ledger")
async def _ledger(ledger: Ledger) -> Ledger:
    await ledger.register("file")
    return ledger


async def die(
    ledger: Ledger, count: int, *, fingerprint: str | None = PRINT, **about: Any
) -> list[UUID]:
    """Make dead letters, each of an envelope of its own."""
    made = [
        await ledger.owe_one(**{"envelope": f"env_{new_id().hex}", **about}) for _ in range(count)
    ]
    for id_ in made:
        await bury(ledger, id_, fingerprint=fingerprint)
    return made


async def bury(ledger: Ledger, delivery_id: UUID, *, fingerprint: str | None = PRINT) -> None:
    table = rows._deliveries
    dead = {"state": "dead", "due_at": None, "attempts": 3, "fingerprint": fingerprint}
    said = {"last_error": "ValueError: no", "settled_at": datetime.now(UTC)}
    async with ledger.transaction() as connection:
        chosen = table.update().where(table.c.id == delivery_id)
        await connection.execute(chosen.values(**dead, **said))


async def insert_dead(ledger: Ledger, count: int) -> None:
    """Make many at once."""
    now = datetime.now(UTC)
    made = [
        {
            "id": new_id(),
            "event_id": new_id(),
            "callback": "file",
            "account": "default",
            "envelope_id": f"env_{number}",
            "sequence": 1,
            "state": "dead",
            "attempts": 3,
            "fingerprint": PRINT,
            "created_at": now,
            "settled_at": now,
        }
        for number in range(count)
    ]
    async with ledger.transaction() as connection:
        for start in range(0, count, 1000):
            await connection.execute(rows._deliveries.insert(), made[start : start + 1000])


@asynccontextmanager
async def working(database_url: str, *, state: str = "done") -> AsyncIterator[None]:
    """Let every delivery that is due end in `state`, soon."""
    ledger = Ledger(database_url)
    due_at = "due_at" if state in {"pending", "running"} else "NULL"
    wanted = (
        f"UPDATE deliveries SET state = :state, due_at = {due_at}, attempts = attempts + 1 "  # noqa: S608
        "WHERE state = 'pending' AND attempts = spent"
    )

    async def work() -> None:
        while True:
            await ledger.change(wanted, state=state)
            await asyncio.sleep(0.02)

    task = asyncio.create_task(work())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])
        await ledger.database.close()


async def to_the_end(database: Database, cause: Cause = CAUSE, **options: Any) -> Progress:
    steps = failures.retry_group(database, cause, actor=ACTOR, **{"rate": FAST, **options})
    return [step async for step in steps][-1]


class TestGroups:
    async def test_count_what_died_of_one_cause(self, ledger: Ledger) -> None:
        await ledger.register("mail")
        await die(ledger, 1, fingerprint="feedfeedfeedfeed", name="mail")
        died = await die(ledger, 3)

        latest, earlier = await failures.list_groups(ledger.database)

        assert (PRINT, "file", "envelope.signed", 3, died[-1], "ValueError: no") == (
            latest.fingerprint,
            latest.callback,
            latest.event_type,
            latest.count,
            latest.delivery_id,
            latest.error,
        )
        assert ("mail", 1) == (earlier.callback, earlier.count)
        assert latest.first_at is not None
        assert latest.last_at is not None
        assert latest.first_at < latest.last_at < datetime.now(UTC)

    async def test_without_a_fingerprint_are_of_one_callback_and_type(self, ledger: Ledger) -> None:
        await die(ledger, 2, fingerprint=None)
        await die(ledger, 1, fingerprint=None, event_type="envelope.sent")

        found = await failures.list_groups(ledger.database)

        assert [("envelope.sent", None, 1), ("envelope.signed", None, 2)] == [
            (group.event_type, group.fingerprint, group.count) for group in found
        ]

    async def test_are_those_of_one_callback_if_asked(self, ledger: Ledger) -> None:
        await die(ledger, 1)
        await die(ledger, 1, fingerprint="feedfeedfeedfeed", name="mail")

        found = await failures.list_groups(ledger.database, callback="mail")

        assert ["mail"] == [group.callback for group in found]

    async def test_of_a_callback_that_is_misspelt_name_those_there_are(
        self, ledger: Ledger
    ) -> None:
        assert [] == await failures.list_groups(ledger.database, callback="file")
        with pytest.raises(NotFound, match="there is no callback 'fiel'; registered: file"):
            await failures.list_groups(ledger.database, callback="fiel")

    async def test_are_no_more_than_asked_for(self, ledger: Ledger) -> None:
        for number in range(3):
            await die(ledger, 1, fingerprint=str(number))

        found = await failures.list_groups(ledger.database, limit=2)

        assert ["2", "1"] == [group.fingerprint for group in found]

    async def test_leave_out_what_is_not_dead(self, ledger: Ledger) -> None:
        for id_ in await die(ledger, 1):
            await control.retry(ledger.database, id_, actor=ACTOR)

        assert [] == await failures.list_groups(ledger.database)


class TestRetryOfAGroup:
    async def test_tries_all_of_it_once_more(self, ledger: Ledger, database_url: str) -> None:
        died = await die(ledger, 8)
        (other,) = await die(ledger, 1, fingerprint="feedfeedfeedfeed")

        async with working(database_url):
            last = await to_the_end(ledger.database)

        assert Progress(total=8, retried=8, done=8) == last
        tried = [await ledger.delivery(id_) for id_ in died]
        assert {("done", 4, 3)} == {(d.state, d.attempts, d.spent) for d in tried}
        assert "dead" == (await ledger.delivery(other)).state

    async def test_is_written_down_with_its_result(self, ledger: Ledger, database_url: str) -> None:
        await die(ledger, 2)

        async with working(database_url):
            await to_the_end(ledger.database)

        began, ended = await ledger.audit()
        assert (ACTOR, "failures.retried", f"failure:{PRINT}") == (
            began.actor,
            began.action,
            began.subject,
        )
        assert {"callback": "file", "count": 2, "rate": FAST} == began.details
        assert "failures.retry_ended" == ended.action
        assert {"retried": 2, "done": 2, "failed": 0, "waiting": 0, "stopped": None} == (
            ended.details
        )

    async def test_stops_when_the_failures_return(self, ledger: Ledger, database_url: str) -> None:
        # Far more than are tried before a busy machine has told of the first.
        await die(ledger, 300)

        async with working(database_url, state="dead"):
            last = await to_the_end(ledger.database, rate=40)

        assert last.stopped is not None
        assert "failed again: the cause is still there" in last.stopped
        assert failures.FEW <= last.failed == last.retried - last.waiting
        assert last.retried < 300
        assert 300 - last.retried == sum(d.attempts == 3 for d in await ledger.deliveries())

    async def test_that_back_off_have_failed_again(self, ledger: Ledger, database_url: str) -> None:
        await die(ledger, 6)

        async with working(database_url, state="pending"):
            last = await to_the_end(ledger.database)

        assert (6, 0) == (last.failed, last.waiting)

    async def test_goes_on_if_a_few_fail(self, ledger: Ledger, database_url: str) -> None:
        """What has died again in this round is not tried again in it: it would never end."""
        await die(ledger, failures.FEW - 1)

        async with working(database_url, state="dead"):
            last = await to_the_end(ledger.database)

        assert Progress(total=4, retried=4, failed=4) == last
        assert {4} == {d.attempts for d in await ledger.deliveries()}

    async def test_earlier_events_of_an_envelope_go_first(self, ledger: Ledger) -> None:
        second = (await die(ledger, 1, envelope="env_1", sequence=2))[0]
        first = (await die(ledger, 1, envelope="env_1", sequence=1))[0]

        steps = failures.retry_group(ledger.database, CAUSE, actor=ACTOR, rate=0.01)
        seen = [await anext(steps), await anext(steps)]
        await steps.aclose()

        assert [0, 1] == [step.retried for step in seen]
        assert "pending" == (await ledger.delivery(first)).state
        assert "dead" == (await ledger.delivery(second)).state

    @pytest.mark.parametrize(
        "change, words",
        [
            pytest.param("paused_at = last_seen_at", "is paused: `callbacks resume", id="paused"),
            pytest.param("open_until = :later", "breaker of callback 'file' is open", id="open"),
            pytest.param("last_seen_at = :earlier", "no process serves 'file'", id="unserved"),
            pytest.param("name = 'another'", "no process serves 'file'", id="forgotten"),
        ],
    )
    async def test_waits_for_no_callback_that_is_given_nothing(
        self, ledger: Ledger, change: str, words: str
    ) -> None:
        await die(ledger, 2)
        now, hour = datetime.now(UTC), timedelta(hours=1)
        times = {"later": now + hour, "earlier": now - hour}
        named = {name: time for name, time in times.items() if name in change}
        if not ledger.database.is_postgresql:
            named = {n: t.replace(tzinfo=None).isoformat(" ") for n, t in named.items()}  # type: ignore[misc]
        await ledger.change(f"UPDATE callbacks SET {change}", **named)  # noqa: S608

        last = await to_the_end(ledger.database)

        assert last.stopped is not None
        assert words in last.stopped
        assert ["dead", "dead"] == await ledger.states()

    async def test_an_open_breaker_that_is_over_is_no_obstacle(
        self, ledger: Ledger, database_url: str
    ) -> None:
        await die(ledger, 1)
        await ledger.change("UPDATE callbacks SET open_until = last_seen_at")

        async with working(database_url):
            last = await to_the_end(ledger.database)

        assert Progress(total=1, retried=1, done=1) == last

    async def test_says_that_nobody_works(self, ledger: Ledger) -> None:
        await die(ledger, 2)

        last = await to_the_end(ledger.database, rate=5, patience=timedelta(seconds=1))

        assert (2, 2) == (last.retried, last.waiting)
        assert last.stopped is not None
        assert "see that a worker runs" in last.stopped

    async def test_waits_for_a_call_that_takes_long(
        self, ledger: Ledger, database_url: str
    ) -> None:
        await die(ledger, 1)
        steps = failures.retry_group(
            ledger.database, CAUSE, actor=ACTOR, patience=timedelta(seconds=0.6)
        )

        async with working(database_url, state="running"):
            seen = [await anext(steps) for _ in range(8)]
        await ledger.change("UPDATE deliveries SET state = 'done'")
        seen += [step async for step in steps]

        assert {None} == {step.stopped for step in seen}
        assert Progress(total=1, retried=1, done=1) == seen[-1]

    @pytest.mark.parametrize("state", ["discarded", "parked"])
    async def test_what_is_set_aside_meanwhile_is_no_failure(
        self, ledger: Ledger, database_url: str, state: str
    ) -> None:
        await die(ledger, 6)

        async with working(database_url, state=state):
            last = await to_the_end(ledger.database)

        assert Progress(total=6, retried=6) == last

    async def test_what_is_not_there_any_more_is_not_waited_for(self, ledger: Ledger) -> None:
        await die(ledger, 1)
        steps = failures.retry_group(ledger.database, CAUSE, actor=ACTOR)
        assert 1 == [await anext(steps), await anext(steps)][-1].waiting

        await ledger.change("DELETE FROM deliveries")
        seen = [step async for step in steps]

        assert 0 == seen[-1].waiting

    async def test_ended_in_the_middle_it_goes_on_where_it_was(
        self, ledger: Ledger, database_url: str
    ) -> None:
        await die(ledger, 4)
        steps = failures.retry_group(ledger.database, CAUSE, actor=ACTOR, rate=0.01)
        await anext(steps)
        await anext(steps)
        await steps.aclose()

        async with working(database_url):
            last = await to_the_end(ledger.database)

        assert Progress(total=3, retried=3, done=3) == last
        assert {4} == {d.attempts for d in await ledger.deliveries()}
        assert "interrupted" == (await ledger.audit())[1].details["stopped"]

    async def test_leaves_alone_what_somebody_else_takes(self, ledger: Ledger) -> None:
        (id_,) = await die(ledger, 1)
        steps = failures.retry_group(ledger.database, CAUSE, actor=ACTOR)
        await anext(steps)

        await control.retry(ledger.database, id_, actor="bob")
        seen = [step async for step in steps]

        assert Progress(total=0) == seen[-1]
        assert (await ledger.audit())[-1].details["stopped"] is None

    async def test_two_at_once_try_nothing_twice(self, ledger: Ledger, database_url: str) -> None:
        await die(ledger, 40)

        async with working(database_url):
            ada, bob = await asyncio.gather(
                to_the_end(ledger.database, rate=200), to_the_end(ledger.database, rate=200)
            )

        assert 40 == ada.retried + bob.retried
        assert 40 == ada.done + bob.done
        assert (ada.retried, bob.retried) == (ada.total, bob.total)
        assert {("done", 4)} == {(d.state, d.attempts) for d in await ledger.deliveries()}

    async def test_those_without_a_fingerprint_are_named_by_their_callback(
        self, ledger: Ledger, database_url: str
    ) -> None:
        await die(ledger, 2, fingerprint=None)
        await die(ledger, 1, fingerprint=None, name="mail")
        await die(ledger, 1)

        async with working(database_url):
            last = await to_the_end(ledger.database, Cause(None, "file"))

        assert Progress(total=2, retried=2, done=2) == last
        assert {"done": 2, "dead": 2} == Counter(await ledger.states())

    @pytest.mark.parametrize(
        "cause, words",
        [
            (Cause("0000000000000000"), "fingerprint '0000000000000000'"),
            (Cause(None, "file"), "callback 'file' without a fingerprint"),
        ],
    )
    async def test_of_nothing_is_explained(self, ledger: Ledger, cause: Cause, words: str) -> None:
        with pytest.raises(NotFound, match=words):
            await to_the_end(ledger.database, cause)

        assert [] == await ledger.audit()

    @pytest.mark.parametrize("rate", [0, -1.0, float("nan")])
    async def test_needs_a_rate(self, ledger: Ledger, rate: float) -> None:
        with pytest.raises(NotAllowed, match="must be above 0"):
            await to_the_end(ledger.database, rate=rate)

    async def test_of_ten_thousand(self, ledger: Ledger, database_url: str) -> None:
        """And of one more than is looked at in one go."""
        count = failures.BLOCK + 1
        await insert_dead(ledger, count)

        async with working(database_url):
            last = await to_the_end(ledger.database)

        assert Progress(total=count, retried=count, done=count) == last


class TestRevival:
    async def test_passes_over_what_died_again_meanwhile(self, ledger: Ledger) -> None:
        """Somebody else has tried it since it was seen: that was the retry."""
        (id_,) = await die(ledger, 1)

        async with ledger.transaction() as connection:
            revived = await rows.revive(connection, [Letter(id_, 2, 1)])

        assert [] == revived
        assert ["dead"] == await ledger.states()

    async def test_passes_over_what_somebody_holds(self, postgres_url: str) -> None:
        ledger = Ledger(postgres_url)
        held, free = await die(ledger, 2)
        letters = [Letter(held, 3, 1), Letter(free, 3, 1)]

        async with ledger.transaction() as connection:
            await deliveries.lock(connection, held)
            async with ledger.transaction() as another:
                revived = await rows.revive(another, letters)

        assert [free] == revived
        await ledger.database.close()


class TestDiscardOfAGroup:
    async def test_gives_all_of_it_up(self, ledger: Ledger) -> None:
        await die(ledger, 3)
        (other,) = await die(ledger, 1, fingerprint=None)

        count = await failures.discard_group(
            ledger.database, CAUSE, reason="test data", actor=ACTOR
        )

        found = await ledger.deliveries(state="discarded")
        assert 3 == count == len(found)
        assert all(each.settled_at is not None for each in found)
        assert "dead" == (await ledger.delivery(other)).state

    async def test_is_written_down_with_the_reason(self, ledger: Ledger) -> None:
        await die(ledger, 2, fingerprint=None)

        await failures.discard_group(
            ledger.database, Cause(None, "file"), reason="test data", actor=ACTOR
        )

        (row,) = await ledger.audit()
        assert (ACTOR, "failures.discarded", "failure:-") == (row.actor, row.action, row.subject)
        assert {"callback": "file", "count": 2, "reason": "test data"} == row.details

    async def test_of_more_than_go_at_once(self, ledger: Ledger) -> None:
        count = 2 * failures.DISCARDED_AT_ONCE + 1
        await insert_dead(ledger, count)

        given_up = await failures.discard_group(
            ledger.database, CAUSE, reason="test data", actor=ACTOR
        )

        assert count == given_up
        assert {"discarded"} == set(await ledger.states())


class TestPace:
    def test_is_never_faster_than_the_rate(self) -> None:
        pace = Pace(10, now=0)

        allowed = [pace.allowed(tick / 4) for tick in range(41)]

        assert [1, 2, 3] == allowed[:3]
        assert 101 == sum(allowed)

    def test_may_be_slower_than_one_a_second(self) -> None:
        pace = Pace(0.5, now=0)

        allowed = [pace.allowed(float(second)) for second in range(6)]

        assert [1, 0, 1, 0, 1, 0] == allowed

    def test_saves_nothing_up(self) -> None:
        pace = Pace(10, now=0)
        pace.allowed(0)

        assert 3 == pace.allowed(60)
