"""Many who wait, beside a sender: what each costs, and how long it takes to reach them all."""

import asyncio
import json
import secrets
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean

import psutil

from tests.bench.api import tokens
from tests.bench.audience import Plan, Report, allow_many_files
from tests.bench.filling import Filling, fill, pending
from tests.bench.load import Order
from tests.bench.measurement import Measurement, Told
from tests.bench.processes import ROOT, clean_environment, end, python, run
from tests.bench.receivers import DIGEST, Service
from tests.postgres import Postgres

FILLING = Filling(10_000, 50_000)
STREAMS, POLLS = 1_000, 1_000
CONNECTIONS = 32
EVENTS = 30
# The load sends events of one type only, and this is another.
AWAITED = "envelope.expired"
# What a process needs for its first readers, and keeps, is not charged to the others.
FIRST = 20


class Crowded(Service):
    """One process that takes events while many wait for others."""

    name = "readers"
    # What was there before is older, and none of what is looked for.
    digests = Service.digests + " WHERE e.received_at > now() - interval '30 minutes'"

    def __init__(
        self, postgres: Postgres, scratch: Path, *, streams: int = STREAMS, polls: int = POLLS
    ) -> None:
        super().__init__(postgres, scratch)
        self._token = secrets.token_hex(32)
        self._streams, self._polls = streams, polls
        self._told: Told | None = None

    def prepare(self) -> None:
        url = self._postgres.create_database("bench readers")
        run(python("-m", "app", "migrate"), environment=self.environment(url))
        asyncio.run(fill(url, FILLING, lambda *_: None))

    def command(self) -> Sequence[str]:
        where = ("--host", "127.0.0.1", "--port", str(self._port))
        return python("-m", "app", "serve", "--no-work", *where)

    def create_database(self) -> str:
        return self._postgres.create_database("bench", template="bench readers")

    def environment(self, url: str) -> dict[str, str]:
        many = str(2 * (self._streams + self._polls))
        seats = {"API_WAITERS": many, "API_WAITERS_PER_TOKEN": many}
        return {**super().environment(url), **tokens(self._token), **seats}

    def tell(self, seconds: float) -> Told:
        """Take events while everybody waits, tell them of some, and take events alone."""
        allow_many_files()
        measured = self.measure(CONNECTIONS, seconds)
        assert self._told is not None  # by `_fire`
        faults = [*self._told.faults, *measured.faults]
        return replace(self._told, acknowledged=measured.acknowledged, faults=faults)

    def _fire(self, order: Order, process: subprocess.Popen[bytes]) -> Measurement:
        service = psutil.Process(process.pid)
        with audience(self._plan(FIRST, FIRST)) as first:
            first.say("streams", "polls", "leave")
        with audience(self._plan(self._streams, self._polls)) as crowd:
            sizes = [_size(service)]
            for word in ("streams", "polls"):
                crowd.say(word)
                sizes.append(_size(service))
            busy, digests = self._window(order, process)
            crowd.say("tell", "sign", "leave")
        alone, more = self._window(order, process)
        # The audit looks there for everything that was acknowledged.
        promised = digests + more + bytes.fromhex("".join(crowd.report.acknowledged))
        Path(order.digests).write_bytes(promised)
        self._told = self._sum_up(sizes, busy, alone, crowd.report)
        failures = dict(Counter(busy.failures) + Counter(alone.failures))
        return replace(busy, acknowledged=len(promised) // DIGEST, failures=failures)

    def _window(self, order: Order, process: subprocess.Popen[bytes]) -> tuple[Measurement, bytes]:
        measured = super()._fire(order, process)
        return measured, Path(order.digests).read_bytes()

    def _plan(self, streams: int, polls: int) -> Plan:
        return Plan(
            port=self._port,
            token=self._token,
            secret=self._secret,
            streams=streams,
            polls=polls // 2,
            envelopes=pending(polls - polls // 2),
            type=AWAITED,
            events=EVENTS,
        )

    def _sum_up(
        self, sizes: Sequence[float], busy: Measurement, alone: Measurement, report: Report
    ) -> Told:
        return Told(
            streams=self._streams,
            polls=self._polls,
            rate=busy.rate,
            rate_alone=alone.rate,
            cpu=busy.cpu + busy.database_cpu,
            cpu_alone=alone.cpu + alone.database_cpu,
            stream_memory=(sizes[1] - sizes[0]) / self._streams,
            poll_memory=(sizes[2] - sizes[1]) / self._polls,
            crowd=fmean([busy.crowd, alone.crowd]),
            acknowledged=0,
            reach=sorted(report.reach),
            reach_last=sorted(report.reach_last),
            answer=sorted(report.answer),
            faults=[f"{self.name}: {fault}" for fault in report.faults],
        )


def _size(process: psutil.Process) -> float:
    """Return the memory of a process, in KB."""
    return float(process.memory_info().rss) / 1024


class Crowd:
    """The audience as its own process, seen from the bench."""

    def __init__(self, process: subprocess.Popen[str], plan: Plan) -> None:
        self.report = Report()
        self._process = process
        self._send(json.dumps(asdict(plan)))

    def say(self, *words: str) -> None:
        """Say some words, wait until each is done, and add up what came of them."""
        for word in words:
            self._send(word)
            assert self._process.stdout is not None  # asked for when it was started
            line = self._process.stdout.readline()
            if not line:
                raise RuntimeError("the audience ended before its time; see its message above")
            for name, values in json.loads(line).items():
                getattr(self.report, name).extend(values)

    def _send(self, line: str) -> None:
        assert self._process.stdin is not None  # asked for when it was started
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()


@contextmanager
def audience(plan: Plan) -> Iterator[Crowd]:
    """Run an audience in the background; it is gone at the end."""
    process = subprocess.Popen(
        python("-m", "tests.bench.audience"),
        cwd=ROOT,
        env=clean_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield Crowd(process, plan)
    finally:
        end(process)
