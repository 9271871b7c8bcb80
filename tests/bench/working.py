"""The service with its callbacks at work: how long they wait, and what taking events costs then."""

import asyncio
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import asyncpg

from tests.bench.load import Order
from tests.bench.measurement import Measurement
from tests.bench.owed import fill, subscribe
from tests.bench.processes import python, run, running, wait_until_ready
from tests.bench.receivers import Service
from tests.postgres import Postgres, free_port

# Without it the server does not know when a transaction was committed.
CLOCKED = {"track_commit_timestamp": "on"}
LAST_CALL = 15.0

_COMMITS = """
SELECT b.event_id::text, 1000 * extract(epoch FROM pg_xact_commit_timestamp(b.xmin))::float8
FROM atlas_receiver.bodies b JOIN atlas_receiver.events e ON e.id = b.event_id
WHERE e.received_at >= to_timestamp($1)
"""
_IS_THERE = "SELECT FROM pg_database WHERE datname = $1"
_LEFT = "SELECT count(*) FROM atlas_receiver.deliveries WHERE due_at IS NOT NULL"


@dataclass(frozen=True, slots=True)
class Scene:
    """What runs, what it owes already, and how many events a second arrive."""

    name: str
    rate: float
    seconds: float
    # Of tests/bench/noop.py; only some of these note each call.
    callbacks: str = "noting"
    # A worker in a process of its own, beside one that takes the events.
    is_apart: bool = False
    owed: int = 0
    owed_to: str = "bench"


SCENES = (
    Scene("one process", 50, 10),
    Scene("two processes", 50, 10, is_apart=True),
    Scene("one process, nothing owed", 100, 5, "drained"),
    Scene("one process, 100,000 owed", 100, 5, "drained", owed=100_000),
    Scene("one process, 50,000 owed to another", 50, 5, "crowded", owed=50_000, owed_to="backlog"),
)


class Working(Service):
    """One scene, on a server that remembers when it committed what."""

    # What was owed before is older, and none of what is looked for.
    digests = Service.digests + " WHERE e.received_at > now() - interval '30 minutes'"

    def __init__(self, postgres: Postgres, scratch: Path, scene: Scene) -> None:
        super().__init__(postgres, scratch)
        self.name = scene.name
        self.scene = scene
        self._notes = scratch / "notes"
        self._worker_port = free_port()
        self._template = f"bench {scene.owed} owed to {scene.owed_to}"

    def prepare(self) -> None:
        # Several scenes begin alike.
        if asyncio.run(_ask(self._postgres.url(), _IS_THERE, self._template)):
            return
        url = self._postgres.create_database(self._template)
        run(python("-m", "app", "migrate"), environment=self.environment(url))
        # Beforehand, so that the first event is owed to them already.
        names = {"bench", self.scene.owed_to}
        asyncio.run(subscribe(url, *names))
        asyncio.run(fill(url, callback=self.scene.owed_to, owed=self.scene.owed))

    def command(self) -> Sequence[str]:
        part = ("--only", "webhooks") if self.scene.is_apart else ()
        where = ("--host", "127.0.0.1", "--port", str(self._port))
        return python("-m", "app", "serve", *part, *where)

    def create_database(self) -> str:
        self._notes.write_bytes(b"")
        return self._postgres.create_database("bench", template=self._template)

    def environment(self, url: str) -> dict[str, str]:
        return {
            **super().environment(url),
            "CALLBACKS": f"tests.bench.noop:{self.scene.callbacks}",
            "BENCH_NOTES": str(self._notes),
        }

    @contextmanager
    def company(self, url: str) -> Iterator[None]:
        if not self.scene.is_apart:
            yield
            return
        log = self._scratch / "worker.log"
        command = python("-m", "app", "work", "--port", str(self._worker_port))
        with running(command, environment=self.environment(url), log=log) as worker:
            wait_until_ready(worker, self._worker_port, log)
            yield

    def _fire(self, order: Order, process: subprocess.Popen[bytes]) -> Measurement:
        measured = super()._fire(replace(order, is_gentle=True), process)
        left = asyncio.run(_ask(self._postgres.url("bench"), _LEFT))[0][0]
        if self.scene.callbacks != "drained":
            self._wait_for_calls(measured.acknowledged)
        return replace(measured, left=left, is_scene=True)

    def _wait_for_calls(self, expected: int) -> None:
        end = time.monotonic() + LAST_CALL
        while len(self._called()) < expected and time.monotonic() < end:
            time.sleep(0.05)

    async def _audit(self, url: str, measured: Measurement, digests: bytes) -> Measurement:
        audited = await super()._audit(url, measured, digests)
        if self.scene.callbacks == "drained":
            return audited
        called = self._called()
        commits = await _ask(url, _COMMITS, measured.began)
        missing = sum(event not in called for event, _ in commits)
        if missing:
            audited.faults.append(f"{self.name}: {missing} events did not reach their callback")
        lags = [called[event] - at for event, at in commits if event in called]
        return replace(audited, lags=lags)

    def _called(self) -> dict[str, float]:
        """Give the time of the first call for each event, in milliseconds."""
        called: dict[str, float] = {}
        for line in self._notes.read_text().splitlines():
            event, _, at = line.partition(" ")
            called.setdefault(event, int(at) / 1e6)
        return called


async def _ask(url: str, query: str, *arguments: float | str) -> list[asyncpg.Record]:
    connection = await asyncpg.connect(url)
    try:
        return list(await connection.fetch(query, *arguments))
    finally:
        await connection.close()
