"""The tests' own PostgreSQL has to survive what the tests do to it."""

import asyncio
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import asyncpg
import pytest

from tests import postgres as harness
from tests.postgres import DURABLE, Postgres, PostgresUnavailableError


@pytest.fixture(name="server", scope="module")
def _server() -> Iterator[Postgres]:
    with Postgres() as server:
        yield server


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(url)
    try:
        yield connection
    finally:
        connection.terminate()


async def ask(url: str, question: str) -> object:
    async with connected(url) as connection:
        return await connection.fetchval(question)


class TestServer:
    async def test_commits_are_commits(self, server: Postgres) -> None:
        """Speed may come from fsync, never from giving up on commits."""
        url = server.url()

        assert "on" == await ask(url, "SHOW synchronous_commit")
        assert "off" == await ask(url, "SHOW fsync")
        assert "200" == await ask(url, "SHOW max_connections")
        assert "" == await ask(url, "SHOW unix_socket_directories")

    async def test_is_run_by_an_ordinary_user(self, server: Postgres) -> None:
        postmaster = server.family()[0]

        assert 0 not in postmaster.uids()

    async def test_a_template_is_copied_with_its_rows(self, server: Postgres) -> None:
        template = server.create_database("template_of_numbers")
        await ask(template, "CREATE TABLE numbers AS SELECT 7 AS n")

        copy = server.create_database("copy_of_numbers", template="template_of_numbers")

        assert 7 == await ask(copy, "SELECT n FROM numbers")


class TestCrash:
    async def test_committed_rows_survive_it(self, server: Postgres) -> None:
        url = server.create_database("crash")
        async with connected(url) as connection:
            await connection.execute("CREATE TABLE kept (n int)")
            await connection.executemany("INSERT INTO kept VALUES ($1)", [(n,) for n in range(100)])

        server.kill()
        assert not server.is_running
        server.start()

        assert 100 == await ask(url, "SELECT count(*) FROM kept")

    async def test_a_busy_backend_does_not_prevent_the_restart(self, server: Postgres) -> None:
        async with connected(server.url()) as connection:
            busy = asyncio.create_task(connection.execute("SELECT pg_sleep(60)"))
            await asyncio.sleep(0.1)
            server.kill()
            with pytest.raises((OSError, asyncpg.PostgresError, asyncpg.InterfaceError)):
                await busy

        server.start()

        assert 1 == await ask(server.url(), "SELECT 1")

    @pytest.mark.parametrize("mode", ["smart", "fast", "immediate"])
    async def test_an_orderly_stop_can_be_undone(self, server: Postgres, mode: str) -> None:
        server.stop(mode)
        assert not server.is_running

        server.start()

        assert 1 == await ask(server.url(), "SELECT 1")


class TestFreeze:
    async def test_nobody_answers_until_it_is_over(self, server: Postgres) -> None:
        async with connected(server.url()) as connection:
            server.suspend()
            try:
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(ask(server.url(), "SELECT 1"), 0.3)
                answer = asyncio.create_task(connection.fetchval("SELECT 2"))
                await asyncio.sleep(0.2)
                assert not answer.done()
            finally:
                server.resume()

            assert 2 == await asyncio.wait_for(answer, 10)

    async def test_a_frozen_server_can_be_stopped(self, server: Postgres) -> None:
        server.suspend()

        server.stop()

        assert not server.is_running
        server.start()


class TestChoice:
    async def test_of_the_older_version_and_of_durability(self) -> None:
        with Postgres(version=16, settings=DURABLE) as server:
            assert "16." in str(await ask(server.url(), "SHOW server_version"))
            assert "on" == await ask(server.url(), "SHOW fsync")

    def test_of_a_directory_without_a_server_is_refused(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: object
    ) -> None:
        monkeypatch.setenv("TEST_PG_BIN", str(tmp_path))

        with pytest.raises(PostgresUnavailableError, match="TEST_PG_BIN"):
            harness.find_binaries()


def test_a_server_does_not_outlive_tests_that_were_killed() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "tests.postgres"], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        url = process.stdout.readline().strip()
        port = urlsplit(url).port or 0
        assert is_listening(port)

        process.kill()

    deadline = time.monotonic() + 10
    while is_listening(port) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_listening(port)


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return 0 == probe.connect_ex(("127.0.0.1", port))


def test_a_user_without_a_name_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some container platforms give out such users, and initdb's own message is no help."""
    monkeypatch.setattr("os.geteuid", lambda: 987_654)

    with pytest.raises(PostgresUnavailableError, match="987654 has no name"):
        Postgres()
