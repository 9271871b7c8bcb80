"""The load generator: a process of its own, and as cheap as Python can make it.

It shares the processors with what it measures, so nothing is made, signed or parsed
inside the window that could be outside: requests are finished bytes, of an answer only
the status line and the length are read, and one epoll serves every connection.

It reads one JSON line with the `Order`, says `ready`, waits for `go`, fires, answers
with one JSON line (a `Result`), and last writes the SHA-256 of every body that was
acknowledged to the order's file, 32 bytes each, and says `done`.
"""

import gc
import hashlib
import hmac
import json
import random
import re
import resource
import select
import socket
import sys
import time
from array import array
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

PATH = "/webhooks/atlas"
WARM_UP = 1.0
WARM_UP_CHUNK = 4_000
# Bodies are made for this much more than the warm-up promised, so as not to run out.
MARGIN = 1.5
LAST_ANSWER = 15.0
UNANSWERED = "unanswered"

_RECORDED = b'"outcome":"recorded"'
_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)

HEAD = (
    "POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    "X-Atlas-Signature: sha256={signature}\r\nContent-Length: {length}\r\n\r\n"
)
# Numbers have a fixed width, so every body has one length and every head another.
BODY = (
    '{"event":"envelope.signed","event_id":"evt_%(event)032x","envelope_id":"%(envelope)s",'
    '"timestamp":"%(now)s","status":"signed","fields_status":"ready","parties":['
    '{"email":"ada.lovelace.%(person)08x@example.com","name":"Ada Lovelace","role":"Client",'
    '"order":1,"status":"signed","signed_at":"%(now)s"},'
    '{"email":"charles.babbage@engine.example","name":"Charles Babbage","role":"Provider",'
    '"order":2,"status":"signed","signed_at":"%(now)s"}],'
    '"metadata":{"external_id":"crm-%(person)08x","department":"onboarding",'
    '"template":"master-services-agreement","region":"eu-central","is_test":false}}'
)


@dataclass(frozen=True, slots=True)
class Order:
    """What to fire, at whom, for how long."""

    port: int
    secret: str
    connections: int
    seconds: float
    digests: str
    # None: each connection sends its next request when the last is answered.
    rate: float | None = None
    # Warm up at that rate, too: what is fired as fast as it can be leaves work behind.
    is_gentle: bool = False
    # Every second connection goes there, if there is one.
    other_port: int | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """What happened inside the window; latencies in milliseconds."""

    recorded: int
    seconds: float
    p50: float
    p99: float
    p999: float
    own_cpu: float
    acknowledged: int
    # The time of day at which the window opened.
    began: float
    failures: dict[str, int] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        return self.recorded / self.seconds


class Maker:
    """Makes unique, signed requests; ids are random, as real ones are."""

    def __init__(self, secret: str) -> None:
        self._secret = secret.encode()
        self._random = random.Random()
        self._head_length = len(self._request()) - len(self.body())

    def make(self, count: int) -> list[bytes]:
        return [self._request() for _ in range(count)]

    def body_of(self, request: bytes) -> bytes:
        return request[self._head_length :]

    def _request(self) -> bytes:
        body = self.body()
        signature = hmac.digest(self._secret, body, "sha256").hex()
        return HEAD.format(path=PATH, signature=signature, length=len(body)).encode() + body

    def body(self) -> bytes:
        bits = self._random.getrandbits
        digits = f"{bits(128):032x}"
        return (
            BODY
            % {
                "event": bits(128),
                "envelope": "-".join(
                    (
                        digits[:8],
                        digits[8:12],
                        "4" + digits[13:16],
                        "a" + digits[17:20],
                        digits[20:],
                    )
                ),
                "person": bits(32),
                "now": datetime.now(UTC).isoformat(timespec="milliseconds"),
            }
        ).encode()


class Connection:
    """One keep-alive connection, with at most one request under way."""

    __slots__ = ("_port", "partial", "request", "since", "socket")
    # An answer to a webhook is far shorter.
    buffer = 4096

    def __init__(self, port: int) -> None:
        self._port = port
        self.partial = b""
        self.request: bytes | None = None
        self.since = 0
        self.socket = self._open()

    def _open(self) -> socket.socket:
        connected = socket.create_connection(("127.0.0.1", self._port), timeout=5)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # Only read when epoll says so, and a request fits into the buffer: nothing blocks.
        connected.settimeout(None)
        return connected

    def reopen(self) -> None:
        self.socket.close()
        self.partial = b""
        self.socket = self._open()

    def send(self, request: bytes, since: int) -> None:
        self.request = request
        self.since = since
        # A closed connection says so to the next `receive`, too.
        with suppress(OSError):
            self.socket.sendall(request)

    def receive(self) -> bytes | None:
        """Return the answer once it is complete; `b""` if the connection was closed."""
        try:
            data = self.socket.recv(self.buffer)
        except OSError:
            return b""
        if not data:
            return b""
        if self.partial:
            data = self.partial + data
        head = data.find(b"\r\n\r\n")
        length = _LENGTH.search(data, 0, head) if head > 0 else None
        if length is None or len(data) < head + 4 + int(length[1]):
            self.partial = data
            return None
        self.partial = b""
        return data


class Load:
    """Fires at one receiver and remembers what was acknowledged."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._maker = Maker(order.secret)
        self._epoll = select.epoll()
        self._connections: dict[int, Connection] = {}
        ports = (order.port, order.other_port or order.port)
        for number in range(order.connections):
            self._watch(Connection(ports[number % 2]))
        self._acknowledged: list[bytes] = []
        self._failures: Counter[str] = Counter()
        self._latencies = array("q")

    def warm_up(self) -> float:
        """Fire for a moment, and return the rate that may be expected."""
        if self._order.is_gentle and self._order.rate is not None:
            self.open_loop(self._maker.make(int(self._order.rate * WARM_UP)), self._order.rate)
            return self._order.rate
        rate, spent = 1.0, 0.0
        while spent < WARM_UP:
            before = len(self._acknowledged)
            seconds = self.closed_loop(self._maker.make(WARM_UP_CHUNK), WARM_UP - spent)
            rate = max(rate, (len(self._acknowledged) - before) / seconds)
            spent += seconds
        return rate

    def prepare(self, count: int) -> list[bytes]:
        """Make the requests of the window, and forget the warm-up."""
        requests = self._maker.make(count)
        # What nobody answered may be stored all the same, as the audit will see.
        unanswered = self._failures[UNANSWERED]
        self._failures = Counter({UNANSWERED: unanswered} if unanswered else {})
        self._latencies = array("q")
        gc.freeze()
        gc.disable()
        return requests

    def closed_loop(self, requests: list[bytes], seconds: float) -> float:
        """Fire until the time or the requests are over; return how long it took."""
        clock = time.perf_counter_ns
        following = iter(requests)
        start = clock()
        end = start + int(seconds * 1e9)
        for connection, request in zip(self._connections.values(), following, strict=False):
            connection.send(request, clock())
        is_exhausted = False
        while not is_exhausted and clock() < end:
            for connection in self._answered(0.05, counted=True):
                next_request = next(following, None)
                if next_request is None:
                    is_exhausted = True
                else:
                    connection.send(next_request, clock())
        finished = clock()
        self._drain()
        return (finished - start) / 1e9

    def open_loop(self, requests: list[bytes], rate: float) -> float:
        """Fire at fixed times, whatever the answers do; latency counts from those times."""
        clock = time.perf_counter_ns
        idle = deque(self._connections.values())
        interval = 1e9 / rate
        start = clock()
        for number, request in enumerate(requests):
            due = start + int(number * interval)
            while (wait := due - clock()) > 0 or not idle:
                # epoll counts milliseconds; select on it waits as short as it should.
                select.select([self._epoll], [], [], max(wait, 0) / 1e9 if idle else 0.05)
                idle.extend(self._answered(0, counted=True))
            idle.popleft().send(request, due)
        self._drain(counted=True)
        return (clock() - start) / 1e9

    def result(self, seconds: float, own_cpu: float, began: float) -> Result:
        taken = sorted(self._latencies)
        return Result(
            recorded=len(taken),
            seconds=seconds,
            p50=milliseconds(taken, 0.5),
            p99=milliseconds(taken, 0.99),
            p999=milliseconds(taken, 0.999),
            own_cpu=own_cpu,
            acknowledged=len(self._acknowledged),
            began=began,
            failures=dict(self._failures),
        )

    def digests(self) -> Iterable[bytes]:
        for request in self._acknowledged:
            yield hashlib.sha256(self._maker.body_of(request)).digest()

    def _watch(self, connection: Connection) -> None:
        number = connection.socket.fileno()
        self._connections[number] = connection
        self._epoll.register(number, select.EPOLLIN)

    def _answered(self, wait: float, *, counted: bool) -> Iterable[Connection]:
        """Yield the connections that are free again; `counted` ones are inside the window."""
        for number, _ in self._epoll.poll(wait):
            connection = self._connections[number]
            answer = connection.receive()
            if answer is None:
                continue
            request, connection.request = connection.request, None
            if answer[9:12] == b"200" and _RECORDED in answer and request is not None:
                if counted:
                    self._latencies.append(time.perf_counter_ns() - connection.since)
                self._acknowledged.append(request)
            else:
                self._fail(number, connection, answer)
            yield connection

    def _fail(self, number: int, connection: Connection, answer: bytes) -> None:
        status = answer[9:12].decode(errors="replace")
        name = "200, not recorded" if status == "200" else status or "closed"
        self._failures[name] += 1
        if not answer or b"connection: close" in answer.lower():
            self._reopen(number, connection)

    def _reopen(self, number: int, connection: Connection) -> None:
        # The kernel forgets a closed descriptor, and so does epoll.
        del self._connections[number]
        connection.reopen()
        self._watch(connection)

    def _drain(self, *, counted: bool = False) -> None:
        """Wait for what is under way; late answers are promises like any other."""
        end = time.monotonic() + LAST_ANSWER
        while busy := sum(c.request is not None for c in self._connections.values()):
            if time.monotonic() > end:
                self._failures[UNANSWERED] += busy
                self._abandon()
                break
            for _ in self._answered(0.05, counted=counted):
                pass

    def _abandon(self) -> None:
        """Leave connections that owe an answer: it would be taken for that of the next request."""
        for number, connection in list(self._connections.items()):
            if connection.request is not None:
                connection.request = None
                self._reopen(number, connection)


def milliseconds(ordered: Sequence[int], part: float) -> float:
    """Return the value below which so great a part of some nanoseconds lies."""
    if not ordered:
        return float("nan")
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))] / 1e6


def own_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    order = Order(**json.loads(sys.stdin.readline()))
    load = Load(order)
    expected = load.warm_up() * MARGIN
    requests = load.prepare(int((order.rate or expected) * order.seconds) + order.connections)
    print("ready", flush=True)
    if sys.stdin.readline() != "go\n":
        return
    before, began = own_cpu(), time.time()
    if order.rate is None:
        seconds = load.closed_loop(requests, order.seconds)
    else:
        seconds = load.open_loop(requests, order.rate)
    print(json.dumps(asdict(load.result(seconds, own_cpu() - before, began))), flush=True)
    Path(order.digests).write_bytes(b"".join(load.digests()))
    print("done", flush=True)


if __name__ == "__main__":
    main()
