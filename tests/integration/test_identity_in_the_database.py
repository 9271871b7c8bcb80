"""What is the same event, asked of the database: one batch, many batches, a new process."""

import shutil
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import delete, select, update

from app.events.identity import content_digest
from tests.factories import make_body
from tests.postgres import create_database, drop_database, replace_database
from tests.replicas import (
    BODIES,
    DELIVERIES,
    ENVELOPES,
    EVENTS,
    IDENTITIES,
    Answer,
    Replica,
    execute,
    replica,
)

RECORDED, DUPLICATE, CONFLICT, QUARANTINED = "recorded", "duplicate", "conflict", "quarantined"
FIRST_TIME, SECOND_TIME = "2026-07-01T10:00:00Z", "2026-07-01T10:05:00Z"


@pytest.fixture(name="running", scope="module", params=["sqlite", "postgres"])
async def _running(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Replica]:
    if request.param == "sqlite":
        path = tmp_path_factory.mktemp("identity") / "receiver.db"
        shutil.copy(request.getfixturevalue("sqlite_template"), path)
        async with replica(f"sqlite:///{path}") as running:
            yield running
        return
    server: str = request.getfixturevalue("server")
    name = f"receiver_{uuid.uuid4().hex}"
    create_database(server, name, template=request.getfixturevalue("postgres_template"))
    async with replica(replace_database(server, name)) as running:
        yield running
    drop_database(server, name)


@pytest.fixture(name="one")
def _one(running: Replica) -> Replica:
    """One database for all, and for each test an account of its own."""
    return replace(running, account=uuid.uuid4().hex)


def sent(**fields: Any) -> bytes:
    """An event that happens to an envelope once."""
    return make_body(**{"event": "envelope.sent", "envelope_id": "env_1", **fields})


def viewed(**fields: Any) -> bytes:
    """An event that may happen to an envelope many times."""
    return make_body(**{"event": "envelope.viewed", "envelope_id": "env_1", **fields})


def spaced_out(body: bytes) -> bytes:
    return body.replace(b'": ', b'" :\n  ')


RELATIONS = [
    pytest.param([sent(), sent()], [RECORDED, DUPLICATE], id="same-bytes"),
    pytest.param([viewed(), spaced_out(viewed())], [RECORDED, DUPLICATE], id="rebuilt-body"),
    pytest.param(
        [viewed(attempt=1, delivered_at=FIRST_TIME), viewed(attempt=2, delivered_at=SECOND_TIME)],
        [RECORDED, DUPLICATE],
        id="another-attempt",
    ),
    pytest.param(
        [viewed(viewed_at=FIRST_TIME), viewed(viewed_at=SECOND_TIME)],
        [RECORDED, RECORDED],
        id="other-times-are-content",
    ),
    pytest.param(
        [sent(event_id="e1"), sent(event_id="e2")], [RECORDED, DUPLICATE], id="new-id-per-attempt"
    ),
    pytest.param(
        [viewed(event_id="e1"), viewed(event_id="e2"), viewed(event_id="e3")],
        [RECORDED, DUPLICATE, DUPLICATE],
        id="new-id-per-attempt-of-a-repeatable-type",
    ),
    pytest.param(
        [sent(event_id="e1"), sent(event_id="e2"), sent(event_id="e2", metadata={"a": 1})],
        [RECORDED, DUPLICATE, DUPLICATE],
        id="an-alias-is-known-from-then-on",
    ),
    pytest.param(
        [sent(event_id="e1"), sent(event_id="e2", metadata={"customer": "c-2"})],
        [RECORDED, RECORDED],
        id="new-id-and-other-content",
    ),
    pytest.param(
        [sent(event_id="e1"), sent(event_id="e1", metadata={"customer": "c-2"})],
        [RECORDED, DUPLICATE],
        id="same-id-and-core-but-other-context",
    ),
    pytest.param(
        [sent(event_id="e1"), sent(event_id="e1", status="voided")],
        [RECORDED, CONFLICT],
        id="same-id-but-another-status",
    ),
    pytest.param(
        [sent(event_id="e1"), sent(event_id="e1", event="envelope.voided")],
        [RECORDED, CONFLICT],
        id="same-id-but-another-type",
    ),
    pytest.param(
        [sent(event_id="e1"), sent(event_id="e1", envelope_id="env_2")],
        [RECORDED, CONFLICT],
        id="same-id-but-another-envelope",
    ),
    pytest.param(
        [
            sent(event_id="e1"),
            sent(event_id="e1", reason="a"),
            sent(event_id="e1", reason="a", attempt=2),
            sent(event_id="e1", reason="b"),
        ],
        [RECORDED, CONFLICT, CONFLICT, CONFLICT],
        id="every-contradiction-and-its-copies",
    ),
    pytest.param(
        [sent(), sent(metadata={"customer": "c-2"})],
        [RECORDED, DUPLICATE],
        id="no-id-same-core-other-context",
    ),
    pytest.param([sent(), sent(reason="x")], [RECORDED, CONFLICT], id="no-id-other-core"),
    pytest.param(
        [sent(event_id="e1"), sent(), sent(event_id="e2")],
        [RECORDED, DUPLICATE, DUPLICATE],
        id="with-id-then-without-then-with-another",
    ),
    pytest.param(
        # The contradiction claims "the voiding of env_1" first, and has no right to it.
        [
            sent(event_id="e1"),
            sent(event_id="e1", event="envelope.voided"),
            sent(event_id="e2", event="envelope.voided", metadata=None),
            sent(event_id="e3", event="envelope.voided", metadata=None),
        ],
        [RECORDED, CONFLICT, RECORDED, DUPLICATE],
        id="a-contradiction-owns-no-keys",
    ),
    pytest.param([b"{}", b"{}", b"{ }"], [QUARANTINED, DUPLICATE, QUARANTINED], id="quarantine"),
]


class TestRelations:
    @pytest.mark.parametrize("bodies, expected", RELATIONS)
    async def test_one_after_the_other(
        self, one: Replica, bodies: list[bytes], expected: list[Answer]
    ) -> None:
        answers = await one.in_turn(*bodies)

        assert expected == answers
        await assert_rows(one, expected)

    @pytest.mark.parametrize("bodies, expected", RELATIONS)
    async def test_all_in_one_batch(
        self, one: Replica, bodies: list[bytes], expected: list[Answer]
    ) -> None:
        """Duplicates inside one statement: no error 21000, and the same answers."""
        answers = await one.together(*bodies)

        assert expected == answers
        assert 1 == await one.transactions()
        await assert_rows(one, expected)


async def assert_rows(one: Replica, expected: list[Answer]) -> None:
    """Check that only what was recorded is owed, and that every copy was counted."""
    rows = await one.said_by_atlas()
    effects = [row.effect for row in rows]
    assert expected.count(RECORDED) * 2 == await one.count(DELIVERIES)
    assert expected.count(QUARANTINED) == effects.count("quarantined")
    copied = sum(row.copies for row in rows)
    assert expected.count(DUPLICATE) + expected.count(CONFLICT) == copied + effects.count(
        "conflict"
    )


class TestIdsAreByteExact:
    @pytest.mark.parametrize(
        "other",
        [
            pytest.param("EVT_é1", id="case"),
            pytest.param("evt_e\u03011", id="nfd"),
            pytest.param("evt_é1 ", id="trailing-blank"),
            pytest.param("evt_é1\u200b", id="zero-width"),
        ],
    )
    async def test_what_looks_alike_is_another_event(self, one: Replica, other: str) -> None:
        """Taken for the same, the second would contradict the first."""
        first = viewed(event_id="evt_é1", status="pending")
        second = viewed(event_id=other, status="draft")

        assert [RECORDED, RECORDED] == await one.in_turn(first, second)
        assert ["evt_é1", other] == [row.atlas_event_id for row in await one.said_by_atlas()]

    @pytest.mark.parametrize("other", ["ENV_É", "env_E\u0301", "env_É ", "env_É\u200b"])
    async def test_an_envelope_that_looks_alike_is_another(self, one: Replica, other: str) -> None:
        await one.together(sent(envelope_id="env_É"), sent(envelope_id=other))

        assert "pending" == (await one.envelope("env_É")).status
        assert "pending" == (await one.envelope(other)).status

    async def test_accounts_share_no_ids(self, one: Replica) -> None:
        body = sent(event_id="e1")

        other = replace(one, account=uuid.uuid4().hex)

        assert RECORDED == await one.outcome(body)
        assert RECORDED == await other.outcome(body)

        for each in (one, other):
            assert ["e1"] == [row.atlas_event_id for row in await each.said_by_atlas()]
            assert "pending" == (await each.envelope("env_1")).status


class TestCopies:
    async def test_the_first_body_stays_byte_for_byte(self, one: Replica) -> None:
        first = spaced_out(sent(event_id="e1"))
        await one.in_turn(first, sent(event_id="e1"), sent(event_id="e1", status="voided"))

        [original, _] = await one.said_by_atlas()

        [body] = await one.rows(select(BODIES.c.body).where(BODIES.c.event_id == original.id))
        assert first == bytes(body[0])

    async def test_a_copy_has_the_receipt_of_the_first(self, one: Replica) -> None:
        first = await one.record(sent(event_id="e1"))
        copy = await one.record(sent(event_id="e2"))

        assert first.event_id == copy.event_id

    async def test_newer_context_in_a_copy_is_kept_as_evidence_and_not_owed(
        self, one: Replica
    ) -> None:
        older = sent(event_id="e1", timestamp=FIRST_TIME)
        newer = sent(event_id="e1", timestamp=SECOND_TIME, metadata={"customer": "c-2"})

        await one.in_turn(older, newer, newer)

        [first, second] = await one.said_by_atlas()
        assert ("refreshed", first.id, None) == (
            second.effect,
            second.original_id,
            second.sequence,
        )
        assert {"customer": "c-2"} == (await one.envelope("env_1")).metadata
        assert 2 == await one.count(DELIVERIES)

    async def test_a_copy_that_says_nothing_new_is_not_written_down(self, one: Replica) -> None:
        """JSONB gives a float like 1e23 back as another number; that is not news."""
        body = viewed(metadata={"tiny": 1e-9, "big": [1e16, {"x": 1e23}], "huge": 1e308, "n": 1.0})

        await one.in_turn(body, body, body)

        [row] = await one.said_by_atlas()
        assert 2 == row.copies
        assert 1 == (await one.envelope("env_1")).version

    async def test_an_event_is_known_hours_later(self, one: Replica) -> None:
        await one.record(sent())
        await one.record(sent(event="envelope.signed"))
        long_ago = datetime.now(UTC) - timedelta(hours=3)
        await execute(one.database, update(EVENTS).values(received_at=long_ago))

        assert DUPLICATE == await one.outcome(sent())

        assert "signed" == (await one.envelope("env_1")).status
        assert 4 == await one.count(DELIVERIES)

    async def test_an_old_event_under_a_new_id_never_lowers_the_status(self, one: Replica) -> None:
        """Somebody replays a life cycle by hand, with ids and content of its own."""
        await one.in_turn(sent(event_id="e1"), sent(event_id="e2", event="envelope.signed"))

        replayed = sent(event_id="replay-1", note="by hand")

        assert RECORDED == await one.outcome(replayed)
        assert ["applied", "applied", "stale"] == [r.effect for r in await one.said_by_atlas()]
        assert "signed" == (await one.envelope("env_1")).status

    async def test_a_new_process_remembers(self, one: Replica) -> None:
        bodies = [sent(event_id="e1"), viewed(), b"not json"]
        await one.in_turn(*bodies)

        async with replica(one.database.address.url, account=one.account) as restarted:
            assert [DUPLICATE] * 3 == await restarted.together(*bodies)


class TestConflicts:
    async def test_a_conflict_flags_the_envelope_and_raises_an_event(self, one: Replica) -> None:
        await one.in_turn(sent(event_id="e1"), sent(event_id="e1", status="voided"))

        envelope = await one.envelope("env_1")
        [first, second] = await one.said_by_atlas()
        assert (True, "pending") == (envelope.disputed, envelope.status)
        assert ("conflict", first.id) == (second.effect, second.original_id)
        assert ["receiver.conflict", "receiver.disputed"] == await one.own_events()

    async def test_a_conflict_that_names_another_envelope_flags_the_first_ones(
        self, one: Replica
    ) -> None:
        """Otherwise a contradiction would bring an envelope into being."""
        await one.record(sent(event_id="e1", envelope_id="first"))

        await one.record(sent(event_id="e1", envelope_id="second"))

        ours = ENVELOPES.c.account == one.account
        envelopes = await one.rows(select(ENVELOPES).where(ours))
        assert [("first", True)] == [(row.id, row.disputed) for row in envelopes]

    async def test_the_same_conflict_is_written_down_once(self, one: Replica) -> None:
        conflicting = sent(event_id="e1", status="voided")
        receipt = await one.record(sent(event_id="e1"))
        first = await one.record(conflicting)

        again = await one.record(conflicting)

        assert first == again != receipt
        assert [0, 1] == [row.copies for row in await one.said_by_atlas()]
        assert ["receiver.conflict", "receiver.disputed"] == await one.own_events()

    async def test_an_event_about_no_envelope_can_be_contradicted(self, one: Replica) -> None:
        about_nothing = {"event": "account.renamed", "envelope_id": None, "event_id": "e1"}

        answers = await one.in_turn(
            make_body(**about_nothing), make_body(**about_nothing, reason="other")
        )

        assert [RECORDED, CONFLICT] == answers
        assert ["receiver.conflict"] == await one.own_events()

    async def test_two_ends_are_a_dispute_once(self, one: Replica) -> None:
        ends = [sent(event=f"envelope.{end}") for end in ("declined", "voided", "signed")]

        await one.in_turn(*ends)

        assert ["receiver.disputed"] == await one.own_events()


class TestPrunedBodies:
    """Identities outlive bodies: a captured request replayed years later is a duplicate."""

    @pytest.mark.parametrize(
        "first, copy",
        [
            pytest.param(sent(event_id="e1"), sent(event_id="e1"), id="by-id"),
            pytest.param(sent(), sent(), id="once"),
            pytest.param(viewed(), spaced_out(viewed()), id="by-content"),
            pytest.param(b"garbage", b"garbage", id="quarantined"),
        ],
    )
    async def test_a_copy_is_still_a_copy(self, one: Replica, first: bytes, copy: bytes) -> None:
        await one.record(first)
        await execute(one.database, delete(BODIES))

        assert DUPLICATE == await one.outcome(copy)

    async def test_without_content_the_word_of_the_sender_counts(self, one: Replica) -> None:
        await one.record(sent(event_id="e1"))
        await execute(one.database, delete(BODIES))

        assert RECORDED == await one.outcome(sent(event_id="e2"))

    async def test_content_that_was_kept_is_compared(self, one: Replica) -> None:
        body = sent(event_id="e1")
        await one.record(body)
        await execute(one.database, update(EVENTS).values(content=content_digest(body)))
        await execute(one.database, delete(BODIES))

        assert DUPLICATE == await one.outcome(sent(event_id="e2"))
        assert RECORDED == await one.outcome(sent(event_id="e3", metadata={"customer": "c-2"}))

    async def test_keys_are_never_fewer(self, one: Replica) -> None:
        await one.in_turn(sent(event_id="e1"), sent(event_id="e2"), sent(event_id="e3"))

        ours = IDENTITIES.c.account == one.account
        keys = {row.key for row in await one.rows(select(IDENTITIES).where(ours))}

        assert {"id:e1", "id:e2", "id:e3", "once:env_1:envelope.sent"} == keys
