"""`rebuild` as an operator runs it: what it says, what it changes, and how it ends."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from app.cli import rebuild as verb
from tests.acceptance.service import Service
from tests.acceptance.test_command_line import Operator, Said
from tests.factories import make_body
from tests.replicas import BODIES, ENVELOPES, Replica, execute, replica


class Receiver:
    """A database that a service has filled, and an operator beside it."""

    def __init__(self, url: str, operator: Operator, capsys: pytest.CaptureFixture[str]) -> None:
        self._url = url
        self._operator = operator
        self._capsys = capsys

    def do(self, action: Callable[[Replica], Awaitable[Any]]) -> Any:
        async def run() -> Any:
            async with replica(self._url) as receiver:
                return await action(receiver)

        return asyncio.run(run())

    def fill(self, *names: str) -> None:
        async def record(receiver: Replica) -> None:
            await receiver.together(
                *[make_body(envelope_id=n, event="envelope.sent") for n in names]
            )

        self.do(record)

    def damage(self, **values: Any) -> None:
        self.do(lambda receiver: execute(receiver.database, ENVELOPES.update().values(**values)))

    def status(self, name: str) -> str:
        row = self.do(lambda receiver: receiver.envelope(name))
        return str(row.status)

    def rebuild(self, *arguments: str) -> Said:
        # What the service itself has logged in here is not what the verb says.
        self._capsys.readouterr()
        return self._operator.say("rebuild", *arguments)


@pytest.fixture(name="receiver")
def _receiver(
    database_url: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Receiver:
    service = Service("serve", home=tmp_path, DATABASE_URL=database_url)
    return Receiver(database_url, Operator(service, capsys, monkeypatch), capsys)


def lines(said: Said) -> list[list[str]]:
    return [line.split("\t") for line in said.out.splitlines()]


class TestRebuild:
    def test_says_that_all_is_well(self, receiver: Receiver) -> None:
        receiver.fill("env_1", "env_2")

        said = receiver.rebuild()

        assert (0, "2 of 2 compared: 0 different, 0 applied, 0 from the row, 0 erased\n") == (
            said.code,
            said.out,
        )

    def test_prints_differences_and_changes_nothing(self, receiver: Receiver) -> None:
        receiver.fill("env_1", "env_2")
        receiver.damage(status="signed", metadata={"long": "x" * 500})

        said = receiver.rebuild("--account", "acme")

        assert 1 == said.code
        header, *rows, summary = lines(said)
        assert ["ENVELOPE", "ACCOUNT", "COLUMN", "IS", "WOULD BE"] == header
        assert ["env_1", "acme", "status", "signed", "pending"] == rows[0]
        assert [
            (name, column) for name in ("env_1", "env_2") for column in ("status", "metadata")
        ] == [(row[0], row[2]) for row in rows]
        assert verb.LONGEST == len(rows[1][3])
        assert ["2 of 2 compared: 2 different, 0 applied, 0 from the row, 0 erased"] == summary
        assert "--apply" in said.err
        assert "signed" == receiver.status("env_1")

    def test_applies_them_if_so_told(self, receiver: Receiver) -> None:
        receiver.fill("env_1", "env_2")
        receiver.damage(status="signed")

        one = receiver.rebuild("--envelope", "env_1", "--apply")
        rest = receiver.rebuild("--apply")
        again = receiver.rebuild()

        assert (0, 0, 0) == (one.code, rest.code, again.code)
        assert "1 of 1 compared: 1 different, 1 applied" in one.out
        assert "2 of 2 compared: 1 different, 1 applied" in rest.out
        assert "2 of 2 compared: 0 different" in again.out
        assert "pending" == receiver.status("env_1")

    def test_prints_them_for_programs(self, receiver: Receiver) -> None:
        receiver.fill("env_1")
        receiver.damage(status="signed")

        said = receiver.rebuild("--json")

        difference, _summary = said.out.splitlines()
        assert {
            "account": "acme",
            "envelope_id": "env_1",
            "column": "status",
            "is": "signed",
            "would_be": "pending",
        } == json.loads(difference)

    def test_prints_no_more_than_can_be_read(
        self, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(verb, "MOST", 1)
        receiver.fill("env_1", "env_2")
        receiver.damage(status="signed")

        said = receiver.rebuild()

        assert 3 == len(said.out.splitlines())
        assert "and 1 more" in said.err

    def test_says_where_bytes_are_gone(self, receiver: Receiver) -> None:
        receiver.fill("env_1")
        receiver.do(lambda filled: execute(filled.database, BODIES.delete()))

        said = receiver.rebuild()

        assert 0 == said.code
        assert "1 from the row" in said.out
        assert "not all of the bytes are kept" in said.err

    def test_goes_on_where_it_was_stopped(self, receiver: Receiver) -> None:
        receiver.fill("env_1", "env_2", "env_3")

        said = receiver.rebuild("--after", "acme/env_2")

        assert "1 of 3 compared" in said.out

    @pytest.mark.parametrize(
        "arguments, word",
        [
            pytest.param(("--after", "env_1"), "acme/env_1", id="no-account"),
            pytest.param(("--envelope", "env_9"), "there is no envelope env_9", id="unknown"),
        ],
    )
    def test_refuses_what_makes_no_sense(
        self, receiver: Receiver, arguments: tuple[str, ...], word: str
    ) -> None:
        said = receiver.rebuild(*arguments)

        assert 2 == said.code
        assert word in said.err
        assert said.is_readable
