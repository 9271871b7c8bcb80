"""A backup that is taken while webhooks arrive has everything that was acknowledged before it."""

import asyncio
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.factories import make_body
from tests.integration.test_database_faults import DUPLICATE, RECORDED, Load
from tests.postgres import Postgres
from tests.replicas import eventually, replica


class Backup:
    """A copy of a database, made and restored as its own tools do."""

    def __init__(self, url: str, place: Path, server: Postgres | None) -> None:
        self._url = url
        self._file = place / "backup"
        self._server = server
        self._name = f"{url.rpartition('/')[2]}_restored"

    def take(self) -> None:
        if self._server is not None:
            self._file.write_bytes(self._server.run("pg_dump", "-Fc", "-d", self._url))
            return
        path = self._url.removeprefix("sqlite:///")
        with closing(sqlite3.connect(path)) as live, closing(sqlite3.connect(self._file)) as copy:
            live.backup(copy, pages=50)

    def restore(self) -> str:
        """Give the URL of the copy."""
        if self._server is None:
            return f"sqlite:///{self._file}"
        url = self._server.create_database(self._name)
        self._server.run("pg_restore", "-d", url, stdin=self._file)
        return url

    def close(self) -> None:
        if self._server is not None:
            self._server.drop_database(self._name)


@pytest.fixture(name="backup")
def _backup(request: pytest.FixtureRequest, database_url: str, tmp_path: Path) -> Iterator[Backup]:
    server = None if database_url.startswith("sqlite") else request.getfixturevalue("postgres")
    if server is not None and not database_url.startswith(server.url("")):
        pytest.skip("the programs for a backup are those of our own server")
    backup = Backup(database_url, tmp_path, server)
    yield backup
    backup.close()


async def test_has_everything_that_was_acknowledged_before_it(
    database_url: str, backup: Backup
) -> None:
    acknowledged: list[bytes] = []
    async with replica(database_url) as one:
        load = Load(one)

        async def take() -> None:
            acknowledged.extend(body for body, answer in load.told.items() if answer == RECORDED)
            await asyncio.to_thread(backup.take)
            await goes_on(load)

        await load.during(take)

    async with replica(await asyncio.to_thread(backup.restore)) as restored:
        assert {DUPLICATE} == set(await restored.together(*acknowledged))
        assert RECORDED == await restored.outcome(make_body())
        # What came after it is not in it, and is taken as new when it is sent again.
        assert {DUPLICATE, RECORDED} >= set(await restored.together(*load.told))


async def goes_on(load: Load) -> None:
    told = len(load.told)
    await eventually(lambda: len(load.told) > told)
