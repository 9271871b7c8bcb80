"""A whole service behind PgBouncer, whose transactions are all over its connections.

It needs PgBouncer itself, from the distribution; `.ci/programs` installs it where tests run.
"""

import os
import pwd
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.acceptance.service import KEY, Service, free_port, run, wait_for
from tests.acceptance.tables import count, rows
from tests.factories import make_body

CALLBACKS = "tests.faults.victims:callbacks"
PGBOUNCER = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")


@pytest.fixture(name="pooled_url")
def _pooled_url(postgres_url: str, tmp_path: Path) -> Iterator[str]:
    """The address of a pooler in transaction mode before the database."""
    if PGBOUNCER is None:
        pytest.skip("pgbouncer is not installed: .ci/programs does that")
    parts, port = urlsplit(postgres_url), free_port()
    settings = tmp_path / "pgbouncer.ini"
    users = tmp_path / "users.txt"
    users.write_text('"postgres" ""\n')
    settings.write_text(
        f"[databases]\n* = host={parts.hostname} port={parts.port} user=postgres\n"
        f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n"
        # Few enough that each transaction finds another connection than the one before.
        f"auth_type = any\nauth_file = {users}\npool_mode = transaction\ndefault_pool_size = 3\n"
    )
    for each in (tmp_path, settings, users):
        each.chmod(0o755)
    with (tmp_path / "pgbouncer.log").open("wb") as log:
        pooler = subprocess.Popen(
            [PGBOUNCER, *_as_an_ordinary_user(), str(settings)],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        url = f"postgresql://postgres@127.0.0.1:{port}{parts.path}"
        wait_for(lambda: _answers(url), f"an answer of the pooler: {_said(tmp_path)}")
        yield url
    finally:
        pooler.terminate()
        pooler.wait(10)


def _as_an_ordinary_user() -> list[str]:
    return ["-u", pwd.getpwnam("nobody").pw_name] if os.geteuid() == 0 else []


def _answers(url: str) -> bool:
    try:
        socket.create_connection(("127.0.0.1", urlsplit(url).port or 0), timeout=5).close()
    except OSError:
        return False
    return True


def _said(home: Path) -> str:
    return (home / "pgbouncer.log").read_text()


def test_everything_works_through_it(postgres_url: str, pooled_url: str, tmp_path: Path) -> None:
    """Webhooks, callbacks, the feed; what listens has a connection of its own."""
    with Service(
        "serve",
        home=tmp_path,
        DATABASE_URL=pooled_url,
        MIGRATE_DATABASE_URL=postgres_url,
        PGBOUNCER="true",
        CALLBACKS=CALLBACKS,
        NOTES=str(tmp_path / "notes"),
    ) as service:
        wait_for(lambda: count(postgres_url, "callbacks") == 3, "the callbacks are registered")
        time.sleep(1.5)
        bodies = [make_body(event_id=f"e{n}") for n in range(30)]
        answers = [service.deliver(body, KEY).status for body in [*bodies, *bodies]]
        ends = "SELECT callback, state, count(*) FROM deliveries GROUP BY 1, 2"
        expected = {("steady", "done", 30), ("shaky", "done", 30), ("hopeless", "dead", 30)}
        wait_for(lambda: expected == set(rows(postgres_url, ends)), "all have ended")

        assert [200] * 60 == answers
        assert 0 == service.terminate()

    assert expected == set(rows(postgres_url, ends))
    trouble = {"dispatch.interrupted", "loop.failed", "events.refused", "wakeups.interrupted"}
    assert not [line for line in service.lines() if line["event"] in trouble]


def test_a_pooler_that_nobody_told_of_is_refused_in_words(
    postgres_url: str, pooled_url: str, tmp_path: Path
) -> None:
    """Without the setting, sessions would be shared with others; the pooler itself refuses."""
    checked = run("check", DATABASE_URL=pooled_url)
    assert "PGBOUNCER=true" in checked.stdout
    service = Service("serve", home=tmp_path, DATABASE_URL=pooled_url)
    service.start()
    try:
        service.wait_until(service.is_alive, "alive behind a pooler")
        service.wait_until(lambda: not service.is_ready(), "not ready behind a pooler")
        assert 503 == service.deliver(make_body(), KEY).status
        assert 0 == count(postgres_url, "events")
        assert "PGBOUNCER=true" in service.lines("service.not_ready")[0]["obstacle"]
    finally:
        service.kill()
