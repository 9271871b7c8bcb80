"""Replicas behind a real balancer are replaced one by one, and nobody who sends may notice.

The balancer is HAProxy with the settings of `deploy/haproxy.cfg`, but for the addresses. Each
replica is told to stop as a deployment does, waited for, and started anew; meanwhile requests go
on at a steady rate. What counts is the first try: the sender's retries would hide everything.
"""

import asyncio
import csv
import re
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from tests.acceptance.raw import exchange, request, wait_until_listening
from tests.acceptance.service import DOOR, START_DEADLINE, Service, wait_for
from tests.faults.ledger import Ledger
from tests.faults.sender import Sender
from tests.faults.site import KEYS, Site
from tests.faults.traffic import Sending, Traffic
from tests.postgres import free_port

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = ROOT / "deploy" / "haproxy.cfg"
# Debian's package puts it where only root looks.
PATH = "/usr/local/sbin:/usr/sbin:/usr/local/bin:/usr/bin:/bin"
# The balancer asks each replica every 2 s: a new one has to be found before the next one goes,
# or for a moment there is nobody.
FOUND_WITHIN = 4.0


class BalancerMissing(RuntimeError):
    """There is no HAProxy on this machine."""


@dataclass(frozen=True, slots=True)
class Rolling:
    """How often replicas are replaced at least, and how many requests come at least."""

    requests: int
    restarts: int
    rate: float = 200.0
    seed: int = 1


@dataclass(frozen=True, slots=True)
class Rolled:
    """What the sender saw while replicas were replaced."""

    requests: int
    restarts: int
    # Tries that were not answered by 200, by what came instead.
    failed: dict[str, int]
    slowest: float


@dataclass(frozen=True, slots=True)
class Balancer:
    """A balancer that runs: where it listens, and where it says what it knows."""

    port: int
    socket: Path

    def has(self, replica: int) -> bool:
        """Whether it sends requests to this replica."""
        with socket.socket(socket.AF_UNIX) as asked:
            asked.settimeout(START_DEADLINE)
            asked.connect(str(self.socket))
            asked.sendall(b"show stat\n")
            with asked.makefile() as answer:
                rows = list(csv.DictReader(answer))
        [status] = [row["status"] for row in rows if row["svname"] == f"replica{replica}"]
        return status.startswith("UP")


def roll(site: Site, order: Rolling) -> Rolled:
    """Replace replicas in turn while requests come."""
    ledger = Ledger()
    with balancer([replica.port for replica in site.replicas]) as front:
        asyncio.run(_roll(site, front, ledger, order))
    failed = {str(status): n for status, n in ledger.statuses.items() if status != 200}
    failed |= dict(ledger.unanswered)
    return Rolled(ledger.tries, ledger.made("replaced"), failed, ledger.slowest)


async def _roll(site: Site, front: Balancer, ledger: Ledger, order: Rolling) -> None:
    sender = Sender([front.port], ledger, keys=KEYS)
    ledger.start()
    async with asyncio.TaskGroup() as group:
        rolling = group.create_task(_replace_all(site.replicas, front, ledger, order.restarts))
        await sender.send(_until(rolling, order), rate=order.rate)


def _until(rolling: "asyncio.Task[None]", order: Rolling) -> Iterator[Sending]:
    """Give so many bodies, and then more of them until all replicas were replaced."""
    sendings = Traffic(order.seed, events=1_000_000).sendings()
    yield from islice(sendings, order.requests)
    while not rolling.done():
        yield next(sendings)


async def _replace_all(
    replicas: Sequence[Service], front: Balancer, ledger: Ledger, restarts: int
) -> None:
    for restart in range(restarts):
        number = restart % len(replicas)
        with ledger.marked("replaced", number):
            await asyncio.to_thread(_replace, replicas[number])
        await asyncio.sleep(FOUND_WITHIN)
        # Where all is late, so are the questions of the balancer.
        await asyncio.to_thread(wait_for, partial(front.has, number), "the new replica is found")


def _replace(replica: Service) -> None:
    assert replica.terminate() == 0, "a replica that is told to stop does so in order"
    replica.start().wait_until_ready()


@contextmanager
def balancer(ports: Sequence[int]) -> Iterator[Balancer]:
    """HAProxy before these replicas, as it is deployed."""
    program = shutil.which("haproxy", path=PATH)
    if program is None:
        raise BalancerMissing("install haproxy: .ci/programs does that")
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="atlas-receiver-balancer-") as folder:
        settings, log = Path(folder) / "haproxy.cfg", Path(folder) / "log"
        settings.write_text(local(SETTINGS.read_text(), port, ports))
        # Beside what is deployed: where a test can ask what the balancer knows.
        front, asking = Balancer(port, Path(folder) / "socket"), Path(folder) / "asking.cfg"
        asking.write_text(f"global\n    stats socket {front.socket} level user\n")
        with log.open("wb") as output:
            process = subprocess.Popen(
                [program, "-db", "-f", settings, "-f", asking],
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            wait_until_listening(port)
            wait_for(lambda: _has_found_somebody(port), f"a replica: {log.read_text()}")
            yield front
        finally:
            process.terminate()
            process.wait()


def local(settings: str, port: int, ports: Sequence[int]) -> str:
    """Give the deployed settings with addresses of the loopback, and nothing else changed."""
    servers = [f"    server replica{n} 127.0.0.1:{each}" for n, each in enumerate(ports)]
    for deployed, ours in (
        (r"^resolvers docker\n(?:[ \t]+.*\n)+", ""),
        (r" resolvers docker init-addr none$", ""),
        (r"^    bind :8080$", f"    bind 127.0.0.1:{port}"),
        (r"^    server-template .*$", "\n".join(servers)),
    ):
        settings, found = re.subn(deployed, ours, settings, flags=re.MULTILINE)
        assert found == 1, f"{SETTINGS.name} has changed: {deployed}"
    return settings


def _has_found_somebody(port: int) -> bool:
    # Without a signature a replica refuses, and the balancer says that there is none.
    return exchange(port, request("POST", DOOR, body=b"{}")).status == 401
