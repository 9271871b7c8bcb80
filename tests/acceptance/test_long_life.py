"""Whoever runs for long keeps nothing of what has gone through: the short form of the soak."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from tests.acceptance.raw import Connection, request
from tests.acceptance.service import DOOR, KEY, Service, wait_for
from tests.acceptance.tables import rows
from tests.factories import make_body, signed

SENDERS, ROUND = 8, 400


def send(port: int, bodies: Sequence[bytes]) -> set[int]:
    connection = Connection(port)
    statuses = set()
    for body in bodies:
        status = 503
        # As Atlas would: where the disk is busy, one may be too late.
        while status == 503:
            connection.send(request("POST", DOOR, [signed(body, KEY)], body))
            status = connection.read().status
        statuses.add(status)
    connection.close()
    return statuses


def take_a_round(service: Service, url: str) -> tuple[int, int, int]:
    """Let events arrive, and be delivered; give memory, descriptors and threads afterwards."""
    bodies = [make_body() for _ in range(ROUND)]
    with ThreadPoolExecutor(SENDERS) as pool:
        sending = [pool.submit(send, service.port, bodies[n::SENDERS]) for n in range(SENDERS)]
        assert {200} == set().union(*(each.result() for each in sending))
    query = "SELECT count(*) FROM deliveries WHERE due_at IS NOT NULL"
    wait_for(lambda: [(0,)] == rows(url, query), "nothing is owed", seconds=120)
    process = psutil.Process(service.process.pid)
    wait_for(lambda: not guests(process, service.port), "connections are closed")
    return process.memory_info().rss, process.num_fds(), process.num_threads()


def guests(process: psutil.Process, port: int) -> list[object]:
    """The connections of those who were let in."""
    listening = psutil.CONN_LISTEN
    found = process.net_connections("tcp")
    return [each for each in found if each.laddr[1] == port and each.status != listening]


@pytest.mark.timeout(400)
def test_thousands_of_events_leave_memory_descriptors_and_threads_as_they_were(
    postgres_url: str, tmp_path: Path
) -> None:
    settings = {
        "DATABASE_URL": postgres_url,
        "CALLBACKS": "tests.faults.victims:callbacks",
        "NOTES": str(tmp_path / "notes"),
        "DELIVERY_CONCURRENCY": str(SENDERS),
    }
    with Service("serve", home=tmp_path, **settings) as service:
        # Until pools are filled, caches known and threads started.
        warm = [take_a_round(service, postgres_url) for _ in range(2)][-1]
        then = [take_a_round(service, postgres_url) for _ in range(3)][-1]

    memory, descriptors, threads = zip(warm, then, strict=True)
    assert memory[1] < 1.15 * memory[0]
    assert descriptors[1] <= descriptors[0] + SENDERS
    assert threads[1] <= threads[0] + SENDERS
