"""Starting wrong says what to do; stopping loses nothing; two at once wait for one another."""

import contextlib
import json
import signal
import socket
import sqlite3
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Self

import pytest

from app.cli import main
from tests.acceptance.conftest import with_password
from tests.acceptance.raw import Connection, request
from tests.acceptance.service import (
    BETA_KEY,
    CANARIES,
    DATABASE_PASSWORD,
    DOOR,
    KEY,
    SETTINGS,
    START_DEADLINE,
    TOKEN,
    Service,
    run,
    wait_for,
)
from tests.acceptance.tables import bodies_of, count
from tests.factories import make_body, new_envelope_id, signed
from tests.postgres import Postgres, create_database, drop_database, replace_database

SECOND = "atlas_live_canary_of_another_key"


@pytest.fixture(name="empty_url", params=["sqlite", "postgres"])
def _empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A database without any tables."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'empty.db'}"
        return
    server: str = request.getfixturevalue("server")
    name = f"receiver_{tmp_path.name}".lower()
    create_database(server, name)
    yield with_password(replace_database(server, name))
    drop_database(server, name)


class Terminal:
    """The command line in this process: two seconds faster than a process of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def run(self, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
        self._capsys.readouterr()
        with self._monkeypatch.context() as patch, ThreadPoolExecutor(1) as pool:
            for name, value in {**SETTINGS, **settings}.items():
                patch.setenv(name, value)
            patch.setattr("sys.argv", ["app", *arguments])
            # The logs of this process belong to pytest.
            patch.setattr("app.telemetry.configure", lambda **_: None)
            # In a thread of its own, because this one may have a running event loop.
            ended = pool.submit(main).exception()
        assert isinstance(ended, SystemExit)
        assert isinstance(ended.code, int)
        return subprocess.CompletedProcess(arguments, ended.code, *self._capsys.readouterr())


@pytest.fixture(name="terminal")
def _terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Terminal:
    return Terminal(monkeypatch, capsys)


def refusal(said: "subprocess.CompletedProcess[str]") -> str:
    """Give the one message with which a start was refused."""
    assert 0 < said.returncode < 128
    assert "Traceback" not in said.stdout + said.stderr
    assert not [canary for canary in [*CANARIES, SECOND] if canary in said.stdout + said.stderr]
    message, *places = said.stderr.splitlines()
    assert message.startswith("error: ")
    # Only a list of the places that were looked in may follow.
    assert all(place.startswith("  ") for place in places)
    return message


class TestRefusal:
    @pytest.mark.parametrize(
        "settings, expected",
        [
            pytest.param({"ATLAS_API_KEYS": ""}, "ATLAS_API_KEY is not set", id="no-key"),
            pytest.param(
                {"ATLAS_API_KEYS": json.dumps({"a": [{"key": KEY, "use": ["call"]}]})},
                "ATLAS_API_KEY is not set",
                id="no-key-that-verifies",
            ),
            pytest.param({"ATLAS_API_KEY": ""}, "ATLAS_API_KEY: is empty", id="empty-key"),
            pytest.param(
                {"ATLAS_API_KEY": f"{SECOND}\x01"[:14]}, "ATLAS_API_KEY: is shorter", id="short-key"
            ),
            pytest.param({"ATLAS_API_KEY": "changeme" * 3}, "is a placeholder", id="placeholder"),
            pytest.param(
                {"ATLAS_API_KEYS": json.dumps({"a": [SECOND, KEY], "b": [KEY]})},
                "belong in one list",
                id="one-key-under-two-accounts",
            ),
            pytest.param({"ATLAS_API_KEYS": "{" + KEY}, "is not valid JSON", id="broken-json"),
            pytest.param(
                {"ATLAS_API_KEY_FILE": "/nowhere/key"}, "ATLAS_API_KEY_FILE: ", id="missing-file"
            ),
            pytest.param({"DELIVERY_LEASE": "soon"}, "DELIVERY_LEASE: give a", id="duration"),
            pytest.param(
                {"DATABASE_URL": f"mysql://app:{DATABASE_PASSWORD}@localhost/app"},
                "postgresql:// and sqlite:// only",
                id="other-database",
            ),
            pytest.param(
                {"DATABASE_URL": DATABASE_PASSWORD}, "DATABASE_URL cannot be read", id="no-url"
            ),
            pytest.param(
                {"DATABASE_URL": f"postgresql://app:{DATABASE_PASSWORD}@localhost:x/app"},
                "DATABASE_URL cannot be read",
                id="port-no-number",
            ),
            pytest.param(
                {"DATABASE_URL": f"postgresql://app:{DATABASE_PASSWORD}@[::1/app"},
                "DATABASE_URL cannot be read",
                id="broken-host",
            ),
            pytest.param(
                {"DATABASE_URL": "sqlite:////nowhere/receiver.db"},
                "not a directory",
                id="missing-directory",
            ),
            pytest.param({"CALLBACKS": "no.such:thing"}, "CALLBACKS names", id="callbacks"),
        ],
    )
    def test_of_a_setting_names_it_in_one_message(
        self, terminal: Terminal, sqlite_url: str, settings: dict[str, str], expected: str
    ) -> None:
        said = terminal.run("serve", **{"DATABASE_URL": sqlite_url, **settings})

        assert expected in refusal(said)

    def test_is_that_of_the_process(self, sqlite_url: str) -> None:
        said = run("serve", DATABASE_URL=sqlite_url, ATLAS_API_KEY=f"{KEY}\n{SECOND}")

        assert "ATLAS_API_KEY: holds a control character" in refusal(said)

    def test_of_a_public_host_says_how_to_keep_the_api_inside(
        self, terminal: Terminal, sqlite_url: str
    ) -> None:
        anywhere = "0.0.0.0"  # noqa: S104  # that is what is refused
        said = refusal(terminal.run("serve", "--host", anywhere, DATABASE_URL=sqlite_url))

        assert "--only webhooks" in said
        assert "API_PORT" in said
        assert "--expose-api" in said

    def test_of_a_public_host_is_that_of_a_key_for_a_laptop_too(
        self, terminal: Terminal, sqlite_url: str
    ) -> None:
        key = f"local_{SECOND}"
        settings = {"DATABASE_URL": sqlite_url, "ATLAS_API_KEY": key}
        anywhere = "0.0.0.0"  # noqa: S104  # that is what is refused

        said = refusal(terminal.run("serve", "--only", "webhooks", "--host", anywhere, **settings))

        assert "ATLAS_API_KEY was made by `make run`" in said

    def test_of_an_empty_database_says_what_to_run(
        self, terminal: Terminal, empty_url: str
    ) -> None:
        for verb in ("serve", "work"):
            said = terminal.run(verb, DATABASE_URL=empty_url)
            assert "python -m app migrate" in refusal(said)

    def test_of_a_taken_port_is_one_line(self, terminal: Terminal, sqlite_url: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]

            said = refusal(terminal.run("serve", "--port", str(port), DATABASE_URL=sqlite_url))

        assert f"cannot listen on 127.0.0.1, port {port}: " in said

    @pytest.mark.parametrize(
        "verb, settings",
        [
            ("serve", {"API_PORT": "18001"}),
            ("serve", {"API_PORT": "18002", "METRICS_PORT": "18002"}),
            ("work", {"METRICS_PORT": "18001"}),
        ],
    )
    def test_of_two_listeners_at_one_port_names_the_settings(
        self, terminal: Terminal, sqlite_url: str, verb: str, settings: dict[str, str]
    ) -> None:
        """The system would let both have it, and which one answers is luck."""
        said = refusal(terminal.run(verb, "--port", "18001", DATABASE_URL=sqlite_url, **settings))

        assert f"port {list(settings.values())[-1]} is named twice" in said
        assert "API_PORT" in said

    def test_of_a_key_that_the_database_knows_otherwise_names_the_way_out(
        self, terminal: Terminal, database_url: str
    ) -> None:
        url = with_password(database_url)
        with socket.create_server(("127.0.0.1", 0)) as taken:
            # Keys are written down before a port is taken.
            port = str(taken.getsockname()[1])
            refusal(terminal.run("serve", "--port", port, DATABASE_URL=url))
        moved = json.dumps({"gamma": [BETA_KEY], "default": [KEY]})

        said = refusal(terminal.run("serve", DATABASE_URL=url, ATLAS_API_KEYS=moved))

        assert "keys rename beta gamma" in said


class TestHelp:
    @pytest.mark.parametrize(
        "arguments, expected",
        [
            (["--help"], ["serve", "work", "migrate", "check", "trigger", "keys", "openapi"]),
            (["serve", "--help"], ["--only", "--no-work", "--migrate", "--expose-api", "--port"]),
            (["work", "--help"], ["--port", "health port"]),
            (["migrate", "--help"], ["schema"]),
        ],
    )
    def test_teaches(self, terminal: Terminal, arguments: list[str], expected: list[str]) -> None:
        """Without any setting: whoever asks has none yet."""
        said = terminal.run(*arguments, ATLAS_API_KEYS="", COLUMNS="200", TERM="dumb")

        assert 0 == said.returncode
        assert not [word for word in expected if word.lower() not in said.stdout.lower()]

    def test_is_given_to_who_asks_for_nothing(self) -> None:
        said = run()

        assert "serve" in said.stdout + said.stderr
        assert "Traceback" not in said.stderr


class Stream:
    """A sender that keeps sending, and remembers what was acknowledged."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._is_over = threading.Event()
        self.acknowledged: list[str] = []
        self.statuses: set[int] = set()
        self._threads = [threading.Thread(target=self._send) for _ in range(4)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    def _send(self) -> None:
        while not self._is_over.is_set():
            envelope_id = new_envelope_id()
            with contextlib.suppress(OSError, EOFError):
                status = self._service.deliver(make_body(envelope_id=envelope_id), KEY).status
                self.statuses.add(status)
                if status == 200:
                    self.acknowledged.append(envelope_id)


class TestStop:
    def test_keeps_everything_that_was_acknowledged(
        self, database_url: str, tmp_path: Path
    ) -> None:
        with (
            Service("serve", home=tmp_path, DATABASE_URL=with_password(database_url)) as service,
            Stream(service) as stream,
        ):
            wait_for(lambda: len(stream.acknowledged) >= 50, "50 events")
            code = service.terminate()

        assert 0 == code
        assert stream.statuses <= {200, 503}
        assert not [e for e in stream.acknowledged if 1 != len(bodies_of(database_url, e))]
        assert 1 == len(service.lines("service.stopped"))
        assert [] == service.errors()

    def test_comes_with_the_keyboard_too(self, sqlite_url: str, tmp_path: Path) -> None:
        with Service("serve", home=tmp_path, DATABASE_URL=sqlite_url) as service:
            service.signal(signal.SIGINT)

            assert 0 == service.wait()

    def test_waits_for_a_request_that_is_under_way(self, sqlite_url: str, tmp_path: Path) -> None:
        body = make_body()
        with (
            Service("serve", home=tmp_path, DATABASE_URL=sqlite_url) as service,
            Connection(service.port) as connection,
        ):
            connection.send(request("POST", DOOR, [signed(body, KEY)], body)[:-10])
            wait_for(service.is_alive, "another answer, so that the first has begun")
            service.signal()
            wait_for(lambda: not service.is_alive(), "a closed door")
            connection.send(body[-10:])

            assert 200 == connection.read().status
            assert 0 == service.wait()

    def test_does_not_wait_for_it_after_a_second_signal(
        self, sqlite_url: str, tmp_path: Path
    ) -> None:
        body = make_body()
        with (
            Service("serve", home=tmp_path, DATABASE_URL=sqlite_url) as service,
            Connection(service.port) as connection,
        ):
            connection.send(request("POST", DOOR, [signed(body, KEY)], body)[:-10])
            wait_for(service.is_alive, "another answer, so that the first has begun")
            service.signal()
            wait_for(lambda: not service.is_alive(), "a closed door")
            start = time.monotonic()
            # One that follows at once counts as the same.
            time.sleep(2)
            service.signal()
            service.wait()

            # Without the second signal it would wait 10 s for the request.
            assert time.monotonic() - start < 8
            service.start().wait_until_ready()
            assert 200 == service.deliver(body, KEY).status

    def test_waits_for_no_request_without_end(self, sqlite_url: str, tmp_path: Path) -> None:
        """It is given up as a whole: nothing of it is stored, and a retry finds nothing odd."""
        envelope_id = new_envelope_id()
        body = make_body(envelope_id=envelope_id)
        with (
            Service("serve", home=tmp_path, DATABASE_URL=sqlite_url) as service,
            Connection(service.port) as connection,
        ):
            connection.send(request("POST", DOOR, [signed(body, KEY)], body)[:-10])
            wait_for(service.is_alive, "another answer, so that the first has begun")
            service.signal()
            # Ten seconds for the body, and as many for all that is open; and a busy machine.
            code = service.wait(60)
            left = bodies_of(sqlite_url, envelope_id)

            service.start().wait_until_ready()
            retry = service.deliver(body, KEY).json()["outcome"]

        assert (0, [], "recorded") == (code, left, retry)

    def test_is_not_prevented_by_a_database_that_says_nothing(self, tmp_path: Path) -> None:
        """Its server is frozen: connections are taken, and never answered."""
        with Postgres() as server:
            url = server.create_database("receiver")
            service = Service("serve", "--migrate", home=tmp_path, DATABASE_URL=url)
            with service:
                assert 200 == service.record(make_body(), KEY).status
                server.suspend()
                try:
                    status = service.deliver(make_body(), KEY).status
                    service.signal()
                    code = service.wait(60)
                finally:
                    server.resume()

        assert (503, 0) == (status, code)

    @pytest.mark.parametrize("after", [0.3, 1.0])
    def test_during_the_start_is_clean(self, empty_url: str, tmp_path: Path, after: float) -> None:
        """Whatever was done by then, migrations included: the next start goes on from there."""
        service = Service("serve", "--migrate", home=tmp_path, DATABASE_URL=empty_url).start()
        time.sleep(after)
        service.signal()

        code = service.wait()
        with service:
            taken = service.record(make_body(), KEY).status

        assert code in {0, -signal.SIGTERM}
        assert 200 == taken
        assert "Traceback" not in service.said

    def test_is_not_prevented_by_a_database_that_is_gone(
        self, sqlite_url: str, tmp_path: Path
    ) -> None:
        url = f"postgresql://app:{DATABASE_PASSWORD}@127.0.0.1:1/app"
        service = Service("serve", home=tmp_path, DATABASE_URL=url)
        service.start().wait_until(service.is_alive, "alive", seconds=START_DEADLINE)

        assert sqlite_url
        assert 0 == service.terminate()
        service.check_secrecy()


class TestMigration:
    def test_of_two_that_start_at_once_is_done_by_one(self, empty_url: str, tmp_path: Path) -> None:
        with contextlib.ExitStack() as stack:
            services = [
                Service("serve", "--migrate", home=tmp_path, DATABASE_URL=empty_url).start()
                for _ in range(2)
            ]
            for service in services:
                stack.callback(end, service)
                service.wait_until_ready()

            body = make_body()
            answers = [service.deliver(body, KEY).json() for service in services]

            assert [("recorded"), ("duplicate")] == [answer["outcome"] for answer in answers]
            assert 1 == len({answer["event_id"] for answer in answers})
            assert [] == [line for service in services for line in service.errors()]

    def test_twice_is_done_once(self, terminal: Terminal, empty_url: str) -> None:
        said = [terminal.run("migrate", DATABASE_URL=empty_url) for _ in range(2)]

        assert [0, 0] == [each.returncode for each in said]
        assert said[0].stderr == said[1].stderr
        assert 0 == count(empty_url, "events")

    def test_of_a_newer_release_is_no_success(self, terminal: Terminal, sqlite_url: str) -> None:
        path = sqlite_url.removeprefix("sqlite:///")
        with closing(sqlite3.connect(path)) as newer, newer:
            newer.execute("UPDATE alembic_version SET version_num = '29990101_0000'")
            newer.execute("UPDATE releases SET min_release = '999.0.0'")

        said = refusal(terminal.run("migrate", DATABASE_URL=sqlite_url))

        assert "deploy the newer release" in said

    def test_says_who_is_waited_for_in_vain(
        self, terminal: Terminal, sqlite_url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import fcntl

        monkeypatch.setattr("app.cli.serve._MIGRATION_WAIT", timedelta(milliseconds=300))
        lock = Path(f"{sqlite_url.removeprefix('sqlite:///')}.migrate.lock")
        with lock.open("w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)

            said = refusal(terminal.run("migrate", DATABASE_URL=sqlite_url))

        assert "another process" in said
        assert "the migration lock" in said

    def test_waits_for_one_that_is_under_way(self, sqlite_url: str, tmp_path: Path) -> None:
        """A lock file says so, and not SQLite's own lock, which gives up after a while."""
        import fcntl

        lock = Path(f"{sqlite_url.removeprefix('sqlite:///')}.migrate.lock")
        service = Service("serve", "--migrate", home=tmp_path, DATABASE_URL=sqlite_url)
        with lock.open("w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            service.start()
            time.sleep(2)
            was_waiting = service.is_running and not service.is_alive()
        with contextlib.ExitStack() as stack:
            stack.callback(end, service)
            service.wait_until_ready()

        assert was_waiting


def end(service: Service) -> None:
    if service.is_running:
        service.terminate()
    service.check_secrecy()


class TestSqlite:
    def test_that_is_locked_means_another_try(self, sqlite_url: str, tmp_path: Path) -> None:
        """Somebody looks at the file with another program, and forgets to commit."""
        path = sqlite_url.removeprefix("sqlite:///")
        body = make_body()
        with Service("serve", "--no-work", home=tmp_path, DATABASE_URL=sqlite_url) as service:
            with closing(sqlite3.connect(path, isolation_level=None, timeout=30)) as stranger:
                stranger.execute("BEGIN IMMEDIATE")
                while_locked = service.deliver(body, KEY).status
                stranger.execute("ROLLBACK")
            service.wait_until(lambda: service.deliver(body, KEY).status == 200, "200 again")

        assert 503 == while_locked


def test_tokens_and_keys_are_in_no_command_line(sqlite_url: str, tmp_path: Path) -> None:
    """`ps` shows those to everybody."""
    with Service("serve", home=tmp_path, DATABASE_URL=sqlite_url) as service:
        line = Path(f"/proc/{service.process.pid}/cmdline")
        shown = line.read_bytes() if line.exists() else b""

    assert KEY.encode() not in shown
    assert TOKEN.encode() not in shown
