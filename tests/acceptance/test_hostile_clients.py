"""Clients that are slow, many, or lie about who they are: nobody else notices them."""

import asyncio
import gzip
import resource
import socket
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import pytest

from app.web.protocol import Protocol
from tests.acceptance.conftest import with_password
from tests.acceptance.raw import Answer, Connection, chunked, exchange, request
from tests.acceptance.service import DOOR, KEY, TOKEN, Service, wait_for
from tests.acceptance.tables import bodies_of, count
from tests.acceptance.test_events_api import bearer, fill_feed, running
from tests.factories import make_body, new_envelope_id, signed
from tests.replicas import eventually

WRONG = (b"X-Atlas-Signature", b"sha256=" + b"0" * 64)


@pytest.fixture(name="lone")
def _lone(database_url: str, tmp_path: Path) -> Iterator[Service]:
    """A service of its own, that is not counted on by other tests; its pool is small."""
    settings = {"DATABASE_URL": with_password(database_url), "DATABASE_POOL": "2"}
    with Service("serve", "--no-work", home=tmp_path, **settings) as service:
        yield service


def descriptors(service: Service) -> int:
    """How many connections its process has open.

    Files of a database are none: the more work comes together, the more of them stay open.
    """
    opened = []
    for each in Path(f"/proc/{service.process.pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            opened.append(str(each.readlink()))
    return sum(target.startswith("socket:") for target in opened)


def memory(service: Service) -> int:
    """How many bytes its process holds in memory."""
    pages = int(Path(f"/proc/{service.process.pid}/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def is_gone(client: socket.socket) -> bool:
    """Whether the service has hung up."""
    client.settimeout(0)
    try:
        return client.recv(65536) == b""
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


def sent_honestly(service: Service) -> int:
    return service.record(make_body(), KEY).status


class Crowd:
    """Clients that all do the same, slowly: each says its part byte by byte, one a second."""

    def __init__(self, port: int, parts: list[bytes]) -> None:
        self.clients = [socket.create_connection(("127.0.0.1", port)) for _ in parts]
        self._rest = dict(zip(self.clients, parts, strict=True))

    def begin(self, size: int) -> None:
        """Say the first bytes at once."""
        for client in self.clients:
            client.sendall(self._rest[client][:size])
            self._rest[client] = self._rest[client][size:]

    def go_on(self) -> None:
        """Say one byte more, and forget those who were cut off."""
        for client in self.clients:
            try:
                client.sendall(self._rest[client][:1])
            except OSError:
                continue
            self._rest[client] = self._rest[client][1:]
        for client in [client for client in self.clients if is_gone(client)]:
            self.clients.remove(client)
            client.close()

    def close(self) -> None:
        for client in self.clients:
            client.close()


class TestSlowClients:
    def test_are_cut_off_and_hold_up_nobody(self, lone: Service) -> None:
        """More of them than the pool has connections: none is taken before a body is whole."""
        body = make_body()
        sent = request("POST", DOOR, [signed(body, KEY)], body)
        before = descriptors(lone)
        statuses: list[int] = []
        with ExitStack() as stack:
            silent = stack.enter_context(closing(Crowd(lone.port, [b""] * 100)))
            heads = stack.enter_context(closing(Crowd(lone.port, [b"POST /" + b"x" * 999] * 100)))
            bodies = stack.enter_context(closing(Crowd(lone.port, [sent] * 50)))
            bodies.begin(len(sent) - 100)

            def are_cut_off() -> bool:
                for crowd in (silent, heads, bodies):
                    crowd.go_on()
                statuses.append(sent_honestly(lone))
                time.sleep(0.5)
                return not (silent.clients or heads.clients or bodies.clients)

            wait_for(are_cut_off, "the end of everybody who is slow", seconds=60)

        assert {200} == set(statuses)
        wait_for(lambda: descriptors(lone) <= before + 3, "descriptors that are given back")
        assert [] == lone.errors()

    @pytest.mark.parametrize(
        "said",
        [
            pytest.param(
                request("GET", "/api/events?limit=1000", [bearer(TOKEN)]) * 20, id="pages"
            ),
            pytest.param(request("GET", "/api/events/stream", [bearer(TOKEN)]), id="stream"),
            pytest.param(request("POST", DOOR, [], b"") * 20_000, id="refusals"),
        ],
    )
    async def test_who_do_not_read_are_cut_off(
        self, sqlite_url: str, monkeypatch: pytest.MonkeyPatch, said: bytes
    ) -> None:
        monkeypatch.setattr(Protocol, "reader_time", 0.5)
        await asyncio.to_thread(fill_feed, sqlite_url)
        async with running(sqlite_url) as (app, _, port):
            with socket.socket() as lazy:
                lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                lazy.connect(("127.0.0.1", port))
                talking = asyncio.create_task(asyncio.to_thread(say, lazy, said))

                await eventually(lambda: app.state.connections)
                await eventually(lambda: not app.state.connections, within=60)

                await talking
            await eventually(lambda: app.state.seats.taken == 0)


def say(client: socket.socket, said: bytes) -> None:
    """Say it for as long as somebody listens."""
    with suppress(OSError):
        client.sendall(said)


class TestFlood:
    def test_of_forgeries_costs_the_honest_nothing(self, lone: Service) -> None:
        """And fills no log: at most ten lines a second."""
        began = time.monotonic()
        body = make_body(metadata={"text": "x" * 1000})

        def forge() -> Counter[int]:
            forged: Counter[int] = Counter()
            with Connection(lone.port) as connection:
                for _ in range(500):
                    connection.send(request("POST", DOOR, [WRONG], body) * 2)
                    forged[connection.read().status] += 1
                    forged[connection.read().status] += 1
            return forged

        def send() -> list[int]:
            return [sent_honestly(lone) for _ in range(50)]

        before = count(lone.settings["DATABASE_URL"], "events")
        with ThreadPoolExecutor() as pool:
            floods = [pool.submit(forge) for _ in range(3)]
            honest = [pool.submit(send) for _ in range(2)]
            statuses = [status for each in honest for status in each.result()]
            forged = sum((each.result() for each in floods), Counter[int]())
        took = time.monotonic() - began

        assert {401: 3000} == forged
        assert [200] * 100 == statuses
        assert before + 100 == count(lone.settings["DATABASE_URL"], "events")
        lines = lone.lines("webhook.rejected", reason="mismatch")
        assert 0 < len(lines) <= 10 * (took + 2)

        def are_all_counted() -> bool:
            lone.post(body, WRONG)
            lines = lone.lines("webhook.rejected", reason="mismatch")
            suppressed: int = sum(line["suppressed"] for line in lines)
            return len(lines) + suppressed >= 3000

        # Those that were not written are counted in the next line that is.
        wait_for(are_all_counted, "a line that counts those before it")

    def test_of_connections_is_told_to_come_again(self, database_url: str, tmp_path: Path) -> None:
        settings = {"DATABASE_URL": with_password(database_url), "MAX_CONNECTIONS": "40"}
        with Service("serve", "--no-work", home=tmp_path, **settings) as service:
            before = descriptors(service)
            with ExitStack() as stack:
                taken = [stack.enter_context(Connection(service.port)) for _ in range(40)]
                # One that was accepted is known to be only once it is answered.
                for connection in taken:
                    connection.send(request("POST", DOOR, [], b""))
                    assert 401 == connection.read().status

                refused = [service.deliver(make_body(), KEY) for _ in range(10)]
                alive = service.get("/livez").status
                body = make_body()
                taken[0].send(request("POST", DOOR, [signed(body, KEY)], body))
                served = taken[0].read().status
            service.wait_until(lambda: service.deliver(body, KEY).status == 200, "room again")

            assert {503} == {answer.status for answer in refused}
            assert all(answer.is_problem for answer in refused)
            assert {"1"} == {answer.headers["retry-after"] for answer in refused}
            assert (200, 200) == (alive, served)
            assert 1 <= len(service.lines("request.rejected", reason="connections_full"))
            wait_for(lambda: descriptors(service) <= before + 3, "descriptors that are given back")

    def test_of_connections_leaves_descriptors_for_the_database(
        self, database_url: str, tmp_path: Path
    ) -> None:
        """With a limit of 256, five hundred clients are not served, and nothing else breaks."""
        settings = {"DATABASE_URL": with_password(database_url)}
        service = Narrow("serve", "--no-work", home=tmp_path, **settings)
        service.start()
        with ExitStack() as stack:
            stack.callback(end, service)
            service.wait_until_ready()
            crowd = [socket.create_connection(("127.0.0.1", service.port)) for _ in range(500)]
            while_full = [answer_of(service).status for _ in range(5)]
            for client in crowd:
                client.close()
            service.wait_until(
                lambda: service.deliver(make_body(), KEY).status == 200, "room again"
            )

        assert set(while_full) <= {503, 0}
        assert [] == service.errors()


class Narrow(Service):
    """A service that may have 256 descriptors, from its first moment on."""

    @property
    def command(self) -> list[str]:
        """How the process is started."""
        return ["/bin/sh", "-c", 'ulimit -n 256 && exec "$@"', "sh", *super().command]


def end(service: Service) -> None:
    if service.is_running:
        service.terminate()
    service.check_secrecy()


def answer_of(service: Service) -> Answer:
    """Give the answer to an event, or status 0 where the connection was cut."""
    try:
        return service.deliver(make_body(), KEY)
    except (OSError, EOFError):
        return Answer(0, {}, b"")


class TestBomb:
    @pytest.mark.parametrize(
        "coding, pack",
        [
            pytest.param(b"gzip", gzip.compress, id="gzip"),
            pytest.param(b"deflate", zlib.compress, id="deflate"),
            pytest.param(b"GZIP", gzip.compress, id="upper-case"),
            pytest.param(b"identity, gzip", gzip.compress, id="behind-another"),
        ],
    )
    def test_is_not_unpacked(
        self, service: Service, coding: bytes, pack: Callable[[bytes], bytes]
    ) -> None:
        """130 kB that would be 128 MiB."""
        bomb = pack(bytes(128 * 1024 * 1024))
        before = memory(service)

        answers = [
            service.post(bomb, signed(bomb, KEY), (b"Content-Encoding", coding)).status
            for _ in range(3)
        ]

        assert [415] * 3 == answers
        assert memory(service) - before < 50 * 1024 * 1024

    def test_that_does_not_say_so_is_bytes_like_any_other(self, service: Service) -> None:
        packed = gzip.compress(make_body())

        answer = service.deliver(packed, KEY)

        assert (200, "quarantined") == (answer.status, answer.json()["outcome"])

    def test_in_the_framing_is_not_unpacked_either(self, service: Service) -> None:
        packed = gzip.compress(make_body())
        data = chunked(DOOR, [signed(packed, KEY)], packed)
        data = data.replace(b"Transfer-Encoding: chunked", b"Transfer-Encoding: gzip, chunked")

        answer = exchange(service.port, data)

        assert answer.status == 400 or "quarantined" == answer.json()["outcome"]


class TestChunks:
    def test_may_have_no_extension_without_end(self, service: Service) -> None:
        body = make_body()
        before = memory(service)
        extended = b"%x;%s\r\n%s\r\n0\r\n\r\n" % (len(body), b"a=" + b"x" * 70_000, body)

        answer = exchange(service.port, chunked(DOOR, [signed(body, KEY)], end=extended))

        assert answer.status in {200, 400, 431}
        assert memory(service) - before < 20 * 1024 * 1024

    def test_of_one_byte_are_a_body_too(self, service: Service, database: str) -> None:
        envelope_id = new_envelope_id()
        body = make_body(envelope_id=envelope_id)
        pieces = [body[n : n + 1] for n in range(len(body))]

        answer = exchange(service.port, chunked(DOOR, [signed(body, KEY)], *pieces))

        assert 200 == answer.status
        assert [body] == bodies_of(database, envelope_id)


FORGED = "198.51.100.77"
FORWARDING = [
    pytest.param([(b"X-Forwarded-For", FORGED.encode())], id="for"),
    pytest.param([(b"X-Forwarded-For", f"{FORGED}:99999, 1".encode())], id="for-with-a-port"),
    pytest.param([(b"X-Forwarded-For", b"\xff," * 200)], id="for-of-no-text"),
    pytest.param([(b"X-Forwarded-Proto", b"javascript")], id="proto"),
    pytest.param([(b"X-Forwarded-Host", f"{FORGED}/api/events?".encode())], id="host"),
    pytest.param([(b"X-Forwarded-Prefix", b"/api"), (b"X-Forwarded-Port", b"-1")], id="prefix"),
    pytest.param([(b"Forwarded", f'for="[{FORGED}";proto=;by=\xff'.encode("latin-1"))], id="rfc"),
    pytest.param([(b"X-Real-IP", b"::1"), (b"X-Original-URL", b"/livez")], id="other-words"),
    pytest.param([(b"X-HTTP-Method-Override", b"GET")], id="method"),
]


class TestForgedOrigin:
    @pytest.mark.parametrize("headers", FORWARDING)
    def test_changes_nothing(self, service: Service, headers: list[tuple[bytes, bytes]]) -> None:
        """Nothing is decided or written by who a client says it is."""
        body = make_body()

        taken = service.post(body, signed(body, KEY), *headers)
        refused = service.post(body, *headers)
        asked = service.ask("/api/envelope/nobody", "no token", *headers)
        page = service.ask("/api/events?limit=1", TOKEN, *headers)

        assert (200, 401, 401, 200) == tuple(
            answer.status for answer in (taken, refused, asked, page)
        )
        told = [*taken.headers.values(), *page.headers.values(), taken.body.decode()]
        assert not [text for text in told if FORGED in text]
        assert FORGED not in service.log

    def test_opens_nothing_that_wants_a_token(self, service: Service) -> None:
        for target in ("/api/events", "/metrics", "/api/stats"):
            assert 401 == service.get(target, (b"X-Forwarded-For", b"127.0.0.1")).status
