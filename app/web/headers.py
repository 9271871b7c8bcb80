"""What every answer of the API has in common: its request id, safe headers, one log line.

A plain ASGI layer around everything but the door, and around the handler of defects, too.
"""

import re
import secrets
import time
from collections.abc import Awaitable, Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.telemetry import answering, get_logger

log = get_logger("api")

# What a caller may give; anything else could be two lines, or a page, in somebody's log.
_USABLE = re.compile(rb"[A-Za-z0-9._-]{1,64}")
# Asked so often that nobody wants to read of it.
_SILENT = frozenset({"/livez", "/readyz", "/metrics"})
POLICY = b"default-src 'none'; frame-ancestors 'none'"
# A route may set its own instead.
_DEFAULTS = (
    (b"cache-control", b"no-store"),
    (b"content-security-policy", POLICY),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
)

OnAnswer = Callable[[int], None]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]


class Dressed:
    """An application whose answers have an id and safe headers, and are logged."""

    def __init__(self, app: ASGIApp, *, on_answer: OnAnswer = lambda _: None) -> None:
        self._app = app
        self._on_answer = on_answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = request_id_of(scope) or new_request_id()
        answer = _Answer(send, request_id.encode())
        began = time.monotonic()
        with answering(request_id):
            try:
                await self._app(scope, receive, answer.send)
            finally:
                if scope["path"] not in _SILENT:
                    self._note(scope, answer.status, time.monotonic() - began)

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        self._on_answer(status)
        log.info(
            "request.answered",
            method=scope["method"],
            # What was asked for may hold an address; which route it was holds nothing.
            route=getattr(scope.get("route"), "path_format", None),
            status=status,
            seconds=round(seconds, 4),
            consumer=scope.get("consumer"),
        )


class _Answer:
    """Passes an answer on, and adds to its head what it lacks."""

    def __init__(self, send: Send, request_id: bytes) -> None:
        self._send = send
        self._request_id = request_id
        # As it is if nothing is ever said: the caller went away.
        self.status = 499

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = list(message.get("headers", ()))
            known = {name for name, _ in headers}
            headers += [header for header in _DEFAULTS if header[0] not in known]
            headers.append((b"x-request-id", self._request_id))
            message = {**message, "headers": headers}
        await self._send(message)


def request_id_of(scope: Scope) -> str | None:
    """Give the id that the caller gave its request, if it is one that can be passed on."""
    found: list[bytes] = [value for name, value in scope["headers"] if name == b"x-request-id"]
    if len(found) != 1 or not _USABLE.fullmatch(found[0]):
        return None
    return found[0].decode()


def new_request_id() -> str:
    """Make an id for a request that has none."""
    return secrets.token_hex(16)
