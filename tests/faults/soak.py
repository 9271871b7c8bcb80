"""The soak: replicas and workers are killed under load, and everything is counted."""

import asyncio
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from app.store.migrations import migrate
from tests.faults.drill import Pace, run
from tests.faults.ledger import Ledger
from tests.faults.oracle import Count, judge
from tests.faults.plan import Plan
from tests.faults.script import owed
from tests.faults.site import Site, Vitals, on_postgresql, on_sqlite
from tests.faults.traffic import Expected, Traffic
from tests.postgres import Postgres

# How long all that is still owed after the last answer may take: leases run out, and what
# failed on purpose is tried again.
DRAIN_SECONDS = 120


@dataclass(frozen=True, slots=True)
class Result:
    """What a run has shown."""

    plan: Plan
    ledger: Ledger
    counts: Sequence[Count]

    @property
    def wrong(self) -> list[Count]:
        """Everything that must not be."""
        return [count for count in self.counts if count.is_wrong]


def soak(
    site: Site,
    plan: Plan,
    *,
    pace: Pace,
    ledger: Ledger | None = None,
    on_sent: Callable[[], object] = lambda: None,
) -> Result:
    """Run `plan` against `site`, and judge."""
    ledger = ledger or Ledger()
    traffic = Traffic(plan.seed, plan.events)
    baseline = [Vitals.of(service) for service in site.services]
    asyncio.run(run(site, traffic, plan.strikes(), ledger, pace=pace, on_sent=on_sent))
    expected = Expected.of(traffic)
    _wait_until_quiet(site, sum(map(owed, expected.types)))
    return Result(plan, ledger, judge(site, expected, ledger, baseline=baseline))


def _wait_until_quiet(site: Site, deliveries: int) -> None:
    for service in site.services:
        service.wait_until_ready()
    deadline = time.monotonic() + DRAIN_SECONDS
    # Whatever is not done in time is for the judge to name.
    while not site.is_quiet(deliveries=deliveries) and time.monotonic() < deadline:
        time.sleep(0.2)


@contextmanager
def own_site(*, sqlite: bool = False, workers: int = 2) -> Iterator[Site]:
    """A deployment of our own that is gone afterwards: with PostgreSQL, or on one file."""
    with tempfile.TemporaryDirectory(prefix="atlas-receiver-faults-") as folder:
        home = Path(folder)
        if sqlite:
            url = f"sqlite:///{home}/receiver.db"
            asyncio.run(migrate(url))
            with on_sqlite(url, home) as site:
                yield site
            return
        with Postgres() as server:
            url = server.create_database("receiver")
            asyncio.run(migrate(url))
            with on_postgresql(url, home, server=server, workers=workers) as site:
                yield site
