"""The flight recorder: everything that happened to one envelope, in one order."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest

from app.dispatch import control, replay
from app.errors import NotAllowed, NotFound
from app.events.signature import Key
from app.store import deliveries, history, keys
from app.store.models import ExpectationRow
from app.store.sight import Sight
from app.upkeep.explain import Entry, Story, explain
from tests.integration.ledger import Ledger

ACTOR = "ada"
_expectations: Any = ExpectationRow.__table__


@pytest.fixture(name="ledger")
async def _ledger(database_url: str) -> AsyncIterator[Ledger]:
    ledger = Ledger(database_url)
    await ledger.register("file")
    async with ledger.transaction() as connection:
        known = [
            Key(account=name, secret=b"", label=name, fingerprint=name)
            for name in ("default", "beta")
        ]
        await keys.register(connection, known, at=datetime.now(UTC))
    yield ledger
    await ledger.database.close()


async def say(ledger: Ledger, effect: str = "applied", **about: Any) -> UUID:
    """Record one event, with columns that intake sets now and then."""
    columns: dict[str, Any] = {
        name: about.pop(name)
        for name in ("copies", "status", "degraded", "original_id")
        if name in about
    }
    event_id = await ledger.record(effect=effect, **about)
    table = history._events
    if columns:
        if "copies" in columns:
            columns["last_copy_at"] = datetime.now(UTC)
        async with ledger.transaction() as connection:
            await connection.execute(table.update().where(table.c.id == event_id).values(**columns))
    return event_id


async def expect(ledger: Ledger, *, is_silent: bool = False, envelope: str = "env_1") -> None:
    now = datetime.now(UTC)
    row = {
        "account": "default",
        "envelope_id": envelope,
        "consumer": "office",
        "created_at": now - timedelta(hours=2),
        "due_at": None if is_silent else now,
        "silent_at": now - timedelta(hours=1) if is_silent else None,
    }
    async with ledger.transaction() as connection:
        await connection.execute(_expectations.insert().values(**row))


async def audit(ledger: Ledger, subject: str, **details: Any) -> None:
    async with ledger.transaction() as connection:
        await deliveries.audit(
            connection, actor=ACTOR, action="envelope.erased", subject=subject, details=details
        )


async def story_of(ledger: Ledger, **options: Any) -> Story:
    return await explain(ledger.database, "env_1", **options)


def kinds(story: Story) -> list[str]:
    return [entry.kind for entry in story.entries]


def the(story: Story, kind: str) -> Entry:
    [entry] = [entry for entry in story.entries if entry.kind == kind]
    return entry


class TestEvents:
    @pytest.mark.parametrize(
        "effect, words",
        [
            ("applied", "envelope.signed changed the envelope; it is signed."),
            ("refreshed", "knew more: that was taken over"),
            ("stale", "envelope.signed changed nothing: as much, or more, was known already"),
            ("milestone", "a milestone never moves the status"),
            ("unknown", "this release does not know the type"),
            ("conflict", "contradicts event"),
            ("of tomorrow", "envelope.signed was recorded as of tomorrow"),
        ],
    )
    async def test_say_what_they_did_or_why_nothing(
        self, ledger: Ledger, effect: str, words: str
    ) -> None:
        event_id = await say(ledger, effect)

        entry = the(await story_of(ledger), "event")

        assert words in entry.summary
        assert (event_id, effect, "kept") == tuple(
            entry.about[name] for name in ("event_id", "effect", "body")
        )

    @pytest.mark.parametrize(
        "event_type, words",
        [
            ("receiver.accepted", "took the word of an event that contradicts another"),
            ("receiver.rebuilt", "computed anew from its events"),
            ("receiver.novelty", "The service says receiver.novelty; it is signed."),
        ],
    )
    async def test_of_our_own_are_explained_too(
        self, ledger: Ledger, event_type: str, words: str
    ) -> None:
        await say(ledger, event_type=event_type)

        assert words in the(await story_of(ledger), "event").summary

    async def test_whose_word_was_taken_say_what_they_were(self, ledger: Ledger) -> None:
        original = await say(ledger, envelope="env_2")
        await say(ledger, "applied", original_id=original)

        assert (
            f"envelope.signed contradicts event {original}, and its word was taken later; "
            "it is signed." == the(await story_of(ledger), "event").summary
        )

    async def test_name_what_could_not_be_used(self, ledger: Ledger) -> None:
        await say(ledger, status=None, degraded=["parties.0.email"])

        summary = the(await story_of(ledger), "event").summary

        assert (
            "envelope.signed changed the envelope; values that could not be used: parties.0.email."
            == summary
        )

    @pytest.mark.parametrize("copies, words", [(1, "came once more"), (3, "came 3 more times")])
    async def test_that_came_again_say_how_often(
        self, ledger: Ledger, copies: int, words: str
    ) -> None:
        await say(ledger, copies=copies)

        story = await story_of(ledger)

        assert ["event", "copies"] == kinds(story)
        assert words in the(story, "copies").summary

    async def test_without_bytes_are_pruned_or_erased(self, ledger: Ledger) -> None:
        await say(ledger, body=None)
        pruned = await story_of(ledger)
        await ledger.envelope(erased_at=datetime.now(UTC))
        erased = await story_of(ledger)

        assert "pruned" == the(pruned, "event").about["body"]
        assert "erased" == the(erased, "event").about["body"]


class TestDeliveries:
    async def test_stand_behind_their_event_with_every_attempt(self, ledger: Ledger) -> None:
        delivery_id = await ledger.owe_one()
        await ledger.claim(lease=timedelta(seconds=-1))
        await ledger.claim()

        story = await story_of(ledger)

        assert ["event", "delivery", "attempt"] == kinds(story)
        delivery, attempt = the(story, "delivery"), the(story, "attempt")
        assert "Owed to file: being tried just now, after 2 attempts." == delivery.summary
        assert f"Attempt 1 at file ended lost: {deliveries.LOST}." == attempt.summary
        assert delivery_id == delivery.about["delivery_id"] == attempt.about["delivery_id"]
        assert attempt.about["seconds"] is None

    @pytest.mark.parametrize(
        "state, words",
        [
            ("pending", "waiting after 1 attempt, due 20"),
            ("done", "done after 1 attempt."),
            ("dead", "dead after 1 attempt: ValueError: no."),
            ("discarded", "discarded after 1 attempt."),
            ("parked", "no process serves the callback"),
            ("new", "new after 1 attempt"),
        ],
    )
    async def test_say_how_they_stand(self, ledger: Ledger, state: str, words: str) -> None:
        await ledger.owe_one()
        await ledger.change(
            "UPDATE deliveries SET state = :state, attempts = 1, last_error = :error",
            state=state,
            error="ValueError:\n no" if state == "dead" else None,
        )

        assert words in the(await story_of(ledger), "delivery").summary

    async def test_of_which_nothing_is_due_wait_from_now(self, ledger: Ledger) -> None:
        await ledger.owe_one()
        await ledger.change("UPDATE deliveries SET due_at = NULL")

        assert "after 0 attempts, due now" in the(await story_of(ledger), "delivery").summary

    async def test_say_how_long_an_attempt_took(self, ledger: Ledger) -> None:
        await ledger.owe_one()
        await ledger.claim(lease=timedelta(seconds=-1))
        await ledger.claim()
        later = await ledger.attempts()
        table = history._attempts
        async with ledger.transaction() as connection:
            begun = later[0].finished_at - timedelta(seconds=1.5)
            await connection.execute(table.update().values(started_at=begun, error=None))

        attempt = the(await story_of(ledger), "attempt")

        assert "Attempt 1 at file ended lost after 1.5 s." == attempt.summary
        assert 1.5 == attempt.about["seconds"]

    async def test_that_were_asked_for_again_say_by_whom(self, ledger: Ledger) -> None:
        event_id = await ledger.record()
        await ledger.owe("file", event=event_id)
        await replay.redispatch(ledger.database, event_id, actor=ACTOR)

        story = await story_of(ledger)

        [first, second] = [entry for entry in story.entries if entry.kind == "delivery"]
        assert (None, ACTOR) == (first.about["asked_by"], second.about["asked_by"])
        assert "once more, as generation 2 because ada asked for it" in second.summary
        assert "ada had the event delivered once more." == the(story, "act").summary


class TestActs:
    async def test_name_who_did_what_and_why(self, ledger: Ledger) -> None:
        delivery_id = await ledger.owe_one()
        await control.discard(ledger.database, delivery_id, reason="sent\nby hand", actor=ACTOR)

        act = the(await story_of(ledger), "act")

        assert "ada gave the delivery up: sent by hand." == act.summary
        assert f"delivery:{delivery_id}" == act.about["subject"]

    async def test_name_who_has_read_the_bytes(self, ledger: Ledger) -> None:
        subject = f"event:{await say(ledger)}"
        async with ledger.transaction() as connection:
            await deliveries.audit(
                connection, actor=ACTOR, action="body.read", subject=subject, details={"bytes": 7}
            )

        act = the(await story_of(ledger), "act")

        assert "ada read the bytes as they were received." == act.summary

    async def test_upon_an_envelope_are_those_of_its_account(self, ledger: Ledger) -> None:
        await say(ledger)
        await audit(ledger, "envelope:env_1", number=1, account="default")
        await audit(ledger, "envelope:env_1", number=2, account="beta")
        await audit(ledger, "envelope:env_1", number=3)

        story = await story_of(ledger)

        acts = [entry.about["details"]["number"] for entry in story.entries if entry.kind == "act"]
        assert [1] == acts

    async def test_hold_no_secret_in_their_details(self, ledger: Ledger) -> None:
        await say(ledger)
        link = "https://atlaswork.ai/sign/1?token=secret"
        await audit(ledger, "envelope:env_1", account="default", link=link)

        act = the(await story_of(ledger), "act")

        assert "secret" not in str(act.about["details"])


class TestMoments:
    async def test_of_the_whole_envelope_are_told(self, ledger: Ledger) -> None:
        moment = datetime.now(UTC) + timedelta(hours=1)
        await ledger.envelope(archived_at=moment, archive_bytes=17, erased_at=moment)
        await expect(ledger)
        await say(ledger)

        story = await story_of(ledger)

        assert ["expected", "event", "archived", "erased"] == kinds(story)
        assert "office said that the envelope was created; something" in story.entries[0].summary
        assert "The signed PDF (17 bytes) was put into the archive." == story.entries[2].summary

    async def test_without_a_size_are_told_too(self, ledger: Ledger) -> None:
        await ledger.envelope(archived_at=datetime.now(UTC))

        story = await story_of(ledger)

        assert ["The signed PDF was put into the archive."] == [
            entry.summary for entry in story.entries
        ]

    async def test_are_all_there_is_of_a_silent_envelope(self, ledger: Ledger) -> None:
        await expect(ledger, is_silent=True)

        story = await story_of(ledger)

        assert ["expected", "silent"] == kinds(story)
        assert story.envelope is None
        assert "office said that the envelope was created." == story.entries[0].summary


class TestPages:
    async def test_follow_each_other_and_hold_everything_once(self, ledger: Ledger) -> None:
        said = [await say(ledger, sequence=number) for number in range(5)]
        await expect(ledger)
        await ledger.envelope(archived_at=datetime.now(UTC) + timedelta(hours=1))

        stories = [await story_of(ledger, limit=2)]
        while (after := stories[-1].next_after) is not None:
            stories.append(await story_of(ledger, limit=2, after=after))

        assert [["expected", "event", "event"], ["event", "event"], ["event", "archived"]] == [
            kinds(story) for story in stories
        ]
        found = [e.about["event_id"] for s in stories for e in s.entries if e.kind == "event"]
        assert said == found

    async def test_behind_the_last_event_hold_nothing_twice(self, ledger: Ledger) -> None:
        event_id = await say(ledger)

        story = await story_of(ledger, after=event_id)

        assert ([], None) == (kinds(story), story.next_after)

    async def test_say_if_something_was_left_out(
        self, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(history, "DELIVERIES", 1)
        monkeypatch.setattr(history, "_AT_ONCE", 1)
        for number in range(3):
            await ledger.owe_one(sequence=number)

        story = await story_of(ledger)

        assert not story.is_complete
        assert 1 == kinds(story).count("delivery")
        assert (await story_of(ledger, limit=1)).is_complete


class TestSight:
    async def test_of_an_envelope_that_nobody_knows_is_nothing(self, ledger: Ledger) -> None:
        with pytest.raises(NotFound, match="There is no envelope env_1 here"):
            await story_of(ledger)

    async def test_hides_the_envelopes_of_other_accounts(self, ledger: Ledger) -> None:
        await say(ledger)

        with pytest.raises(NotFound):
            await story_of(ledger, sight=Sight(("beta",)))

        assert "default" == (await story_of(ledger, sight=Sight(("default",)))).account

    async def test_of_two_accounts_has_to_be_narrowed(self, ledger: Ledger) -> None:
        await say(ledger)
        await say(ledger, account="beta")

        with pytest.raises(NotAllowed, match="'beta' and 'default' both have this envelope"):
            await story_of(ledger)

        assert "beta" == (await story_of(ledger, sight=Sight(("beta",)))).account

    async def test_of_a_tenant_is_of_its_envelopes(self, ledger: Ledger) -> None:
        await say(ledger)
        await ledger.envelope(tenant="org_1")

        with pytest.raises(NotFound):
            await story_of(ledger, sight=Sight(None, "org_2"))

        assert "default" == (await story_of(ledger, sight=Sight(None, "org_1"))).account
