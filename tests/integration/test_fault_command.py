"""`python -m tests.faults`: what it says, and a proxy that obeys whoever types."""

import asyncio
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.faults.__main__ import main
from tests.misbehaving import Misbehaving, answer, say_nothing

ROOT = Path(__file__).resolve().parents[2]
ASKED = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


class Typed:
    """A proxy in a process of its own, and the terminal that it listens to."""

    def __init__(self, process: asyncio.subprocess.Process, port: int) -> None:
        self._process = process
        self._port = port

    def say(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n".encode())

    async def hear(self) -> str:
        assert self._process.stdout is not None
        return (await asyncio.wait_for(self._process.stdout.readline(), 10)).decode()

    async def ask(self) -> bytes:
        """Ask the server behind it; nothing stands for a connection that broke."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        writer.write(ASKED)
        try:
            return await asyncio.wait_for(reader.read(1024), 10)
        except ConnectionResetError:
            return b""
        finally:
            writer.transport.abort()


@pytest.fixture(name="server")
async def _server() -> AsyncIterator[Misbehaving]:
    async with Misbehaving(answer(body=b"hello")) as server:
        yield server


@pytest.fixture(name="typed")
async def _typed(server: Misbehaving) -> AsyncIterator[Typed]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.faults", "proxy", f"127.0.0.1:{server.port}"),
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    greeting = (await asyncio.wait_for(process.stdout.readline(), 60)).decode()
    port = re.search(r"127\.0\.0\.1:(\d+)", greeting)
    assert port is not None
    yield Typed(process, int(port[1]))
    assert process.stdin is not None
    process.stdin.close()
    assert 0 == await asyncio.wait_for(process.wait(), 10)


class TestProxy:
    async def test_does_what_is_typed(self, typed: Typed) -> None:
        assert (await typed.ask()).endswith(b"hello")

        typed.say("swallow GET")
        typed.say("nonsense")
        assert "say one of" in await typed.hear()

        assert b"" == await typed.ask()
        assert (await typed.ask()).endswith(b"hello")

    async def test_leads_elsewhere(self, typed: Typed) -> None:
        async with Misbehaving(answer(body=b"another"), say_nothing) as other:
            typed.say(f"switch 127.0.0.1:{other.port}")
            typed.say("delay")
            assert "say one of" in await typed.hear()

            assert (await typed.ask()).endswith(b"another")


def test_help_teaches_by_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])

    assert "python -m tests.faults soak --seed 7" in capsys.readouterr().out
