"""`python -m tests.bench`: the contenders in turns, an audit after each, one table."""

import argparse
import asyncio
import contextlib
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import asyncpg
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)

from tests.bench import machine, report
from tests.bench.measurement import Measurement, Result, Told, Worked, combine
from tests.bench.processes import carry_out
from tests.bench.queues import Deliveries, Filling, PgQueuer, Procrastinate, Queue
from tests.bench.readers import Crowded
from tests.bench.reads import Reading
from tests.bench.receivers import Receiver, Service, Textbook, TextbookAsync
from tests.bench.reference import pgbench_version, references
from tests.bench.report import Results
from tests.bench.variants import AtWork, Grown, OnSqlite, Replicas, SameRows, Start, ThreeWrites
from tests.bench.working import CLOCKED, SCENES, Working
from tests.postgres import DURABLE, Postgres

RECEIVERS = ("reference", "one-statement", "service", "textbook", "textbook-async")
# As they are named on the command line.
VARIANTS = {
    "at-work": AtWork,
    "replicas": Replicas,
    "grown": Grown,
}
QUEUES = ("deliveries", "procrastinate", "pgqueuer")
CONTENDERS = (
    *RECEIVERS,
    *VARIANTS,
    "sqlite",
    "start",
    *QUEUES,
    "history",
    "working",
    "reads",
    "readers",
)
# Sent at a fixed rate: to whom, and on how many connections.
PACES = {"service": (1_000, 64), "two replicas": (300, 64)}
SCENE_CONNECTIONS = 8
# Whoever needs longer for its queue is stopped, and what it did until then counts.
DRAIN_SECONDS = 8.0
JOBS, FEW_JOBS = Filling(20_000), Filling(5_000)
HISTORY = (Filling(100_000), Filling(100_000, finished=1_000_000))

DESCRIPTION = """\
Measure how many signed events per second are taken, and how many callbacks run; print
it as ratios.

reference      pgbench, one event per transaction: begin, three statements, commit
one-statement  pgbench, the same writes in one statement: the hardest to keep up with
service        python -m app serve --only webhooks --no-work, one process
textbook       FastAPI and the SQLAlchemy ORM as one writes them on a first afternoon,
               following FastAPI's tutorial
textbook-async the same with async sessions on asyncpg

at-work        the service with a callback at work in the same process
replicas       two processes of the service on one database
grown          the service on a database that knows ten million identities; filling it
               takes two minutes and 3 GB of disk for each copy
sqlite         the service on a file; on such a file the same rows, one transaction for
               each event; and so the three writes of the reference
start          from nothing to the first 200, on SQLite

deliveries     python -m app work: 20,000 deliveries to a callback that does nothing
procrastinate  its own worker: 20,000 jobs that do nothing
pgqueuer       likewise
history        100,000 deliveries, without and with a million finished ones beside them
working        from the commit of an event to its callback, and taking events meanwhile

reads          GET /api/envelope/{id}/status and others, against an empty route behind the
               same token and in the same process: 10,000 envelopes, 32 connections
readers        serve --no-work, with 1,000 long-polls and 1,000 streams that wait meanwhile

All of them use one PostgreSQL of the bench's own, which flushes each commit to the
disk, on a database that is new for each window. They take turns, and each figure is the
median of the rounds: compare figures of one run only. After each window every
acknowledged event is looked for in the database, byte for byte; of what the API
answered, a sample is compared with it.

The closed loop sends on each connection as soon as the last answer is there. One more
window sends 1,000 events/s to one process, another 300 events/s to two replicas,
whatever the answers do; their latencies count from the moment at which an event should
have been sent.
"""
EPILOG = """\
examples:
  python -m tests.bench                            all of it, about twenty minutes
  python -m tests.bench --quick                    a first impression, under a minute
  python -m tests.bench --only service --connections 128 --rounds 5
  python -m tests.bench --markdown table.md        the table for a document, too

exit status:
  0  every acknowledged event was found and every answer right, however fast or slow
  1  an acknowledged event is lost or altered, an answer is wrong, or a contender did not run

With a million envelopes: python -m tests.bench.large --help
"""


class Prepared(Protocol):
    """What has to be done once, before anything is measured."""

    name: str

    def prepare(self) -> None:
        """Do once what every window needs."""


class Contender(Prepared, Protocol):
    """What every receiver of events can do."""

    connections: Sequence[int] | None

    def measure(self, connections: int, seconds: float) -> Measurement:
        """Run one window on a new database."""


class Turn(Protocol):
    """Something that is measured once in each round."""

    @property
    def name(self) -> str:
        """What is shown while it is measured."""

    def measure(self, seconds: float) -> Result:
        """Measure it, on a database of its own."""


@dataclass(frozen=True, slots=True)
class Window:
    """Events are sent as fast as they are answered: to whom, and on how many connections."""

    contender: Contender
    connections: int

    @property
    def name(self) -> str:
        return f"{self.contender.name}, {self.connections} connections"

    def measure(self, seconds: float) -> Measurement:
        return self.contender.measure(self.connections, seconds)


@dataclass(frozen=True, slots=True)
class Pace:
    """Events are sent at a fixed rate, whatever the answers do."""

    receiver: Receiver
    rate: int
    connections: int

    @property
    def name(self) -> str:
        return f"{self.receiver.name} at {self.rate:,}/s"

    def measure(self, seconds: float) -> Measurement:
        measured = self.receiver.measure(self.connections, 4 * seconds, self.rate)
        return replace(measured, contender=self.name, is_paced=True)


@dataclass(frozen=True, slots=True)
class Drain:
    """A queue is worked off."""

    queue: Queue

    @property
    def name(self) -> str:
        return self.queue.title

    def measure(self, seconds: float) -> Worked:
        return self.queue.measure(max(DRAIN_SECONDS, seconds))


@dataclass(frozen=True, slots=True)
class Play:
    """Events arrive while callbacks are at work."""

    working: Working

    @property
    def name(self) -> str:
        return self.working.name

    def measure(self, seconds: float) -> Measurement:
        del seconds  # a scene has its own
        scene = self.working.scene
        return self.working.measure(SCENE_CONNECTIONS, scene.seconds, scene.rate)


@dataclass(frozen=True, slots=True)
class Listening:
    """Many wait for events."""

    crowded: Crowded

    @property
    def name(self) -> str:
        return self.crowded.name

    def measure(self, seconds: float) -> Told:
        return self.crowded.tell(seconds)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    machine.require_linux()
    # A plain kill has to end the children, too, and `finally` does that.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    console = Console(stderr=True, highlight=False)
    return carry_out(lambda: _bench(options, console), console)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--seconds", type=float, default=4.0, help="length of one window (%(default)s)")
    add("--rounds", type=int, default=2, help="windows per figure; the median counts (%(default)s)")
    add(
        "--connections",
        type=_numbers,
        default=[1, 32, 128],
        metavar="N,N",
        help="connections that are kept busy (1,32,128)",
    )
    add(
        "--only",
        type=_contenders,
        metavar="NAME,NAME",
        help=f"leave the others out; of {', '.join(CONTENDERS)}",
    )
    add("--quick", action="store_true", help="one short round at 32 connections")
    add("--markdown", type=Path, metavar="FILE", help="write the table there, too")
    options = parser.parse_args(arguments)
    if options.seconds <= 0 or options.rounds < 1:
        parser.error("--seconds and --rounds must be positive")
    if options.quick:
        options.seconds, options.rounds, options.connections = 2.0, 1, [32]
    if options.only is None:
        options.only = [*RECEIVERS, *QUEUES] if options.quick else list(CONTENDERS)
    return options


def _numbers(text: str) -> list[int]:
    numbers = [int(number) for number in text.split(",")]
    if not all(0 < number <= 150 for number in numbers):
        raise argparse.ArgumentTypeError("each number must lie between 1 and 150")
    return numbers


def _contenders(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in CONTENDERS]:
        raise argparse.ArgumentTypeError(
            f"{unknown[0]!r} is none of {', '.join(CONTENDERS)}; separate names with commas"
        )
    return names


def _bench(options: argparse.Namespace, console: Console) -> int:
    with (
        tempfile.TemporaryDirectory(prefix="atlas-receiver-bench-") as scratch,
        Postgres(settings=DURABLE) as postgres,
        Postgres(settings={**DURABLE, **CLOCKED}) as clocked,
    ):
        contenders = _choose(options.only, postgres, Path(scratch))
        file = OnSqlite(postgres, Path(scratch))
        starting = [file] if "start" in options.only else []
        queues = _queues(options, postgres, Path(scratch))
        scenes = [Working(clocked, Path(scratch), scene) for scene in SCENES]
        if "working" not in options.only:
            scenes = []
        reading, crowded = Reading(postgres, Path(scratch)), Crowded(postgres, Path(scratch))
        asking = [reading] if reading.name in options.only else []
        waiting = [crowded] if crowded.name in options.only else []
        about = [machine.describe(), machine.versions(_version_of(postgres)), _method(options)]
        if any(name in options.only for name in ("reference", "one-statement")):
            about.append(f"pgbench: {pgbench_version()}")
        for line in about:
            console.print(line)
        turns: list[Turn] = [
            *_windows(contenders, options),
            *_paces(contenders),
            *map(Start, starting),
            *map(Drain, queues),
            *map(Play, scenes),
            *asking,
            *map(Listening, waiting),
        ]
        prepared: list[Prepared] = [
            *contenders,
            *starting,
            *queues,
            *scenes,
            *asking,
            *waiting,
        ]
        measured = _run(prepared, turns, options, console)
    results = Results(measured)
    table = Console(highlight=False)
    table.width = report.width_of(table)
    table.print(report.render(results))
    if options.markdown is not None:
        options.markdown.write_text(report.markdown(results, about=about))
    return 1 if results.faults() else 0


def _choose(only: Sequence[str], postgres: Postgres, scratch: Path) -> list[Contender]:
    contenders: list[Contender] = [
        *references(postgres),
        Service(postgres, scratch),
        Textbook(postgres, scratch),
        TextbookAsync(postgres, scratch),
    ]
    chosen = [contender for contender in contenders if contender.name in only]
    chosen += [kind(postgres, scratch) for name, kind in VARIANTS.items() if name in only]
    if "sqlite" in only:
        file = OnSqlite(postgres, scratch)
        chosen = [*chosen, file, SameRows(file, scratch), ThreeWrites(scratch)]
    return chosen


def _queues(options: argparse.Namespace, postgres: Postgres, scratch: Path) -> list[Queue]:
    jobs = FEW_JOBS if options.quick else JOBS
    kinds: tuple[type[Queue], ...] = (Deliveries, Procrastinate, PgQueuer)
    queues = [kind(postgres, scratch, jobs) for kind in kinds if kind.name in options.only]
    if "history" in options.only:
        queues += [Deliveries(postgres, scratch, filling) for filling in HISTORY]
    return queues


def _method(options: argparse.Namespace) -> str:
    return (
        f"windows of {options.seconds:g} s, median of {options.rounds} interleaved rounds; "
        "fsync, full_page_writes and synchronous_commit on"
    )


def _version_of(postgres: Postgres) -> str:
    async def ask() -> str:
        connection = await asyncpg.connect(postgres.url())
        try:
            return str(await connection.fetchval("SHOW server_version"))
        finally:
            await connection.close()

    return asyncio.run(ask())


def _run(
    contenders: Sequence[Prepared],
    turns: Sequence[Turn],
    options: argparse.Namespace,
    console: Console,
) -> list[Result]:
    measured: dict[str, list[Result]] = {turn.name: [] for turn in turns}
    with _progress(console) as progress:
        task = progress.add_task("preparing", total=options.rounds * len(turns))
        for contender in contenders:
            progress.update(task, description=f"preparing {contender.name}")
            contender.prepare()
        for turn in [*turns] * options.rounds:
            progress.update(task, description=turn.name)
            measured[turn.name].append(turn.measure(options.seconds))
            progress.advance(task)
    return sorted((combine(rounds) for rounds in measured.values()), key=_place)


def _windows(contenders: Sequence[Contender], options: argparse.Namespace) -> Iterator[Window]:
    for connections in sorted({1, 32, 128, *options.connections}):
        for contender in contenders:
            if connections in (contender.connections or options.connections):
                yield Window(contender, connections)


def _paces(contenders: Sequence[Contender]) -> Iterator[Pace]:
    for contender in contenders:
        if isinstance(contender, Receiver) and contender.name in PACES:
            yield Pace(contender, *PACES[contender.name])


def _place(one: Result) -> tuple[int, int]:
    """Say where in the tables it stands; what has no place of its own comes in its turn."""
    if not isinstance(one, Measurement) or one.contender not in RECEIVERS:
        return len(RECEIVERS), 0
    return RECEIVERS.index(one.contender), one.connections


@contextlib.contextmanager
def _progress(console: Console) -> Iterator[Progress]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        yield progress


if __name__ == "__main__":
    sys.exit(main())
