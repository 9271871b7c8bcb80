"""Child processes that end when the bench ends, however it ends."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path

from rich.console import Console

from tests.postgres import PostgresUnavailableError

ROOT = Path(__file__).resolve().parents[2]
READY_DEADLINE = 30.0
PATIENCE = 10.0


@contextmanager
def running(
    command: Sequence[str], *, environment: Mapping[str, str], log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server in the background, its output in `log`; it is gone at the end."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**clean_environment(), **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            # Ctrl-C in the terminal is for us; what we started, we end in order.
            start_new_session=True,
        )
    try:
        yield process
    finally:
        end(process)


def run(command: Sequence[str], *, environment: Mapping[str, str] | None = None) -> str:
    """Run a program to its end and return what it said; raise if it failed."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**clean_environment(), **(environment or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said = process.communicate()[0]
    finally:
        end(process)
    if process.returncode != 0:
        raise RuntimeError(f"{Path(command[0]).name} failed ({process.returncode}):\n{said}")
    return said


def end(process: subprocess.Popen[bytes] | subprocess.Popen[str]) -> None:
    """Ask the process to stop; kill it if it does not."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def wait_until_ready(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Return when `/readyz` answers 200; raise with the end of the log if it never does."""
    deadline = time.monotonic() + READY_DEADLINE
    while not _is_ready(port):
        if process.poll() is not None or time.monotonic() > deadline:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-25:])
            raise RuntimeError(f"the receiver did not get ready; its log ends:\n{tail}")
        time.sleep(0.01)


def clean_environment() -> dict[str, str]:
    """Return an environment in which no setting of the developer's own is left."""
    kept = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "VIRTUAL_ENV", "TEST_PG_BIN")
    return {name: os.environ[name] for name in kept if name in os.environ}


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def _is_ready(port: int) -> bool:
    connection = HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def carry_out(measure: Callable[[], int], console: Console) -> int:
    """Measure, and return the exit status; what goes wrong is said in words."""
    try:
        return measure()
    except KeyboardInterrupt:
        console.print("interrupted; everything that was started has been ended")
        return 130
    except (RuntimeError, PostgresUnavailableError) as error:
        console.print(str(error), style="red", markup=False)
        return 1
