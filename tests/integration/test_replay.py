"""Events owed again with intent: to those who had them, and to those who came later."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest

from app.dispatch import control, replay
from app.dispatch.replay import Backfilled
from app.errors import NotAllowed, NotFound
from app.store import breakers, callbacks, deliveries
from app.store.callbacks import Subscription
from app.store.ids import new_id
from app.store.replays import owe
from tests.integration.ledger import Ledger

ACTOR = "ada"
DAY = timedelta(days=1)
NOBODY = "01890a5d-ac96-774b-bcce-b302099a8057"


@pytest.fixture(name="ledger")
async def _ledger(database_url: str) -> AsyncIterator[Ledger]:
    ledger = Ledger(database_url)
    await ledger.register("file", "mail")
    yield ledger
    await ledger.database.close()


async def settle_all(ledger: Ledger, state: str = "done") -> None:
    await ledger.change("UPDATE deliveries SET state = :state, due_at = NULL", state=state)


class TestRedispatch:
    async def test_owes_an_event_that_is_done_again(self, ledger: Ledger) -> None:
        event = await ledger.record(sequence=7)
        first = await ledger.owe_one("file", event=event, sequence=7)
        await settle_all(ledger)

        (again,) = await replay.redispatch(ledger.database, event, to=["file"], actor=ACTOR)

        (claim,) = await ledger.claim()
        row = await ledger.delivery(again.id)
        assert (again.id, 2, event) == (claim.id, claim.generation, claim.event_id)
        assert ("running", 7, "env_1", "default") == (
            row.state,
            row.sequence,
            row.envelope_id,
            row.account,
        )
        assert "done" == (await ledger.delivery(first)).state

    async def test_goes_to_all_that_ask_for_it_now(self, ledger: Ledger) -> None:
        await ledger.register("extra", patterns=["contract.extracted"])
        event = await ledger.record()
        await ledger.owe("file", event=event)

        made = await replay.redispatch(ledger.database, str(event), actor=ACTOR)

        assert [("file", 2), ("mail", 1)] == sorted((m.callback, m.generation) for m in made)

    async def test_is_written_down(self, ledger: Ledger) -> None:
        event = await ledger.record()

        await replay.redispatch(ledger.database, event, to=["mail"], actor=ACTOR)

        (row,) = await ledger.audit()
        assert (ACTOR, "event.redispatched", f"event:{event}") == (
            row.actor,
            row.action,
            row.subject,
        )
        assert {"generations": {"mail": 1}} == row.details

    async def test_two_operators_at_once_make_two_generations(self, ledger: Ledger) -> None:
        event = await ledger.record()
        await ledger.owe("file", event=event)

        await asyncio.gather(
            *(
                replay.redispatch(ledger.database, event, to=["file"], actor=who)
                for who in ("ada", "bob", "cyd")
            )
        )

        assert [1, 2, 3, 4] == sorted(d.generation for d in await ledger.deliveries())

    async def test_meets_the_sweep_without_an_error(self, postgres_url: str) -> None:
        """The sweep owes the first generation while a person asks for one more."""
        ledger = Ledger(postgres_url)
        await ledger.register("file")
        event = await ledger.record()

        async with ledger.transaction() as connection:
            await deliveries.enqueue(connection, [(event, "file", "default", "env_1", 1)])
            asking = asyncio.create_task(replay.redispatch(ledger.database, event, actor=ACTOR))
            async with ledger.transaction() as other:
                for _ in range(200):
                    waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted"
                    if (await other.exec_driver_sql(waiting)).scalar():
                        break
                    await asyncio.sleep(0.01)
        (made,) = await asking

        assert 2 == made.generation
        assert [1, 2] == sorted(d.generation for d in await ledger.deliveries())
        await ledger.database.close()

    @pytest.mark.parametrize(
        "effect, words",
        [("quarantined", "reproject it first"), ("conflict", "--accept")],
    )
    async def test_of_what_was_never_applied_is_refused(
        self, ledger: Ledger, effect: str, words: str
    ) -> None:
        event = await ledger.record(None if effect == "quarantined" else "a.b", effect=effect)

        with pytest.raises(NotAllowed, match=words):
            await replay.redispatch(ledger.database, event, actor=ACTOR)

        assert [] == await ledger.deliveries()

    async def test_to_whom_does_not_ask_for_it_is_refused(self, ledger: Ledger) -> None:
        async with ledger.transaction() as connection:
            wanted = Subscription("extra", ("contract.*", "envelope.sent"), "acme")
            await callbacks.register(connection, [wanted])
        event = await ledger.record()

        for to in (["extra"], ["file", "extra"]):
            with pytest.raises(
                NotAllowed, match=r"extra asks for contract\.\*, envelope\.sent of acme"
            ):
                await replay.redispatch(ledger.database, event, to=to, actor=ACTOR)

        assert [] == await ledger.deliveries()

    async def test_goes_to_those_that_are_named_once_each(self, ledger: Ledger) -> None:
        event = await ledger.record()
        names = ["mail", "file", "mail"]

        made = await replay.redispatch(ledger.database, event, to=names, actor=ACTOR)

        assert ["file", "mail"] == sorted(each.callback for each in made)

    async def test_to_nobody_is_refused(self, database_url: str) -> None:
        ledger = Ledger(database_url)
        event = await ledger.record()

        with pytest.raises(NotAllowed, match="none is registered"):
            await replay.redispatch(ledger.database, event, actor=ACTOR)
        with pytest.raises(NotFound, match="no process has loaded any"):
            await replay.redispatch(ledger.database, event, actor=ACTOR, to=["file"])

        await ledger.database.close()

    async def test_of_what_is_not_there_is_not_found(self, ledger: Ledger) -> None:
        event = await ledger.record()

        with pytest.raises(NotFound, match=f"no event {NOBODY}"):
            await replay.redispatch(ledger.database, NOBODY, actor=ACTOR)
        with pytest.raises(NotFound, match="is not the id of an event"):
            await replay.redispatch(ledger.database, "7", actor=ACTOR)
        with pytest.raises(NotFound, match="no callback 'fil'; registered: file, mail"):
            await replay.redispatch(ledger.database, event, actor=ACTOR, to=["fil"])

    async def test_owing_nothing_is_fine(self, ledger: Ledger) -> None:
        async with ledger.transaction() as connection:
            assert {} == await owe(connection, [])


class TestBackfill:
    async def record(self, ledger: Ledger, age: timedelta, **about: object) -> UUID:
        at = datetime.now(UTC) - age
        milliseconds = int(at.timestamp() * 1000)
        identifier = UUID(int=milliseconds << 80 | new_id().int & ((1 << 80) - 1))
        envelope = f"env_{identifier.hex}"
        given = {"envelope": envelope, "received_at": at, "event_id": identifier, **about}
        return await ledger.record(**given)  # type: ignore[arg-type]

    async def run(self, ledger: Ledger, name: str = "file", **options: object) -> list[Backfilled]:
        given = {"since": datetime.now(UTC) - 30 * DAY, "actor": ACTOR, **options}
        return [step async for step in replay.backfill(ledger.database, name, **given)]  # type: ignore[arg-type]

    async def test_owes_the_past_in_the_order_of_its_receipt(self, ledger: Ledger) -> None:
        events = [await self.record(ledger, age * DAY) for age in (1, 3, 2)]

        steps = await self.run(ledger, rate=100)

        owed = sorted(await ledger.deliveries(), key=lambda d: (d.due_at is None, d.due_at))
        assert [events[1], events[2], events[0]] == [d.event_id for d in owed]
        assert {("file", "pending", 1)} == {(d.callback, d.state, d.generation) for d in owed}
        assert Backfilled(3, 3) == steps[-1]

    async def test_is_due_one_after_the_other(self, ledger: Ledger) -> None:
        for _ in range(21):
            await self.record(ledger, DAY)

        await self.run(ledger, rate=10)

        times = sorted(d.due_at for d in await ledger.deliveries() if d.due_at is not None)
        waits = {round((b - a).total_seconds(), 1) for a, b in itertools.pairwise(times)}
        assert {0.1} == waits

    async def test_lets_what_is_live_go_first(self, ledger: Ledger) -> None:
        for _ in range(50):
            await self.record(ledger, DAY)
        await self.run(ledger, rate=1)
        live = await ledger.owe_one("file", envelope="env_live")

        claims = await ledger.claim(limit=100)

        assert live in {claim.id for claim in claims}
        assert len(claims) < 25

    async def test_leaves_out_what_is_not_asked_for(self, ledger: Ledger) -> None:
        async with ledger.transaction() as connection:
            await callbacks.register(connection, [Subscription("new", ("*",), "default")])
        wanted = await self.record(ledger, DAY)
        owed = await self.record(ledger, DAY)
        await ledger.owe("new", event=owed)
        for effect in ("conflict", "refreshed"):
            await self.record(ledger, DAY, effect=effect)
        await self.record(ledger, DAY, effect="quarantined", event_type=None)
        await self.record(ledger, DAY, account="other")
        await self.record(ledger, DAY, event_type="receiver.dead")
        await self.record(ledger, 40 * DAY)
        await self.record(ledger, timedelta(0))

        steps = await self.run(ledger, "new", until=datetime.now(UTC) - timedelta(hours=1))

        assert Backfilled(1, 1) == steps[-1]
        assert {owed, wanted} == {d.event_id for d in await ledger.deliveries()}

    async def test_said_twice_owes_once(self, ledger: Ledger) -> None:
        await self.record(ledger, DAY)
        await self.run(ledger)

        again = await self.run(ledger)

        assert [Backfilled(0, 0)] == again
        assert 1 == len(await ledger.deliveries())

    async def test_ended_in_the_middle_goes_on_where_it_was(
        self, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(replay, "AT_ONCE", 2)
        monkeypatch.setattr(replay, "SPAN", 3)
        for _ in range(7):
            await self.record(ledger, DAY)
        since = datetime.now(UTC) - 2 * DAY
        steps = replay.backfill(ledger.database, "file", since=since, actor=ACTOR)
        seen = [await anext(steps) for _ in range(2)]
        await steps.aclose()

        rest = await self.run(ledger)

        assert [Backfilled(7, 0), Backfilled(7, 2)] == seen
        assert Backfilled(5, 5) == rest[-1]
        assert 7 == len({d.event_id for d in await ledger.deliveries()})
        first, *_ = ended = [
            row.details for row in await ledger.audit() if row.action == "callback.backfill_ended"
        ]
        assert {"owed": 2, "is_complete": False} == first
        assert {"owed": 5, "is_complete": True} == ended[-1]

    async def test_two_at_once_owe_once(self, ledger: Ledger) -> None:
        for _ in range(30):
            await self.record(ledger, DAY)

        both = await asyncio.gather(self.run(ledger), self.run(ledger))

        assert 30 == sum(steps[-1].owed for steps in both)
        assert 30 == len(await ledger.deliveries())

    async def test_is_never_far_ahead_of_its_time(
        self, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """So that an end by hand leaves little behind, and a live event waits for little."""
        ahead = timedelta(seconds=0.5)
        monkeypatch.setattr(replay, "AHEAD", ahead)
        for _ in range(8):
            await self.record(ledger, DAY)

        steps = replay.backfill(
            ledger.database, "file", since=datetime.now(UTC) - 2 * DAY, rate=2, actor=ACTOR
        )
        latest = []
        async for _ in steps:
            due = [d.due_at for d in await ledger.deliveries() if d.due_at is not None]
            latest.append(max(due, default=datetime.now(UTC)) - datetime.now(UTC))

        assert 8 == len(await ledger.deliveries())
        assert max(latest) < 2 * ahead

    async def test_is_written_down(self, ledger: Ledger) -> None:
        await self.record(ledger, DAY)
        since, until = datetime(2026, 1, 1, tzinfo=UTC), datetime.now(UTC)

        await self.run(ledger, since=since, until=until, rate=5)

        row = (await ledger.audit())[0]
        assert (ACTOR, "callback.backfilled", "callback:file") == (
            row.actor,
            row.action,
            row.subject,
        )
        said = {"since": since.isoformat(), "until": until.isoformat(), "rate": 5, "count": 1}
        assert said == row.details

    async def test_is_counted_by_type_first(self, ledger: Ledger) -> None:
        for event_type in ("envelope.sent", "envelope.signed", "envelope.sent"):
            await self.record(ledger, DAY, event_type=event_type)

        counts = await replay.count_backfill(
            ledger.database, "file", since=datetime.now(UTC) - 2 * DAY
        )

        assert {"envelope.sent": 2, "envelope.signed": 1} == counts
        assert [] == await ledger.deliveries()

    async def test_of_a_callback_that_is_not_there_is_not_found(self, ledger: Ledger) -> None:
        with pytest.raises(NotFound, match="registered: file, mail"):
            await self.run(ledger, "fiel")

    async def test_needs_a_rate(self, ledger: Ledger) -> None:
        with pytest.raises(NotAllowed, match="must be above 0"):
            await self.run(ledger, rate=0)


class TestPause:
    async def test_gathers_what_is_owed(self, ledger: Ledger) -> None:
        assert await control.pause(ledger.database, "file", reason="moving", actor=ACTOR)
        owed = await ledger.owe_one("file")

        held = await ledger.claim("file", "mail")

        assert [] == held
        assert await control.resume(ledger.database, "file", actor=ACTOR)
        assert [owed] == [claim.id for claim in await ledger.claim()]

    async def test_said_twice_is_done_once(self, ledger: Ledger) -> None:
        for changes in (True, False):
            assert changes is await control.pause(
                ledger.database, "file", reason="moving", actor=ACTOR
            )
        for changes in (True, False):
            assert changes is await control.resume(ledger.database, "file", actor=ACTOR)

        paused, resumed = await ledger.audit()
        assert ("callback.paused", "callback:file", {"reason": "moving"}) == (
            paused.action,
            paused.subject,
            paused.details,
        )
        assert "callback.resumed" == resumed.action
        assert "is paused" in resumed.details["was"]

    async def test_a_resumed_callback_shows_with_a_few_calls_whether_it_is_well(
        self, ledger: Ledger
    ) -> None:
        await ledger.change("UPDATE callbacks SET open_until = last_seen_at")
        await ledger.shift("callbacks", "open_until", timedelta(minutes=5))

        assert await control.resume(ledger.database, "file", actor=ACTOR)

        assert 1 == len(await ledger.audit())
        async with ledger.transaction() as connection:
            assert await breakers.probe(connection, "file", hold=timedelta(minutes=1))
        assert not await control.resume(ledger.database, "file", actor=ACTOR)

    async def test_of_a_callback_that_is_not_there_is_not_found(self, ledger: Ledger) -> None:
        with pytest.raises(NotFound, match="registered: file, mail"):
            await control.pause(ledger.database, "nobody", reason="x", actor=ACTOR)
        with pytest.raises(NotFound, match="registered: file, mail"):
            await control.resume(ledger.database, "nobody", actor=ACTOR)
