"""A batch of nothing but news: two statements without a lock, and the long way if one is late."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import event, select, text

from app.store import batches, deliveries, envelopes, events
from app.store.session import KeptConnections, fetch
from tests.factories import make_body
from tests.replicas import (
    DELIVERIES,
    EVENTS,
    NOT_DURABLE,
    Replica,
    eventually,
    execute,
    read,
    replica,
)

RECORDED, DUPLICATE = "recorded", "duplicate"


@pytest.fixture(name="one")
async def _one(postgres_url: str) -> AsyncIterator[Replica]:
    async with replica(postgres_url) as one:
        yield one


@pytest.fixture(name="other")
async def _other(postgres_url: str) -> AsyncIterator[Replica]:
    async with replica(postgres_url) as other:
        yield other


@asynccontextmanager
async def heard(one: Replica) -> AsyncIterator[list[str]]:
    """Every statement that intake sends meanwhile, by its first words."""
    said: list[str] = []

    def note(query: Any) -> None:
        said.append(query.query.split(" AS ")[0].split()[0])

    def listen(driver: Any, *_: Any) -> None:
        driver.driver_connection.add_query_logger(note)

    event.listen(one.database.engine.sync_engine, "connect", listen)
    # The first two make the driver ask for types, and prepare what is asked ever after.
    await one.record(make_body(event="envelope.sent", envelope_id="first"))
    await one.record(make_body(event="envelope.signed", envelope_id="first"))
    said.clear()
    yield said


@pytest.fixture(name="between")
def _between(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Awaitable[Any]]], None]:
    """Have something happen once, after the next batch was read and before it is written."""
    write = batches.write

    def happens(act: Callable[[], Awaitable[Any]]) -> None:
        async def late(connection: Any, changes: Any) -> None:
            monkeypatch.setattr(batches, "write", write)
            await act()
            await write(connection, changes)

        monkeypatch.setattr(batches, "write", late)

    return happens


# What a statement of this release sends, by the type of its rows.
SENT = {
    "incoming_identity": events.IDENTITIES.names,
    "incoming_event": events.COLUMNS.names,
    "incoming_body": events.BODIES.names,
    "incoming_envelope": (*envelopes.COLUMNS.names, "version_read"),
    "incoming_delivery": deliveries.OWED.names,
}


async def test_rows_have_the_attributes_of_their_types(one: Replica) -> None:
    """A column more needs a type of its own, which a migration brings."""
    query = text("""
        SELECT t.typname, a.attname FROM pg_type t JOIN pg_attribute a ON a.attrelid = t.typrelid
        WHERE t.typnamespace = 'atlas_receiver'::regnamespace AND t.typname LIKE 'incoming%'
        ORDER BY t.typname, a.attnum
    """)
    async with one.database.begin(limit=timedelta(seconds=5)) as connection:
        rows = (await connection.execute(query)).all()

    assert SENT == {
        kind: tuple(attribute for of, attribute in rows if of == kind) for kind, _ in rows
    }


class Pause:
    """A place at which somebody waits until it is over."""

    def __init__(self) -> None:
        self.is_there, self.is_over = asyncio.Event(), asyncio.Event()

    async def here(self) -> None:
        self.is_there.set()
        await self.is_over.wait()


async def history(one: Replica, envelope_id: str) -> Sequence[Any]:
    """Sequence and version of each event of one envelope."""
    query = select(EVENTS.c.sequence, EVENTS.c.version).where(EVENTS.c.envelope_id == envelope_id)
    return [tuple(row) for row in await one.rows(query.order_by(EVENTS.c.sequence))]


class TestNews:
    async def test_takes_two_statements_and_no_transaction(self, one: Replica) -> None:
        async with heard(one) as said:
            assert [RECORDED] * 15 == await one.together(*(make_body() for _ in range(15)))

        assert ["SELECT", "WITH"] == said

    async def test_of_known_envelopes_does_so_too(self, one: Replica) -> None:
        async with heard(one) as said:
            await one.record(make_body(event="envelope.sent", envelope_id="env"))
            await one.record(make_body(event="envelope.signed", envelope_id="env"))

        assert ["SELECT", "WITH"] * 2 == said
        assert [(1, 1), (2, 2)] == await history(one, "env")
        assert "signed" == (await one.envelope("env")).status

    @pytest.mark.parametrize(
        "bodies",
        [
            pytest.param([make_body(event_id="a")] * 2, id="the-same-twice"),
            pytest.param(
                [make_body(event_id=id_, envelope_id="env") for id_ in ("a", "b")],
                id="one-signing-under-two-ids",
            ),
        ],
    )
    async def test_that_repeats_itself_is_no_news(self, one: Replica, bodies: list[bytes]) -> None:
        async with heard(one) as said:
            assert [RECORDED, DUPLICATE] == await one.together(*bodies)

        assert "BEGIN" in said

    async def test_beside_a_copy_takes_the_long_way(self, one: Replica) -> None:
        known = make_body()
        await one.record(known)

        assert [DUPLICATE, RECORDED] == await one.together(known, make_body())
        assert 2 == await one.count(EVENTS)


class TestFaster:
    """Somebody else, between the two statements."""

    async def test_with_a_change_of_the_envelope_is_not_overwritten(
        self, one: Replica, other: Replica, between: Callable[..., None]
    ) -> None:
        await one.record(make_body(event="envelope.created", envelope_id="env"))
        signed = make_body(event="envelope.signed", envelope_id="env")
        between(lambda: other.record(signed, account=one.account))

        assert RECORDED == await one.outcome(make_body(event="envelope.sent", envelope_id="env"))

        assert [(1, 1), (2, 2), (3, 3)] == await history(one, "env")
        envelope = await one.envelope("env")
        assert ("signed", 3) == (envelope.status, envelope.sequence)
        assert envelope.sent_at is not None

    async def test_with_the_first_event_of_an_envelope_is_not_overwritten(
        self, one: Replica, other: Replica, between: Callable[..., None]
    ) -> None:
        signed = make_body(event="envelope.signed", envelope_id="env")
        between(lambda: other.record(signed, account=one.account))

        assert RECORDED == await one.outcome(make_body(event="envelope.sent", envelope_id="env"))

        assert [(1, 1), (2, 2)] == await history(one, "env")
        assert "signed" == (await one.envelope("env")).status

    async def test_with_the_same_event_makes_ours_a_copy(
        self, one: Replica, other: Replica, between: Callable[..., None]
    ) -> None:
        body = make_body(envelope_id="env")
        between(lambda: other.record(body, account=one.account))

        assert [DUPLICATE, RECORDED] == await one.together(body, make_body())

        assert [(1, 1)] == await history(one, "env")
        assert 2 * 2 == await one.count(DELIVERIES)

    async def test_again_and_again_over_two_replicas_loses_nothing(
        self, one: Replica, other: Replica
    ) -> None:
        bodies = [
            make_body(event="envelope.viewed", envelope_id=f"env_{n % 5}", event_id=f"e{n}", note=n)
            for n in range(200)
        ]

        answers = await asyncio.gather(
            *((one, other)[n % 2].record(body, account="acme") for n, body in enumerate(bodies))
        )

        assert {RECORDED} == {answer.outcome for answer in answers}
        for n in range(5):
            assert [(k, k) for k in range(1, 41)] == await history(one, f"env_{n}")


class TestSideBySide:
    async def test_while_the_database_works_on_one_batch_the_next_begins(
        self, one: Replica, between: Callable[..., None]
    ) -> None:
        pause = Pause()
        between(pause.here)
        first = asyncio.create_task(one.outcome(make_body()))
        await pause.is_there.wait()

        assert RECORDED == await one.outcome(make_body())

        pause.is_over.set()
        assert RECORDED == await first

    async def test_an_envelope_that_is_being_written_waits_for_itself(
        self, one: Replica, between: Callable[..., None]
    ) -> None:
        pause = Pause()
        between(pause.here)
        sent = make_body(event="envelope.sent", envelope_id="env")
        signed = make_body(event="envelope.signed", envelope_id="env")
        first = asyncio.create_task(one.outcome(sent))
        await pause.is_there.wait()
        second = asyncio.create_task(one.outcome(signed))

        assert RECORDED == await one.outcome(make_body())
        assert not second.done()

        pause.is_over.set()
        assert (RECORDED, RECORDED) == tuple(await asyncio.gather(first, second))
        types = select(EVENTS.c.type).where(EVENTS.c.envelope_id == "env")
        in_order = [row[0] for row in await one.rows(types.order_by(EVENTS.c.sequence))]
        assert ["envelope.sent", "envelope.signed"] == in_order


class TestTheEnd:
    async def test_waits_for_an_envelope_that_the_last_batch_found_held(
        self, one: Replica, other: Replica
    ) -> None:
        await one.record(make_body(event="envelope.sent", envelope_id="env"))
        signed = make_body(event="envelope.signed", envelope_id="env")
        pool: Any = one.database.engine.pool

        async with holding(other, "env"):
            last = asyncio.create_task(one.outcome(signed))
            await asyncio.sleep(0)
            await one.intake.close()
            await asyncio.sleep(0.5)

        assert RECORDED == await last
        await eventually(lambda: pool.checkedout() == 0)


@asynccontextmanager
async def holding(other: Replica, envelope_id: str) -> AsyncIterator[None]:
    """Lock the row of an envelope."""
    async with other.database.begin(limit=timedelta(seconds=10)) as connection:
        same = "SELECT 1 FROM envelopes WHERE id = $1 FOR UPDATE"
        await fetch(connection, same, [envelope_id])
        yield


class TestKeptConnections:
    async def test_are_used_again(self, one: Replica) -> None:
        for _ in range(5):
            await one.record(make_body())

        assert 1 == await sessions(one)

    async def test_that_the_server_ended_are_replaced(self, one: Replica) -> None:
        await one.record(make_body())
        [kept] = one.intake._kept._idle
        await read(one.database, select(text("pg_terminate_backend(pid)")).select_from(OURS))
        await eventually(kept.info["driver"].is_closed)

        assert RECORDED == await one.outcome(make_body())

    async def test_that_know_row_types_which_are_gone_are_replaced(
        self, one: Replica, other: Replica
    ) -> None:
        """A schema that was restored has types of the same names; a replica must find them."""
        await one.record(make_body())
        for statement in (
            "ALTER TYPE incoming_body RENAME TO body_before",
            "CREATE TYPE incoming_body AS (event_id uuid, body bytea)",
            "DROP TYPE body_before",
        ):
            await execute(other.database, statement)

        # The first is told to come again.
        assert [NOT_DURABLE, RECORDED] == await one.in_turn(make_body(), make_body())

    async def test_that_are_cut_off_when_all_is_done_are_replaced(self, one: Replica) -> None:
        kept = KeptConnections(one.database, most=1)
        async with kept.begin(limit=timedelta(seconds=5)) as connection:
            connection.info["driver"].terminate()

        async with kept.begin(limit=timedelta(seconds=5)) as connection:
            assert [(1,)] == [tuple(row) for row in await fetch(connection, "SELECT 1")]
        await kept.close()

        pool: Any = one.database.engine.pool
        assert 0 == pool.checkedout()

    async def test_are_given_back_in_the_end(self, postgres_url: str) -> None:
        async with replica(postgres_url) as one:
            await one.record(make_body())
            pool: Any = one.database.engine.pool
            assert 1 == pool.checkedout()

            await one.intake.close()
            await eventually(lambda: pool.checkedout() == 0)

    async def test_leave_one_to_others_in_the_smallest_pool(self, postgres_url: str) -> None:
        async with replica(postgres_url, size=2) as one:
            answers = await one.together(*(make_body() for _ in range(600)))

            assert [RECORDED] * 600 == answers
            assert one.database.engine.pool.checkedout() <= 1  # type: ignore[attr-defined]


OURS = text(
    "pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid() "
    "AND application_name = 'atlas-receiver'"
)


async def sessions(one: Replica) -> int:
    [row] = await read(one.database, select(text("count(*)")).select_from(OURS))
    return int(row[0])
