"""uvicorn's HTTP protocol, and what it leaves open: a deadline and a limit for the head.

Without them a connection that says nothing, or one byte a minute, stays for ever. Broken
requests are refused here, before any application, in the same words as everything else.
"""

import asyncio
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Final

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from app.telemetry import Throttle, get_logger
from app.web.errors import problem
from app.web.seats import CUT, WAITS

log = get_logger("door")

HEAD_TIME: Final = 10.0
MAX_HEAD_BYTES: Final = 64 * 1024

_rejections = Throttle(per_second=10)


# Is told the reason and the status of every refusal.
Refused = Callable[[str, int], None]


class Protocol(HttpToolsProtocol):
    """One connection; the head of each request must come soon, and be of a sane size."""

    cycle: RequestResponseCycle | None  # type: ignore[assignment]  # None until the first request

    head_time: float = HEAD_TIME
    on_refusal: Refused = staticmethod(lambda *_: None)
    _head_timer: asyncio.TimerHandle | None = None
    # What arrived of a head that is not complete yet, and what its lines came to.
    _head_bytes: int = 0
    _line_bytes: int = 0
    # Where in a request the connection is; between two requests in neither.
    _is_in_head: bool = False
    _is_in_body: bool = False
    _upgrade_at: int = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Expect a request at once."""
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Expect nothing any more."""
        self._head_is_here()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take some bytes; those of an idle connection are the start of a request."""
        if self._head_timer is None and (self.cycle is None or self.cycle.response_complete):
            self._expect_head()
        # Counted before it is parsed: where a head ends, the count begins anew.
        if not self._is_in_body:
            self._head_bytes += len(data)
        self._unset_keepalive_if_required()
        self._feed(data)
        if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._refuse(431, "head_too_large")

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """Answer what was asked completely before the sender closed its side."""
        if self.cycle is None or self.cycle.response_complete or self._is_in_body:
            return None
        # One that waits for news would wait for nobody: hardly anyone closes only one side.
        if WAITS in self.cycle.scope:
            return None
        self.cycle.keep_alive = False
        return True

    def on_message_begin(self) -> None:
        """Count the lines of each request by themselves."""
        self._line_bytes = 0
        self._is_in_head = True
        super().on_message_begin()
        self.scope[CUT] = self.transport.abort  # type: ignore[typeddict-unknown-key]

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take one line of the head; what follows a chunked body is counted and dropped.

        Some servers drop it and others do not, so it must not decide anything.
        """
        self._line_bytes += len(name) + len(value)
        if self._line_bytes > MAX_HEAD_BYTES:
            raise ValueError("the lines of the head are too many")
        if not self._is_in_body:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Leave the rest of the request to the application and its own deadlines."""
        if self.parser.get_method() == b"CONNECT":
            raise ValueError("there are no tunnels here")
        # It comes again, without what made it one; see `_feed`.
        if self.parser.should_upgrade():
            return
        self._head_is_here()
        self._is_in_head, self._is_in_body = False, True
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """After a request that was refused in the middle, expect the next one at once."""
        if self.parser.should_upgrade():
            return
        self._head_is_here()
        self._is_in_body = False
        super().on_message_complete()
        if self.cycle is not None and self.cycle.response_complete:
            self._expect_head()

    def on_response_complete(self) -> None:
        """Expect the rest of a head that began to arrive before this answer was out."""
        super().on_response_complete()
        is_next = self._is_in_head and not self.pipeline and not self.transport.is_closing()
        if is_next and self._head_timer is None:
            self._expect_head()

    def leave(self) -> None:
        """Cut off one who waited for news and does not take the end of it."""
        if self.cycle is not None and WAITS in self.cycle.scope:
            self.transport.abort()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002  # ours says it as a problem
        """Refuse what is no HTTP, or too much of it."""
        if self._line_bytes > MAX_HEAD_BYTES:
            self._refuse(431, "head_too_large")
        else:
            self._refuse(400, "request_malformed")

    def _feed(self, data: bytes) -> None:
        rest = memoryview(data)
        try:
            while not self._is_parsed(rest):
                # As RFC 9110 has it, an upgrade that nobody offers is ignored. The parser
                # would drop the body, so it reads the same head once more, without that line.
                rest = rest[self._upgrade_at :]
                self.parser.feed_data(self._head_without_upgrade())
        except httptools.HttpParserError:
            self.send_400_response("")

    def _is_parsed(self, data: memoryview) -> bool:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as stop:
            self._upgrade_at = stop.args[0]
            return False
        return True

    def _head_without_upgrade(self) -> bytes:
        version = self.parser.get_http_version().encode()
        lines = [self.parser.get_method() + b" " + self.url + b" HTTP/" + version]
        lines += [name + b": " + value for name, value in self.headers if name != b"upgrade"]
        return b"\r\n".join([*lines, b"", b""])

    def _expect_head(self) -> None:
        self._head_timer = self.loop.call_later(self.head_time, self._give_up)

    def _head_is_here(self) -> None:
        self._head_bytes = 0
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _give_up(self) -> None:
        self._head_timer = None
        if not self.transport.is_closing():
            self.transport.close()

    def _refuse(self, status: int, reason: str) -> None:
        self._head_is_here()
        self.on_refusal(reason, status)
        suppressed = _rejections.pass_or_count()
        if suppressed is not None:
            log.warning("request.rejected", reason=reason, status=status, suppressed=suppressed)
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete and not self._is_in_body:
            # A refusal now would be taken for the answer to the request before.
            cycle.keep_alive = False
            return
        if not self._is_in_body or not self._is_being_answered():
            self.transport.write(_response(status))
        self.transport.close()

    def _is_being_answered(self) -> bool:
        """True if something was written for the request whose body this is, or comes first."""
        return bool(self.pipeline) or (self.cycle is not None and self.cycle.response_started)


def telling(on_refusal: Refused) -> type[Protocol]:
    """Give a protocol that tells of every refusal."""
    return type("Protocol", (Protocol,), {"on_refusal": staticmethod(on_refusal)})


_DETAILS: Mapping[int, str] = {
    400: "The request is incomplete or malformed.",
    431: "The head of the request is larger than this service takes.",
}


def _response(status: int) -> bytes:
    body = problem(status, _DETAILS[status])
    return (
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n"
        "content-type: application/problem+json\r\n"
        f"content-length: {len(body)}\r\n"
        "cache-control: no-store\r\n"
        "x-content-type-options: nosniff\r\n"
        "connection: close\r\n\r\n"
    ).encode() + body
