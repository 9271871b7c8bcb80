"""What was away comes back, and so does the service: in time, and without a person.

Promised are 5 s to the first 200 after the database accepts again, and 30 s to the next callback
after a network that was silent. Asserted are 20 s and 60 s: the machine may be busy.
"""

import asyncio
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from app.store.migrations import migrate
from tests.acceptance.service import KEY, Service, wait_for
from tests.factories import make_body, new_envelope_id
from tests.faults.proxy import Cut, Proxy, proxy_aside
from tests.postgres import Postgres

FIRST_200, NEXT_CALLBACK, ANSWER = 20.0, 60.0, 9.0
# Longer than any deadline and any pause between two tries.
SILENCE = 15.0

CALLBACKS = """
import os
from app.callbacks import Callbacks, Event

callbacks = Callbacks()

@callbacks.on("envelope.*")
async def note(event: Event) -> None:
    with open(os.environ["NOTES"], "a") as notes:
        notes.write(f"{event.envelope_id}\\n")
"""


class Running:
    """One service, and what its callback has seen."""

    def __init__(self, service: Service, notes: Path) -> None:
        self.service = service
        self._notes = notes

    def answer(self, envelope_id: str) -> int:
        """Send an event, and give the status of the answer, which comes in time."""
        body = make_body(envelope_id=envelope_id)
        start = time.monotonic()
        status = self.service.deliver(body, KEY).status
        assert time.monotonic() - start < ANSWER
        return status

    def takes_events(self) -> bool:
        return self.answer(new_envelope_id()) == 200

    def has_called(self, envelope_id: str) -> bool:
        return self._notes.exists() and envelope_id in self._notes.read_text().split()


@contextmanager
def running(database_url: str, home: Path) -> Iterator[Running]:
    (home / "noting.py").write_text(CALLBACKS)
    settings = {
        "DATABASE_URL": database_url,
        "CALLBACKS": "noting:callbacks",
        "PYTHONPATH": str(home),
        "NOTES": str(home / "notes"),
        "DELIVERY_LEASE": "5s",
    }
    with ExitStack() as stack:
        service = Service("serve", home=home, **settings)
        stack.push(service.start()).wait_until_ready()
        one = Running(service, home / "notes")
        work(one)
        yield one


def work(one: Running, *, within: float = NEXT_CALLBACK) -> None:
    """Send an event, and wait until its callback was called."""
    envelope_id = new_envelope_id()
    assert 200 == one.answer(envelope_id)
    wait_for(lambda: one.has_called(envelope_id), "the callback was called", seconds=within)


@pytest.mark.timeout(300)
class TestRecovery:
    def test_from_restarts_of_the_database(self, tmp_path: Path) -> None:
        with Postgres() as server:
            asyncio.run(migrate(server.url()))
            with running(server.url(), tmp_path) as one:
                for mode in ("immediate", "fast"):
                    server.stop(mode)
                    assert 503 == one.answer(new_envelope_id())
                    server.start()

                    wait_for(one.takes_events, "the first 200", seconds=FIRST_200)

                    work(one)

    def test_from_a_long_silence_of_the_network(self, postgres_url: str, tmp_path: Path) -> None:
        """Nobody is told that a connection is dead; what asks for an answer has to notice."""
        with proxy_aside(postgres_url) as (wire, url), running(url, tmp_path) as one:
            silence(wire)
            owed = new_envelope_id()
            assert 503 == one.answer(owed)
            time.sleep(SILENCE)
            assert 503 == one.answer(owed)
            assert one.service.is_alive()
            assert not one.service.is_ready()

            wire.resume()

            wait_for(one.takes_events, "the first 200", seconds=FIRST_200)
            work(one)
            assert 200 == one.answer(owed)
            wait_for(lambda: one.has_called(owed), "what was owed is done", seconds=NEXT_CALLBACK)


def silence(wire: Proxy) -> None:
    """Lose every connection, without telling, and let no new one pass."""
    wire.stall()
    wire.cut(Cut.SILENCE)
