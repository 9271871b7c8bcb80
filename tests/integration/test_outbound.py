"""Calls to other services: every bad answer ends in time, in words, and without a secret."""

import asyncio
import gc
import gzip
import netrc
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
import trustme
import uvloop

from app.errors import ConfigError
from app.outbound import (
    AddressRefused,
    Answer,
    BrokenAnswer,
    DeadlinePassed,
    Outbound,
    OutboundError,
    RequestRefused,
    TooLarge,
    Unreachable,
    is_public,
    read_url,
)
from tests.misbehaving import (
    Behaviour,
    Misbehaving,
    Received,
    answer,
    drip,
    never_end,
    say_nothing,
    send,
    send_and_hang_up,
    send_and_reset,
)

LOOPBACK = ("127.0.0.0/8", "::1/128")
NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
OK = b"HTTP/1.1 200 OK\r\n"


def outbound(
    *, allow: tuple[str, ...] = LOOPBACK, seconds: float = 10, max_bytes: int = 1000
) -> Outbound:
    return Outbound(allow=allow, timeout=timedelta(seconds=seconds), max_bytes=max_bytes)


async def failure(url: str, calls: Outbound | None = None) -> OutboundError:
    with pytest.raises(OutboundError) as raised:
        await (calls or outbound()).request("POST", url, content=b"{}")
    assert "secret" not in str(raised.value)
    return raised.value


async def failure_of(behaviour: Behaviour, *, seconds: float = 10) -> OutboundError:
    async with Misbehaving(behaviour) as server:
        return await failure(server.url, outbound(seconds=seconds))


class TestRequest:
    async def test_the_answer_comes_as_it_was_given(self) -> None:
        async with Misbehaving(answer(418, {"X-Kind": "tea"}, b"short and stout")) as server:
            got = await outbound().request("POST", server.url, headers={"a": "b"}, content=b"{}")

        (sent,) = server.received
        assert (418, b"short and stout", False) == (got.status, got.body, got.is_cut)
        assert "tea" == got.headers["x-kind"]
        assert ("POST", "/hook/path-secret?key=query-secret") == (sent.method, sent.target)
        assert ("b", "2", b"{}") == (sent.headers["a"], sent.headers["content-length"], sent.body)
        assert f"127.0.0.1:{server.port}" == sent.headers["host"]

    async def test_the_body_is_cut_where_it_exceeds_the_limit(self) -> None:
        async with Misbehaving(never_end(OK + b"\r\n")) as server:
            got = await outbound(max_bytes=10).request("GET", server.url)

        assert (b"x" * 10, True) == (got.body, got.is_cut)

    async def test_a_body_as_long_as_the_limit_is_whole(self) -> None:
        async with Misbehaving(answer(body=b"x" * 10)) as server:
            got = await outbound(max_bytes=10).request("GET", server.url)

        assert (b"x" * 10, False) == (got.body, got.is_cut)

    async def test_a_redirect_is_an_answer_like_any_other(self) -> None:
        """Following it would lead to wherever the other side wants, inside our network."""
        async with (
            Misbehaving(answer()) as inside,
            Misbehaving(answer(302, {"Location": inside.url})) as server,
        ):
            got = await outbound().request("POST", server.url, content=b"{}")

        assert (302, False) == (got.status, got.is_success)
        assert [] == inside.received

    async def test_a_connection_is_used_again(self) -> None:
        calls = outbound()
        async with Misbehaving(answer(body=b"1")) as server:
            for _ in range(3):
                await calls.request("GET", server.url)

        assert (3, 1) == (len(server.received), server.connections)

    async def test_a_cookie_is_not_given_back(self) -> None:
        calls = outbound()
        async with Misbehaving(answer(headers={"Set-Cookie": "a=b; Path=/"})) as server:
            await calls.request("GET", server.url)
            await calls.request("GET", server.url)

        assert all("cookie" not in each.headers for each in server.received)

    async def test_proxies_and_netrc_of_the_environment_are_ignored(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        rc = tmp_path / "netrc"
        rc.write_text("machine 127.0.0.1 login me password secret")
        assert netrc.netrc(rc).hosts
        monkeypatch.setenv("NETRC", str(rc))
        async with Misbehaving(answer(500)) as proxy, Misbehaving(answer()) as server:
            for name in ("http_proxy", "https_proxy", "all_proxy"):
                monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
                monkeypatch.setenv(name.upper(), f"http://127.0.0.1:{proxy.port}")
            got = await outbound().request("GET", server.url)

        assert (200, []) == (got.status, proxy.received)
        assert "authorization" not in server.received[0].headers

    async def test_a_header_that_would_break_out_of_its_line_is_not_sent(self) -> None:
        async with Misbehaving(answer()) as server:
            for value in ("secret\r\nX-Other: 1", "secret \u2028"):
                with pytest.raises(RequestRefused, match="header") as raised:
                    await outbound().request("GET", server.url, headers={"X": value})
                assert "secret" not in str(raised.value)

        assert [] == server.received


class TestBadAnswer:
    @pytest.mark.parametrize(
        "behaviour",
        [
            pytest.param(say_nothing, id="silence"),
            pytest.param(drip(b"", seconds=0.02), id="a-status-line-in-drips"),
            pytest.param(drip(OK + b"Content-Length: 900\r\n\r\n", seconds=0.02), id="drips"),
            pytest.param(never_end(b"", b"HTTP/1.1 100 Continue\r\n\r\n"), id="always-continue"),
        ],
    )
    async def test_the_deadline_is_for_all_of_it(self, behaviour: Behaviour) -> None:
        error = await failure_of(behaviour, seconds=0.3)

        assert isinstance(error, DeadlinePassed)
        assert "within 0.3 s" in str(error)

    @pytest.mark.parametrize(
        "data",
        [
            pytest.param(b"", id="nothing"),
            pytest.param(b"\x00\xff\x00\xff\r\n\r\n", id="noise"),
            pytest.param(b"SSH-2.0-OpenSSH_9\r\n\r\n", id="another-protocol"),
            pytest.param(b"HTTP/1.1 abc\r\n\r\n", id="no-status"),
            pytest.param(OK + b"no colon\r\n\r\n", id="no-header"),
            pytest.param(OK + b"Content-Length: 9\r\n\r\nshort", id="ended-early"),
            pytest.param(OK + b"Content-Length: -1\r\n\r\n", id="negative-length"),
            pytest.param(
                OK + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n12", id="two-lengths"
            ),
            pytest.param(OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", id="broken-chunk"),
            pytest.param(OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nab", id="short-chunk"),
            pytest.param(OK + b"Transfer-Encoding: gzip\r\n\r\n", id="unknown-transfer"),
        ],
    )
    async def test_what_is_not_http_is_a_broken_answer(self, data: bytes) -> None:
        error = await failure_of(send_and_hang_up(data))

        assert isinstance(error, BrokenAnswer)
        assert "127.0.0.1:" in str(error)

    @pytest.mark.parametrize(
        "behaviour",
        [
            pytest.param(never_end(b"HTTP/1.1 200 "), id="reason"),
            pytest.param(never_end(OK + b"X: "), id="value"),
            pytest.param(never_end(OK, b"X-Name: value\r\n"), id="endless-many"),
            pytest.param(send(OK + b"X-Some-Name: value\r\n" * 10_000 + b"\r\n"), id="10-000"),
            pytest.param(
                never_end(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"0" * 65536), id="chunk-size"
            ),
        ],
    )
    async def test_headers_have_a_limit(self, behaviour: Behaviour) -> None:
        assert isinstance(await failure_of(behaviour), BrokenAnswer)

    async def test_headers_beyond_ascii_are_read(self) -> None:
        data = OK + b"X-Name: \xe4\xff\xc3\xa9\r\nContent-Length: 0\r\n\r\n"
        async with Misbehaving(send(data)) as server:
            got = await outbound().request("GET", server.url)

        assert "äÿÃ©" == got.headers["x-name"]

    async def test_the_next_call_has_a_connection_of_its_own(self) -> None:
        calls = outbound(max_bytes=10)
        async with Misbehaving(never_end(OK + b"\r\n"), answer(201)) as server:
            await calls.request("GET", server.url)
            got = await calls.request("GET", server.url)

        assert (201, 2) == (got.status, server.connections)

    async def test_a_call_that_is_cancelled_leaves_nothing_behind(self) -> None:
        calls = outbound()
        asked = asyncio.Event()

        async def keep_silent(_: Received, __: asyncio.StreamWriter) -> None:
            asked.set()
            await asyncio.Event().wait()

        async with Misbehaving(keep_silent) as server:
            call = asyncio.create_task(calls.request("GET", server.url))
            await asyncio.wait_for(asked.wait(), 5)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call

        assert not (await calls._pools.of_this_loop()).connections

    async def test_a_connection_that_breaks_is_a_broken_answer(self) -> None:
        error = await failure_of(send_and_reset(OK + b"Content-Length: 9\r\n\r\nhalf"))

        assert isinstance(error, BrokenAnswer)
        assert "hung up before it had answered in full" in str(error)

    async def test_nobody_listens(self) -> None:
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            port = closed.getsockname()[1]

            error = await failure(f"http://127.0.0.1:{port}/path-secret")

        assert isinstance(error, Unreachable)
        assert f"127.0.0.1:{port} cannot be reached" in str(error)


class TestDownload:
    async def test_the_body_goes_to_the_sink(self) -> None:
        pieces: list[bytes] = []
        async with Misbehaving(answer(body=b"x" * 200_000)) as server:
            got = await outbound().download(server.url, pieces.append, max_bytes=200_000)

        assert (200, b"") == (got.status, got.body)
        assert b"x" * 200_000 == b"".join(pieces)
        assert len(pieces) > 1

    async def test_what_is_declared_too_large_is_not_read(self) -> None:
        pieces: list[bytes] = []
        head = OK + b"Content-Length: 1073741824\r\n\r\n"
        async with Misbehaving(never_end(head)) as server:
            with pytest.raises(TooLarge, match="more than 5000 bytes") as raised:
                await outbound().download(server.url, pieces.append, max_bytes=5000)

        assert [] == pieces
        assert "secret" not in str(raised.value)

    async def test_what_turns_out_too_large_is_not_read_on(self) -> None:
        pieces: list[bytes] = []
        async with Misbehaving(never_end(OK + b"\r\n")) as server:
            with pytest.raises(TooLarge):
                await outbound().download(server.url, pieces.append, max_bytes=200_000)

        assert len(b"".join(pieces)) <= 200_000

    async def test_another_status_is_collected(self) -> None:
        pieces: list[bytes] = []
        async with Misbehaving(answer(403, body=b"expired " * 500)) as server:
            got = await outbound().download(server.url, pieces.append, max_bytes=10)

        assert (403, True, []) == (got.status, got.is_cut, pieces)
        assert got.excerpt(14) == "expired expire"

    async def test_a_packed_body_is_refused(self) -> None:
        """Ten megabytes of blanks are ten kilobytes when packed; nobody unpacks them here."""
        bomb = gzip.compress(bytes(10_000_000))
        async with Misbehaving(answer(headers={"Content-Encoding": "gzip"}, body=bomb)) as server:
            with pytest.raises(BrokenAnswer, match="packed"):
                await outbound().download(server.url, lambda _: None, max_bytes=50_000_000)

        assert "identity" == server.received[0].headers["accept-encoding"]

    @pytest.mark.parametrize("error", [OSError("no space"), TimeoutError("no space")])
    async def test_what_the_sink_raises_comes_through(self, error: Exception) -> None:
        def full(_: bytes) -> None:
            raise error

        async with Misbehaving(answer(body=b"x")) as server:
            with pytest.raises(type(error), match="no space"):
                await outbound().download(server.url, full, max_bytes=10)


class TestAnswer:
    @pytest.mark.parametrize(
        "value,seconds",
        [
            ("7", 7),
            (" 0 ", 0),
            ("99999999999999999999999", 86400),
            ("Sun, 22 Nov 2026 12:01:30 GMT", 90),
            ("Sun, 22 Nov 2026 12:01:30", 90),
            ("Sun, 22 Nov 2026 11:00:00 GMT", 0),
            ("Fri, 31 Dec 9999 23:59:59 GMT", 86400),
            ("Fri, 31 Dec 9999 23:59:59 -2359", 86400),
            ("Sat, 01 Jan 0001 00:00:00 +2359", 0),
            ("soon", None),
            ("-5", None),
            ("1.5", None),
            ("²", None),
            ("Sun, 99 Nov 2026 12:01:30 GMT", None),
            ("", None),
        ],
    )
    def test_retry_after_is_a_wait_within_a_day(self, value: str, seconds: int | None) -> None:
        got = Answer(503, {"retry-after": value}, b"").retry_after(now=NOW)

        assert got == (None if seconds is None else timedelta(seconds=seconds))

    @pytest.mark.parametrize(
        "body,expected",
        [
            (b"", ""),
            (b"no\r\n\tsuch\x00thing\x1b[31m", "no such thing [31m"),
            (b"\xff\xfe caf\xc3\xa9 \xe2\x80\xa8 \xf0\x9f\x98\x80", "café"),
            (b"x" * 5000, "x" * 200),
            (" ".join(["é"] * 300).encode(), " ".join(["é"] * 100)),
        ],
    )
    def test_an_excerpt_is_one_printable_line(self, body: bytes, expected: str) -> None:
        assert expected == Answer(500, {}, body).excerpt()

    def test_of_a_packed_body_there_is_none(self) -> None:
        assert "" == Answer(500, {"content-encoding": "gzip"}, b"readable").excerpt()


REFUSED = [
    "0.0.0.0",  # noqa: S104  # to call it is to call oneself; nobody binds to it
    "10.0.0.1",
    "100.64.0.1",
    "127.0.0.1",
    "169.254.169.254",
    "172.31.255.255",
    "192.0.0.8",
    "192.0.2.1",
    "192.168.0.1",
    "198.18.0.1",
    "224.0.0.1",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::7f00:1",
    "::ffff:10.0.0.1",
    "64:ff9b::10.0.0.1",
    "64:ff9b:1::a00:1",
    "100::1",
    "2001:0:0:0:0:0:80ff:fffe",
    "2001:db8::1",
    "2002:a00:1::1",
    "3fff::1",
    "5f00::1",
    "fc00::1",
    "fe80::1",
    "fe80::1%eth0",
    "fec0::1",
    "ff02::1",
]

THIS_MACHINE = ["127.0.0.1", "localhost", "127.1", "2130706433", "0x7f000001", "0"]
THIS_MACHINE += ["[::1]", "[::]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]"]


class TestGuard:
    @pytest.mark.parametrize("address", REFUSED)
    def test_no_such_address_is_public(self, address: str) -> None:
        assert not is_public(ip_address(address))

    @pytest.mark.parametrize(
        "address", ["1.1.1.1", "100.63.0.1", "172.32.0.1", "2606:4700::1111", "64:ff9b::1.1.1.1"]
    )
    def test_these_are_public(self, address: str) -> None:
        assert is_public(ip_address(address))

    @pytest.mark.parametrize("host", THIS_MACHINE)
    async def test_this_machine_is_refused_however_it_is_written(self, host: str) -> None:
        async with Misbehaving(answer()) as server:
            error = await failure(server.at(host), outbound(allow=("10.0.0.0/8",)))

        assert isinstance(error, AddressRefused)
        assert "FORWARD_ALLOW" in str(error)
        assert 0 == server.connections

    async def test_the_refusal_names_what_to_allow(self) -> None:
        error = await failure("http://localhost/path-secret", outbound(allow=()))

        assert "localhost is 127.0.0.1" in str(error) or "localhost is ::1" in str(error)
        assert str(error).endswith("or its network to FORWARD_ALLOW")

    @pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::ffff:127.0.0.1]"])
    async def test_an_allowed_network_is_called(self, host: str) -> None:
        async with Misbehaving(answer()) as server:
            got = await outbound(allow=("127.0.0.1",)).request("GET", server.at(host))

        assert 200 == got.status

    async def test_of_several_addresses_only_those_are_called_that_may_be(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with Misbehaving(answer()) as server:
            monkeypatch.setattr(socket, "getaddrinfo", names("10.9.9.9", "127.0.0.1"))
            got = await outbound().request("GET", server.at("mixed.test"))

        assert 200 == got.status
        assert f"mixed.test:{server.port}" == server.received[0].headers["host"]

    async def test_a_dead_address_is_passed_over(self, monkeypatch: pytest.MonkeyPatch) -> None:
        async with Misbehaving(answer()) as server:
            monkeypatch.setattr(socket, "getaddrinfo", names("127.0.0.9", "127.0.0.1"))
            got = await outbound().request("GET", server.at("two.test"))

        assert 200 == got.status

    async def test_a_name_is_asked_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A second answer could be another one, after the first was found to be harmless."""
        ask = names("127.0.0.1")
        async with Misbehaving(answer()) as server:
            monkeypatch.setattr(socket, "getaddrinfo", ask)
            await outbound().request("GET", server.at("rebind.test"))

        assert ["rebind.test"] == [host for host in ask.asked if host == "rebind.test"]

    async def test_a_name_that_is_not_known_is_unreachable(self) -> None:
        for host in ("absent.invalid", "a..b", "x" * 70):
            error = await failure(f"http://{host}/path-secret")
            assert isinstance(error, Unreachable)
            assert f"the name {host} cannot be resolved" in str(error)


class names:  # noqa: N801  # stands for a function of the standard library
    """Answers for the system's resolver: these addresses for any name, literals for themselves."""

    def __init__(self, *addresses: str) -> None:
        self.asked: list[str] = []
        self._addresses = addresses

    def __call__(self, host: str, port: int, *_: Any, **__: Any) -> list[Any]:
        self.asked.append(host)
        return [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))
            for address in (self._addresses if host.endswith(".test") else (host,))
        ]


class TestUrl:
    @pytest.mark.parametrize(
        "url",
        [
            "",
            "crm.example.com/hook",
            "//crm.example.com/hook",
            "ftp://crm.example.com/hook",
            "file:///etc/passwd",
            "http:///hook",
            "http://crm.example.com:99999/",
            "http://crm.example.com:0/",
            "http://crm.example.com:http/",
            "http://[::1/",
            "http://[fe80::1%25eth0]/",
            "http://crm example.com/",
            "http://crm\x00.example.com/",
            "http://\u2488.example.com/",
            "http://\ud800.example.com/",
            "http://" + "a" * 300 + "/",
            "http://example.com/" + "a" * 20_000,
            "http://\u0f0b" + "\u0f0b" * 10_000 + "/",
            "https://me:secret@crm.example.com/",
        ],
    )
    async def test_what_cannot_be_called_is_refused_with_a_reason(self, url: str) -> None:
        error = await failure(url)

        assert isinstance(error, RequestRefused)
        assert str(error).startswith("the URL ")

    def test_a_host_beyond_ascii_is_written_as_names_are(self) -> None:
        assert "xn--mnchen-3ya.example" == read_url("https://münchen.example/x").raw_host.decode()


@pytest.fixture(name="authority", scope="module")
def _authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(name="trusted")
def _trusted(authority: trustme.CA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "authority.pem"
    authority.cert_pem.write_to_path(path)
    monkeypatch.setenv("SSL_CERT_FILE", str(path))
    return path


def tls(certificate: trustme.LeafCert) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)
    return context


@pytest.mark.usefixtures("trusted")
class TestCertificate:
    async def test_a_good_one_is_accepted(self, authority: trustme.CA) -> None:
        async with Misbehaving(answer(), tls=tls(authority.issue_cert("localhost"))) as server:
            got = await outbound().request("GET", server.at("localhost"))

        assert 200 == got.status

    async def test_an_address_is_proven_by_its_own(self, authority: trustme.CA) -> None:
        async with Misbehaving(answer(), tls=tls(authority.issue_cert("127.0.0.1"))) as server:
            got = await outbound().request("GET", server.url)

        assert 200 == got.status

    async def test_that_of_another_name_is_refused(self, authority: trustme.CA) -> None:
        async with Misbehaving(answer(), tls=tls(authority.issue_cert("other.test"))) as server:
            error = await failure(server.at("localhost"))

        assert isinstance(error, Unreachable)
        assert "certificate is not valid: Hostname mismatch" in str(error)
        assert [] == server.received

    async def test_one_that_has_expired_is_refused(self, authority: trustme.CA) -> None:
        old = authority.issue_cert(
            "localhost", not_before=NOW - timedelta(days=900), not_after=NOW - timedelta(days=600)
        )
        async with Misbehaving(answer(), tls=tls(old)) as server:
            error = await failure(server.at("localhost"))

        assert "certificate is not valid: certificate has expired" in str(error)
        assert [] == server.received

    async def test_one_that_nobody_vouches_for_is_refused(self) -> None:
        own = trustme.CA().issue_cert("localhost")
        async with Misbehaving(answer(), tls=tls(own)) as server:
            error = await failure(server.at("localhost"))

        assert "certificate is not valid: unable to get local issuer certificate" in str(error)

    @pytest.mark.parametrize("name", ["PYTHONHTTPSVERIFY", "CURL_INSECURE", "REQUESTS_CA_BUNDLE"])
    async def test_no_variable_switches_the_check_off(
        self, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(name, "0")
        own = trustme.CA().issue_cert("localhost")
        async with Misbehaving(answer(), tls=tls(own)) as server:
            assert isinstance(await failure(server.at("localhost")), Unreachable)

    @pytest.mark.parametrize("content", [None, "no certificate"], ids=["absent", "noise"])
    def test_authorities_that_cannot_be_read_stop_the_start(
        self, trusted: Path, content: str | None
    ) -> None:
        trusted.unlink()
        if content is not None:
            trusted.write_text(content)

        with pytest.raises(ConfigError, match="SSL_CERT_FILE"):
            outbound()

    async def test_plain_http_where_tls_was_expected(self) -> None:
        async with Misbehaving(answer(), greeting=b"HTTP/1.1 400 Bad\r\n\r\n") as server:
            error = await failure(server.url.replace("http://", "https://"))

        assert isinstance(error, Unreachable)


@pytest.fixture(name="threaded")
def _threaded() -> Iterator[Callable[..., Any]]:
    """Runs a coroutine on an event loop of its own in a thread of its own."""

    def run(loop_factory: Callable[[], asyncio.AbstractEventLoop], main: Any) -> Any:
        results: list[Any] = []

        def work() -> None:
            with asyncio.Runner(loop_factory=loop_factory) as runner:
                results.append(runner.run(main()))

        thread = threading.Thread(target=work)
        thread.start()
        thread.join(20)
        (result,) = results
        return result

    yield run
    gc.collect()


@pytest.mark.parametrize(
    "factory",
    [
        pytest.param(asyncio.new_event_loop, id="asyncio"),
        pytest.param(uvloop.new_event_loop, id="uvloop"),
    ],
)
@pytest.mark.usefixtures("trusted")
class TestLoops:
    @pytest.mark.parametrize("is_tls", [False, True], ids=["plain", "tls"])
    async def test_each_loop_has_connections_that_end_with_it(
        self,
        *,
        factory: Callable[[], asyncio.AbstractEventLoop],
        threaded: Callable[..., Any],
        authority: trustme.CA,
        is_tls: bool,
    ) -> None:
        calls = outbound()
        context = tls(authority.issue_cert("localhost")) if is_tls else None
        async with Misbehaving(answer(body=b"1"), tls=context) as server:

            async def call_twice() -> int:
                await calls.request("GET", server.at("localhost"))
                return (await calls.request("GET", server.at("localhost"))).status

            for _ in range(2):
                assert 200 == await asyncio.to_thread(threaded, factory, call_twice)
            await asyncio.wait_for(server.is_left(), 5)

        assert (4, 2) == (len(server.received), server.connections)

    async def test_failures_have_the_same_names_on_every_loop(
        self, factory: Callable[[], asyncio.AbstractEventLoop], threaded: Callable[..., Any]
    ) -> None:
        own = tls(trustme.CA().issue_cert("localhost"))
        async with Misbehaving(answer(), tls=own) as server, Misbehaving(say_nothing) as silent:

            async def fail() -> list[str]:
                calls = outbound(seconds=0.5)
                urls = (server.at("localhost"), silent.url, "http://a..b/", "http://10.0.0.1/")
                return [type(await failure(url, calls)).__name__ for url in urls]

            got = await asyncio.to_thread(threaded, factory, fail)

        assert ["Unreachable", "DeadlinePassed", "Unreachable", "AddressRefused"] == got
