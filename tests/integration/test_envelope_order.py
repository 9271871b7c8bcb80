"""Every order of every set of events ends in the same row, on both databases."""

import asyncio
import os
import random
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import select

from app.store import envelopes
from tests.factories import make_body
from tests.replicas import DELIVERIES, ENVELOPES, EVENTS, Replica, execute, replica

# Of events that two replicas record at once; the catalogue asks for 10,000.
PAIRS = int(os.environ.get("PAIRS", "60"))

# Our own: how many events it took, in which order, and when.
OURS = {"account", "id", "version", "sequence", "first_seen_at", "updated_at"}
WORKER_LOOP_IS_SHARED = settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

ADA, BOB = "ada@example.com", "bob@example.com"
LIFE: Sequence[dict[str, Any]] = (
    {"event": "envelope.created", "timestamp": "2026-07-01T10:00:00Z", "status": "draft"},
    {
        "event": "envelope.sent",
        "timestamp": "2026-07-01T12:00:01.5+02:00",
        "parties": [{"email": ADA, "order": 1}, {"email": BOB, "order": 2}],
        "metadata": {"deal": 1e16, "tags": ["a", None]},
    },
    # The same sending, told once more with newer context: a copy that refreshes.
    {
        "event": "envelope.sent",
        "timestamp": "2026-07-01T10:00:02.000001Z",
        "metadata": {"deal": 2},
        "externalId": "x-1",
    },
    {"event": "envelope.viewed", "event_id": "v1", "timestamp": "2026-07-01T10:05:00Z"},
    {
        "event": "envelope.viewed",
        "event_id": "v2",
        "timestamp": "2026-07-01T10:04:00.123Z",
        "parties": [{"email": BOB, "order": 2, "status": "viewed"}, {"email": ADA, "order": 1}],
    },
    {
        "event": "envelope.signed",
        "event_id": "s1",
        "timestamp": 1782900600,
        "parties": [
            {"email": ADA, "order": 1, "status": "signed"},
            {"email": BOB, "order": 2, "status": "signed"},
        ],
    },
    {"event": "envelope.declined", "reason": "no", "timestamp": "2026-07-01T10:09:00Z"},
    {"event": "envelope.voided", "reason": "moot"},
    {"event": "envelope.expired", "event_id": "x1", "timestamp": "2036-07-01T10:00:00Z"},
    {
        "event": "contract.extracted",
        "fields_version": 2,
        "fields_status": "ready",
        "extracted_data": {"total": 1e23, "note": "ünïcode"},
        "timestamp": "2026-07-01T10:20:00Z",
    },
    {"event": "contract.extracted", "event_id": "c2", "fields_version": 1, "isTest": True},
    {"event": "envelope.archived", "status": "archived", "event_id": "u1"},
)


@dataclass
class Both:
    """The same intake on both databases."""

    sqlite: Replica
    postgres: Replica


@pytest.fixture(name="both")
async def _both(sqlite_url: str, postgres_url: str) -> AsyncIterator[Both]:
    async with replica(sqlite_url) as sqlite, replica(postgres_url) as postgres:
        yield Both(sqlite, postgres)


@pytest.fixture(name="one")
async def _one(database_url: str) -> AsyncIterator[Replica]:
    async with replica(database_url) as one:
        yield one


@st.composite
def _orders(draw: st.DrawFn) -> tuple[list[int], list[list[int]]]:
    """Up to six events; and in any order, each once or twice, cut into batches."""
    events = draw(st.lists(st.sampled_from(range(len(LIFE))), min_size=1, max_size=6, unique=True))
    copies = draw(st.lists(st.sampled_from(events), max_size=6, unique=True))
    shuffled = draw(st.permutations([*events, *copies]))
    cuts = draw(st.lists(st.booleans(), min_size=len(shuffled), max_size=len(shuffled)))
    batches: list[list[int]] = [[]]
    for event, is_cut in zip(shuffled, cuts, strict=True):
        if is_cut and batches[-1]:
            batches.append([])
        batches[-1].append(event)
    return events, batches


async def _play(one: Replica, batches: Sequence[Sequence[int]]) -> tuple[Any, list[Any]]:
    """Record batch by batch for a new account; give the row, and what each event did."""
    one = replace(one, account=uuid.uuid4().hex)
    answers = []
    for batch in batches:
        answers += await one.together(*map(_body, batch))
    row = (await one.envelope("env"))._mapping
    ours = OURS | set(row["marks"].get("ours", ()))
    effects = [(e.type, e.effect, e.sequence, e.status) for e in await one.said_by_atlas()]
    return {k: v for k, v in row.items() if k not in ours}, [answers, sorted(effects, key=repr)]


def _body(event: int) -> bytes:
    bare: dict[str, Any] = {"envelope_id": "env", "parties": None, "metadata": None}
    return make_body(**{**bare, **LIFE[event]})


class TestAnyOrder:
    @WORKER_LOOP_IS_SHARED
    @given(order=_orders())
    async def test_every_order_ends_in_the_same_row_on_both_databases(
        self, both: Both, order: tuple[list[int], list[list[int]]]
    ) -> None:
        events, batches = order

        straight, _ = await _play(both.sqlite, [[event] for event in sorted(events)])
        shuffled, effects = await _play(both.sqlite, batches)
        on_postgres, effects_on_postgres = await _play(both.postgres, batches)

        assert straight == shuffled
        assert shuffled == on_postgres
        assert effects == effects_on_postgres

    @pytest.mark.parametrize("first, second", [("signed", "declined"), ("declined", "voided")])
    async def test_two_ends_are_disputed_in_both_orders(
        self, one: Replica, first: str, second: str
    ) -> None:
        """The larger of the lattice stands, whichever came first."""
        for envelope_id, ends in (("env_1", (first, second)), ("env_2", (second, first))):
            for end in ends:
                await one.record(make_body(event=f"envelope.{end}", envelope_id=envelope_id))

        for envelope_id in ("env_1", "env_2"):
            envelope = await one.envelope(envelope_id)
            assert (first, True) == (envelope.status, envelope.disputed)

    async def test_an_event_dated_ten_years_ahead_freezes_nothing(self, one: Replica) -> None:
        ahead = (datetime.now(UTC) + timedelta(days=3650)).isoformat()
        later = (datetime.now(UTC) - timedelta(minutes=1)).isoformat()
        poison = make_body(
            event="envelope.sent", envelope_id="env", timestamp=ahead, metadata={"from": "ahead"}
        )
        await one.record(poison)

        await one.record(
            make_body(
                event="envelope.sent",
                envelope_id="env",
                event_id="e2",
                timestamp=later,
                metadata={"from": "today"},
            )
        )

        envelope = await one.envelope("env")
        assert {"from": "today"} == envelope.metadata
        assert envelope.sent_at <= datetime.now(UTC)
        assert ["timestamp"] == (await one.said_by_atlas())[0].degraded

    async def test_unknown_words_change_no_status_and_are_owed(self, one: Replica) -> None:
        await one.record(make_body(event="envelope.sent", envelope_id="env"))

        await one.record(make_body(event="envelope.archived", envelope_id="env", status="shelved"))

        envelope = await one.envelope("env")
        assert ("pending", "shelved") == (envelope.status, envelope.status_word)
        assert ["applied", "unknown"] == [row.effect for row in await one.said_by_atlas()]
        assert 4 == await one.count(DELIVERIES)

    @pytest.mark.parametrize("extraction", ["a mere text", 5, True, ["a"]])
    async def test_a_document_of_any_kind_is_read_back_by_the_next_event(
        self, one: Replica, extraction: Any
    ) -> None:
        fields = {"envelope_id": f"env_{uuid.uuid4().hex}", "extraction": extraction}

        await one.record(make_body(event="envelope.sent", **fields))
        await one.record(make_body(event="envelope.viewed", envelope_id=fields["envelope_id"]))

        assert extraction == (await one.envelope(str(fields["envelope_id"]))).extraction


class TestTimes:
    @pytest.mark.parametrize(
        "written, instant",
        [
            ("2026-07-01T10:00:00Z", datetime(2026, 7, 1, 10, tzinfo=UTC)),
            ("2026-07-01T12:00:00.123+02:00", datetime(2026, 7, 1, 10, 0, 0, 123000, UTC)),
            ("2026-07-01T00:30:00.000001-09:30", datetime(2026, 7, 1, 10, 0, 0, 1, UTC)),
            ("0001-01-01T00:00:00Z", datetime(1, 1, 1, tzinfo=UTC)),
            (1782900000, datetime(2026, 7, 1, 10, tzinfo=UTC)),
            (1782900000123, datetime(2026, 7, 1, 10, 0, 0, 123000, UTC)),
        ],
    )
    async def test_a_time_is_read_back_as_the_same_instant(
        self, both: Both, written: object, instant: datetime
    ) -> None:
        body = make_body(event="envelope.sent", envelope_id="env", timestamp=written)

        for one in (both.sqlite, both.postgres):
            await one.record(body)

            assert instant == (await one.said_by_atlas())[0].occurred_at
            assert instant == (await one.envelope("env")).sent_at

    async def test_the_first_instant_of_all_does_no_harm(self, one: Replica) -> None:
        """A driver may read it back without a zone, and that cannot be compared."""
        for timestamp in ("0001-01-01T00:00:00Z", "2026-07-01T10:00:00Z"):
            body = make_body(event="envelope.viewed", envelope_id="env", timestamp=timestamp)
            assert "recorded" == await one.outcome(body)

        assert datetime(1, 1, 1, tzinfo=UTC) == (await one.envelope("env")).viewed_at

    async def test_events_of_one_instant_are_all_kept(self, one: Replica) -> None:
        same = {"event": "envelope.viewed", "envelope_id": "env", "timestamp": 1782900000123}

        await one.together(*(make_body(**same, event_id=f"e{n}", page=n) for n in range(5)))

        assert [1, 2, 3, 4, 5] == sorted(row.sequence for row in await one.said_by_atlas())


class TestNumbers:
    async def test_of_the_history_go_on_behind_four_bytes(self, one: Replica) -> None:
        views = [make_body(event="envelope.viewed", envelope_id="env", n=n) for n in range(3)]
        await one.record(views[0])
        await execute(one.database, ENVELOPES.update().values(sequence=2**31 - 1))

        assert ["recorded"] * 2 == await one.in_turn(*views[1:])

        rows = await one.said_by_atlas()
        assert [1, 2**31, 2**31 + 1] == sorted(row.sequence for row in rows)


class TestTwoReplicas:
    @pytest.fixture(name="pair")
    async def _pair(self, postgres_url: str) -> AsyncIterator[tuple[Replica, Replica]]:
        async with replica(postgres_url) as one, replica(postgres_url) as other:
            yield one, other

    async def test_fifty_events_of_one_envelope_at_once_make_a_history_without_gaps(
        self, pair: tuple[Replica, Replica]
    ) -> None:
        kinds = ("viewed", "sent", "signed", "created", "expired")
        bodies = [
            make_body(event=f"envelope.{kinds[n % 5]}", envelope_id="env", event_id=f"e{n}", n=n)
            for n in range(50)
        ]

        answers = await asyncio.gather(*(pair[n % 2].outcome(b) for n, b in enumerate(bodies)))

        told = (EVENTS.c.sequence, EVENTS.c.type)
        rows = await pair[0].rows(select(*told).order_by(EVENTS.c.sequence))
        [envelope] = await pair[0].rows(select(ENVELOPES))
        assert ["recorded"] * 50 == answers
        assert list(range(1, envelope.sequence + 1)) == [row.sequence for row in rows]
        assert 50 == sum(not row.type.startswith("receiver.") for row in rows)
        assert ("signed", True) == (envelope.status, envelope.disputed)

    async def test_a_hundred_identical_requests_at_once_are_one_event(
        self, pair: tuple[Replica, Replica]
    ) -> None:
        body = make_body(event_id="e1")

        answers = await asyncio.gather(*(pair[n % 2].outcome(body) for n in range(100)))

        [row] = await pair[0].said_by_atlas()
        assert (1, 99) == (answers.count("recorded"), answers.count("duplicate"))
        assert 99 == row.copies
        assert 2 == await pair[0].count(DELIVERIES)

    async def test_no_update_is_lost_between_replicas(self, pair: tuple[Replica, Replica]) -> None:
        """Reading and writing one row at the same time, again and again."""
        for n in range(20):
            view = {"event": "envelope.viewed", "envelope_id": "e", "n": n}
            bodies = [make_body(**view, by=by) for by in ("one", "other")]
            await asyncio.gather(*(one.record(b) for one, b in zip(pair, bodies, strict=True)))

        rows = await pair[0].said_by_atlas()
        assert list(range(1, 41)) == sorted(row.sequence for row in rows)

    async def test_no_update_is_lost_between_reading_and_writing(
        self, pair: tuple[Replica, Replica], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whoever has read hesitates before it writes, so that the other one comes between."""
        dice, lock = random.Random(63), envelopes.lock

        async def hesitate(connection: Any, keys: Any) -> Any:
            held = await lock(connection, keys)
            await asyncio.sleep(dice.uniform(0.0, 0.02))
            return held

        monkeypatch.setattr(envelopes, "lock", hesitate)
        for n in range(PAIRS // 10):
            names = [f"env_{n}_{k}" for k in range(10)]
            viewed = [make_body(event="envelope.viewed", envelope_id=name) for name in names]
            signed = [make_body(event="envelope.signed", envelope_id=name) for name in names]
            sides = (pair[0].together(*viewed), pair[1].together(*signed))
            answers = await asyncio.gather(*sides)
            assert ["recorded"] * 20 == [*answers[0], *answers[1]]

        rows = await pair[0].rows(select(ENVELOPES.c.status, ENVELOPES.c.sequence))
        assert [("signed", 2)] * (PAIRS // 10 * 10) == [tuple(row) for row in rows]
