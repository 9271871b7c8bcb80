"""One service per module, on SQLite and on PostgreSQL in turn."""

import sqlite3
import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import pytest

from tests.acceptance.service import DATABASE_PASSWORD, Service
from tests.postgres import create_database, drop_database, replace_database

MAX_BODY_BYTES = 256 * 1024


@pytest.fixture(name="database", scope="module", params=["sqlite", "postgres"])
def _database(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """A migrated database for all tests of a module."""
    if request.param == "sqlite":
        path = tmp_path_factory.mktemp("database") / "receiver.db"
        copy_sqlite(request.getfixturevalue("sqlite_template"), path)
        yield f"sqlite:///{path}"
        return
    server: str = request.getfixturevalue("server")
    name = f"receiver_{uuid.uuid4().hex}"
    create_database(server, name, template=request.getfixturevalue("postgres_template"))
    yield replace_database(server, name)
    drop_database(server, name)


def copy_sqlite(template: Path, path: Path) -> None:
    with closing(sqlite3.connect(template)) as source, closing(sqlite3.connect(path)) as target:
        source.backup(target)


def with_password(url: str) -> str:
    """Add a password to look for in logs; our own servers trust everybody on the loopback."""
    parts = urlsplit(url)
    if parts.scheme != "postgresql" or parts.password is not None:
        return url
    return urlunsplit(parts._replace(netloc=parts.netloc.replace("@", f":{DATABASE_PASSWORD}@", 1)))


@pytest.fixture(name="service", scope="module")
def _service(database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The whole service in one process; all tests of a module share it."""
    home = tmp_path_factory.mktemp("service")
    settings = {
        "DATABASE_URL": with_password(database),
        "MAX_BODY_BYTES": str(MAX_BODY_BYTES),
    }
    with Service("serve", home=home, **settings) as service:
        yield service
