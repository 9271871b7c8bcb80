"""What events look like is learned from the feed, and what is new after that is noticed."""

import json
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import select
from structlog.testing import capture_logs

from app.store import feed, shapes
from app.store.models import ShapeRow
from app.store.session import Database
from app.store.shapes import Known, Shape
from app.store.sight import Sight
from app.upkeep.drift import LEARNING, LONGEST, Drift
from app.upkeep.following import Following
from app.upkeep.sequencer import Sequencer
from tests.integration.ledger import Ledger

ALL = Sight(None)
SHAPES: Any = ShapeRow.__table__


class Learner:
    """A follower, the feed that it follows, and what it has written."""

    def __init__(self, url: str) -> None:
        self.ledger = Ledger(url)
        self.drift = Drift()

    async def see(
        self, *documents: Any, event_type: str | None = "survey.sent", **about: Any
    ) -> UUID:
        """Record events and let them be learned; gives the last one's id."""
        ids = []
        for document in documents:
            body = document if isinstance(document, bytes) else json.dumps(document).encode()
            ids.append(await self.ledger.record(event_type, body=body, **about))
        await self.follow()
        return ids[-1]

    async def follow(self, drift: Drift | None = None) -> None:
        await Sequencer(self.ledger.database, holder="a").step()
        following = Following(self.ledger.database, followers=[drift or self.drift])
        while await following.step():
            pass

    async def learned(self, event_type: str = "survey.sent") -> None:
        """Let a type be known well."""
        await self.see(*[{"status": "sent", "n": 1}] * LEARNING, event_type=event_type)

    async def known(self) -> set[str]:
        async with self.ledger.reading() as connection:
            rows = await connection.execute(select(SHAPES))
        return {f"{row.type} {row.kind} {row.path}" for row in rows}

    async def page(self, sight: Sight = ALL, **options: Any) -> list[Shape]:
        async with self.ledger.reading() as connection:
            return await shapes.page(connection, sight, **{"limit": 100, **options})


@pytest.fixture(name="learner")
async def _learner(database_url: str) -> AsyncIterator[Learner]:
    learner = Learner(database_url)
    yield learner
    await learner.ledger.database.close()


class TestLearning:
    async def test_is_of_fields_words_and_types(self, learner: Learner) -> None:
        await learner.see({"status": "sent", "parties": [{"email": "ada@example.com"}]})

        assert {
            "survey.sent type seen",
            "survey.sent field status:string",
            "survey.sent status status=sent",
            "survey.sent field parties:array",
            "survey.sent field parties[]:object",
            "survey.sent field parties[].email:string",
        } == await learner.known()
        assert 5 == learner.drift.known

    async def test_makes_no_noise(self, learner: Learner) -> None:
        with capture_logs() as lines:
            await learner.learned()
            await learner.see({"status": "sent", "n": 1})

        said = [(line["event"], line["log_level"]) for line in lines if "drift" in line["event"]]
        assert [("drift.learned", "info")] * 2 == said
        assert not learner.drift.noticed
        assert "survey.sent type learned" in await learner.known()

    async def test_ends_after_some_events(self, learner: Learner) -> None:
        await learner.learned()

        with capture_logs() as lines:
            event_id = await learner.see({"status": "answered", "n": 1, "m": None})

        [line] = [line for line in lines if "drift" in line["event"]]
        assert {
            "event": "drift.noticed",
            "log_level": "warning",
            "part": "upkeep",
            "event_type": "survey.sent",
            "event_id": str(event_id),
            "traits": ["field m:null", "status status=answered"],
            "count": 2,
        } == line
        assert {"field": 1, "status": 1} == dict(learner.drift.noticed)

    async def test_notices_each_thing_once(self, learner: Learner) -> None:
        await learner.learned()

        with capture_logs() as lines:
            await learner.see({"new": 1}, {"new": 2})
            await learner.see({"new": 3})

        assert ["drift.noticed"] == [each["event"] for each in lines if "drift" in each["event"]]

    async def test_is_of_each_type_by_itself(self, learner: Learner) -> None:
        await learner.learned()

        await learner.see({"new": 1}, event_type="survey.begun")

        assert "survey.begun field new:number" in await learner.known()
        assert not learner.drift.noticed

    async def test_leaves_out_what_is_no_event_of_atlas(self, learner: Learner) -> None:
        await learner.see({"x": 1}, event_type="receiver.dead")
        await learner.see(b"[]", event_type=None)

        assert set() == await learner.known()

    async def test_does_without_what_cannot_be_read(self, learner: Learner) -> None:
        await learner.ledger.record("survey.sent", body=None)
        await learner.see(b"[]", json.dumps({"x": "y" * LONGEST}).encode())

        assert set() == await learner.known()

    async def test_of_a_large_body_is_like_any_other(self, learner: Learner) -> None:
        await learner.see({"x": "y" * 20_000})

        assert "survey.sent field x:string" in await learner.known()

    async def test_is_never_of_values(self, learner: Learner) -> None:
        said = {"email": "ada@example.com", "status": "https://x.org/?token=t", "k\x00\ud800": 1}
        await learner.learned()

        with capture_logs() as lines:
            await learner.see(said)

        written = " ".join([*await learner.known(), json.dumps(lines)])
        assert "survey.sent field k\ufffd\ufffd:number" in written
        assert "survey.sent status status=other" in written
        assert "ada@" not in written
        assert "token" not in written


class TestProcesses:
    async def test_one_that_comes_later_knows_what_was_learned(self, learner: Learner) -> None:
        await learner.learned()
        later = Drift()
        await learner.ledger.record("survey.sent", body=b'{"new": 1, "n": 2}')

        with capture_logs() as lines:
            await learner.follow(later)

        said = [each["traits"] for each in lines if each["event"] == "drift.noticed"]
        assert [["field new:number"]] == said
        assert 4 == later.known

    async def test_one_that_is_behind_says_nothing_twice(self, learner: Learner) -> None:
        """Another process has noticed it, while this one thought that it knew everything."""
        await learner.learned()
        other = Drift()
        await learner.ledger.record("survey.sent", body=b'{"new": 1}')
        await learner.follow(other)

        with capture_logs() as lines:
            await learner.see({"new": 1})

        assert [] == [each for each in lines if "drift" in each["event"]]

    async def test_what_was_taken_back_is_learned_again(self, learner: Learner) -> None:
        drift, database = learner.drift, learner.ledger.database
        await learner.ledger.record("survey.sent", body=b'{"x": 1}')
        await Sequencer(database, holder="a").step()

        with pytest.raises(ZeroDivisionError):
            await fail_after(drift, database)
        lost = await learner.known()
        await learner.follow()

        assert set() == lost
        assert "survey.sent field x:number" in await learner.known()


async def fail_after(drift: Drift, database: Database) -> None:
    """Learn, and then lose the transaction."""
    async with database.begin(limit=timedelta(seconds=5)) as connection:
        await drift.follow(connection, await feed.read(connection, 0, limit=10))
        raise ZeroDivisionError


class TestBounds:
    async def test_of_a_type_are_told_once(
        self, learner: Learner, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("app.upkeep.drift.MOST_TRAITS", 3)

        with capture_logs() as lines:
            await learner.see({"a": 1, "b": 1}, {"c": 1, "d": 1}, {"e": 1, "f": 1}, {"g": 1})

        assert 1 == [each["event"] for each in lines].count("drift.ignored")
        assert 2 == learner.drift.ignored
        assert 4 == len(await learner.known())

    async def test_of_types_keep_the_rest_out(
        self, learner: Learner, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("app.upkeep.drift.MOST_TYPES", 1)

        await learner.see({"a": 1})
        await learner.see({"a": 1}, event_type="survey.begun")

        assert 1 == learner.drift.ignored
        assert {"survey.sent type seen", "survey.sent field a:number"} == await learner.known()


class TestList:
    async def test_says_what_is_drift(self, learner: Learner) -> None:
        await learner.learned()
        event_id = await learner.see({"new": 1})

        found = await learner.page()

        assert [
            ("field", "n:number", False),
            ("field", "new:number", True),
            ("field", "status:string", False),
            ("status", "status=sent", False),
            ("type", "learned", False),
            ("type", "seen", False),
        ] == [(shape.kind, shape.path, shape.is_drift) for shape in found]
        assert event_id == found[1].event_id

    async def test_goes_on_behind_a_place(self, learner: Learner) -> None:
        for event_type in ("a.b", "c.d"):
            await learner.see({"x": 1, "y": 1}, event_type=event_type)

        found, after = [], None
        while page := await learner.page(after=after, limit=2):
            found += page
            after = Known(*page[-1][:3])

        assert found == await learner.page()
        assert 6 == len(found)
        assert {"c.d"} == {shape.type for shape in await learner.page(of_type="c.d")}

    async def test_hides_events_of_others(self, learner: Learner) -> None:
        await learner.ledger.envelope("env_1", tenant="org_1")
        event_id = await learner.see({"x": 1})

        seen = {
            name: (await learner.page(sight))[0].event_id
            for name, sight in {
                "all": ALL,
                "account": Sight(("default",)),
                "another": Sight(("acme",)),
                "tenant": Sight(None, "org_1"),
                "another-tenant": Sight(None, "org_2"),
            }.items()
        }

        assert {
            "all": event_id,
            "account": event_id,
            "another": None,
            "tenant": event_id,
            "another-tenant": None,
        } == seen
