"""`python -m tests.bench.profiling`: where the processor time of a webhook goes."""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from tests.bench import machine, report
from tests.bench.measurement import Measurement
from tests.bench.processes import carry_out, python
from tests.bench.receivers import Service
from tests.bench.sampler import Stack, read
from tests.bench.stations import by_function, by_station
from tests.postgres import DURABLE, Postgres

FUNCTIONS = 20

DESCRIPTION = """\
Show where the processor time of one webhook goes: for each station of its path, and for the
functions with most time of their own.

Starts a PostgreSQL of its own, which flushes each commit to the disk, and `python -m app serve
--only webhooks --no-work`, which is asked every few milliseconds of processor time at what it
is. Signed events are fired at it as by the bench, and afterwards every acknowledged one is
looked for in the database, byte for byte.

How to read it:

  - A sample belongs to the innermost function that is on the map, tests/bench/stations.py: what
    a station calls in a library is its own. What runs in loops of its own, beside the path, keeps
    all it calls.
  - What the process used of the processor, as the system counts it, is divided in the
    proportion of the samples. So the stations add up to it.
  - Sending counts for whoever sends. What receives, and the driver's reading of an answer, is
    compiled and called by the event loop: it counts there.
  - A share of 5 % of 1,000 samples is known to about 0.7 points. Longer is more exact.
  - Events that wait for each other share a transaction: at one connection an event pays for all
    of it, at 32 for a part.
"""
EPILOG = """\
examples:
  python -m tests.bench.profiling                         32 connections, ten seconds
  python -m tests.bench.profiling --connections 1         nothing is shared
  python -m tests.bench.profiling --rate 300              at a pace, whatever the answers do
  chrt -r 5 .venv/bin/python -m tests.bench.profiling     as root: nothing else disturbs it

exit status:
  0  every acknowledged event was found
  1  an acknowledged event is lost or altered, or something did not run
"""


class Profiled(Service):
    """The service, asked while the window is open at what it is."""

    def __init__(self, postgres: Postgres, scratch: Path) -> None:
        super().__init__(postgres, scratch)
        self._stacks = scratch / "stacks.json"

    def command(self) -> Sequence[str]:
        _, _, _, *arguments = super().command()
        return python("-m", "tests.bench.sampler", str(self._stacks), *arguments)

    @contextmanager
    def watching(self, process: subprocess.Popen[bytes]) -> Iterator[None]:
        """Have samples taken."""
        os.kill(process.pid, signal.SIGUSR1)
        yield
        os.kill(process.pid, signal.SIGUSR2)

    def samples(self) -> Counter[Stack]:
        """Give what was found in the last window."""
        if not self._stacks.exists():
            raise RuntimeError("the service ended without writing down its samples")
        return read(self._stacks)


@dataclass(frozen=True, slots=True)
class Profile:
    """What one window has shown."""

    measured: Measurement
    samples: Mapping[Stack, int]

    @property
    def total(self) -> int:
        return sum(self.samples.values())

    def stations(self) -> Iterator[tuple[str, str, str]]:
        """Give the rows of the first table, in the order of the path."""
        for station, count in by_station(self.samples).items():
            yield station.name, *self._cells(count)
        yield "all of it", *self._cells(self.total)

    def functions(self) -> Iterator[tuple[str, str, str]]:
        """Give the rows of the second table, the dearest first."""
        for title, count in by_function(self.samples).most_common(FUNCTIONS):
            yield title, *self._cells(count)

    def _cells(self, count: int) -> tuple[str, str]:
        share = count / self.total
        return f"{share * self.measured.cpu:.1f}", f"{share:.1%}"

    def summary(self) -> str:
        """Say what else an event costs, and what this was worked out from."""
        one = self.measured
        return (
            f"{one.rate:,.0f} events/s on {one.connections} connections, p50 {one.p50:.1f} ms; "
            f"µs CPU per event: service {one.cpu:.0f}, database {one.database_cpu:.0f}, "
            f"load {one.load_cpu:.0f}; {self.total:,} samples."
        )

    def kept(self) -> str:
        """Say what became of what was acknowledged."""
        return "\n".join(self.measured.faults) or (
            f"{self.measured.acknowledged:,} events acknowledged; every one is in the database "
            "byte for byte, with its envelope and its delivery."
        )


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    machine.require_linux()
    # A plain kill has to end the children, too, and `finally` does that.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    console = Console(highlight=False)
    console.width = report.width_of(console)
    return carry_out(lambda: _profile(options, console), console)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.profiling",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--connections", type=int, default=32, metavar="N", help="that are kept busy (%(default)s)")
    add(
        "--seconds",
        type=float,
        default=10.0,
        metavar="S",
        help="length of the window (%(default)s)",
    )
    add(
        "--rate",
        type=float,
        metavar="N",
        help="events per second, instead of as many as are answered",
    )
    add("--markdown", type=Path, metavar="FILE", help="write the tables there, too")
    options = parser.parse_args(arguments)
    if not 0 < options.connections <= 150:
        parser.error("--connections must lie between 1 and 150")
    if options.seconds <= 0 or (options.rate is not None and options.rate <= 0):
        parser.error("--seconds and --rate must be positive")
    return options


def _profile(options: argparse.Namespace, console: Console) -> int:
    with (
        tempfile.TemporaryDirectory(prefix="atlas-receiver-profile-") as scratch,
        Postgres(settings=DURABLE) as postgres,
    ):
        service = Profiled(postgres, Path(scratch))
        service.prepare()
        measured = service.measure(options.connections, options.seconds, options.rate)
        profile = Profile(measured, service.samples())
    if not profile.total:
        raise RuntimeError("no sample was taken: the service did nothing, or not for long enough")
    tables = (
        ("Stations of the path", ("station", "µs CPU per event", "share"), profile.stations()),
        (
            f"The {FUNCTIONS} functions with most time of their own",
            ("function", "µs CPU per event", "share"),
            profile.functions(),
        ),
    )
    drawn = [(title, headings, list(rows)) for title, headings, rows in tables]
    notes = [profile.summary(), profile.kept(), report.crowd_warning([measured.crowd]) or ""]
    for each in drawn:
        console.print(report.table(*each))
    for note in filter(None, notes):
        console.print(note, markup=False)
    if options.markdown is not None:
        written = [report.markdown_table(headings, rows) for _, headings, rows in drawn]
        options.markdown.write_text(
            "\n\n".join([machine.describe(), *written, *notes]).strip() + "\n"
        )
    return 1 if measured.faults else 0


if __name__ == "__main__":
    sys.exit(main())
