"""HTTP by hand: requests as bytes, however broken, and whatever comes back.

A client library would repair, normalise or refuse most of what is sent here.
"""

import json
import socket
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

# Shorter than the waits, of 30 s and more, that an answer must not need.
DEADLINE = 25.0
NO_BODY = {100, 204, 304}

Header = tuple[bytes, bytes]


@dataclass(frozen=True, slots=True)
class Answer:
    """One response: its status, its headers by lower-case name, its body."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def is_problem(self) -> bool:
        return (
            self.headers.get("content-type") == "application/problem+json"
            and self.json()["status"] == self.status
        )


class Connection:
    """One TCP connection to the service, for bytes in any order and at any time."""

    def __init__(self, port: int, *, host: str = "127.0.0.1") -> None:
        self._socket = socket.create_connection((host, port), timeout=DEADLINE)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._unread = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def send(self, data: bytes) -> None:
        """Send `data`; a server that has hung up already may still have answered."""
        with suppress(ConnectionError):
            self._socket.sendall(data)

    def half_close(self) -> None:
        self._socket.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """Close with a reset instead of an orderly end."""
        self._socket.setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00"
        )
        self.close()

    def close(self) -> None:
        self._socket.close()

    def read(self, *, is_head: bool = False) -> Answer:
        """Read one response; to a HEAD request, without its body."""
        head = self._read_until(b"\r\n\r\n")
        status_line, *lines = head[:-4].split(b"\r\n")
        headers = dict(_header(line) for line in lines)
        status = int(status_line.split(b" ")[1])
        if is_head or status in NO_BODY:
            return Answer(status, headers, b"")
        return Answer(status, headers, self._read_body(headers))

    def is_closed_within(self, seconds: float) -> bool:
        """Whether the service hangs up, having said nothing more, in this time."""
        self._socket.settimeout(seconds)
        try:
            return self._unread == b"" and self._socket.recv(1) == b""
        except ConnectionError:
            return True
        except TimeoutError:
            return False
        finally:
            with suppress(OSError):
                self._socket.settimeout(DEADLINE)

    def _read_body(self, headers: dict[str, str]) -> bytes:
        if headers.get("transfer-encoding") == "chunked":
            return b"".join(self._chunks())
        if "content-length" in headers:
            return self._read_exactly(int(headers["content-length"]))
        return self._read_to_end()

    def _chunks(self) -> Iterable[bytes]:
        while size := int(self._read_until(b"\r\n"), 16):
            yield self._read_exactly(size)
            self._read_exactly(2)
        self._read_until(b"\r\n")

    def _read_until(self, end: bytes) -> bytes:
        while end not in self._unread:
            self._receive()
        found, _, self._unread = self._unread.partition(end)
        return found + end

    def _read_exactly(self, size: int) -> bytes:
        while len(self._unread) < size:
            self._receive()
        found, self._unread = self._unread[:size], self._unread[size:]
        return found

    def _read_to_end(self) -> bytes:
        with suppress(EOFError, ConnectionError):
            while True:
                self._receive()
        found, self._unread = self._unread, b""
        return found

    def _receive(self) -> None:
        data = self._socket.recv(65536)
        if not data:
            raise EOFError(f"the service hung up after {self._unread!r}")
        self._unread += data


def _header(line: bytes) -> tuple[str, str]:
    name, _, value = line.decode("latin-1").partition(":")
    return name.lower(), value.strip()


def request(
    method: str,
    target: str,
    headers: Iterable[Header] = (),
    body: bytes = b"",
    *,
    host: bytes = b"receiver.test",
    declared: int | None = None,
) -> bytes:
    """Write one request; `declared` says another length than the body has."""
    length = len(body) if declared is None else declared
    lines = [f"{method} {target} HTTP/1.1".encode(), b"Host: " + host]
    lines += [name + b": " + value for name, value in headers]
    if length or method in {"POST", "PUT", "PATCH"}:
        lines.append(b"Content-Length: %d" % length)
    return b"\r\n".join([*lines, b"", body])


def chunked(
    target: str, headers: Iterable[Header], *chunks: bytes, end: bytes = b"0\r\n\r\n"
) -> bytes:
    """Write one POST whose body comes in chunks and has no declared length."""
    lines = [f"POST {target} HTTP/1.1".encode(), b"Host: receiver.test"]
    lines += [name + b": " + value for name, value in headers]
    lines.append(b"Transfer-Encoding: chunked")
    parts = [b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks]
    return b"\r\n".join([*lines, b"", b"".join(parts) + end])


def exchange(port: int, data: bytes, *, is_head: bool = False) -> Answer:
    """Send one request on a connection of its own, and read the answer."""
    with Connection(port) as connection:
        connection.send(data)
        return connection.read(is_head=is_head)


def wait_until_listening(port: int, *, seconds: float = 60.0) -> None:
    """Wait until somebody accepts connections on `port`."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            Connection(port).close()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
        else:
            return
