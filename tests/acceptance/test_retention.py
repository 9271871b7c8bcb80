"""What an operator has pruned and erased, with the service running beside."""

import asyncio
import io
import json
import os
import pty
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Self
from uuid import UUID

import pytest

from app.store import events
from app.store.base import Base
from app.store.ids import first_id_at
from app.store.session import Database, DatabaseAddress
from tests.acceptance.service import KEY, ROOT, TOKEN, Service, environment, wait_for
from tests.acceptance.tables import bodies_of, count, rows
from tests.acceptance.test_command_line import Operator, Said
from tests.factories import SIGNER, make_body, new_envelope_id

OLD = 4_000
# On a machine that has other things to do, a process needs a while to begin.
PATIENCE = 90.0
LONG_AGO = datetime.now(UTC) - timedelta(days=100)
# Many small steps: on a busy machine somebody else must find it half way, too.
SLOW = """
from functools import partial

from app.cli import main
from app.upkeep import pruning

pruning.prune = partial(pruning.prune, at_once=10)
main()
"""


def fill(database_url: str, number: int) -> None:
    """Record events that came long ago, more than anybody empties in a moment."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(asyncio.run, _fill(database_url, number)).result()


async def _fill(database_url: str, number: int) -> None:
    database = Database(DatabaseAddress(database_url))
    first = first_id_at(LONG_AGO.timestamp()).int
    said = {"account": "default", "type": "envelope.sent", "effect": "applied"}
    for start in range(0, number, 2000):
        ids = [UUID(int=first + start + i) for i in range(2000)]
        listed = [
            tuple(
                {**said, "id": id_, "envelope_id": f"old_{id_.int}", "received_at": LONG_AGO}.get(n)
                for n in events.COLUMNS.names
            )
            for id_ in ids
        ]
        bodies = [(id_, make_body(event="envelope.sent", envelope_id="old")) for id_ in ids]
        async with database.begin(limit=timedelta(seconds=30)) as connection:
            await events.add(connection, listed, bodies)
    await database.close()


def left(database_url: str) -> int:
    """How many of those still have their body."""
    query = (
        "SELECT count(*) FROM bodies b JOIN events e ON e.id = b.event_id "
        "WHERE e.envelope_id LIKE 'old_%'"
    )
    return int(rows(database_url, query)[0][0])


@contextmanager
def pruning(service: Service, said: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """Prune slowly in a process of its own, which tells `said` why it ends if it does."""
    with said.open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", SLOW, "prune", "--older-than", "90d"],
            cwd=ROOT,
            env=environment(service.settings),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait(60)


@pytest.fixture(name="operator")
def _operator(
    service: Service, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Operator:
    return Operator(service, capsys, monkeypatch)


class Sender:
    """Sends webhooks one after the other for the length of a block."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._send)
        self.sent: list[str] = []
        self.refused: list[int] = []

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join(60)

    def _send(self) -> None:
        while not self._is_over.is_set():
            envelope = new_envelope_id()
            answer = self._service.deliver(make_body(envelope_id=envelope), KEY)
            if answer.status == 200:
                self.sent.append(envelope)
            else:
                self.refused.append(answer.status)


class TestPrune:
    @pytest.mark.timeout(300)
    def test_killed_half_way_under_load_it_goes_on(
        self, service: Service, database: str, operator: Operator, tmp_path: Path
    ) -> None:
        fill(database, OLD)
        said = tmp_path / "said"

        with Sender(service) as sender:
            with pruning(service, said) as process:

                def has_begun() -> bool:
                    assert process.poll() is None, f"it ended: {said.read_text()}"
                    return left(database) < OLD

                wait_for(has_begun, "some bodies are gone", seconds=PATIENCE)
                other = operator.say("prune", "--older-than", "90d")
                process.kill()
            remaining = left(database)
            # Its lease ends by itself, a while after its death.
            wait_for(lambda: prune(operator).code == 0, "another goes on", seconds=PATIENCE)

        assert 0 < remaining < OLD
        assert 1 == other.code
        assert f":{process.pid} prunes just now" in other.err
        assert 0 == left(database)
        of_old = "SELECT count(*) FROM events WHERE envelope_id LIKE 'old_%'"
        assert OLD == rows(database, of_old)[0][0]
        assert 0 == rows(database, f"{of_old} AND content IS NULL")[0][0]
        assert [] == sender.refused
        assert len(sender.sent) > 20
        assert all(len(bodies_of(database, envelope)) == 1 for envelope in sender.sent[::20])

    def test_without_an_age_says_what_to_say(self, operator: Operator) -> None:
        said = operator.say("prune")

        assert 2 == said.code
        assert "--older-than 90d" in said.err
        assert "BODY_RETENTION=90d" in said.err

    def test_takes_the_age_from_the_settings(self, operator: Operator) -> None:
        said = operator.say("prune", "--dry-run", BODY_RETENTION="3650d")

        assert (0, "0 bodies would be emptied, 0 kept\n") == (said.code, said.out)

    def test_says_what_is_kept_and_why(self, operator: Operator, service: Service) -> None:
        service.deliver(b"[]", KEY)

        # Until the second is over, nothing is older than one.
        wait_for(lambda: "in quarantine" in prune(operator, "1s", "--dry-run").out, "it is seen")

        assert "that the service said about itself" in prune(operator, "1s", "--dry-run").out

    def test_refuses_what_is_no_length_of_time(self, operator: Operator) -> None:
        said = prune(operator, "yesterday")

        assert 2 == said.code
        assert "no length of time" in said.err


def prune(operator: Operator, older_than: str = "90d", *options: str) -> Said:
    return operator.say("prune", "--older-than", older_than, *options)


class TestErase:
    def test_an_envelope_for_good(
        self, service: Service, database: str, operator: Operator
    ) -> None:
        envelope = new_envelope_id()
        captured = make_body(envelope_id=envelope, event="envelope.declined", reason="too dear")
        first = service.deliver(captured, KEY).json()

        shown = operator.say("erase", "--envelope", envelope, "--dry-run")
        assert "would be erased:" in shown.out
        assert 1 == len(bodies_of(database, envelope))
        done = operator.say("erase", "--envelope", envelope, "--yes")

        assert 0 == done.code, done.err
        assert {"bodies", "envelopes", "events"} <= set(done.out.split())
        again = service.deliver(captured, KEY).json()
        assert ("duplicate", first["event_id"]) == (again["outcome"], again["event_id"])
        answer = service.ask(f"/api/envelope/{envelope}", TOKEN)
        assert "declined" == answer.json()["status"]
        assert SIGNER not in answer.body.decode()
        assert [] == bodies_of(database, envelope)

    def test_an_address_while_events_arrive(
        self, service: Service, database: str, operator: Operator
    ) -> None:
        address = "canary.4711@example.com"
        envelopes = [new_envelope_id() for _ in range(3)]
        for envelope in envelopes:
            service.deliver(make_body(envelope_id=envelope, parties=[{"email": address}]), KEY)
        service.deliver(json.dumps({"event": 5, "to": address}).encode(), KEY)

        with Sender(service) as sender:
            done = operator.say("erase", "--email", address.upper(), "--yes")

        assert 0 == done.code, done.err
        assert [] == sender.refused
        assert address not in everything(database)
        erased = rows(database, "SELECT id FROM envelopes WHERE erased_at IS NOT NULL")
        assert set(envelopes) <= {row[0] for row in erased}
        assert not {row[0] for row in erased} & set(sender.sent)

    @pytest.mark.parametrize(
        "arguments, text",
        [
            ([], "name one"),
            (["--envelope", "e", "--email", "a@b.c"], "name one"),
            (["--email", "nobody", "--yes"], "no e-mail address"),
            (["--envelope", "env_of_nobody", "--yes"], "there is no envelope"),
            (["--envelope", "env_of_nobody"], "say --yes"),
        ],
    )
    def test_says_what_is_wrong(
        self, operator: Operator, monkeypatch: pytest.MonkeyPatch, arguments: list[str], text: str
    ) -> None:
        monkeypatch.setattr("sys.stdin", io.StringIO())

        said = operator.say("erase", *arguments)

        assert 2 == said.code
        assert text in said.err

    def test_of_nobody_finds_nothing(self, operator: Operator) -> None:
        said = operator.say("erase", "--email", "nobody@example.net", "--yes")

        assert (0, "nothing was found\n") == (said.code, said.out)

    def test_says_what_could_not_be_removed(
        self, service: Service, database: str, operator: Operator, tmp_path: Path
    ) -> None:
        envelope = new_envelope_id()
        service.deliver(make_body(envelope_id=envelope), KEY)
        (tmp_path / "default").write_text("a file where a directory should be")

        failed = operator.say("erase", "--envelope", envelope, "--yes", ARCHIVE_URL=str(tmp_path))
        mended = operator.say("erase", "--envelope", envelope, "--yes")

        assert 1 == failed.code
        assert "was not removed" in failed.err
        assert "say the same again" in failed.err
        assert 0 == mended.code
        assert "all of it was erased before" in mended.out
        assert [] == bodies_of(database, envelope)

    @pytest.mark.parametrize("answer", ["y", "n"])
    def test_asks_at_a_terminal(
        self,
        service: Service,
        database: str,
        operator: Operator,
        monkeypatch: pytest.MonkeyPatch,
        answer: str,
    ) -> None:
        envelope = new_envelope_id()
        service.deliver(make_body(envelope_id=envelope), KEY)
        ours, theirs = pty.openpty()
        os.write(ours, f"{answer}\n".encode())

        with os.fdopen(theirs) as terminal:
            monkeypatch.setattr("sys.stdin", terminal)
            said = operator.say("erase", "--envelope", envelope)
            monkeypatch.undo()

        os.close(ours)
        assert "would be erased" in said.out
        assert ("nothing was erased" in said.err) == (answer == "n")
        assert (len(bodies_of(database, envelope)) == 0) == (answer == "y")


def everything(database_url: str) -> str:
    """All that stands in any table, as text."""
    assert count(database_url, "events") > 0
    tables = [table.name for table in Base.metadata.sorted_tables]
    held = [rows(database_url, f"SELECT * FROM {table}") for table in tables]  # noqa: S608
    return repr(held).lower()
