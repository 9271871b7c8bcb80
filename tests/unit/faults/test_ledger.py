"""The ledger of a fault run: what happened when, second by second."""

import itertools
import time

import pytest

from tests.faults.ledger import BROKEN, Ledger


class TestLedger:
    def test_time_may_pass_while_it_is_written(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A second may end between any two looks at the clock."""
        clock = itertools.count(0, 0.6)
        monkeypatch.setattr(time, "monotonic", lambda: next(clock))
        kept = Ledger()

        for _ in range(10):
            kept.note_silence(BROKEN)

        assert 10 == sum(second.unanswered for second in kept.seconds)
        assert 10 == kept.unanswered[BROKEN]

    def test_a_fault_lasts_as_long_as_its_block(self, monkeypatch: pytest.MonkeyPatch) -> None:
        now = [0.0]
        monkeypatch.setattr(time, "monotonic", lambda: now[0])
        kept = Ledger()

        now[0] = 5.0
        with kept.marked("frozen", 1):
            now[0] = 7.5

        [mark] = kept.marks
        assert (5.0, 7.5, 1) == (mark.at, mark.until, kept.made("frozen"))
