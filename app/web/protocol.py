"""uvicorn's HTTP protocol, and what it leaves open: deadlines and limits of a connection.

Without them one that says nothing, or one byte a minute, or takes no answer, stays for ever.
Broken requests are refused here, before any application, in the same words as everything else.
"""

import asyncio
from collections.abc import Callable, Mapping
from functools import partial
from http import HTTPStatus
from typing import Any, Final

import httptools
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from app.telemetry import Throttle, get_logger
from app.web.errors import problem
from app.web.seats import CUT, WAITS
from app.web.webhooks import LARGE_BODY, Answer, Door

log = get_logger("door")

HEAD_TIME: Final = 10.0
# As long as this an answer may wait for its reader to take more of it.
READER_TIME: Final = 60.0
MAX_HEAD_BYTES: Final = 64 * 1024
MOST_GATHERED: Final = 16 * 1024

_rejections = Throttle(per_second=10)


# Is told the reason and the status of every refusal.
Refused = Callable[[str, int], None]


class Corked:
    """A transport that gathers what is written at once: a head leaves with its body.

    Each write is a packet and a system call otherwise.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._gathered: list[bytes] = []
        self._size = 0
        # Asked several times for each answer.
        self.is_closing = transport.is_closing

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Write soon; much of it at once, so that the transport can ask to wait."""
        if not self._gathered:
            self._loop.call_soon(self._flush)
        self._gathered.append(data)
        self._size += len(data)
        if self._size > MOST_GATHERED:
            self._flush()

    def write_whole(self, data: bytes) -> None:
        """Write now, behind what was gathered."""
        self._flush()
        self._transport.write(data)

    def close(self) -> None:
        """Write what was gathered, and close."""
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        if self._gathered:
            gathered, self._gathered, self._size = self._gathered, [], 0
            # Cut off meanwhile, nobody reads it.
            if not self.is_closing():
                self._transport.write(b"".join(gathered))


class Protocol(HttpToolsProtocol):
    """One connection; the head of each request must come soon, and be of a sane size."""

    cycle: RequestResponseCycle | None  # type: ignore[assignment]  # None until the first request
    transport: Corked  # type: ignore[assignment]  # a transport to everybody else

    head_time: float = HEAD_TIME
    reader_time: float = READER_TIME
    # Beyond so many at once, a connection is told to come again.
    max_connections: int = 8192
    on_refusal: Refused = staticmethod(lambda *_: None)
    # Where small webhooks are taken at once; all else goes to the application.
    door: Door | None = None
    # A request whose application is not started yet: its body may still come with its head.
    _unstarted: RequestResponseCycle | None = None
    # Only while bytes are read can a request be put off until their end; one that waited
    # behind another begins when that is answered, and gets its task at once.
    _is_feeding: bool = False
    _head_timer: asyncio.TimerHandle | None = None
    _reader_timer: asyncio.TimerHandle | None = None
    # What arrived of a head that is not complete yet, and what its lines came to.
    _head_bytes: int = 0
    _line_bytes: int = 0
    # Where in a request the connection is; between two requests in neither.
    _is_in_head: bool = False
    _is_in_body: bool = False
    _upgrade_at: int = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Expect a request at once; if there are too many already, only to refuse it."""
        super().connection_made(Corked(transport, self.loop))  # type: ignore[arg-type]
        if len(self.connections) > 2 * self.max_connections:
            # Not even a refusal: the descriptors are for those who were let in.
            transport.abort()
        elif len(self.connections) > self.max_connections:
            self.app = self._refuse_to_serve
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Expect nothing any more."""
        self._head_is_here()
        self._reader_is_there()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Expect the reader to take what is written for it."""
        super().pause_writing()
        self._expect_reader()

    def resume_writing(self) -> None:
        """Write on: the reader takes it."""
        super().resume_writing()
        self._reader_is_there()

    def data_received(self, data: bytes) -> None:
        """Take some bytes; those of an idle connection are the start of a request."""
        # Counted before it is parsed: where a head ends, the count begins anew.
        if not self._is_in_body:
            self._head_bytes += len(data)
        self._unset_keepalive_if_required()
        before = self.cycle
        was_idle = before is None or before.response_complete
        self._feed(data)
        # Nearly every head is here at once, and needs no timer.
        if was_idle and self.cycle is before and self._head_timer is None:
            self._expect_head()
        if (cycle := self._unstarted) is not None:
            self._unstarted = None
            self._start(cycle)
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

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        """Start the application, but for what the door may take at the end of these bytes."""
        if self._is_feeding and self._is_for_door(cycle, app):
            self._unstarted = cycle
        else:
            super()._start_asgi_task(cycle, app)

    def _is_for_door(self, cycle: RequestResponseCycle, app: Any) -> bool:
        return (
            self.door is not None
            and not self.flow.write_paused
            and not cycle.waiting_for_100_continue
            and app is self.config.loaded_app
            and cycle.scope["method"] == "POST"
            and self.door.is_at(cycle.scope["path"])
        )

    def _start(self, cycle: RequestResponseCycle) -> None:
        if cycle.more_body or len(cycle.body) > LARGE_BODY:
            super()._start_asgi_task(cycle, self.app)
        else:
            assert self.door is not None  # it is why this one waited
            self.door.take(
                cycle.scope,  # type: ignore[arg-type]  # a dict, if a typed one
                bytes(cycle.body),
                partial(self._reply, cycle),
            )

    def _reply(self, cycle: RequestResponseCycle, answer: Answer) -> None:
        """Write what the door says, as the application would have it written."""
        if cycle.disconnected or self.transport.is_closing():
            return
        headers = [*answer.headers, (b"content-length", b"%d" % len(answer.body))]
        if not cycle.keep_alive:
            headers.append((b"connection", b"close"))
        elif (b"connection", b"close") in headers:
            cycle.keep_alive = False
        lines = [b"%b: %b\r\n" % header for header in (*cycle.default_headers, *headers)]
        self.transport.write_whole(
            b"".join([STATUS_LINE[answer.status], *lines, b"\r\n", answer.body])
        )
        cycle.response_started = cycle.response_complete = True
        if not cycle.keep_alive:
            self.transport.close()
        self.on_response_complete()

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
        self._expect_last_words_to_be_taken()
        is_next = self._is_in_head and not self.pipeline and not self.transport.is_closing()
        if is_next and self._head_timer is None:
            self._expect_head()

    def shutdown(self) -> None:
        """Close as soon as what was asked is answered."""
        super().shutdown()
        self._expect_last_words_to_be_taken()

    def timeout_keep_alive_handler(self) -> None:
        """Close a connection on which nothing is asked any more."""
        super().timeout_keep_alive_handler()
        self._expect_last_words_to_be_taken()

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
        self._is_feeding = True
        try:
            while not self._is_parsed(rest):
                # As RFC 9110 has it, an upgrade that nobody offers is ignored. The parser
                # would drop the body, so it reads the same head once more, without that line.
                rest = rest[self._upgrade_at :]
                self.parser.feed_data(self._head_without_upgrade())
        except httptools.HttpParserError:
            self.send_400_response("")
        finally:
            self._is_feeding = False

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
            self._expect_last_words_to_be_taken()

    def _expect_reader(self) -> None:
        if self._reader_timer is None:
            self._reader_timer = self.loop.call_later(self.reader_time, self.transport.abort)

    def _reader_is_there(self) -> None:
        if self._reader_timer is not None:
            self._reader_timer.cancel()
            self._reader_timer = None

    def _expect_last_words_to_be_taken(self) -> None:
        """Closing waits for the reader of what is still to be sent; it must not do so for ever."""
        if self.transport.is_closing() and self.transport.get_write_buffer_size():
            self._expect_reader()

    async def _refuse_to_serve(self, scope: Any, receive: Any, send: Any) -> None:
        """Say that there are too many; an orchestrator must not end the process for that."""
        if scope["path"] == "/livez":
            await self.config.loaded_app(scope, receive, send)
            return
        self._note(503, "connections_full")
        body = problem(503, _DETAILS[503])
        headers = [*_refusal_headers(body), (b"retry-after", b"1"), (b"connection", b"close")]
        await send({"type": "http.response.start", "status": 503, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def _note(self, status: int, reason: str) -> None:
        self.on_refusal(reason, status)
        suppressed = _rejections.pass_or_count()
        if suppressed is not None:
            log.warning("request.rejected", reason=reason, status=status, suppressed=suppressed)

    def _refuse(self, status: int, reason: str) -> None:
        self._head_is_here()
        self._note(status, reason)
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete and not self._is_in_body:
            # A refusal now would be taken for the answer to the request before.
            cycle.keep_alive = False
            return
        if not self._is_in_body or not self._is_being_answered():
            self.transport.write(_response(status))
        self.transport.close()
        self._expect_last_words_to_be_taken()

    def _is_being_answered(self) -> bool:
        """True if something was written for the request whose body this is, or comes first."""
        return bool(self.pipeline) or (self.cycle is not None and self.cycle.response_started)


def listening(
    *, max_connections: int, on_refusal: Refused, door: Door | None = None
) -> type[Protocol]:
    """Give a protocol for so many connections, that tells of every refusal."""
    values = {
        "max_connections": max_connections,
        "on_refusal": staticmethod(on_refusal),
        "door": door,
    }
    return type("Protocol", (Protocol,), values)


_DETAILS: Mapping[int, str] = {
    400: "The request is incomplete or malformed.",
    431: "The head of the request is larger than this service takes.",
    503: "There are too many connections; come again.",
}


def _refusal_headers(body: bytes) -> list[tuple[bytes, bytes]]:
    return [
        (b"content-type", b"application/problem+json"),
        (b"content-length", str(len(body)).encode()),
        (b"cache-control", b"no-store"),
        (b"x-content-type-options", b"nosniff"),
    ]


def _response(status: int) -> bytes:
    body = problem(status, _DETAILS[status])
    headers = [*_refusal_headers(body), (b"connection", b"close")]
    lines = [b"%b: %b" % header for header in headers]
    status_line = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}".encode()
    return b"\r\n".join([status_line, *lines, b"", body])
