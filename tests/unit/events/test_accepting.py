"""What a person's word does to an envelope: the one way down for a status."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from app.events.lifecycle import BLANK, Envelope, accept, ends_said, project, refresh
from app.events.payload import Event

NOW = datetime(2026, 7, 1, 12, tzinfo=UTC)


def said(name: str, **fields: Any) -> Event:
    return Event(type=f"envelope.{name}", envelope_id="env_1", **fields)


def after(*events: Event) -> Envelope:
    envelope = BLANK
    for event in events:
        envelope, _ = project(envelope, event, received_at=NOW)
    return envelope


class TestAcceptance:
    def test_takes_the_status_down(self) -> None:
        envelope = accept(after(said("signed")), said("declined"), received_at=NOW)

        assert "declined" == envelope.status

    def test_keeps_the_milestones_that_were_passed(self) -> None:
        envelope = accept(after(said("signed")), said("declined"), received_at=NOW)

        assert (NOW, NOW) == (envelope.signed_at, envelope.declined_at)

    def test_says_nothing_about_the_dispute(self) -> None:
        disputed = after(said("signed"), said("declined"))

        assert accept(disputed, said("declined"), received_at=NOW).disputed
        assert not accept(after(said("signed")), said("declined"), received_at=NOW).disputed

    def test_takes_a_word_that_is_older(self) -> None:
        newer = said("declined", reason="z", occurred_at=NOW)
        older = said("declined", reason="a", occurred_at=NOW - timedelta(days=1))

        envelope = accept(after(newer), older, received_at=NOW)

        assert "a" == envelope.decline_reason
        assert ("a", "declined") == (
            refresh(envelope, older, received_at=NOW).decline_reason,
            refresh(envelope, older, received_at=NOW).status,
        )

    @pytest.mark.parametrize("at", [None, NOW])
    def test_does_not_let_a_copy_of_what_is_overruled_come_back(self, at: datetime | None) -> None:
        overruled = said("declined", reason="z", occurred_at=at)
        word = said("declined", reason="a")

        envelope = accept(after(overruled), word, received_at=NOW)
        again = accept(envelope, word, received_at=NOW)

        assert "a" == refresh(envelope, overruled, received_at=NOW).decline_reason
        assert envelope == again
        assert refresh(again, overruled, received_at=NOW) == again

    def test_lets_what_atlas_says_later_stand(self) -> None:
        envelope = accept(
            after(said("declined", reason="z", occurred_at=NOW)),
            said("declined", reason="a"),
            received_at=NOW,
        )
        later = said("declined", reason="b", occurred_at=NOW + timedelta(seconds=1))

        assert "b" == refresh(envelope, later, received_at=NOW).decline_reason

    def test_leaves_the_status_to_events_that_have_one(self) -> None:
        envelope = accept(after(said("sent")), said("viewed"), received_at=NOW)

        assert ("pending", NOW) == (envelope.status, envelope.viewed_at)

    def test_leaves_no_empty_marks(self) -> None:
        assert {"ours": ["declined_at"]} == accept(BLANK, said("declined"), received_at=NOW).marks

    def test_may_be_of_a_word_that_is_no_status(self) -> None:
        first = said("viewed", status_word="odd", occurred_at=NOW)

        envelope = accept(after(first), said("viewed", status_word="even"), received_at=NOW)

        assert "even" == envelope.status_word

    def test_leaves_alone_what_the_word_says_nothing_of(self) -> None:
        known = {"a": 1}
        first = said("sent", metadata=known, status_word="odd", occurred_at=NOW)
        older = said("sent", metadata={"a": 2}, status_word="even")

        envelope = accept(after(first), said("declined", reason="no"), received_at=NOW)
        later = refresh(envelope, older, received_at=NOW)

        assert (known, "odd") == (envelope.metadata, envelope.status_word)
        assert (known, "odd") == (later.metadata, later.status_word)

    def test_takes_a_no_for_an_answer(self) -> None:
        newer = said("sent", is_test=True, occurred_at=NOW)

        envelope = accept(after(newer), said("sent", is_test=False), received_at=NOW)

        assert envelope.is_test is False


class TestRefresh:
    def test_does_not_bring_an_overruled_status_back(self) -> None:
        envelope = accept(after(said("signed")), said("declined"), received_at=NOW)

        fresh = refresh(envelope, said("signed", metadata={"a": 1}), received_at=NOW)

        assert ("declined", False, {"a": 1}) == (fresh.status, fresh.disputed, fresh.metadata)


class TestEnds:
    def test_are_those_of_the_name_and_of_the_word(self) -> None:
        assert {"signed"} == ends_said("envelope.signed", None)
        assert {"declined", "signed"} == ends_said("envelope.declined", "signed")

    def test_are_none_of_what_is_no_end(self) -> None:
        assert set() == ends_said("envelope.sent", "pending")
        assert set() == ends_said("envelope.viewed", "signed")
