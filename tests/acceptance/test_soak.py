"""Processes and their database are killed under load: nothing acknowledged is lost or altered.

`make soak` does the same at length; docs/soak.md has the figures of such a run.
"""

import pytest

from tests.faults.drill import Pace
from tests.faults.plan import Plan
from tests.faults.report import table
from tests.faults.soak import Result, own_site, soak

# A busy machine needs long for each start, and retries have to outlast it.
PACE = Pace(rate=60, compress=120)


def broken(result: Result) -> list[str]:
    """What was broken, but for the time of an answer: a busy machine may be slow."""
    return [count.name for count in result.wrong if count.invariant != "I8"]


@pytest.mark.timeout(400)
class TestSoak:
    def test_killed_replicas_workers_and_databases_lose_nothing(self) -> None:
        plan = Plan(seed=20261122, events=1000, kills=4, database_stops=1, freezes=1)

        with own_site() as site:
            result = soak(site, plan, pace=PACE)

        assert [] == broken(result), f"\n{table(result)}"
        assert 6 == len(result.ledger.marks)

    def test_a_killed_process_on_sqlite_loses_nothing(self) -> None:
        """Case 142, in short."""
        plan = Plan(seed=20261122, events=400, kills=3, replicas=1, workers=0)

        with own_site(sqlite=True) as site:
            result = soak(site, plan, pace=PACE)

        assert [] == broken(result), f"\n{table(result)}"
        assert 3 == len(result.ledger.marks)
