"""`python -m tests.bench.large`: a database with a history, beside one that has hardly any."""

import argparse
import asyncio
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import asyncpg
from rich.console import Console, Group
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from tests.bench import machine, report
from tests.bench.api import api, as_service
from tests.bench.asking import asker
from tests.bench.filling import LOG, Filling, fill
from tests.bench.measurement import Measurement, combine_measured
from tests.bench.pairs import (
    Beside,
    Both,
    Comparison,
    Intake,
    Pair,
    routes_of,
)
from tests.bench.processes import carry_out, python, run
from tests.postgres import DURABLE, Postgres

SMALL = Filling(10_000, 50_000)
CONNECTIONS = (1, 8)
SENDERS = 32
NAMES = ("small", "large")
# Everything that the two servers write beside the tables: programs, logs, temporary files.
BESIDE = 2**30

DESCRIPTION = """\
Measure what a long history costs: each list and each lookup of the API, and taking events,
on a database with a million envelopes and five million events, and on one with ten thousand
and fifty thousand.

Both are filled by SQL, in one PostgreSQL of the bench's own which flushes each commit to the
disk, and are gone at the end. The two take turns of half a second; of each route the medians
are compared. Some of the answers of each turn are compared with the database.
"""
EPILOG = """\
examples:
  python -m tests.bench.large                               all of it: fifteen minutes
  python -m tests.bench.large --envelopes 100000 --events 500000
  python -m tests.bench.large --only envelopes,ingest       routes whose names begin so
  python -m tests.bench.large --scratch /mnt/big            where the databases are to be

exit status:
  0  every answer was right and every acknowledged event was found, however fast or slow
  1  an answer was wrong, an acknowledged event is lost or altered, or something did not run
  2  there is not enough room on the disk
"""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    machine.require_linux()
    # A plain kill has to end the children, too, and `finally` does that.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    console = Console(stderr=True, highlight=False)
    if (refusal := room(options.scratch, _filling(options))) is not None:
        console.print(refusal, style="red", markup=False)
        return 2
    return carry_out(lambda: _bench(options, console), console)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.large",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--envelopes", type=int, default=1_000_000, help="in the large database (%(default)s)")
    add("--events", type=int, default=5_000_000, help="a multiple of them (%(default)s)")
    add("--seconds", type=float, default=1.5, help="for each figure (%(default)s)")
    add("--rounds", type=int, default=2, help="windows of ingest; the median counts (%(default)s)")
    add(
        "--only",
        type=lambda text: tuple(text.split(",")),
        default=("",),
        metavar="NAME,NAME",
        help="routes whose names begin so, and `ingest`",
    )
    add(
        "--scratch",
        type=Path,
        default=Path(tempfile.gettempdir()),
        metavar="DIR",
        help="where the databases are to be (%(default)s)",
    )
    add("--markdown", type=Path, metavar="FILE", help="write the tables there, too")
    options = parser.parse_args(arguments)
    if options.envelopes < SMALL.envelopes or options.events % options.envelopes:
        parser.error(f"--envelopes: {SMALL.envelopes} and more; --events: a multiple of them")
    if options.seconds <= 0 or options.rounds < 1:
        parser.error("--seconds and --rounds must be positive")
    if not options.scratch.is_dir():
        parser.error(f"--scratch: {options.scratch} is not a directory")
    return options


def _filling(options: argparse.Namespace) -> Filling:
    return Filling(options.envelopes, options.events)


def room(scratch: Path, filling: Filling) -> str | None:
    """Say what is missing if the databases do not fit; None if they do."""
    needed = SMALL.bytes + filling.bytes + LOG + BESIDE
    free = shutil.disk_usage(scratch).free
    if free >= needed:
        return None
    return (
        f"{scratch} has {free / 2**30:.1f} GB free, and this needs {needed / 2**30:.1f} GB: "
        "name a larger place with --scratch, or a smaller history with --envelopes and --events"
    )


def _bench(options: argparse.Namespace, console: Console) -> int:
    # The server's own directory is made there, too.
    tempfile.tempdir = str(options.scratch)
    with (
        tempfile.TemporaryDirectory(prefix="atlas-receiver-bench-") as scratch,
        Postgres(settings=DURABLE) as postgres,
    ):
        fillings = dict(zip(NAMES, (SMALL, _filling(options)), strict=True))
        about = [machine.describe(), machine.versions(_version(postgres)), _method(fillings)]
        for line in about:
            console.print(line)
        _fill(postgres, fillings, console)
        about.append(_sizes(postgres))
        console.print(about[-1])
        compared = Comparison(
            _ask(postgres, Path(scratch), fillings, options, console),
            _take(postgres, Path(scratch), options, console),
        )
    return _report(compared, about, options)


def _method(fillings: dict[str, Filling]) -> str:
    small, large = fillings.values()
    return (
        f"small: {small.envelopes:,} envelopes, {small.events:,} events; "
        f"large: {large.envelopes:,} envelopes, {large.events:,} events; "
        "fsync, full_page_writes and synchronous_commit on"
    )


def _version(postgres: Postgres) -> str:
    return _value(postgres.url(), "SHOW server_version")


def _sizes(postgres: Postgres) -> str:
    size = "SELECT pg_size_pretty(pg_database_size(current_database()))"
    return "on the disk: " + ", ".join(
        f"{name} {_value(postgres.url(name), size)}" for name in NAMES
    )


def _value(url: str, query: str) -> str:
    async def ask() -> str:
        connection = await asyncpg.connect(url)
        try:
            return str(await connection.fetchval(query))
        finally:
            await connection.close()

    return asyncio.run(ask())


def _fill(postgres: Postgres, fillings: dict[str, Filling], console: Console) -> None:
    for name, filling in fillings.items():
        url = postgres.create_database(name)
        run(python("-m", "app", "migrate"), environment={"DATABASE_URL": url, "ENV_FILE": ""})
        with _progress(console) as progress:
            # Indexes are built when the rows are there, so the bar stands still now and then.
            bar = progress.add_task(f"filling {name}", total=sum(filling.rows.values()))

            def tell(table: str, rows: int, *, bar: TaskID = bar, name: str = name) -> None:
                progress.update(bar, description=f"filling {name}: {table}", advance=rows)

            asyncio.run(fill(url, filling, tell))


@contextmanager
def _progress(console: Console) -> Iterator[Progress]:
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        yield progress


def _ask(
    postgres: Postgres,
    scratch: Path,
    fillings: dict[str, Filling],
    options: argparse.Namespace,
    console: Console,
) -> list[Pair]:
    with ExitStack() as stack:
        services = [
            stack.enter_context(api(postgres, postgres.url(name), scratch, as_service))
            for name in fillings
        ]
        both = Both(services, stack.enter_context(asker()))
        found = zip(*map(routes_of, services, fillings.values()), strict=True)
        routes = [pair for pair in found if pair[0].name.startswith(options.only)]
        progress = stack.enter_context(_progress(console))
        bar = progress.add_task("", total=len(routes) * len(CONNECTIONS))
        pairs = []
        for pair in routes:
            for connections in CONNECTIONS:
                progress.update(bar, description=f"{pair[0].name}, {connections} connections")
                pairs.append(both.ask(pair, connections, options.seconds))
                progress.advance(bar)
    return pairs


def _take(
    postgres: Postgres, scratch: Path, options: argparse.Namespace, console: Console
) -> list[Intake]:
    if not "ingest".startswith(options.only):
        return []
    contenders = [Beside(postgres, scratch, name) for name in NAMES]
    windows: list[list[Measurement]] = [[], []]
    with _progress(console) as progress:
        bar = progress.add_task("ingest", total=options.rounds * len(NAMES))
        for _ in range(options.rounds):
            for contender, measured in zip(contenders, windows, strict=True):
                measured.append(contender.measure(SENDERS, 2 * options.seconds))
                progress.advance(bar)
    small, large = map(combine_measured, windows)
    return [Intake((small, large))]


def _report(compared: Comparison, about: Sequence[str], options: argparse.Namespace) -> int:
    console = Console(highlight=False)
    console.width = report.width_of(console)
    notes = compared.notes()
    console.print(Group(*(report.table(*each) for each in compared.tables), *map(Text, notes)))
    if options.markdown is not None:
        drawn = [report.markdown_table(headings, rows) for _, headings, rows in compared.tables]
        options.markdown.write_text("\n\n".join(["\n".join(about), *drawn, *notes]) + "\n")
    return 1 if compared.faults else 0


if __name__ == "__main__":
    sys.exit(main())
