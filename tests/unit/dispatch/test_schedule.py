"""When a failed delivery is tried again."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.dispatch.schedule import (
    LONGEST_CAP,
    LONGEST_REQUEST,
    MAX_ATTEMPTS,
    Backoff,
    next_try,
    wait_after,
)

MIDDLE = 0.5
NOISE = st.floats(min_value=0, max_value=1)


def seconds_after(attempt: int, backoff: Backoff | None = None, noise: float = MIDDLE) -> float:
    return wait_after(attempt, backoff=backoff or Backoff(), noise=noise).total_seconds()


class TestWait:
    def test_waits_grow_up_to_the_cap(self) -> None:
        waits = [seconds_after(attempt) for attempt in range(1, MAX_ATTEMPTS)]

        assert [5, 15, 45, 135, 405, 1215, 3600, 3600, 3600, 3600, 3600] == waits
        assert timedelta(hours=5.5) < timedelta(seconds=sum(waits)) < timedelta(hours=5.6)

    def test_what_failed_together_does_not_come_back_together(self) -> None:
        """A spread of a quarter to both sides, also at the cap."""
        for attempt in (1, 5, 12):
            middle = seconds_after(attempt)

            assert seconds_after(attempt, noise=0) == pytest.approx(0.75 * middle)
            assert seconds_after(attempt, noise=1) == pytest.approx(1.25 * middle)

    @given(attempt=st.integers(1, 10**9), factor=st.floats(1, 1000), noise=NOISE)
    def test_no_attempt_is_too_late_for_a_clock(
        self, attempt: int, factor: float, noise: float
    ) -> None:
        backoff = Backoff(base=timedelta(days=1), factor=factor, cap=timedelta.max)

        wait = wait_after(attempt, backoff=backoff, noise=noise)

        assert timedelta(0) < wait <= 1.25 * LONGEST_CAP
        assert datetime(9990, 1, 1, tzinfo=UTC) + wait < datetime.max.replace(tzinfo=UTC)

    def test_a_month_is_the_longest_wait(self) -> None:
        slow = Backoff(base=timedelta(days=400), cap=timedelta(days=400))

        assert timedelta(days=30).total_seconds() == seconds_after(1, slow)


class TestNextTry:
    def try_again(self, attempt: int, after: timedelta | None = None) -> timedelta | None:
        return next_try(attempt, max_attempts=3, backoff=Backoff(), noise=MIDDLE, after=after)

    def test_the_last_attempt_is_the_last(self) -> None:
        waits = [self.try_again(attempt) for attempt in (1, 2, 3, 4)]

        assert [timedelta(seconds=5), timedelta(seconds=15), None, None] == waits

    @pytest.mark.parametrize(
        "asked, given",
        [
            pytest.param(timedelta(minutes=7), timedelta(minutes=7), id="as-asked"),
            pytest.param(timedelta(0), timedelta(0), id="at-once"),
            pytest.param(timedelta(seconds=-5), timedelta(0), id="in-the-past"),
            pytest.param(timedelta(days=400_000), LONGEST_REQUEST, id="year-3000"),
            pytest.param(timedelta.max, LONGEST_REQUEST, id="beyond-the-calendar"),
        ],
    )
    def test_a_callback_may_ask_for_a_time_within_reason(
        self, asked: timedelta, given: timedelta
    ) -> None:
        assert given == self.try_again(1, asked)

    def test_reason_ends_after_a_day(self) -> None:
        assert timedelta(days=1) == self.try_again(1, timedelta(days=2))

    def test_but_not_for_more_attempts(self) -> None:
        assert self.try_again(3, timedelta(minutes=7)) is None
