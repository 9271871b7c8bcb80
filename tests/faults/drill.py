"""One run: traffic on one side, strikes on the other, until everything is answered for."""

import asyncio
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tests.acceptance.service import START_DEADLINE, Service
from tests.faults.ledger import Ledger
from tests.faults.plan import Fault, Strike
from tests.faults.sender import Sender
from tests.faults.site import KEYS, Site
from tests.faults.traffic import Traffic

KILLS = {Fault.KILL_REPLICA, Fault.KILL_WORKER}
ON_WORKERS = {Fault.KILL_WORKER, Fault.FREEZE_WORKER}


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast the traffic comes, and how much shorter than Atlas' the waits for a retry are."""

    rate: float = 200.0
    compress: float = 60.0
    # Requests that wait for an answer at once.
    in_flight: int = 1000


async def run(
    site: Site,
    traffic: Traffic,
    strikes: Sequence[Strike],
    ledger: Ledger,
    *,
    pace: Pace,
    on_sent: Callable[[], object] = lambda: None,
) -> None:
    """Send all traffic while faults strike; return when there is an answer for everything."""
    ports = [replica.port for replica in site.replicas]
    sender = Sender(ports, ledger, keys=KEYS, compress=pace.compress, in_flight=pace.in_flight)
    ledger.start()
    async with asyncio.TaskGroup() as group:
        striking = [
            group.create_task(_strike_all(site, each, ledger)) for each in _by_family(strikes)
        ]
        await sender.send(traffic.sendings(), rate=pace.rate, on_sent=on_sent)
        ledger.finish()
        if ledger.acknowledged < traffic.events:
            # Some moments will never come.
            for task in striking:
                task.cancel()


def _by_family(strikes: Sequence[Strike]) -> list[list[Strike]]:
    """Give the strikes at replicas, at workers and at the database: each family one by one."""
    families: dict[str, list[Strike]] = {}
    for strike in strikes:
        families.setdefault(strike.fault.partition(" ")[0], []).append(strike)
    return list(families.values())


async def _strike_all(site: Site, strikes: Sequence[Strike], ledger: Ledger) -> None:
    for strike in strikes:
        await ledger.reaches(strike.moment)
        if strike.fault is Fault.STOP_DATABASE:
            await _stop_database(site, strike, ledger)
        else:
            family = site.workers if strike.fault in ON_WORKERS else site.replicas
            # A process that is struck while it starts would show little, and with nobody there
            # to take events the run would only wait.
            for service in family:
                await _wait_until_at_work(service)
            await _strike(family[strike.target], strike, ledger)


async def _strike(service: Service, strike: Strike, ledger: Ledger) -> None:
    if not service.is_running:
        ledger.died += 1
        service.start()
        return
    with ledger.marked(strike.fault, strike.target):
        if strike.fault in KILLS:
            await asyncio.to_thread(service.kill)
            service.start()
        else:
            await _freeze(service, strike.seconds)


async def _freeze(service: Service, seconds: float) -> None:
    service.signal(signal.SIGSTOP)
    try:
        await asyncio.sleep(seconds)
    finally:
        service.signal(signal.SIGCONT)


async def _stop_database(site: Site, strike: Strike, ledger: Ledger) -> None:
    assert site.server is not None, "nothing but a server of our own can be stopped"
    with ledger.marked(strike.fault, strike.target):
        try:
            await asyncio.to_thread(site.server.stop, "immediate")
            await asyncio.sleep(strike.seconds)
        finally:
            await asyncio.to_thread(site.server.start)


async def _wait_until_at_work(service: Service) -> None:
    deadline = time.monotonic() + START_DEADLINE
    while service.is_running and time.monotonic() < deadline:
        if await asyncio.to_thread(service.is_ready):
            return
        await asyncio.sleep(0.05)
