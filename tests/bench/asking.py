"""The asker: a process of its own that asks one question after another, as cheaply as load.py.

It reads one JSON line with a `Question`, asks it on every connection until the time is over,
answers with one JSON line (an `Answer`), and reads the next, until its input ends.
"""

import gc
import json
import random
import select
import subprocess
import sys
import time
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field

from tests.bench.load import LAST_ANSWER, Connection, milliseconds, own_cpu
from tests.bench.processes import ROOT, clean_environment, end, python

# Of so many answers, the body is kept to be compared with the database.
SAMPLES = 8
HEAD = "GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {token}\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Question:
    """What to ask, whom, on how many connections and for how long; any of the paths serves."""

    port: int
    token: str
    paths: Sequence[str]
    connections: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of it; latencies in milliseconds."""

    answered: int
    seconds: float
    p50: float
    p99: float
    own_cpu: float
    failures: dict[str, int] = field(default_factory=dict)
    # A path and the body of its answer, several times.
    samples: list[tuple[str, str]] = field(default_factory=list)


class Asking(Connection):
    """A connection whose answers may be long."""

    __slots__ = ("path",)
    buffer = 65_536

    def __init__(self, port: int) -> None:
        super().__init__(port)
        self.path = ""


class Asker:
    """Asks one question."""

    def __init__(self, question: Question) -> None:
        self._question = question
        self._paths = [(path, request_of(path, question.token)) for path in question.paths]
        self._epoll = select.epoll()
        self._connections: dict[int, Asking] = {}
        self._latencies = array("q")
        self._failures: Counter[str] = Counter()
        self._samples: list[tuple[str, str]] = []
        for _ in range(question.connections):
            self._watch(Asking(question.port))

    def ask(self) -> Answer:
        """Ask until the time is over, and wait for what is under way."""
        before, start = own_cpu(), time.perf_counter_ns()
        end = start + int(self._question.seconds * 1e9)
        for connection in self._connections.values():
            self._send(connection)
        while time.perf_counter_ns() < end:
            for connection in list(self._answered(0.05)):
                self._send(connection)
        # What is answered after the end is counted, and so is the time that it took.
        self._drain()
        seconds = (time.perf_counter_ns() - start) / 1e9
        self._epoll.close()
        for connection in self._connections.values():
            connection.socket.close()
        return self._answer(seconds, own_cpu() - before)

    def _answer(self, seconds: float, cpu: float) -> Answer:
        taken = sorted(self._latencies)
        return Answer(
            answered=len(taken),
            seconds=seconds,
            p50=milliseconds(taken, 0.5),
            p99=milliseconds(taken, 0.99),
            own_cpu=cpu,
            failures=dict(self._failures),
            samples=self._samples,
        )

    def _watch(self, connection: Asking) -> None:
        number = connection.socket.fileno()
        self._connections[number] = connection
        self._epoll.register(number, select.EPOLLIN)

    def _send(self, connection: Asking) -> None:
        connection.path, request = random.choice(self._paths)
        connection.send(request, time.perf_counter_ns())

    def _answered(self, wait: float) -> Iterator[Asking]:
        """Yield the connections that are free again."""
        for number, _ in self._epoll.poll(wait):
            connection = self._connections[number]
            answer = connection.receive()
            if answer is None:
                continue
            connection.request = None
            if answer[9:12] == b"200":
                self._latencies.append(time.perf_counter_ns() - connection.since)
                self._keep(connection.path, answer)
            else:
                self._fail(number, connection, answer)
            yield connection

    def _keep(self, path: str, answer: bytes) -> None:
        # The first ones, and then some here and there, so that the last are among them.
        if len(self._samples) < SAMPLES:
            self._samples.append((path, _body(answer)))
        elif random.random() < SAMPLES / len(self._latencies):
            self._samples[random.randrange(SAMPLES)] = path, _body(answer)

    def _fail(self, number: int, connection: Asking, answer: bytes) -> None:
        self._failures[answer[9:12].decode(errors="replace") or "closed"] += 1
        if not answer or b"connection: close" in answer.lower():
            del self._connections[number]
            connection.reopen()
            self._watch(connection)

    def _drain(self) -> None:
        deadline = time.monotonic() + LAST_ANSWER
        while busy := sum(c.request is not None for c in self._connections.values()):
            if time.monotonic() > deadline:
                self._failures["unanswered"] += busy
                return
            for _ in self._answered(0.05):
                pass


def request_of(path: str, token: str) -> bytes:
    return HEAD.format(path=path, token=token).encode()


def _body(answer: bytes) -> str:
    return answer.partition(b"\r\n\r\n")[2].decode()


class AskerProcess:
    """The asker as its own process, seen from the bench."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def ask(self, question: Question) -> Answer:
        assert self._process.stdin is not None  # asked for when it was started
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(asdict(question)) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the asker ended before its time; see its message above")
        return Answer(**json.loads(line))


@contextmanager
def asker() -> Iterator[AskerProcess]:
    """Run an asker in the background; it is gone at the end."""
    process = subprocess.Popen(
        python("-m", "tests.bench.asking"),
        cwd=ROOT,
        env=clean_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield AskerProcess(process)
    finally:
        end(process)


def main() -> None:
    gc.freeze()
    gc.disable()
    for line in sys.stdin:
        answer = Asker(Question(**json.loads(line))).ask()
        with suppress(BrokenPipeError):
            print(json.dumps(asdict(answer)), flush=True)
        gc.collect()


if __name__ == "__main__":
    main()
