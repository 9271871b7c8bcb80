"""The API's hot reads, beside an empty route of the same process and behind the same token."""

import asyncio
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import asyncpg

from tests.bench.api import Api, api, with_nothing_beside
from tests.bench.asking import asker
from tests.bench.filling import Filling, fill
from tests.bench.measurement import Asked, Reads, combine_asked
from tests.bench.processes import python, run
from tests.bench.report import EMPTY
from tests.bench.routes import NOTHING, Json, Route, envelope_pages, feed_pages, one_envelope
from tests.postgres import Postgres

FILLING = Filling(10_000, 50_000)
CONNECTIONS = 32
# They take turns this often, so that what slows the machine down slows all of them.
SLICE = 0.5
WARM_UP = 0.3


class Reading:
    """Each of a few routes, in turns, in one process."""

    name = "reads"

    def __init__(self, postgres: Postgres, scratch: Path) -> None:
        self._postgres = postgres
        self._scratch = scratch

    def prepare(self) -> None:
        url = self._postgres.create_database("bench reads")
        environment = {"DATABASE_URL": url, "ENV_FILE": ""}
        run(python("-m", "app", "migrate"), environment=environment)
        asyncio.run(fill(url, FILLING, lambda *_: None))

    def measure(self, seconds: float) -> Reads:
        url = self._postgres.url("bench reads")
        with (
            api(self._postgres, url, self._scratch, with_nothing_beside) as service,
            asker() as asking,
        ):
            routes = list(_routes(service))
            for route in routes:
                service.ask(asking, route, CONNECTIONS, WARM_UP)
            slices: list[list[Asked]] = [
                [service.ask(asking, route, CONNECTIONS, SLICE) for route in routes]
                for _ in range(max(1, round(seconds / SLICE)))
            ]
        return Reads([combine_asked(each) for each in zip(*slices, strict=True)])


def _routes(service: Api) -> Iterator[Route]:
    yield Route(EMPTY, {NOTHING: _is_empty})
    # The third one, `explain`, is no hot read.
    yield from islice(one_envelope(FILLING.envelopes), 2)
    yield envelope_pages(service.caller)
    yield feed_pages(service.caller)


async def _is_empty(_: asyncpg.Connection, body: Json) -> str | None:
    return "is not empty" if body else None
