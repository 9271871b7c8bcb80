"""`python -m tests.bench.endurance`: does a process grow while events keep coming?"""

import argparse
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from rich.console import Console

from tests.bench import machine
from tests.bench.load import Order
from tests.bench.measurement import Measurement
from tests.bench.receivers import Service
from tests.bench.report import markdown_table, table
from tests.postgres import DURABLE, Postgres

HEADINGS = ("minute", "MB", "descriptors", "threads")
# What is loaded and cached in the first minutes is no growth.
SETTLED = 2
ALLOWED = 1.1

DESCRIPTION = """\
Send events at a steady rate to one process of the service, callbacks at work, on PostgreSQL,
and note once a minute what it holds: memory, descriptors, threads. Afterwards every
acknowledged event is looked for in the database, byte for byte.
"""
EPILOG = """\
examples:
  python -m tests.bench.endurance                    a quarter of an hour, 200 events/s
  python -m tests.bench.endurance --minutes 240      an afternoon

exit status:
  0  every acknowledged event was found, and memory has grown by less than a tenth since
     the second minute
  1  otherwise
"""


@dataclass(frozen=True, slots=True)
class Sample:
    """What the process holds."""

    minute: int
    memory: float
    descriptors: int
    threads: int

    @property
    def cells(self) -> list[str]:
        return [f"{self.minute}", f"{self.memory:.1f}", f"{self.descriptors}", f"{self.threads}"]


class Enduring(Service):
    """Everything in one process, looked at once a minute."""

    name = "endurance"

    def __init__(self, postgres: Postgres, scratch: Path) -> None:
        super().__init__(postgres, scratch)
        self.samples: list[Sample] = []

    def command(self) -> Sequence[str]:
        where = ("--host", "127.0.0.1", "--port", str(self._port))
        return [sys.executable, "-m", "app", "serve", *where]

    def environment(self, url: str) -> dict[str, str]:
        return {**super().environment(url), "CALLBACKS": "tests.bench.noop:drained"}

    def _fire(self, order: Order, process: subprocess.Popen[bytes]) -> Measurement:
        over = threading.Event()
        watching = threading.Thread(target=self._watch, args=(process.pid, over))
        watching.start()
        try:
            return super()._fire(order, process)
        finally:
            over.set()
            watching.join()

    def _watch(self, pid: int, over: threading.Event) -> None:
        process = psutil.Process(pid)
        while not over.wait(60):
            with process.oneshot():
                self.samples.append(
                    Sample(
                        minute=len(self.samples) + 1,
                        memory=process.memory_info().rss / 2**20,
                        descriptors=process.num_fds(),
                        threads=process.num_threads(),
                    )
                )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.endurance",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=int, default=15)
    parser.add_argument("--rate", type=float, default=200, help="events a second (%(default)s)")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there, too")
    options = parser.parse_args(arguments)
    if options.minutes <= SETTLED or options.rate <= 0:
        parser.error(f"--minutes must be more than {SETTLED}, and --rate positive")
    machine.require_linux()
    console = Console(highlight=False)
    with (
        tempfile.TemporaryDirectory(prefix="atlas-receiver-bench-") as scratch,
        Postgres(settings=DURABLE) as postgres,
        console.status(f"{options.minutes} minutes at {options.rate:g} events/s"),
    ):
        service = Enduring(postgres, Path(scratch))
        service.prepare()
        # A little longer, so that the last look still sees it under load.
        measured = service.measure(16, 60.0 * options.minutes + 5, options.rate)
    rows = [sample.cells for sample in service.samples]
    console.print(table("What the process holds", HEADINGS, rows))
    growth = service.samples[-1].memory / service.samples[SETTLED - 1].memory
    said = (
        f"{measured.acknowledged:,} events acknowledged; memory after {options.minutes} minutes "
        f"/ after {SETTLED}: {growth:.3f}; p99 {measured.p99:.1f} ms, p99.9 {measured.p999:.1f} ms"
    )
    console.print(said)
    for fault in measured.faults:
        console.print(fault, style="bold red", markup=False)
    if options.markdown is not None:
        options.markdown.write_text(f"{markdown_table(HEADINGS, rows)}\n\n{said}\n")
    return 1 if measured.faults or growth > ALLOWED else 0


if __name__ == "__main__":
    sys.exit(main())
