"""Group commit: who shares a transaction, who waits, and what one bad event costs the rest."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace as replace_fields
from datetime import UTC, datetime, timedelta
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import structlog
from sqlalchemy import select, update

from app.errors import NotDurable
from app.events.payload import Event
from app.intake import IntakeLimits
from app.intake import queue as intake_queue
from app.intake.record import record
from app.intake.submission import Receipt, Submission, understand
from app.store import events as event_rows
from app.store.session import Connection
from tests.factories import make_body, new_envelope_id
from tests.replicas import (
    BODIES,
    DELIVERIES,
    ENVELOPES,
    EVENTS,
    NOT_DURABLE,
    PATIENT,
    Replica,
    archive_and_crm,
    eventually,
    execute,
    replica,
)

RECORDED, DUPLICATE, CONFLICT, QUARANTINED = "recorded", "duplicate", "conflict", "quarantined"
# An answer is promised within 4.5 s; the machine of a test may be twice as slow.
PROMISED = 9


@pytest.fixture(name="one")
async def _one(database_url: str) -> AsyncIterator[Replica]:
    async with replica(database_url) as one:
        yield one


@pytest.fixture(name="postgres_one")
async def _postgres_one(postgres_url: str) -> AsyncIterator[Replica]:
    async with replica(postgres_url) as one:
        yield one


def submission(body: bytes, **broken: Any) -> Submission:
    """A submission; `broken` values of its event get past the parser."""
    made = understand(body, account="acme", key_label="main", received_at=datetime.now(UTC))
    if broken:
        assert made.event is not None
        made.event = replace_fields(made.event, **broken)
    return made


@asynccontextmanager
async def transaction(one: Replica) -> AsyncIterator[Connection]:
    """Another session's transaction; rolled back at the end, whatever happened."""
    async with one.database.engine.connect() as connection:
        await connection.begin()
        yield connection
        await connection.rollback()


class TestSharing:
    async def test_requests_at_once_share_a_transaction(self, one: Replica) -> None:
        answers = await one.together(*(make_body() for _ in range(15)))

        assert [RECORDED] * 15 == answers
        assert 1 == await one.transactions()

    async def test_many_share_those_that_can_run_side_by_side(self, one: Replica) -> None:
        answers = await one.together(*(make_body() for _ in range(100)))

        assert [RECORDED] * 100 == answers
        most = 3 if one.database.is_postgresql else 1
        assert most == await one.transactions()

    async def test_those_who_arrive_during_a_commit_share_the_next_one(self, one: Replica) -> None:
        first = asyncio.create_task(one.outcome(make_body()))
        await asyncio.sleep(0)
        await asyncio.sleep(0)

        answers = await one.together(*(make_body() for _ in range(15)))

        assert [RECORDED] * 16 == [await first, *answers]
        assert 2 == await one.transactions()

    async def test_alone_a_request_waits_for_nobody(self, one: Replica) -> None:
        await one.record(make_body())

        # Where the disk is busy, many may be slow by themselves.
        took = [1.0]
        while min(took) >= 0.1 and len(took) < 100:
            start = time.perf_counter()
            await one.record(make_body())
            took.append(time.perf_counter() - start)

        assert len(took) == await one.transactions()
        assert min(took) < 0.1

    @pytest.mark.parametrize(
        "limits",
        [
            pytest.param(replace_fields(PATIENT, batch_events=10), id="by-events"),
            pytest.param(replace_fields(PATIENT, batch_bytes=9_501), id="by-bytes"),
        ],
    )
    async def test_a_batch_is_bounded(self, database_url: str, limits: IntakeLimits) -> None:
        async with replica(database_url, limits=limits) as one:
            answers = await one.together(*(make_body(pad="x" * 850) for _ in range(40)))

            assert [RECORDED] * 40 == answers
            assert await one.transactions() in {4, 5}

    async def test_everything_of_one_event_commits_together(self, one: Replica) -> None:
        receipt = await one.record(make_body(envelope_id="env"))

        [row] = await one.rows(select(EVENTS))
        [body] = await one.rows(select(BODIES.c.event_id))
        deliveries = await one.rows(select(DELIVERIES))
        assert receipt.event_id == row.id == body[0]
        assert {"archive", "crm"} == {d.callback for d in deliveries}
        assert {("env", 1)} == {(d.envelope_id, d.sequence) for d in deliveries}
        assert "signed" == (await one.envelope("env")).status

    async def test_a_large_body_is_understood_in_a_thread(self, one: Replica) -> None:
        body = make_body(pad="x" * (intake_queue.LARGE_BODY + 1))

        assert RECORDED == await one.outcome(body)
        assert DUPLICATE == await one.outcome(body)

    async def test_callbacks_are_woken_only_when_something_is_owed(self, database_url: str) -> None:
        wakes: list[set[str]] = []
        async with replica(database_url, on_owed=wakes.append) as one:
            await one.record(b"not an event")
            assert not wakes

            await one.record(make_body())
            assert [{"archive", "crm"}] == wakes


class TestBounds:
    @pytest.mark.parametrize(
        "limits",
        [
            pytest.param(replace_fields(PATIENT, events=10), id="events"),
            pytest.param(replace_fields(PATIENT, bytes=10_000), id="bytes"),
        ],
    )
    async def test_a_full_queue_refuses_at_once_and_recovers(
        self, database_url: str, limits: IntakeLimits
    ) -> None:
        async with replica(database_url, limits=limits) as one:
            flood = [asyncio.create_task(one.record(make_body(pad="x" * 900))) for _ in range(20)]
            answers = await asyncio.gather(*flood, return_exceptions=True)

            refused = [answer for answer in answers if isinstance(answer, NotDurable)]
            assert 0 < len(refused) < 20
            assert {("queue_full", timedelta(seconds=1))} == {
                (error.reason, error.retry_after) for error in refused
            }
            assert RECORDED == await one.outcome(make_body())
            assert 21 - len(refused) == await one.count(EVENTS)

    async def test_says_so_while_many_wait(self, one: Replica) -> None:
        """So that other work in this process can wait, too."""
        flood = [asyncio.create_task(one.record(make_body())) for _ in range(50)]
        await asyncio.sleep(0)

        assert one.intake.is_pressed
        assert 50 == one.intake.pending[0]
        await asyncio.gather(*flood)
        assert (0, 0) == one.intake.pending
        assert not one.intake.is_pressed

    async def test_is_busy_a_little_longer_than_many_wait(
        self, one: Replica, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Between two batches nobody waits; who looks just then would think that all is quiet."""
        now = [1000.0]
        monkeypatch.setattr(intake_queue, "time", SimpleNamespace(monotonic=lambda: now[0]))
        flood = [asyncio.create_task(one.record(make_body())) for _ in range(50)]
        await asyncio.gather(*flood)

        seen = [one.intake.is_busy]
        now[0] += intake_queue.BUSY
        seen.append(one.intake.is_busy)
        await one.record(make_body())
        seen.append(one.intake.is_busy)

        assert [True, False, False] == seen

    async def test_closing_commits_what_is_waiting_and_takes_nothing_new(
        self, database_url: str
    ) -> None:
        async with replica(database_url) as one:
            waiting = [asyncio.create_task(one.outcome(make_body())) for _ in range(5)]
            await asyncio.sleep(0)
            await one.intake.close()

            assert NOT_DURABLE == await one.outcome(make_body())
            assert [RECORDED] * 5 == await asyncio.gather(*waiting)

    async def test_a_large_body_that_comes_too_late_is_refused(self, database_url: str) -> None:
        """It was admitted, and read in a thread while the last batch was committed."""
        async with replica(database_url) as one:
            late = asyncio.create_task(one.outcome(make_body(pad="x" * 100_000)))
            await asyncio.sleep(0)
            await one.intake.close()

            assert NOT_DURABLE == await asyncio.wait_for(late, PROMISED)

    async def test_reading_a_large_body_counts_towards_its_answer(self, database_url: str) -> None:
        """Bodies that wait for a thread must not make a sender wait for ever."""
        async with replica(database_url, limits=IntakeLimits(answer=timedelta(0))) as one:
            assert NOT_DURABLE == await one.outcome(make_body(pad="x" * 100_000))

    async def test_when_the_loop_ends_everybody_is_answered(self, postgres_one: Replica) -> None:
        await postgres_one.record(make_body(envelope_id="held"))
        async with held_envelope(postgres_one, "held"):
            waiting = asyncio.create_task(
                postgres_one.outcome(make_body(event="envelope.voided", envelope_id="held"))
            )
            await eventually(lambda: postgres_one.intake._slow)
            postgres_one.running.cancel()

            assert NOT_DURABLE == await waiting
            assert NOT_DURABLE == await postgres_one.outcome(make_body())

    @pytest.mark.parametrize("broken", ["_take", "_refuse"])
    async def test_a_loop_that_failed_can_be_started_again(
        self, one: Replica, broken: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Neither the loop that commits nor the one that answers in time ends alone."""
        with monkeypatch.context() as patch:
            patch.setattr(one.intake, broken, explode)
            if broken == "_refuse":
                one.intake._outstanding.append(submission(make_body()))
                one.intake._outstanding[0].on_answer = lambda _: None
            else:
                one.intake._arrived.set()
            with suppress(ExceptionGroup, RuntimeError):
                await asyncio.wait_for(one.running, PROMISED)
            assert one.running.done()
            one.intake._outstanding.clear()
        assert NOT_DURABLE == await one.outcome(make_body())

        one.running = asyncio.create_task(one.intake.run())

        await asyncio.sleep(0)
        assert RECORDED == await one.outcome(make_body())

    async def test_those_who_are_answered_do_not_gather_behind_one_who_waits(
        self, postgres_one: Replica
    ) -> None:
        """One held envelope at the head of the line must not keep every body in memory."""
        await postgres_one.record(make_body(envelope_id="held"))
        async with held_envelope(postgres_one, "held"):
            held = asyncio.create_task(
                postgres_one.outcome(make_body(event="envelope.voided", envelope_id="held"))
            )
            await asyncio.sleep(0)
            await postgres_one.together(*(make_body() for _ in range(300)))

            await eventually(lambda: len(postgres_one.intake._outstanding) < 10)
        assert RECORDED == await held


class TestWhoWaits:
    async def test_is_not_counted_any_more_after_a_defect(
        self, one: Replica, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whatever fails between admission and the queue: room must not be lost with each."""
        monkeypatch.setattr(intake_queue, "understand", explode)

        for body in (make_body(), make_body(pad="x" * 100_000)):
            with pytest.raises(RuntimeError):
                await one.record(body)

        assert (0, 0) == one.intake.pending

    async def test_cannot_keep_others_from_their_answers(self, one: Replica) -> None:
        """The connection of one may fail just when it is answered."""

        def fail(_: object) -> None:
            raise RuntimeError("nobody is there")

        about = {"account": "acme", "key_label": "key"}
        one.intake.submit(make_body(), **about, on_answer=fail)

        assert RECORDED == await one.outcome(make_body())
        assert 2 == await one.count(EVENTS)
        assert (0, 0) == one.intake.pending

    async def test_longer_than_it_may_is_not_answered_once_more(
        self, database_url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The event may still commit; its sender has gone, and its room was given away."""
        limits = IntakeLimits(answer=timedelta(seconds=0.2), transaction=timedelta(seconds=20))
        async with replica(database_url, limits=limits) as one:
            work, may_begin = one.intake._record, asyncio.Event()

            async def hesitate(batch: Sequence[Submission]) -> None:
                await may_begin.wait()
                await work(batch)

            monkeypatch.setattr(one.intake, "_record", hesitate)
            assert NOT_DURABLE == await one.outcome(make_body())

            may_begin.set()

            await eventually(lambda: is_there(one))
            assert (0, 0) == one.intake.pending


async def is_there(one: Replica) -> bool:
    return await one.count(EVENTS) == 1


class TestClientsThatGoAway:
    async def test_a_commit_under_way_is_not_cancelled(self, one: Replica) -> None:
        async with transaction_waits(one):
            body = make_body()
            gone = asyncio.create_task(one.record(body))
            stays = asyncio.create_task(one.outcome(make_body()))
            await eventually(lambda: not one.intake._waiting)
            await asyncio.sleep(0.05)
            gone.cancel()

        assert RECORDED == await stays
        assert DUPLICATE == await one.outcome(body)
        assert gone.cancelled()

    async def test_one_who_left_before_the_commit_disturbs_nobody(self, one: Replica) -> None:
        """What was genuine is recorded all the same: the next try is a duplicate."""
        tasks = [asyncio.create_task(one.outcome(make_body())) for _ in range(10)]
        await asyncio.sleep(0)
        tasks[3].cancel()

        answers = await asyncio.gather(*tasks, return_exceptions=True)

        assert 9 == answers.count(RECORDED)
        assert 10 == await one.count(EVENTS)
        assert 0 == one.intake._pending_events == one.intake._pending_bytes


@asynccontextmanager
async def transaction_waits(one: Replica) -> AsyncIterator[None]:
    """Let no transaction commit until the end: somebody holds what every event needs."""
    async with transaction(one) as connection:
        if one.database.is_postgresql:
            await connection.exec_driver_sql("LOCK TABLE events IN SHARE MODE")
        yield


@asynccontextmanager
async def held_envelope(one: Replica, envelope_id: str) -> AsyncIterator[None]:
    async with transaction(one) as connection:
        same = ENVELOPES.c.id == envelope_id
        await connection.execute(select(ENVELOPES).where(same).with_for_update())
        yield


class TestPoison:
    """One event that the database refuses is quarantined alone, with its SQLSTATE."""

    @pytest.mark.parametrize(
        "broken, on_sqlite, on_postgresql",
        [
            pytest.param({"reason": "a\0b"}, None, "sqlstate_22021", id="nul"),
            pytest.param({"fields_version": 2**31}, None, "sqlstate_22000", id="beyond-int4"),
            pytest.param(
                {"fields_version": 2**64},
                "sqlstate_OverflowError",
                "sqlstate_22000",
                id="beyond-64-bits",
            ),
            pytest.param(
                {"reason": "\ud800"},
                "sqlstate_UnicodeEncodeError",
                "sqlstate_22000",
                id="surrogate",
            ),
            pytest.param(
                {"metadata": {"a": "\ud800"}},
                "sqlstate_PydanticSerializationError",
                "sqlstate_PydanticSerializationError",
                id="unwritable-document",
            ),
        ],
    )
    async def test_an_unstorable_value(
        self, one: Replica, broken: dict[str, Any], on_sqlite: str | None, on_postgresql: str
    ) -> None:
        poison = submission(make_body(envelope_id="bad"), **broken)
        expected = on_postgresql if one.database.is_postgresql else on_sqlite
        waiting = [asyncio.create_task(one.outcome(make_body())) for _ in range(3)]
        bad = submit(one, poison)
        waiting += [asyncio.create_task(one.outcome(make_body())) for _ in range(4)]

        assert [RECORDED] * 7 == await asyncio.gather(*waiting)
        assert (QUARANTINED if expected else RECORDED) == (await bad).outcome

        row = await event_of(one, poison)
        [body] = await one.rows(select(BODIES.c.body).where(BODIES.c.event_id == poison.event_id))
        assert expected == row.reason
        assert poison.body == bytes(body[0])
        if expected is not None:
            assert ("quarantined", None, None) == (row.effect, row.type, row.envelope_id)
            assert ["receiver.quarantined"] == await one.own_events()

    async def test_a_violated_constraint(self, one: Replica) -> None:
        await plant(one, refuse="23514")
        bad = make_body(event="envelope.poisoned")

        answers = await one.together(make_body(), bad, make_body(), bad)

        assert [RECORDED, QUARANTINED, RECORDED, DUPLICATE] == answers
        expected = "sqlstate_23514" if one.database.is_postgresql else "sqlstate_IntegrityError"
        assert [expected] == [r.reason for r in await one.said_by_atlas() if r.reason]
        # What was refused is recognised when the sender tries again.
        assert DUPLICATE == await one.outcome(bad)

    async def test_bytes_that_are_refused_too_are_not_durable(self, one: Replica) -> None:
        await plant(one, refuse="22000", column="effect", value="quarantined")

        answers = await one.together(make_body(), b"garbage", make_body())

        assert [RECORDED, NOT_DURABLE, RECORDED] == answers

    async def test_a_defect_of_ours_is_not_durable_and_not_the_end(self, database_url: str) -> None:
        def broken(_: str, __: str) -> tuple[str, ...]:
            raise LookupError

        async with replica(database_url, interested=broken) as one:
            assert NOT_DURABLE == await one.outcome(make_body())
            assert not await one.count(EVENTS)

            one.intake._interested = archive_and_crm
            assert RECORDED == await one.outcome(make_body())


async def event_of(one: Replica, submitted: Submission) -> Any:
    [row] = await one.rows(select(EVENTS).where(EVENTS.c.id == submitted.event_id))
    return row


async def plant(
    one: Replica, *, refuse: str, column: str = "type", value: str = "envelope.poisoned"
) -> None:
    """Make the database refuse events with this value, as a constraint of somebody's would."""
    if one.database.is_postgresql:
        await execute(
            one.database,
            f"CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
            f"IF NEW.{column} = '{value}' THEN RAISE EXCEPTION 'no' USING ERRCODE = '{refuse}'; "
            f"END IF; RETURN NEW; END $$",
        )
        each = "BEFORE INSERT ON events FOR EACH ROW EXECUTE FUNCTION refuse()"
        await execute(one.database, f"CREATE TRIGGER refuse {each}")
    else:
        await execute(
            one.database,
            f"CREATE TRIGGER refuse BEFORE INSERT ON events WHEN NEW.{column} = '{value}' "
            f"BEGIN SELECT RAISE(ABORT, 'no'); END",
        )


class TestAfterTheCommit:
    async def test_a_failing_wake_up_is_not_the_senders_problem(self, database_url: str) -> None:
        def fail(_: set[str]) -> None:
            raise RuntimeError

        async with replica(database_url, on_owed=fail) as one:
            assert RECORDED == await one.outcome(make_body())
            assert RECORDED == await one.outcome(make_body())

    async def test_a_failing_log_is_not_the_senders_problem(
        self, one: Replica, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(intake_queue, "log", BrokenLog())

        assert RECORDED == await one.outcome(make_body())
        assert RECORDED == await one.outcome(make_body())

    async def test_a_failing_log_does_not_end_the_loop_when_events_are_refused(
        self, one: Replica, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(intake_queue, "log", BrokenLog())
        await plant(one, refuse="22000", column="effect", value="quarantined")

        assert NOT_DURABLE == await one.outcome(b"garbage")
        assert RECORDED == await one.outcome(make_body())

    async def test_one_line_is_logged_for_each_event(self, one: Replica) -> None:
        with structlog.testing.capture_logs() as lines:
            await one.record(make_body(envelope_id="env", event_id="e1", fields_status="ready"))
            await one.record(b"garbage")
            await eventually(lambda: len(lines) == 2)

        [event], [garbage] = [list(line["each"]) for line in lines]
        assert ("webhook.received", "webhook.received") == tuple(line["event"] for line in lines)
        assert ("recorded", "envelope.signed", "env", "ready", "acme") == (
            event["outcome"],
            event["event_type"],
            event["envelope_id"],
            event["fields_status"],
            event["account"],
        )
        assert ("quarantined", "not_json", None) == (
            garbage["outcome"],
            garbage["reason"],
            garbage["envelope_id"],
        )


class BrokenLog:
    """A log on a full disk."""

    def __getattr__(self, _: str) -> Any:
        def fail(*_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

        return fail


class TestOwnId:
    """A try whose answer was lost finds its own id, and says what was said then."""

    @pytest.mark.parametrize(
        "bodies, outcome",
        [
            pytest.param([make_body(envelope_id="env")], RECORDED, id="recorded"),
            pytest.param([b"garbage"], QUARANTINED, id="quarantined"),
            pytest.param(
                [make_body(envelope_id="env"), make_body(envelope_id="env", status="voided")],
                CONFLICT,
                id="conflict",
            ),
            pytest.param(
                [make_body(envelope_id="env"), make_body(envelope_id="env", externalId="x")],
                DUPLICATE,
                id="refreshed",
            ),
        ],
    )
    async def test_the_second_try_changes_nothing(
        self, one: Replica, bodies: list[bytes], outcome: str
    ) -> None:
        *before, tried = bodies
        await one.in_turn(*before)
        again = submission(tried)
        await write(one, again)
        known = await everything(one)

        receipt = await asyncio.wait_for(submit(one, again), PROMISED)

        assert outcome == receipt.outcome
        if outcome != DUPLICATE:
            assert again.event_id == receipt.event_id
            assert known == await everything(one)


async def write(one: Replica, *batch: Submission) -> None:
    """Commit a batch whose answer nobody hears."""
    now = datetime.now(UTC)
    async with one.database.begin(limit=timedelta(seconds=5)) as connection:
        await record(connection, batch, interested=archive_and_crm, now=now)


async def everything(one: Replica) -> list[Any]:
    tables = (EVENTS, ENVELOPES, DELIVERIES)
    return [sorted(map(repr, await one.rows(select(table)))) for table in tables]


class TestLocks:
    async def test_a_held_envelope_stalls_nobody_else(self, postgres_one: Replica) -> None:
        one = postgres_one
        await one.record(make_body(envelope_id="held", event="envelope.sent"))
        await one.record(make_body(envelope_id="known", event="envelope.sent"))
        async with held_envelope(one, "held"):
            held = [
                send(one, envelope_id="held", event=f"envelope.{e}") for e in ("signed", "viewed")
            ]
            others = [make_body(envelope_id=e) for e in ("known", "new-1", "new-2")]

            start = time.perf_counter()
            answers = await one.together(*others)
            quick = time.perf_counter() - start
            # And one that arrives while the lane of the held one is open.
            held.append(send(one, envelope_id="held", event="another.kind"))

            assert [RECORDED] * 3 == answers
            assert quick < PROMISED
            assert not any(task.done() for task in held)

        assert [RECORDED] * 3 == await asyncio.gather(*held)
        assert "signed" == (await one.envelope("held")).status
        assert [1, 2, 3, 4] == sorted(
            row.sequence for row in await one.said_by_atlas() if row.envelope_id == "held"
        )

    @pytest.mark.parametrize(
        "theirs",
        [
            pytest.param({"event_id": "e1", "envelope_id": "other"}, id="an-identity"),
            pytest.param({"event_id": "e2", "envelope_id": "env_1"}, id="an-envelope"),
        ],
    )
    async def test_what_another_replica_has_not_committed_stalls_nobody_else(
        self, postgres_one: Replica, theirs: dict[str, Any]
    ) -> None:
        one = postgres_one
        async with transaction(one) as connection:
            first = submission(make_body(event="envelope.viewed", **theirs))
            await record(connection, [first], interested=archive_and_crm, now=datetime.now(UTC))
            waiting = send(one, event_id="e1", envelope_id="env_1", event="envelope.sent")

            others = await one.together(*(make_body(envelope_id=f"n{i}") for i in range(40)))

            assert [RECORDED] * 40 == others
            assert not waiting.done()

        assert RECORDED == await waiting

    async def test_one_that_stays_held_is_not_durable_in_time(self, postgres_url: str) -> None:
        limits = IntakeLimits(answer=timedelta(seconds=1.5), transaction=timedelta(seconds=1))
        async with replica(postgres_url, limits=limits) as one:
            await one.record(make_body(envelope_id="held"))
            async with held_envelope(one, "held"):
                start = time.perf_counter()
                body = make_body(event="envelope.viewed", envelope_id="held")
                assert NOT_DURABLE == await one.outcome(body)
                assert 1.4 < time.perf_counter() - start < PROMISED
                await eventually(lambda: not one.intake._slow)

            # Whatever it took: on a busy machine that may be more than one try.
            answers = [await one.outcome(body)]
            while answers[-1] == NOT_DURABLE and len(answers) < 20:
                answers.append(await one.outcome(body))
            assert {RECORDED, DUPLICATE} >= {answers[-1]}
            assert 2 == await one.count(EVENTS)

    async def test_more_held_envelopes_than_lanes_stall_nobody(self, postgres_one: Replica) -> None:
        one = postgres_one
        names = [f"held-{n}" for n in range(8)]
        await one.together(*(make_body(envelope_id=name, event="envelope.sent") for name in names))
        async with transaction(one) as connection:
            await connection.execute(select(ENVELOPES).with_for_update())
            held = [asyncio.create_task(one.outcome(make_body(envelope_id=n))) for n in names]
            await eventually(lambda: len(one.intake._slow) == 8)

            assert RECORDED == await asyncio.wait_for(one.outcome(make_body()), PROMISED)

        assert [RECORDED] * 8 == await asyncio.gather(*held)

    async def test_poison_in_a_slow_lane_is_isolated_there(self, postgres_one: Replica) -> None:
        one = postgres_one
        await plant(one, refuse="23514")
        await one.record(make_body(envelope_id="held", event="envelope.sent"))
        async with held_envelope(one, "held"):
            bodies = [
                make_body(envelope_id="held", event=f"envelope.{e}")
                for e in ("viewed", "poisoned", "signed")
            ]
            held = [asyncio.create_task(one.outcome(body)) for body in bodies]
            await eventually(lambda: one.intake._slow)

        assert [RECORDED, QUARANTINED, RECORDED] == await asyncio.gather(*held)

    async def test_a_hot_lane_keeps_no_answered_bodies(self, postgres_one: Replica) -> None:
        """A lane may never run empty; what is answered must leave it all the same."""
        one = postgres_one
        await one.record(make_body(envelope_id="hot"))
        async with held_envelope(one, "hot"):
            tasks = [asyncio.create_task(one.outcome(hot_body(0)))]
            await eventually(lambda: one.intake._slow)
        longest = 0
        for n in range(1, 60):
            tasks.append(asyncio.create_task(one.outcome(hot_body(n))))
            await asyncio.sleep(0.01)
            # Faster than they can be answered would fill it as well.
            await eventually(lambda: sum(not task.done() for task in tasks) < 20)
            longest = max(longest, *(len(lane) for lane in one.intake._slow.values()), 0, 0)

        assert [RECORDED] * 60 == await asyncio.gather(*tasks)
        assert longest < 40

    async def test_an_exclusive_table_lock_is_not_durable_in_time(self, postgres_url: str) -> None:
        async with (
            replica(postgres_url, is_strict=True) as one,
            replica(postgres_url) as other,
            transaction(other) as connection,
        ):
            await one.record(make_body())
            await connection.exec_driver_sql("LOCK TABLE events IN ACCESS EXCLUSIVE MODE")
            start = time.perf_counter()

            answers = await one.together(*(make_body() for _ in range(5)))

            assert [NOT_DURABLE] * 5 == answers
            assert time.perf_counter() - start < PROMISED
            await connection.rollback()

            await eventually(lambda: is_recorded(one))

    async def test_a_duplicate_waits_for_the_first_and_inserts_if_it_rolls_back(
        self, postgres_one: Replica
    ) -> None:
        one = postgres_one
        body = make_body(event_id="e1")
        async with transaction(one) as connection:
            first = submission(body)
            await record(connection, [first], interested=archive_and_crm, now=datetime.now(UTC))
            waiter = asyncio.create_task(one.record(body))
            await waits_for_a_lock(one)

        receipt = await waiter
        assert RECORDED == receipt.outcome
        assert first.event_id != receipt.event_id
        assert 1 == await one.count(EVENTS)

    async def test_a_duplicate_waits_for_the_first_and_is_one_if_it_commits(
        self, postgres_one: Replica
    ) -> None:
        one = postgres_one
        body = make_body(event_id="e1")
        first = submission(body)
        async with one.database.begin(limit=timedelta(seconds=20)) as connection:
            await record(connection, [first], interested=archive_and_crm, now=datetime.now(UTC))
            waiter = asyncio.create_task(one.record(body))
            await waits_for_a_lock(one)

        receipt = await waiter
        assert (DUPLICATE, first.event_id) == (receipt.outcome, receipt.event_id)


async def is_recorded(one: Replica) -> bool:
    return await one.outcome(make_body()) == RECORDED


def in_time() -> float:
    return asyncio.get_running_loop().time() + PROMISED


def explode(*_: Any, **__: Any) -> Any:
    raise RuntimeError("a defect")


def send(one: Replica, **fields: Any) -> asyncio.Task[Any]:
    return asyncio.create_task(one.outcome(make_body(**fields)))


def hot_body(n: int) -> bytes:
    return make_body(event="envelope.viewed", envelope_id="hot", event_id=f"e{n}", n=n)


def submit(one: Replica, submission: Submission) -> asyncio.Future[Receipt]:
    """Begin to record what was understood earlier."""
    answered: asyncio.Future[Receipt] = asyncio.get_running_loop().create_future()
    on_answer = partial(intake_queue._fulfil, answered)
    one.intake._submit(submission, deadline=in_time(), on_answer=on_answer)
    return answered


async def waits_for_a_lock(one: Replica) -> None:
    async def is_waiting() -> bool:
        async with one.database.begin(limit=timedelta(seconds=5)) as connection:
            query = "SELECT count(*) FROM pg_locks WHERE NOT granted"
            return bool((await connection.exec_driver_sql(query)).scalar())

    await eventually(is_waiting)


class TestSubmission:
    async def test_a_copy_that_another_replica_received_sooner_is_no_news(
        self, one: Replica
    ) -> None:
        """Without a time of Atlas' own, a milestone has that of the first receipt."""
        body = make_body(envelope_id="env")
        sooner = submission(body)
        await one.record(body)
        before = await one.envelope("env")

        assert DUPLICATE == (await submit(one, sooner)).outcome

        assert before == await one.envelope("env")
        assert 1 == await one.count(EVENTS)

    async def test_copies_in_a_batch_compare_with_those_before_them(self, one: Replica) -> None:
        """The digest of the first is made from memory: its bytes are not stored yet."""
        fields = {"event": "envelope.sent", "envelope_id": new_envelope_id()}
        same = [make_body(**fields, event_id=f"e{n}") for n in range(3)]
        other = make_body(**fields, event_id="e4", metadata={"customer": "c-2"})

        assert [RECORDED, DUPLICATE, DUPLICATE, RECORDED] == await one.together(*same, other)

    async def test_copies_of_several_compare_each_with_its_own(self, one: Replica) -> None:
        """The digests of those that are stored are made of their bytes, one after the other."""
        names = [new_envelope_id() for _ in range(2)]
        told = [
            [make_body(event="envelope.sent", envelope_id=n, event_id=f"{n}-{k}") for n in names]
            for k in range(2)
        ]

        assert [RECORDED] * 2 == await one.together(*told[0])
        assert [DUPLICATE] * 2 == await one.together(*told[1])

    async def test_reading_an_event_back(self, one: Replica) -> None:
        receipt = await one.record(make_body(envelope_id="env"))
        async with one.database.begin(limit=timedelta(seconds=5), is_reading=True) as connection:
            found = await event_rows.get(connection, receipt.event_id)
            body = await event_rows.read_body(connection, receipt.event_id)

        assert found is not None
        assert ("envelope.signed", "env") == (found.type, found.envelope_id)
        assert body is not None

    async def test_a_settled_envelope_of_another_account_is_not_touched(self, one: Replica) -> None:
        await one.record(make_body(envelope_id="env", event="envelope.sent"))
        await execute(one.database, update(ENVELOPES).values(account="globex"))

        await one.record(make_body(envelope_id="env", event="envelope.voided"))

        assert "pending" == (await one.envelope("env", account="globex")).status


class TestReading:
    @pytest.mark.parametrize(
        "question, expected",
        [
            pytest.param({}, ["other", "signed", "viewed", "sent"], id="all-newest-first"),
            pytest.param({"envelope_id": "env"}, ["signed", "viewed", "sent"], id="envelope"),
            pytest.param({"event_type": "envelope.viewed"}, ["viewed"], id="type"),
            pytest.param({"effect": "milestone"}, ["viewed"], id="effect"),
            pytest.param({"limit": 2}, ["other", "signed"], id="limit"),
        ],
    )
    async def test_pages_of_events(
        self, one: Replica, question: dict[str, Any], expected: list[str]
    ) -> None:
        for kind, envelope_id in (("sent", "env"), ("viewed", "env"), ("signed", "env")):
            await one.record(make_body(event=f"envelope.{kind}", envelope_id=envelope_id))
            # Within a millisecond, ids of ours have no order.
            await asyncio.sleep(0.002)
        await one.record(make_body(event="envelope.other", envelope_id="env_2"))

        async with one.database.begin(limit=timedelta(seconds=5), is_reading=True) as connection:
            rows = await event_rows.page(connection, **question)
            rest = await event_rows.page(connection, **question, before=rows[0].id)

        assert expected == [row.type.removeprefix("envelope.") for row in rows]
        assert rows[1:] == rest[: len(rows) - 1]


def test_an_event_without_envelope_has_no_envelope_key() -> None:
    made = submission(make_body(event="ping", envelope_id=None))

    assert isinstance(made.event, Event)
    assert made.envelope_key is None
