"""The reference consumer of docs/consumer.py, killed again and again while events arrive.

By hand, with more: python -m tests.acceptance.test_consumer --events 10000
"""

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode

import pytest

from app.store.migrations import migrate
from tests.acceptance.raw import exchange, request
from tests.acceptance.service import KEY, ROOT, START_DEADLINE, TOKEN, Service, wait_for
from tests.factories import make_body, signed
from tests.postgres import Postgres

PROGRAM = ROOT / "docs" / "consumer.py"
EVENTS, KILLS = 1000, 6
AT_ONCE = 16
# The consumer writes each place to the disk, and one that met nobody pauses longer and longer.
PATIENCE = 120


class Consumer:
    """The program as somebody would run it; what it dealt with stands in a file."""

    def __init__(self, home: Path, port: int) -> None:
        self._log, self._said = home / "handled.txt", home / "said.txt"
        self._environment = {
            **os.environ,
            "RECEIVER_URL": f"http://127.0.0.1:{port}",
            "RECEIVER_TOKEN": TOKEN,
            "CONSUMER_PLACE": str(home / "place"),
        }
        self.place = home / "place"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self._log.open("ab") as log, self._said.open("ab") as said:
            self._process = subprocess.Popen(
                [sys.executable, str(PROGRAM)], env=self._environment, stdout=log, stderr=said
            )

    def kill(self) -> None:
        assert self._process is not None, "it was not started"
        self._process.kill()
        self._process.wait(START_DEADLINE)

    def wait(self) -> int:
        assert self._process is not None, "it was not started"
        return self._process.wait(START_DEADLINE)

    @property
    def said(self) -> str:
        return self._said.read_text()

    def handled(self) -> list[str]:
        """The envelopes of what it dealt with, one for each item and time."""
        if not self._log.exists():
            return []
        whole = self._log.read_text().rpartition("\n")[0]
        # A line that was cut off, and went on with the next one, would be no three words.
        words = [line.split(" ") for line in whole.splitlines()]
        assert {3} >= {len(line) for line in words}
        return [envelope_id for _, _, envelope_id in words]


@dataclass(frozen=True, slots=True)
class Run:
    """What came of one run."""

    seconds: float
    handled: list[str]
    in_feed: list[str]

    @property
    def repeated(self) -> int:
        return len(self.handled) - len(self.in_order)

    @property
    def in_order(self) -> list[str]:
        """What was dealt with, each where it was first."""
        return list(dict.fromkeys(self.handled))


def run(home: Path, database_url: str, *, events: int, kills: int) -> Run:
    """Send events while a consumer reads, is killed and is started again."""
    began = time.monotonic()
    with Service("serve", "--no-work", home=home, DATABASE_URL=database_url) as service:
        consumer = Consumer(home, service.port)
        consumer.start()
        sent = 0
        for number in range(1, kills + 2):
            until = events * number // (kills + 1)
            asyncio.run(send(service.port, until - sent))
            sent = until
            if number <= kills:
                # In the middle of its work: a part of what was sent is not read yet.
                half = sent // 2
                wait_for(
                    lambda least=half: len(consumer.handled()) > least,  # type: ignore[misc]
                    "some progress",
                    seconds=PATIENCE,
                )
                consumer.kill()
                consumer.start()
        expected = in_feed(service.port, events)
        wait_for(
            lambda: len(set(consumer.handled())) >= len(expected), "all of it", seconds=PATIENCE
        )
        consumer.kill()
    return Run(time.monotonic() - began, consumer.handled(), expected)


async def send(port: int, number: int) -> None:
    """Send so many events, several at a time, each of an envelope of its own."""
    numbers = iter(range(number))
    await asyncio.gather(*(_send_some(port, numbers) for _ in range(AT_ONCE)))


async def _send_some(port: int, numbers: Iterator[int]) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for _ in numbers:
        body = make_body()
        head = b"HTTP/1.1 503"
        # As Atlas would: where the disk is busy, one may be too late.
        while head.startswith(b"HTTP/1.1 503"):
            writer.write(request("POST", "/webhooks/atlas", [signed(body, KEY)], body))
            head = await reader.readuntil(b"\r\n\r\n")
            [length] = [line for line in head.split(b"\r\n") if line.startswith(b"content-length")]
            await reader.readexactly(int(length.partition(b":")[2]))
        assert head.startswith(b"HTTP/1.1 200"), head
    writer.close()
    await writer.wait_closed()


def in_feed(port: int, number: int) -> list[str]:
    """The envelopes of everything in the feed, in its order: so many, and nothing behind them."""
    found: list[str] = []
    query: dict[str, str | int] = {"limit": 1000, "wait": 2}
    end = time.monotonic() + PATIENCE
    while True:
        target = f"/api/events?{urlencode(query)}"
        bearer = b"Authorization", b"Bearer " + TOKEN.encode()
        answer = exchange(port, request("GET", target, [bearer]))
        if answer.status == 503:
            continue
        page = answer.json()
        if not page["items"] and (len(found) >= number or time.monotonic() > end):
            return found
        found += [item["envelope_id"] for item in page["items"]]
        query["after"] = page["next_cursor"]


@pytest.mark.timeout(400)
class TestConsumer:
    def test_killed_again_and_again_misses_nothing(self, database_url: str, tmp_path: Path) -> None:
        done = run(tmp_path, database_url, events=EVENTS, kills=KILLS)

        assert EVENTS == len(done.in_feed)
        assert done.in_feed == done.in_order
        # What it was just dealing with comes again, and nothing else does.
        assert done.repeated <= KILLS

    def test_ends_where_a_person_has_to_decide(self, sqlite_url: str, tmp_path: Path) -> None:
        with Service("serve", "--no-work", home=tmp_path, DATABASE_URL=sqlite_url) as service:
            consumer = Consumer(tmp_path, service.port)
            consumer.place.write_text("no cursor")
            consumer.start()

            assert 1 == consumer.wait()
            assert "422" in consumer.said

    def test_waits_for_a_service_that_is_away(self, sqlite_url: str, tmp_path: Path) -> None:
        with Service("serve", "--no-work", home=tmp_path, DATABASE_URL=sqlite_url) as service:
            consumer = Consumer(tmp_path, service.port)
            consumer.start()
            service.deliver(make_body(envelope_id="env_1"), KEY)
            wait_for(lambda: consumer.handled() == ["env_1"], "the first", seconds=PATIENCE)

            service.kill()
            service.start().wait_until_ready()
            service.deliver(make_body(envelope_id="env_2"), KEY)

            wait_for(
                lambda: consumer.handled() == ["env_1", "env_2"], "the second", seconds=PATIENCE
            )
            consumer.kill()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run it on both databases, and print what came of it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--events", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=20)
    asked = parser.parse_args(arguments)
    os.environ["ENV_FILE"] = ""
    with tempfile.TemporaryDirectory() as folder, Postgres() as postgres:
        urls = {
            "SQLite": f"sqlite:///{folder}/receiver.db",
            "PostgreSQL": postgres.create_database("receiver"),
        }
        for name, url in urls.items():
            asyncio.run(migrate(url))
            home = Path(folder) / name
            home.mkdir()
            show(name, run(home, url, events=asked.events, kills=asked.kills), asked)


def show(name: str, done: Run, asked: argparse.Namespace) -> None:
    missed = len(set(done.in_feed) - set(done.handled))
    order = "in order" if done.in_feed == done.in_order else "NOT IN ORDER"
    sys.stdout.write(
        f"{name}: {len(done.in_feed)} of {asked.events} events in the feed, consumer killed "
        f"{asked.kills} times: {missed} missed, {done.repeated} repeated, {order}, "
        f"{done.seconds:.0f} s\n"
    )


if __name__ == "__main__":
    main()
