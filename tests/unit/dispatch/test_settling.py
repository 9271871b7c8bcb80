"""What a verdict means for its delivery: settled, tried again, or a dead letter."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from app.callbacks import Callbacks
from app.dispatch.attempt import COMMITTED, DONE, Call, Dead, Failed, Outcome, Skipped, Verdict
from app.dispatch.settling import settlement
from app.store.claims import Claim
from app.store.ids import new_id
from app.store.verdicts import Settlement

BEGAN, ENDED = datetime(2026, 7, 1, 12, tzinfo=UTC), datetime(2026, 7, 1, 12, 1, tzinfo=UTC)
CLAIM = Claim(new_id(), 7, 3, 0, "it", 1, new_id(), "env_1")


def settled(
    verdict: Verdict, *, attempt: int = 3, spent: int = 0, noise: float = 0.5, **options: Any
) -> Settlement:
    """The end of one attempt; with nothing said about it, the third of twelve."""
    callbacks = Callbacks()
    callbacks.on("*", name="it", **options)(lambda _: None)
    claim = Claim(CLAIM.id, 7, attempt, spent, "it", 1, CLAIM.event_id, "env_1")
    call = Call(next(iter(callbacks)), claim, None)
    return settlement(Outcome(call, verdict, BEGAN, ENDED), noise=noise)


class TestTheEnd:
    @pytest.mark.parametrize(
        "verdict, word, state",
        [
            pytest.param(DONE, "done", "done", id="done"),
            pytest.param(COMMITTED, "done", "done", id="committed"),
            pytest.param(Skipped("not mine"), "skipped", "done", id="skipped"),
        ],
    )
    def test_of_what_went_well_is_the_end_of_the_delivery(
        self, verdict: Verdict, word: str, state: str
    ) -> None:
        assert settled(verdict) == Settlement(
            id=CLAIM.id,
            token=7,
            attempt=3,
            verdict=word,
            state=state,
            wait=None,
            error=None,
            fingerprint=None,
            started_at=BEGAN,
            finished_at=ENDED,
        )

    def test_of_what_gave_up_is_a_dead_letter(self) -> None:
        row = settled(Dead("GiveUp: gone", "0123456789abcdef"))

        assert ("dead", "dead", None) == (row.verdict, row.state, row.wait)
        assert ("GiveUp: gone", "0123456789abcdef") == (row.error, row.fingerprint)

    def test_of_what_has_failed_is_another_try(self) -> None:
        row = settled(Failed("ValueError: no", "0123456789abcdef"))

        assert ("failed", "pending", timedelta(seconds=45)) == (row.verdict, row.state, row.wait)
        assert ("ValueError: no", "0123456789abcdef") == (row.error, row.fingerprint)

    def test_of_the_last_try_is_a_dead_letter_as_well(self) -> None:
        row = settled(Failed("ValueError: no", "0123456789abcdef"), max_attempts=3)

        assert ("dead", "dead", None) == (row.verdict, row.state, row.wait)
        assert ("ValueError: no", "0123456789abcdef") == (row.error, row.fingerprint)


class TestTheWait:
    def test_begins_anew_with_a_fresh_round(self) -> None:
        """An operator who retries a dead letter gives it all of its attempts again."""
        row = settled(Failed("no", "0"), attempt=13, spent=12, max_attempts=3)

        assert ("failed", timedelta(seconds=5)) == (row.verdict, row.wait)

    def test_is_spread_so_that_not_all_come_back_together(self) -> None:
        waits = [settled(Failed("no", "0"), attempt=1, noise=noise).wait for noise in (0.0, 1.0)]

        assert [timedelta(seconds=3.75), timedelta(seconds=6.25)] == waits

    def test_is_the_callbacks_own_if_it_named_one(self) -> None:
        assert timedelta(minutes=7) == settled(Failed("no", "0", timedelta(minutes=7))).wait
