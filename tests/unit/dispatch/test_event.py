"""What a callback is given, made of a row."""

from datetime import UTC, datetime

import pytest

from app.dispatch.event import Undecodable, build
from app.store.claims import Claim
from app.store.contents import Content
from app.store.ids import new_id

CLAIM = Claim(new_id(), 1, 1, 0, "it", 1, new_id(), "env_1")
NOW = datetime.now(UTC)
# As PostgreSQL's driver gives them: id, is late, body, then the event, then no envelope.
ROW = (
    new_id(),
    False,
    b"{}",
    *(new_id(), "envelope.signed", "default", "env_1", None, None, NOW, 1, "applied", "signed", 1),
    *[None] * 40,
)
CONTENT = Content(ROW, is_postgresql=True, event_type="envelope.signed", fields_status=None)


class TestEvent:
    def test_may_be_about_no_envelope(self) -> None:
        assert build(CLAIM, CONTENT, deadline=NOW).envelope is None

    def test_has_the_same_data_each_time(self) -> None:
        event = build(CLAIM, CONTENT, deadline=NOW)

        assert event.data is event.data

    def test_of_a_delivery_that_is_gone_cannot_be_made(self) -> None:
        with pytest.raises(Undecodable):
            build(CLAIM, None, deadline=NOW)
