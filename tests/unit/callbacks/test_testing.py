"""What authors of callbacks test with: an event as the service would make it, and verdicts."""

from datetime import UTC, datetime
from typing import Any

import pytest

from app.callbacks import Callbacks, Event, GiveUp, RetryLater
from app.callbacks.testing import Dead, Done, Failed, Skipped, deliver, make_event
from app.errors import PayloadRejected


@pytest.fixture(name="callbacks")
def _callbacks() -> Callbacks:
    return Callbacks()


class TestMakeEvent:
    def test_is_signed_if_nothing_else_is_said(self) -> None:
        event = make_event()

        assert ("envelope.signed", "env_1", "signed") == (
            event.type,
            event.envelope_id,
            event.status,
        )

    def test_has_the_envelope_that_its_data_make(self) -> None:
        parties = [{"email": "ada@example.com", "status": "signed"}, {"email": "ben@example.com"}]
        data = {"parties": parties, "metadata": {"external_id": "crm-7"}}

        envelope = make_event("envelope.sent", envelope_id="env_7", data=data).envelope

        assert envelope is not None
        assert ("env_7", "pending", 1, 2) == (
            envelope.id,
            envelope.status,
            envelope.signed_count,
            envelope.total,
        )
        assert "crm-7" == envelope.external_id
        assert envelope.parties is not None
        assert "ada@example.com" == envelope.parties[0].email

    def test_has_no_secrets_in_its_data(self) -> None:
        event = make_event(data={"sign_url": "https://sign.example/?token=abc"})

        assert "abc" not in str(event.data)

    def test_takes_any_field_as_it_is_given(self) -> None:
        at = datetime(2026, 1, 1, tzinfo=UTC)

        event = make_event(attempt=3, is_late=True, envelope=None, deadline=at)

        assert (3, True, None, at) == (
            event.attempt,
            event.is_late,
            event.envelope,
            event.deadline,
        )

    def test_refuses_what_would_go_to_quarantine(self) -> None:
        with pytest.raises(PayloadRejected):
            make_event("")


class TestDeliver:
    async def test_calls_who_asks_for_it_and_names_the_verdicts(self, callbacks: Callbacks) -> None:
        seen: list[str] = []

        @callbacks.on("envelope.signed")
        async def by_coroutine(event: Event) -> None:
            seen.append(event.callback)

        @callbacks.on("envelope.*")
        def by_function(event: Event) -> None:
            seen.append(event.callback)

        @callbacks.on("envelope.voided")
        async def not_wanted(event: Event) -> None:
            seen.append(event.callback)

        verdicts = await deliver(callbacks, make_event())

        assert {"by_coroutine": Done(), "by_function": Done()} == verdicts
        assert ["by_coroutine", "by_function"] == seen

    async def test_says_what_was_raised(self, callbacks: Callbacks) -> None:
        @callbacks.on("*")
        async def later(_: Event) -> None:
            raise RetryLater("not yet")

        @callbacks.on("*")
        async def never(_: Event) -> None:
            raise GiveUp("no customer")

        @callbacks.on("*", where=lambda event: event.status == "voided")
        async def other(_: Event) -> None: ...

        verdicts = await deliver(callbacks, make_event())

        assert isinstance(verdicts["later"], Failed)
        assert isinstance(verdicts["never"], Dead)
        assert isinstance(verdicts["other"], Skipped)

    async def test_lends_a_session(self, callbacks: Callbacks) -> None:
        written: list[str] = []

        @callbacks.on("*")
        async def write(event: Event, session: Any) -> None:
            session.append(event.id)

        event = make_event()

        assert {"write": Done(is_committed=True)} == await deliver(
            callbacks, event, session=written
        )
        assert [event.id] == written
