"""Call other services over HTTP, and nobody inside our own network by accident.

Whoever may choose a URL, or what a name resolves to, could otherwise make this service
speak to its neighbours. So each address is checked when it is connected to. Nothing of the
environment is used (proxies, netrc), no cookie is kept, no redirect followed, no answer
unpacked, and no certificate taken on trust.

OutboundError
├── RequestRefused      the URL, or a header, cannot be used at all
├── AddressRefused      it leads to an address that is not public and not in FORWARD_ALLOW
├── Unreachable         no name, no connection, no trust in the certificate
├── DeadlinePassed      the whole exchange took longer than it may
├── BrokenAnswer        what came back is not HTTP, or ended in the middle
└── TooLarge            a download is larger than it may be
"""

import asyncio
import re
import socket
import ssl
import weakref
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

import httpcore2
import httpx2

from app.errors import AppError, ConfigError

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

LONGEST_URL = 16 * 1024
LONGEST_REASON = 200
LONGEST_WAIT = timedelta(hours=24)
# An idle connection is closed by us before most servers close it under a request.
IDLE_SECONDS = 4.0
IDLE_CONNECTIONS = 20
# For each address of a name but the last, so that one dead address does not use up all.
CONNECT_SECONDS = 3.0
MOST_ADDRESSES = 8

_HOST = re.compile(r"[a-z0-9._-]{1,253}|[0-9a-f]*:[0-9a-f:.]+", re.IGNORECASE)
_BLANK = re.compile(r"[^!-~\u00a1-\ud7ff\ue000-\uffff]+")
_GLOBAL = ip_network("2000::/3")
_NAT64 = ip_network("64:ff9b::/96")
# Not for the public, and not known as such to every release of Python.
_RESERVED = (ip_network("192.0.0.0/24"), ip_network("3fff::/20"))


class OutboundError(AppError):
    """A call to another service failed; the text names the host, never path or query."""


class RequestRefused(OutboundError):
    """The URL, or a header, cannot be used at all."""


class AddressRefused(OutboundError):
    """The URL leads into a network that is not public, and nobody allowed that."""


class Unreachable(OutboundError):
    """There is no such host, nobody answers there, or its certificate proves nothing."""


class DeadlinePassed(OutboundError):
    """The exchange took longer than it may, from the name to the last byte."""


class BrokenAnswer(OutboundError):
    """What came back cannot be read as HTTP, or ended in the middle."""


class TooLarge(OutboundError):
    """The body is larger than it may be."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What another service answered; the body is as it was sent, perhaps still packed."""

    status: int
    # By lower-case name; one that came twice is joined with a comma.
    headers: Mapping[str, str]
    body: bytes
    # There was more of the body than we wanted to read.
    is_cut: bool = False

    @property
    def is_success(self) -> bool:
        """True for 2xx; a redirect is none."""
        return 200 <= self.status < 300  # noqa: PLR2004  # that is what HTTP calls success

    @property
    def is_packed(self) -> bool:
        """True if the body is compressed, although we asked for plain."""
        return self.headers.get("content-encoding", "identity").strip().lower() != "identity"

    def excerpt(self, length: int = 200) -> str:
        """Give the beginning of the body in one line, as far as it can be printed."""
        if self.is_packed:
            return ""
        text = self.body[: 8 * length].decode("utf-8", "replace")
        return _BLANK.sub(" ", text.replace("\ufffd", " ")).strip()[:length].rstrip()

    def retry_after(self, *, now: datetime | None = None) -> timedelta | None:
        """Read `Retry-After`, as seconds or as a date; at most a day, None if there is none."""
        value = self.headers.get("retry-after", "").strip()
        if value.isascii() and value.isdigit():
            # Beyond nine digits it is longer than the longest wait anyway.
            return min(timedelta(seconds=int(value[:9])), LONGEST_WAIT)
        try:
            due = parsedate_to_datetime(value)
        except (ValueError, TypeError, OverflowError):
            return None
        due = due if due.tzinfo else due.replace(tzinfo=UTC)
        return min(max(due - (now or datetime.now(UTC)), timedelta(0)), LONGEST_WAIT)


class Outbound:
    """Calls other services; may be shared by callbacks, threads and event loops.

    `allow` are the networks that may be reached although they are not public; `timeout` is
    for a whole exchange; of an answer's body at most `max_bytes` are kept.
    """

    def __init__(self, *, allow: Sequence[str] = (), timeout: timedelta, max_bytes: int) -> None:
        self._timeout = timeout
        self._max_bytes = max_bytes
        self._pools = _Pools(
            _GuardedNetwork(tuple(ip_network(each, strict=False) for each in allow))
        )

    async def request(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        content: bytes | None = None,
    ) -> Answer:
        """Send one request; any answer at all is returned, anything else raises `OutboundError`."""
        target = read_url(url)
        async with self._exchange(method, target, headers, content) as response:
            return await self._collect(response)

    async def download(
        self,
        url: str,
        sink: Callable[[bytes], object],
        *,
        max_bytes: int,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """Give the body of a 200 to `sink`, piece by piece; the answer has no body then.

        Any other answer is collected as `request` does it. Raises `TooLarge` as soon as the
        body is known to be; what `sink` has by then, its owner throws away.
        """
        target = read_url(url)
        async with self._exchange("GET", target, headers, None) as response:
            if response.status != 200:  # noqa: PLR2004  # only that one is the document
                return await self._collect(response)
            answer = Answer(response.status, _headers(response), b"")
            _check_declared(answer, target, max_bytes)
            size = 0
            async with aclosing(response.aiter_stream()) as chunks:
                async for chunk in chunks:
                    size += len(chunk)
                    if size > max_bytes:
                        raise _too_large(target, max_bytes)
                    sink(chunk)
            return answer

    async def _collect(self, response: httpcore2.Response) -> Answer:
        body = bytearray()
        async with aclosing(response.aiter_stream()) as chunks:
            async for chunk in chunks:
                body += chunk
                if len(body) > self._max_bytes:
                    break
        is_cut = len(body) > self._max_bytes
        kept = bytes(body[: self._max_bytes])
        return Answer(response.status, _headers(response), kept, is_cut)

    @asynccontextmanager
    async def _exchange(
        self,
        method: str,
        url: httpx2.URL,
        headers: Mapping[str, str] | None,
        content: bytes | None,
    ) -> AsyncGenerator[httpcore2.Response]:
        pool = await self._pools.of_this_loop()
        target = httpcore2.URL(
            scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path
        )
        sent = _request_headers(url, headers)
        timer = asyncio.timeout(self._timeout.total_seconds())
        with _named_failures(url, timer, self._timeout):
            async with (
                timer,
                pool.stream(method, target, headers=sent, content=content) as response,
            ):
                yield response


def read_url(url: str) -> httpx2.URL:
    """Read a URL that may be called; raises `RequestRefused` with the reason, without the URL."""
    if len(url) > LONGEST_URL:
        raise RequestRefused(f"the URL is longer than {LONGEST_URL} characters")
    try:
        found = httpx2.URL(url)
        host = found.raw_host.decode("ascii")
    except (httpx2.InvalidURL, ValueError, TypeError):
        # The text of that error quotes the URL.
        raise RequestRefused("the URL cannot be read: is its host or its port mistyped?") from None
    if found.scheme not in {"http", "https"}:
        raise RequestRefused("the URL must begin with https:// or http://")
    if not _HOST.fullmatch(host):
        raise RequestRefused("the URL names no host that could be looked up")
    if found.port is not None and not 0 < found.port < 1 << 16:
        raise RequestRefused("the URL names a port that does not exist")
    if found.userinfo:
        raise RequestRefused(
            "the URL holds a user name or password, which are not sent: leave it out"
        )
    return found


def is_public(address: Address) -> bool:
    """True for an address that anybody on the internet may reach, and that leads nowhere else."""
    return all(map(_is_public, (address, *_embedded(address))))


def _is_public(address: Address) -> bool:
    if address.is_multicast or any(address in network for network in _RESERVED):
        return False
    if address.version == 4:  # noqa: PLR2004  # the protocol's number
        return address.is_global
    return address in _NAT64 or (address in _GLOBAL and address.is_global)


def _embedded(address: Address) -> Iterator[IPv4Address]:
    """Give the IPv4 addresses to which an IPv6 address leads over a gateway."""
    if isinstance(address, IPv4Address):
        return
    if address in _NAT64:
        yield IPv4Address(int(address) & 0xFFFFFFFF)
    if address.sixtofour is not None:
        yield address.sixtofour
    yield from address.teredo or ()


class _GuardedNetwork(httpcore2.AsyncNetworkBackend):
    """Opens connections to addresses that were looked at, never to a name.

    A name that is checked first and connected to afterwards may lead elsewhere by then.
    """

    def __init__(self, allow: tuple[Network, ...]) -> None:
        self._allow = allow
        self._network = httpcore2.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109  # the library's signature
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        """Connect to the first address of `host` that answers, of those that are permitted."""
        del timeout, local_address, socket_options  # not used by us; the deadline is the caller's
        *others, last = self._permitted(host, await _resolve(host, port))
        for address in others:
            try:
                return await self._network.connect_tcp(str(address), port, CONNECT_SECONDS)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout):
                continue
        return await self._network.connect_tcp(str(last), port)

    async def connect_unix_socket(
        self,
        path: str,
        timeout: float | None = None,  # noqa: ASYNC109  # the library's signature
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        """Refuse: a socket in the file system is nobody outside."""
        raise NotImplementedError

    def _permitted(self, host: str, addresses: Sequence[Address]) -> Sequence[Address]:
        permitted = [each for each in addresses if is_public(each) or self._is_allowed(each)]
        if permitted:
            return permitted[:MOST_ADDRESSES]
        found = addresses[0]
        where = str(found) if host == str(found) else f"{host} is {found}, which"
        raise AddressRefused(
            f"{where} is not a public address, so it is not called; "
            f"to permit it, add {found} or its network to FORWARD_ALLOW"
        )

    def _is_allowed(self, address: Address) -> bool:
        return any(address in network for network in self._allow)


async def _resolve(host: str, port: int) -> Sequence[Address]:
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no name that could be looked up"
        raise Unreachable(f"the name {host} cannot be resolved: {reason}") from error
    return tuple(dict.fromkeys(_address(str(entry[4][0])) for entry in found))


def _address(text: str) -> Address:
    address = ip_address(text)
    # Written as IPv6, it is an IPv4 address nevertheless, and is called as one.
    return getattr(address, "ipv4_mapped", None) or address


# What is open on each event loop: the connections, and what closes them when the loop ends.
_Open = dict[asyncio.AbstractEventLoop, tuple[httpcore2.AsyncConnectionPool, AsyncGenerator[None]]]


class _Pools:
    """A pool of connections for each running event loop, closed when its loop ends."""

    def __init__(self, network: httpcore2.AsyncNetworkBackend) -> None:
        self._network = network
        self._trust = _trust()
        self._open: _Open = {}
        # Keeps alive what is open until it is closed, also when this object goes first.
        weakref.finalize(self, _close_all, self._open).atexit = False

    async def of_this_loop(self) -> httpcore2.AsyncConnectionPool:
        """Give the pool of the running loop."""
        loop = asyncio.get_running_loop()
        if loop not in self._open:
            await self._begin(loop)
        return self._open[loop][0]

    async def _begin(self, loop: asyncio.AbstractEventLoop) -> None:
        for ended in [each for each in tuple(self._open) if each.is_closed()]:
            self._open.pop(ended, None)
        pool = httpcore2.AsyncConnectionPool(
            ssl_context=self._trust,
            max_connections=None,
            max_keepalive_connections=IDLE_CONNECTIONS,
            keepalive_expiry=IDLE_SECONDS,
            network_backend=self._network,
        )
        life = _live(loop, pool, self._open)
        self._open[loop] = (pool, life)
        await anext(life)


def _trust() -> ssl.SSLContext:
    """Give the authorities that certificates are checked against; there is no way around it."""
    try:
        return httpcore2.default_ssl_context()
    except OSError as error:
        raise ConfigError(
            "SSL_CERT_FILE or SSL_CERT_DIR names something that cannot be read as certificates "
            f"({type(error).__name__}): correct it, or leave it out for those of the system"
        ) from error


async def _live(
    loop: asyncio.AbstractEventLoop, pool: httpcore2.AsyncConnectionPool, opened: _Open
) -> AsyncGenerator[None]:
    # A loop that ends closes the generators which began on it. Nothing else says that it
    # ends while connections can still be closed in good order.
    try:
        yield
    finally:
        opened.pop(loop, None)
        await pool.aclose()


def _close_all(opened: _Open) -> None:
    for loop, (_, life) in tuple(opened.items()):
        # A loop that is closed has closed them already.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(loop.create_task, life.aclose())


def _request_headers(
    url: httpx2.URL, headers: Mapping[str, str] | None
) -> Sequence[tuple[bytes, bytes]]:
    own = {"Host": _name(url), "Accept-Encoding": "identity", "User-Agent": "atlas-receiver"}
    every = {**own, **(headers or {})}
    try:
        return [(name.encode("ascii"), value.encode("ascii")) for name, value in every.items()]
    except UnicodeEncodeError:
        raise RequestRefused("a header of the request holds a character beyond ASCII") from None


def _headers(response: httpcore2.Response) -> Mapping[str, str]:
    found: dict[str, str] = {}
    for raw_name, raw_value in response.headers:
        # Any byte is a character in this one; other encodings would fail on some.
        name, value = raw_name.decode("latin-1").lower(), raw_value.decode("latin-1")
        found[name] = f"{found[name]}, {value}" if name in found else value
    return found


def _check_declared(answer: Answer, url: httpx2.URL, max_bytes: int) -> None:
    if answer.is_packed:
        raise BrokenAnswer(f"{_name(url)} answered with a packed body, although asked for a plain")
    declared = answer.headers.get("content-length", "")
    if declared.isdigit() and (len(declared) > 18 or int(declared) > max_bytes):  # noqa: PLR2004  # digits of 64 bits
        raise _too_large(url, max_bytes)


def _too_large(url: httpx2.URL, max_bytes: int) -> TooLarge:
    return TooLarge(f"{_name(url)} answered with more than {max_bytes} bytes")


@contextmanager
def _named_failures(url: httpx2.URL, timer: asyncio.Timeout, limit: timedelta) -> Iterator[None]:
    """Turn what the library raises into our own few exceptions."""
    try:
        yield
    except TimeoutError as error:
        if not timer.expired():
            raise
        seconds = f"{limit.total_seconds():g}"
        raise DeadlinePassed(f"{_name(url)} did not answer in full within {seconds} s") from error
    except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
        raise Unreachable(f"{_name(url)} cannot be reached: {_reason(error)}") from error
    except (httpcore2.NetworkError, httpcore2.TimeoutException) as error:
        raise BrokenAnswer(f"{_name(url)} hung up before it had answered in full") from error
    except httpcore2.LocalProtocolError:
        # The text of that error quotes what stands in the header.
        raise RequestRefused("a header of the request cannot be sent") from None
    except httpcore2.ProtocolError as error:
        reason = str(error)[:LONGEST_REASON]
        raise BrokenAnswer(f"{_name(url)} did not answer as HTTP is spoken: {reason}") from error


def _reason(error: BaseException) -> str:
    # What the library caught; it is not chained any more when it arrives here.
    cause = error.args[0] if error.args else None
    if isinstance(cause, ssl.SSLCertVerificationError):
        return f"its certificate is not valid: {cause.verify_message}"
    if isinstance(cause, ssl.SSLError):
        return f"TLS failed: {cause.reason}"
    return str(error)[:LONGEST_REASON] or "the connection was refused or broken"


def _name(url: httpx2.URL) -> str:
    return url.netloc.decode("ascii")
