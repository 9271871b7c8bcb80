"""Alive is not ready: a database that is away makes nobody restart anything."""

import asyncio
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from tests.acceptance.conftest import with_password
from tests.acceptance.service import KEY, TOKEN, Service, run
from tests.acceptance.tables import bodies_of
from tests.factories import make_body, new_envelope_id, signed
from tests.postgres import Postgres

# An answer is promised within 5 s of the body, on a machine that has time; whatever else it
# has to do, a sender gives up after 10 s.
PROMISED = 10.0


@pytest.fixture(name="own_server", scope="module")
def _own_server() -> Iterator[Postgres]:
    """A server to stop, to start and to freeze."""
    with Postgres() as server:
        yield server


@pytest.fixture(name="url", scope="module")
def _url(own_server: Postgres) -> str:
    url = own_server.create_database("receiver")
    assert 0 == run("migrate", DATABASE_URL=url).returncode
    return with_password(url)


@pytest.fixture(name="lone", scope="module")
def _lone(
    own_server: Postgres, url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    """A service that is never restarted, whatever happens to its database."""
    home = tmp_path_factory.mktemp("lone")
    own_server.start()
    with Service("serve", home=home, DATABASE_URL=url) as service:
        yield service
        own_server.start()


@pytest.fixture(name="is_away")
def _is_away(own_server: Postgres, lone: Service) -> None:
    own_server.stop("immediate")
    lone.wait_until(lambda: not lone.is_ready(), "not ready without its database")


@pytest.fixture(name="is_there")
def _is_there(own_server: Postgres, lone: Service) -> None:
    own_server.start()
    lone.wait_until_ready()


def is_taken(service: Service, body: bytes) -> bool:
    return service.deliver(body, KEY).status == 200


class TestDatabaseAtTheStart:
    def test_is_waited_for(self, own_server: Postgres, url: str, tmp_path: Path) -> None:
        service = Service("serve", home=tmp_path, DATABASE_URL=url)
        own_server.stop()
        try:
            service.start().wait_until(service.is_alive, "alive without a database")
            answer = service.get("/readyz")
            first = service.deliver(make_body(), KEY).status
            own_server.start()
            service.wait_until_ready()
            then = service.deliver(make_body(), KEY).status
            code = service.terminate()
        finally:
            own_server.start()
            if service.is_running:
                service.kill()

        assert (503, "not ready") == (answer.status, answer.json()["status"])
        assert "does not answer" == answer.json()["checks"]["database"]
        assert service.lines("service.not_ready")
        assert (503, 200, 0) == (first, then, code)
        service.check_secrecy()


@pytest.mark.usefixtures("is_away")
class TestDatabaseThatIsAway:
    def test_leaves_the_service_alive_and_not_ready(self, lone: Service) -> None:
        assert lone.is_alive()
        assert 503 == lone.get("/readyz").status

    def test_means_another_try_for_what_is_genuine(self, lone: Service) -> None:
        answer = lone.deliver(make_body(), KEY)

        assert 503 == answer.status
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert answer.is_problem

    def test_is_not_needed_to_refuse_what_is_not(self, lone: Service) -> None:
        """Otherwise strangers could use up its connections."""
        assert 401 == lone.deliver(make_body(), "a key that nobody was given").status
        assert 405 == lone.get("/webhooks/atlas").status

    def test_is_what_the_api_says(self, lone: Service) -> None:
        answer = lone.ask("/api/envelope/env_1", TOKEN)

        assert 503 == answer.status
        assert "retry-after" in answer.headers
        assert answer.is_problem

    def test_is_found_when_it_comes_back(
        self, lone: Service, own_server: Postgres, url: str
    ) -> None:
        body = make_body(envelope_id=(envelope_id := new_envelope_id()))

        while_down = [lone.deliver(body, KEY).status for _ in range(3)]
        own_server.start()
        lone.wait_until(lambda: is_taken(lone, body), "200 after the database came back")

        assert [503, 503, 503] == while_down
        assert [body] == bodies_of(url, envelope_id)
        lone.wait_until_ready()


@pytest.mark.usefixtures("is_there")
class TestDatabase:
    def test_that_is_frozen_is_not_waited_for_long(
        self, lone: Service, own_server: Postgres
    ) -> None:
        own_server.suspend()
        try:
            start = time.monotonic()
            answer = lone.deliver(make_body(), KEY)
            took = time.monotonic() - start
            refused = lone.post(b"{}", signed(b"", KEY)).status
            is_alive = lone.is_alive()
        finally:
            own_server.resume()

        assert 503 == answer.status
        assert took < PROMISED
        assert (401, True) == (refused, is_alive)
        body = make_body()
        lone.wait_until(lambda: is_taken(lone, body), "200 after the database went on")
        lone.wait_until_ready()

    @pytest.mark.parametrize("table", ["events", "envelopes", "identities"])
    def test_with_a_locked_table_leaves_everything_else_alive(
        self, lone: Service, url: str, table: str
    ) -> None:
        with locked(url, table):
            start = time.monotonic()
            answer = lone.deliver(make_body(), KEY)
            took = time.monotonic() - start
            asked = [
                lone.ask(path, TOKEN).status for path in ("/api/events", "/api/envelope/env_1")
            ]
            is_alive = lone.is_alive()
            lone.wait_until(lone.is_ready, "ready beside a locked table")
            refused = lone.post(b"{}", signed(b"", KEY)).status

        assert 503 == answer.status
        assert took < PROMISED
        assert {200, 404, 503} >= set(asked)
        assert (True, 401) == (is_alive, refused)
        body = make_body()
        lone.wait_until(lambda: is_taken(lone, body), "200 after the lock")

    def test_in_trouble_leaves_no_error_behind(self, lone: Service) -> None:
        assert not [line for line in lone.lines() if line.get("status") == 500]
        assert [] == lone.lines("request.crashed") + lone.lines("loop.failed")
        assert "Traceback" not in lone.said


@contextmanager
def locked(url: str, table: str) -> Iterator[None]:
    """Hold a table as somebody does who changes it by hand."""
    with asyncio.Runner() as runner:
        settings = {"search_path": "atlas_receiver"}
        holder = runner.run(asyncpg.connect(url, server_settings=settings))
        runner.run(holder.execute(f"BEGIN; LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE"))
        try:
            yield
        finally:
            runner.run(holder.close())


def said_of(service: Service, part: str) -> Any:
    """What `/readyz` says of one part; on a busy machine it may be too late to be well."""
    return service.get("/readyz").json()["checks"][part]


class TestSchema:
    def test_that_does_not_fit_is_a_word_to_strangers_and_a_line_to_us(
        self, sqlite_url: str, tmp_path: Path
    ) -> None:
        path = sqlite_url.removeprefix("sqlite:///")
        with Service("serve", home=tmp_path, DATABASE_URL=sqlite_url) as service:
            with closing(sqlite3.connect(path, timeout=30)) as database, database:
                database.execute("DELETE FROM alembic_version")
            service.wait_until(
                lambda: said_of(service, "database") == "schema absent",
                "not ready without its schema",
            )
            is_ready = service.is_ready()
            obstacles = [line["obstacle"] for line in service.lines("service.not_ready")]

        assert not is_ready
        assert [obstacle for obstacle in obstacles if "this release needs" in obstacle]

    def test_that_is_newer_and_compatible_is_said_to_be_no_more_than_that(
        self, sqlite_url: str, tmp_path: Path
    ) -> None:
        """Old replicas go on while new ones roll in."""
        path = sqlite_url.removeprefix("sqlite:///")
        with closing(sqlite3.connect(path)) as database, database:
            database.execute("UPDATE alembic_version SET version_num = '29990101_0000'")
        with Service("serve", home=tmp_path, DATABASE_URL=sqlite_url) as service:
            service.wait_until(
                lambda: said_of(service, "database") == "ok, schema newer, compatible",
                "these words",
            )

        assert service.lines("schema.newer")


class TestWorker:
    def test_has_a_health_port(self, sqlite_url: str, tmp_path: Path) -> None:
        with Service(
            "work",
            home=tmp_path,
            DATABASE_URL=sqlite_url,
            CALLBACKS="app.callbacks.audit_log:callbacks",
        ) as worker:
            assert 200 == worker.get("/livez").status
            worker.wait_until(lambda: said_of(worker, "dispatch") == "ok", "at work")
            assert 404 == worker.deliver(make_body(), KEY).status
            assert 404 == worker.ask("/api/envelope/env_1", TOKEN).status
            assert 0 == worker.terminate()
