"""When a callback is left alone: pure, so every step is one line."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.dispatch.breaker import Breaker, Condition, Tally, advance

NOW = datetime(2026, 1, 1, tzinfo=UTC)
BREAKER = Breaker(calls=10, window=timedelta(minutes=1), pause=timedelta(seconds=10))
BAD = Tally(failed=10)


def at(seconds: float) -> datetime:
    return NOW + timedelta(seconds=seconds)


def step(condition: Condition, tally: Tally, seconds: float = 0) -> Condition:
    return advance(condition, tally, breaker=BREAKER, now=at(seconds))


CLOSED = Condition(since=NOW)
OPEN = step(CLOSED, BAD)


class TestClosed:
    def test_opens_when_too_many_fail(self) -> None:
        assert at(10) == step(CLOSED, Tally(5, 5)).open_until

    def test_stays_closed_while_few_fail(self) -> None:
        assert step(CLOSED, Tally(6, 5)).open_until is None

    def test_does_not_judge_by_a_handful_of_calls(self) -> None:
        assert step(CLOSED, Tally(failed=9)).open_until is None

    def test_adds_up_what_several_processes_tell(self) -> None:
        half = step(CLOSED, Tally(failed=5))

        assert step(half, Tally(failed=5)).open_until is not None

    def test_forgets_what_is_older_than_its_window(self) -> None:
        half = step(CLOSED, Tally(failed=9))

        assert Tally(failed=1) == step(half, Tally(failed=1), seconds=60).tally

    def test_is_clean_after_a_window_without_failures(self) -> None:
        recovered = Condition(since=NOW, trips=3, tally=Tally(1, 1))

        assert step(recovered, Tally(succeeded=1), seconds=60).is_clean

    def test_a_strict_one_opens_at_the_first_failure(self) -> None:
        after = advance(CLOSED, Tally(failed=1), breaker=Breaker(calls=1), now=NOW)

        assert after.open_until is not None

    @pytest.mark.parametrize("rate", [0.0, 0.000001])
    def test_only_successes_never_open_it(self, rate: float) -> None:
        strict = Breaker(failure_rate=rate, calls=1)

        after = advance(CLOSED, Tally(succeeded=1000), breaker=strict, now=NOW)

        assert after.open_until is None

    def test_unless_told_otherwise_it_judges_by_twenty_calls_of_a_minute(self) -> None:
        usual = Breaker()

        few = advance(CLOSED, Tally(9, 10), breaker=usual, now=NOW)
        enough = advance(CLOSED, Tally(10, 10), breaker=usual, now=NOW)
        later = advance(few, Tally(9, 10), breaker=usual, now=at(60))

        assert (None, at(10), None) == (few.open_until, enough.open_until, later.open_until)
        assert (timedelta(minutes=5), 3) == (usual.longest, usual.probes)


class TestOpen:
    def test_ignores_what_was_under_way(self) -> None:
        assert OPEN == step(OPEN, Tally(succeeded=100), seconds=9)
        assert OPEN == step(OPEN, BAD, seconds=9)

    def test_is_not_clean(self) -> None:
        assert not OPEN.is_clean


class TestHalfOpen:
    def test_closes_when_a_probe_succeeds(self) -> None:
        after = step(OPEN, Tally(succeeded=1), seconds=10)

        assert (None, 1) == (after.open_until, after.trips)

    def test_opens_for_twice_as_long_when_a_probe_fails(self) -> None:
        after = step(OPEN, Tally(succeeded=2, failed=1), seconds=10)

        assert at(10 + 20) == after.open_until

    def test_stays_as_it_is_while_nothing_was_tried(self) -> None:
        assert OPEN == step(OPEN, Tally(), seconds=1000)

    def test_opens_for_longer_if_it_fails_again_soon_after_it_closed(self) -> None:
        closed = step(OPEN, Tally(succeeded=1), seconds=10)

        assert at(11 + 20) == step(closed, BAD, seconds=11).open_until


class TestPause:
    @pytest.mark.parametrize("trips", [6, 100, 10_000])
    def test_never_grows_beyond_the_longest(self, trips: int) -> None:
        condition = Condition(since=NOW, trips=trips, open_until=NOW)

        assert NOW + BREAKER.longest == step(condition, BAD).open_until

    @given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50), st.floats(0, 100))))
    def test_ends_some_time_whatever_happens(self, steps: list[tuple[int, int, float]]) -> None:
        condition, now = CLOSED, 0.0
        for succeeded, failed, wait in steps:
            now += wait
            condition = step(condition, Tally(succeeded, failed), seconds=now)
            if condition.open_until is not None:
                assert condition.open_until <= at(now) + BREAKER.longest
