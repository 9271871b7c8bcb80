"""The service as an operator runs it: a process of its own, with its own environment."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests import postgres
from tests.acceptance.raw import Answer, Header, exchange, request
from tests.acceptance.tables import rows
from tests.factories import SIGN_TOKEN, SIGNER, signed

# Accounts, keys and consumers of every service that the tests start, unless they say otherwise.
KEY = "atlas_live_canary_of_default_1"
OLD_KEY = "atlas_live_canary_of_default_0"
BETA_KEY = "atlas_live_canary_of_beta_0001"
TOKEN = "token-canary-of-the-office-001"
BETA_TOKEN = "token-canary-of-the-beta-team"
OPERATOR_TOKEN = "token-canary-of-an-operator-1"
DATABASE_PASSWORD = "database-canary-password"

SECRETS = [KEY, OLD_KEY, BETA_KEY, TOKEN, BETA_TOKEN, OPERATOR_TOKEN, DATABASE_PASSWORD]
CANARIES = [*SECRETS, SIGNER, SIGN_TOKEN]

SETTINGS: Mapping[str, str] = {
    "ATLAS_API_KEYS": json.dumps(
        {
            "default": [{"key": KEY, "label": "new"}, {"key": OLD_KEY, "label": "old"}],
            "beta": [BETA_KEY],
        }
    ),
    "API_TOKENS": json.dumps(
        {
            "office": TOKEN,
            "beta-team": {"tokens": [BETA_TOKEN], "accounts": ["beta"]},
            "operator": {"tokens": [OPERATOR_TOKEN], "scopes": ["operate"]},
        }
    ),
    "LOG_FORMAT": "json",
}

ROOT = Path(__file__).resolve().parents[2]
DEADLINE = 60.0
# On a machine that has other things to do, a process needs a while to begin.
START_DEADLINE = 90.0
DOOR = "/webhooks/atlas"


# Servers of every kind share the ports of this process.
free_port = postgres.free_port


def wait_for(
    condition: Callable[[], bool], what: str | Callable[[], str], *, seconds: float = DEADLINE
) -> None:
    """Wait until `condition` holds; fail with `what` if it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            missed = what if isinstance(what, str) else what()
            raise AssertionError(f"not in {seconds:.0f} s: {missed}")
        time.sleep(0.02)


def environment(settings: Mapping[str, str]) -> dict[str, str]:
    """The environment of a service: ours (the tests keep it clean), and `settings`."""
    paths = [settings.get("PYTHONPATH"), str(ROOT)]
    return {
        **os.environ,
        "ENV_FILE": "",
        **SETTINGS,
        **settings,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }


def run(
    *arguments: str, seconds: float = START_DEADLINE, **settings: str
) -> subprocess.CompletedProcess[str]:
    """Run a verb to its end, and give what it said."""
    return subprocess.run(
        [sys.executable, "-m", "app", *arguments],
        cwd=ROOT,
        env=environment(settings),
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


class Service:
    """One process: `serve`, or `work`; it can be ended in every way, and started again."""

    def __init__(self, *arguments: str, home: Path, **settings: str) -> None:
        self.port = free_port()
        self.arguments: Sequence[str] = (*arguments, "--port", str(self.port))
        self.settings = settings
        self._log = home / f"{arguments[0]}-{self.port}.log"
        self._said = home / f"{arguments[0]}-{self.port}.err"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self.start().wait_until_ready()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.is_running:
            self.terminate()
        self.check_secrecy()

    @property
    def command(self) -> list[str]:
        """How the process is started, if it is started now."""
        return [sys.executable, "-m", "app", *self.arguments]

    def start(self) -> Self:
        """Start the process, and do not wait; its log goes on where it was."""
        with self._log.open("ab") as log, self._said.open("ab") as said:
            self._process = subprocess.Popen(
                self.command,
                cwd=ROOT,
                env=environment(self.settings),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=said,
            )
        return self

    def wait_until_ready(self) -> Self:
        self.wait_until(self.is_ready, "ready", seconds=START_DEADLINE)
        return self

    def wait_until(
        self, condition: Callable[[], bool], what: str, *, seconds: float = DEADLINE
    ) -> None:
        """Wait until `condition` holds; a process that ends meanwhile never will."""

        def holds() -> bool:
            assert self.is_running, f"the service ended: {self.said}\n{self.log}"
            return condition()

        wait_for(holds, lambda: f"{what}; it said: {self.said}\n{self.log}", seconds=seconds)

    @property
    def process(self) -> "subprocess.Popen[bytes]":
        assert self._process is not None, "the service was not started"
        return self._process

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def is_ready(self) -> bool:
        return self._status("/readyz") == 200

    def is_alive(self) -> bool:
        return self._status("/livez") == 200

    def _status(self, path: str) -> int | None:
        try:
            return self.get(path).status
        except (OSError, EOFError):
            return None

    def kill(self) -> None:
        """End it as a crash would."""
        self.process.kill()
        self.process.wait(DEADLINE)

    def signal(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def wait(self, seconds: float = DEADLINE) -> int:
        """Wait for its end, and give the exit code."""
        return self.process.wait(seconds)

    def terminate(self) -> int:
        """End it as an operator would; give the exit code."""
        if self.is_running:
            self.signal()
        try:
            return self.wait()
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    @property
    def log(self) -> str:
        """Everything that it logged so far."""
        return self._log.read_text("utf-8", errors="replace") if self._log.exists() else ""

    @property
    def said(self) -> str:
        """Everything that it said to the operator's terminal so far."""
        return self._said.read_text("utf-8", errors="replace") if self._said.exists() else ""

    def lines(self, event: str | None = None, **fields: object) -> list[dict[str, Any]]:
        """Give the log lines with this name and these fields; every line must be JSON."""
        complete = self.log.rpartition("\n")[0]
        lines = [json.loads(line) for line in complete.splitlines()]
        return [
            line
            for line in lines
            if event in {None, line["event"]}
            and all(line.get(name) == value for name, value in fields.items())
        ]

    def line(self, event: str | None = None, **fields: object) -> dict[str, Any]:
        """Wait for the one line with this name and these fields.

        Senders are answered before a line is written, and may read the log before that.
        """
        what = f"a line {event or ''} with {fields}"
        wait_for(lambda: bool(self.lines(event, **fields)), what)
        [line] = self.lines(event, **fields)
        return line

    def errors(self) -> list[dict[str, Any]]:
        """Give the lines of errors, but for those to whoever asks whether it is ready.

        Where the disk is busy, a database may be too late to say that it is there.
        """
        return [line for line in self.lines(level="error") if line["event"] != "service.not_ready"]

    def wait_until_known(self, *callbacks: str) -> Self:
        """Wait until these callbacks are registered, which they are soon after the start.

        What came before, and a moment later, is not owed at once, but by the next sweep.
        """
        url = self.settings["DATABASE_URL"]
        wait_for(
            lambda: {name for (name,) in rows(url, "SELECT name FROM callbacks")} >= {*callbacks},
            f"callbacks {', '.join(callbacks)}",
        )
        return self

    def check_secrecy(self) -> None:
        """No secret stands in anything that was said, however the test went."""
        said = self.log + self.said
        assert not [canary for canary in CANARIES if canary in said]

    def get(self, target: str, *headers: Header) -> Answer:
        return exchange(self.port, request("GET", target, headers))

    def ask(self, target: str, token: str, *headers: Header) -> Answer:
        """Ask the internal API."""
        return self.get(target, (b"Authorization", b"Bearer " + token.encode()), *headers)

    def post(self, body: bytes, *headers: Header, target: str = DOOR) -> Answer:
        return exchange(self.port, request("POST", target, headers, body))

    def deliver(self, body: bytes, key: str, *, target: str = DOOR) -> Answer:
        """Send a body, signed as Atlas would sign it."""
        return self.post(body, signed(body, key), target=target)

    def record(self, body: bytes, key: str) -> Answer:
        """Send a body as Atlas would: after a 503, as a busy machine may give, once more.

        It may have been recorded all the same, and is a duplicate then.
        """
        for _ in range(3):
            answer = self.deliver(body, key)
            if answer.status != 503:
                return answer
        return self.deliver(body, key)
