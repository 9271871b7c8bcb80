"""The audience: a process that holds many connections open, and notes who is told what when.

It reads one JSON line with a `Plan`, and then words, one a line: `streams` and `polls` open
the connections, `tell` sends events that everybody waits for, `sign` events that one poll
each waits for, `leave` closes all. Each is answered with one JSON line, a `Report`.
"""

import gc
import hashlib
import hmac
import json
import random
import re
import resource
import select
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from io import FileIO

from tests.bench.asking import Asking, request_of
from tests.bench.load import HEAD, PATH, Connection

WAIT = 60
# How long an event may take to reach everybody.
LAST_CALL = 15.0
# So many envelopes are signed for each event that all are told of.
SIGNED = 3
# Longer than the id of an event, which may be cut in two.
OVERLAP = 64
# So many files; the server has as many connections, and inherits the limit.
FILES = 16_384
_NEXT = re.compile(rb'"next_cursor":"([\w-]+)"')


@dataclass(frozen=True, slots=True)
class Plan:
    """Who waits for what, at whom."""

    port: int
    token: str
    secret: str
    streams: int
    # So many wait for the feed, and one for each of these envelopes.
    polls: int
    envelopes: Sequence[str]
    # What the readers of the feed want, and nobody else sends.
    type: str
    events: int


@dataclass(frozen=True, slots=True)
class Report:
    """What came of a word; times in milliseconds from the 200 of an event."""

    reach: list[float] = field(default_factory=list)
    reach_last: list[float] = field(default_factory=list)
    answer: list[float] = field(default_factory=list)
    # SHA-256 of the bodies that were acknowledged, in hex.
    acknowledged: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


class Stream(Asking):
    """A reader of the stream."""

    def open(self, request: bytes) -> None:
        self.send(request, 0)

    def read(self) -> bytes:
        """Return what came, with the end of what came before; `b""` if it was closed."""
        try:
            data = self.socket.recv(self.buffer)
        except OSError:
            return b""
        seen, self.partial = self.partial + data, data[-OVERLAP:]
        return seen if data else b""


class Poll(Asking):
    """One who asks again whenever it was answered."""

    def __init__(self, port: int, path: str, token: str) -> None:
        super().__init__(port)
        self.path = path
        self._token = token

    def ask(self, after: str | None = None) -> None:
        path = self.path if after is None else self.path.replace("after=latest", f"after={after}")
        self.send(request_of(path, self._token), 0)


class Audience:
    """Everybody who waits, and one connection that sends events."""

    def __init__(self, plan: Plan, words: FileIO) -> None:
        self._plan = plan
        self._said = words
        self._epoll = select.epoll()
        self._streams: dict[int, Stream] = {}
        self._polls: dict[int, Poll] = {}
        self._faults: list[str] = []
        self._words = words.fileno()
        self._epoll.register(self._words, select.EPOLLIN)
        # The event that is waited for, and who was told of it when.
        self._awaited = b""
        self._told: dict[int, float] = {}
        self._opened: set[int] = set()

    def run(self) -> None:
        """Do what the words say, and read what comes meanwhile, until the words end."""
        words: dict[str, Callable[[], Report]] = {
            "streams": self._open_streams,
            "polls": self._open_polls,
            "tell": self._tell,
            "sign": self._sign,
            "leave": self._leave,
        }
        while True:
            if not self._serve(1.0):
                continue
            word = self._said.readline().decode().strip()
            if not word:
                return
            report = words[word]()
            report.faults.extend(self._faults)
            self._faults.clear()
            # Whoever interrupts the bench hears nothing of us.
            with suppress(BrokenPipeError):
                print(json.dumps(asdict(report)), flush=True)

    def _open_streams(self) -> Report:
        path = f"/api/events/stream?after=latest&type={self._plan.type}"
        request = request_of(path, self._plan.token)
        for _ in range(self._plan.streams):
            stream = Stream(self._plan.port)
            self._watch(self._streams, stream)
            stream.open(request)
            self._serve(0)
        # Each is greeted once it is listening.
        self._serve_until(lambda: len(self._opened) == len(self._streams))
        missing = len(self._streams) - len(self._opened)
        return Report(faults=[f"{missing} streams were not opened"] if missing else [])

    def _open_polls(self) -> Report:
        feed = f"/api/events?wait={WAIT}&after=latest&type={self._plan.type}"
        paths = [f"/api/envelope/{id_}?wait={WAIT}&until=signed" for id_ in self._plan.envelopes]
        for path in [feed] * self._plan.polls + paths:
            poll = Poll(self._plan.port, path, self._plan.token)
            self._watch(self._polls, poll)
            poll.ask()
            self._serve(0)
        # They say nothing while they wait; those that are refused say so at once.
        self._serve_until(lambda: False, seconds=1.0)
        return Report()

    def _leave(self) -> Report:
        for connection in [*self._streams.values(), *self._polls.values()]:
            connection.socket.close()
        self._streams.clear()
        self._polls.clear()
        self._serve_until(lambda: False, seconds=1.0)
        return Report()

    def _tell(self) -> Report:
        """Send events one after another; each is waited for until all have it."""
        report = Report()
        feed = [number for number, poll in self._polls.items() if "after=" in poll.path]
        readers = {*self._streams, *feed}
        for _ in range(self._plan.events):
            # At any moment between two looks of the service.
            self._serve_until(lambda: False, seconds=random.uniform(0.05, 0.15))
            event = self._send(self._plan.type, str(random.getrandbits(64)), report)
            self._serve_until(lambda: len(self._told) == len(readers))
            lags = sorted(max(0.0, (at - event) * 1e3) for at in self._told.values())
            report.reach.extend(lags)
            report.reach_last.extend(lags[-1:])
            if missing := len(readers - self._told.keys()):
                report.faults.append(f"{missing} readers did not hear of an event")
        return report

    def _sign(self) -> Report:
        """Sign some envelopes, one after another; somebody waits for each."""
        report = Report()
        waiting = {poll.path: number for number, poll in self._polls.items()}
        for id_ in self._plan.envelopes[: SIGNED * self._plan.events]:
            path = f"/api/envelope/{id_}?wait={WAIT}&until=signed"
            event = self._send("envelope.signed", id_, report)
            self._awaited, number = b'"signed"', waiting[path]
            self._serve_until(lambda number=number: number in self._told)  # type: ignore[misc]
            if number in self._told:
                report.answer.append(max(0.0, (self._told[number] - event) * 1e3))
            else:
                report.faults.append(f"who waits for {id_} was not told that it is signed")
        return report

    def _send(self, kind: str, envelope_id: str, report: Report) -> float:
        """Send one event; give the moment of its 200."""
        own_id = f"evt_{random.getrandbits(128):032x}"
        self._awaited, self._told = own_id.encode(), {}
        body = _body(kind, own_id, envelope_id)
        connection = Connection(self._plan.port)
        connection.send(_signed(body, self._plan.secret), 0)
        answer = None
        while answer is None:
            answer = connection.receive()
        moment = time.perf_counter()
        connection.socket.close()
        if answer[9:12] == b"200":
            report.acknowledged.append(hashlib.sha256(body).hexdigest())
        else:
            report.faults.append(f"an event was answered {answer[:80]!r}")
        return moment

    def _watch(self, among: dict[int, Stream] | dict[int, Poll], connection: Asking) -> None:
        number = connection.socket.fileno()
        among[number] = connection  # type: ignore[assignment]  # the caller knows which
        self._epoll.register(number, select.EPOLLIN)

    def _serve_until(self, is_done: Callable[[], bool], *, seconds: float = LAST_CALL) -> None:
        end = time.perf_counter() + seconds
        while not is_done() and (left := end - time.perf_counter()) > 0:
            self._serve(min(left, 0.05), but=self._words)

    def _serve(self, wait: float, *, but: int | None = None) -> bool:
        """Read what has come; True if there is a word, too."""
        has_word = False
        for number, _ in self._ready(wait, but):
            if number == self._words:
                has_word = True
            elif number in self._streams:
                self._hear(number, self._streams[number])
            elif number in self._polls:
                self._answered(number, self._polls[number])
        return has_word

    def _ready(self, wait: float, but: int | None) -> Iterator[tuple[int, int]]:
        if but is None:
            yield from self._epoll.poll(wait)
            return
        # A word would wake us again and again until it is read.
        yield from (each for each in self._epoll.poll(wait) if each[0] != but)

    def _hear(self, number: int, stream: Stream) -> None:
        data = stream.read()
        if not data:
            self._faults.append("a stream was closed")
            self._epoll.unregister(number)
        elif number not in self._opened and b"retry:" in data:
            self._opened.add(number)
        self._note(number, data)

    def _answered(self, number: int, poll: Poll) -> None:
        answer = poll.receive()
        if answer is None:
            return
        if answer[9:12] != b"200":
            self._faults.append(f"a long-poll was answered {answer[:200]!r}")
            self._epoll.unregister(number)
            return
        self._note(number, answer)
        following = _NEXT.search(answer)
        if b'"status":"signed"' not in answer:
            poll.ask(following[1].decode() if following else None)

    def _note(self, number: int, data: bytes) -> None:
        if self._awaited and self._awaited in data and number not in self._told:
            self._told[number] = time.perf_counter()


def _body(kind: str, own_id: str, envelope_id: str) -> bytes:
    said = {
        "event": kind,
        "event_id": own_id,
        "envelope_id": envelope_id,
        "timestamp": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "status": kind.removeprefix("envelope."),
    }
    return json.dumps(said).encode()


def _signed(body: bytes, secret: str) -> bytes:
    signature = hmac.digest(secret.encode(), body, "sha256").hex()
    return HEAD.format(path=PATH, signature=signature, length=len(body)).encode() + body


def allow_many_files() -> None:
    """Let this process, and what it starts, hold many connections."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (enough, hard))


def main() -> None:
    allow_many_files()
    # Unbuffered: a word that is read ahead would wake nobody.
    words = FileIO(sys.stdin.fileno(), closefd=False)
    audience = Audience(Plan(**json.loads(words.readline())), words)
    gc.freeze()
    gc.disable()
    audience.run()


if __name__ == "__main__":
    main()
