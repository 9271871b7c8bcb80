"""What every test may ask for: a clean environment and a fresh, migrated database.

`database_url` gives each test a database of its own on SQLite and on PostgreSQL
in turn; `sqlite_url` and `postgres_url` are for tests about one of them. A test
that kills or freezes a server starts a `Postgres` of its own, so that the
others keep theirs.
"""

import asyncio
import os
import re
import sqlite3
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import structlog
from hypothesis import HealthCheck, settings

from app.settings import Settings
from app.store.migrations import migrate
from tests.postgres import (
    Administrator,
    Postgres,
    create_database,
    drop_database,
    replace_database,
)

# Whatever a developer has set for the service itself must not reach the tests.
SERVICE = {name.upper() for name in Settings.model_fields} | {"PORT", "SECRETS_DIR"}
SERVICE |= {f"{name}_FILE" for name in SERVICE}
LIBPQ = re.compile(r"PG[A-Z]+")


# How long an example takes says more about the machine than about the code.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")


def pytest_configure() -> None:
    for name in list(os.environ):
        own_server = "TEST_DATABASE_URL" not in os.environ and LIBPQ.fullmatch(name)
        if name in SERVICE or own_server:
            del os.environ[name]
    # Empty: no `.env` either, neither here nor in the processes that tests start.
    os.environ["ENV_FILE"] = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out what needs a whole machine, except where a machine is there for it."""
    if os.environ.get("CI") == "true":
        return
    not_run = pytest.mark.skip(reason="needs root or system programs: runs with CI=true")
    for item in items:
        if item.get_closest_marker("machine"):
            item.add_marker(not_run)


@pytest.fixture(scope="session", autouse=True)
def _loggers_are_not_remembered() -> Iterator[None]:
    """A logger that was used once by a verb would write past whoever captures lines later."""
    configure = structlog.configure

    def forgetfully(**options: Any) -> None:
        configure(**{**options, "cache_logger_on_first_use": False})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(structlog, "configure", forgetfully)
        yield


@pytest.fixture(autouse=True)
def _logging_begins_anew() -> Iterator[None]:
    """A verb that ran in this process has set a level, which would hide lines from the next."""
    yield
    structlog.reset_defaults()


@pytest.fixture(name="postgres", scope="session")
def _postgres() -> Iterator[Postgres]:
    """The server that the tests of this worker share."""
    with Postgres() as postgres:
        yield postgres


@pytest.fixture(name="server", scope="session")
def _server(request: pytest.FixtureRequest) -> str:
    """The URL of a server to make databases on: ours, unless another one is named."""
    given = os.environ.get("TEST_DATABASE_URL")
    if given:
        return given
    postgres: Postgres = request.getfixturevalue("postgres")
    return postgres.url()


@pytest.fixture(name="administrator", scope="session")
def _administrator(server: str) -> Iterator[Administrator]:
    administrator = Administrator(server)
    yield administrator
    administrator.close()


@pytest.fixture(name="postgres_template", scope="session")
def _postgres_template(server: str) -> Iterator[str]:
    name = f"receiver_template_{uuid.uuid4().hex}"
    create_database(server, name)
    _migrate(replace_database(server, name))
    yield name
    drop_database(server, name)


@pytest.fixture(name="sqlite_template", scope="session")
def _sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "receiver.db"
    _migrate(f"sqlite:///{path}")
    return path


@pytest.fixture(name="postgres_url")
def _postgres_url(
    server: str, administrator: Administrator, postgres_template: str
) -> Iterator[str]:
    name = f"receiver_{uuid.uuid4().hex}"
    administrator.create(name, template=postgres_template)
    yield replace_database(server, name)
    administrator.drop(name)


@pytest.fixture(name="sqlite_url")
def _sqlite_url(sqlite_template: Path, tmp_path: Path) -> str:
    path = tmp_path / "receiver.db"
    with (
        closing(sqlite3.connect(sqlite_template)) as template,
        closing(sqlite3.connect(path)) as copy,
    ):
        template.backup(copy)
    return f"sqlite:///{path}"


@pytest.fixture(name="database_url", params=["sqlite", "postgres"])
def _database_url(request: pytest.FixtureRequest) -> str:
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


def _migrate(database_url: str) -> None:
    # In a thread of its own, because this one may have a running event loop.
    with ThreadPoolExecutor(1) as pool:
        pool.submit(asyncio.run, migrate(database_url)).result()
