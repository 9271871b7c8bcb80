"""The one door open to the internet: `POST /webhooks/atlas`.

A plain ASGI endpoint, ahead of routing and middleware: a decorated route would cost more
than everything else on the path together. Refusals come before the body is read where
they can, and nothing is parsed before the signature is proven over the raw bytes.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable, Generator, MutableMapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple, Protocol
from uuid import UUID

from app.errors import NotDurable, RequestRejected, SignatureRejected
from app.events.signature import Key, KeyRing, read_signature
from app.telemetry import Throttle, described, get_logger
from app.web.errors import problem
from app.web.headers import request_id_of

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

log = get_logger("door")

PATH = "/webhooks/atlas"
# A digest of more than this would hold up the loop; it is taken in a thread.
LARGE_BODY = 64 * 1024
_JSON = (b"content-type", b"application/json")
_PROBLEM = (b"content-type", b"application/problem+json")


Refusal = SignatureRejected | RequestRejected | NotDurable
REFUSALS = (SignatureRejected, RequestRejected, NotDurable)


class Answer(NamedTuple):
    """What is answered; its length is added by whoever writes it."""

    status: int
    body: bytes
    headers: tuple[tuple[bytes, bytes], ...]


Reply = Callable[[Answer], None]


class Receipt(Protocol):
    """What recording answers."""

    @property
    def outcome(self) -> Any: ...
    @property
    def event_id(self) -> UUID: ...


class Recorder(Protocol):
    """What the door needs of intake; both raise `NotDurable`."""

    def submit(
        self, body: bytes, *, account: str, key_label: str, on_answer: Callable[[Any], None]
    ) -> None:
        """Begin to record one small authentic body; give its receipt, or a `NotDurable`."""

    async def record(self, body: bytes, *, account: str, key_label: str) -> Receipt:
        """Record one authentic body of any size."""


@dataclass(frozen=True, slots=True)
class DoorLimits:
    """How large a body may be, how long it may take, and what all of them may hold."""

    body_bytes: int = 1024 * 1024
    body_time: timedelta = timedelta(seconds=10)
    pending_bytes: int = 64 * 1024 * 1024


@dataclass(slots=True)
class _Share:
    """What one request holds of the bytes that all may hold."""

    size: int = 0


class Abandoned(Exception):  # not an error of ours: the sender went away
    """The sender closed the connection before its body was complete."""


class Door:
    """Takes a request, and answers only when its event is on disk."""

    def __init__(
        self,
        keyring: KeyRing,
        recorder: Recorder,
        *,
        on_match: Callable[[Key, datetime], None],
        on_refusal: Callable[[str, int], None] = lambda *_: None,
        limits: DoorLimits | None = None,
    ) -> None:
        self._keyring = keyring
        self._recorder = recorder
        self._on_match = on_match
        self._on_refusal = on_refusal
        self._limits = limits or DoorLimits()
        self._rejections = Throttle(per_second=10)
        # What arrived in pieces and is not proven yet, of all requests together: anybody
        # can send that, so it must not grow with the number of connections.
        self._held = 0

    def is_at(self, path: str) -> bool:
        """True if a request for `path` comes to this door, whatever its method."""
        return path.startswith(PATH) and _account_of(path) is not _ELSEWHERE

    def take(self, scope: Scope, body: bytes, reply: Reply) -> None:
        """Answer one request of a small body that is here already; `reply` is called once.

        The same as `__call__`, without a task and its messages: nearly every webhook comes
        this way, and they would cost a third of it.
        """
        try:
            signature, length = _check_head(scope, limit=self._limits.body_bytes)
            key = self._verify(self._sized(body, length), signature, scope)
            self._recorder.submit(
                body,
                account=key.account,
                key_label=key.label,
                on_answer=lambda said: reply(self._settle(said, scope)),
            )
        except Exception as error:  # noqa: BLE001  # the fence: every sender is answered
            reply(self._refuse(_understood(error), scope))

    def _settle(self, said: Receipt | NotDurable, scope: Scope) -> Answer:
        if isinstance(said, NotDurable):
            return self._refuse(said, scope)
        return _acknowledge(said)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; every refusal is a constant problem+json."""
        try:
            receipt = await self._receive(scope, receive)
        except Abandoned:
            log.info("webhook.abandoned")
        except Exception as error:  # noqa: BLE001  # the fence: every sender is answered
            await _send(send, self._refuse(_understood(error), scope))
        else:
            await _send(send, _acknowledge(receipt))

    def _refuse(self, error: Refusal, scope: Scope) -> Answer:
        answer = _refusal(error)
        self._note(error.reason, scope, status=answer.status)
        return answer

    async def _receive(self, scope: Scope, receive: Receive) -> Receipt:
        signature, length = _check_head(scope, limit=self._limits.body_bytes)
        share = _Share()
        try:
            body = await self._read(receive, length, share)
            key = await self._prove(body, signature, scope)
        finally:
            self._held -= share.size
        return await self._recorder.record(body, account=key.account, key_label=key.label)

    async def _prove(self, body: bytes, signature: bytes, scope: Scope) -> Key:
        if len(body) > LARGE_BODY:
            return await asyncio.to_thread(self._verify, body, signature, scope)
        return self._verify(body, signature, scope)

    def _verify(self, body: bytes, signature: bytes, scope: Scope) -> Key:
        now = datetime.now(UTC)
        key = self._keyring.verify(body, signature, account=_account_of(scope["path"]), now=now)
        self._on_match(key, now)
        return key

    async def _read(self, receive: Receive, length: int | None, share: _Share) -> bytes:
        end = asyncio.get_running_loop().time() + self._limits.body_time.total_seconds()
        message = await _next(receive, end)
        # Nearly every body comes in one piece, and then nothing is copied.
        if not message.get("more_body", False):
            return self._sized(message.get("body", b""), length)
        chunks = bytearray(message.get("body", b""))
        while message.get("more_body", False):
            self._sized(chunks, None)
            self._hold(len(chunks), share)
            message = await _next(receive, end)
            chunks += message.get("body", b"")
        self._hold(len(chunks), share)
        return self._sized(bytes(chunks), length)

    def _hold(self, size: int, share: _Share) -> None:
        more = size - share.size
        if self._held + more > self._limits.pending_bytes:
            raise NotDurable("queue_full")
        self._held += more
        share.size = size

    def _sized(self, body: bytes | bytearray, length: int | None) -> bytes:
        if len(body) > self._limits.body_bytes:
            raise RequestRejected("body_too_large", status=413)
        if length is not None and length != len(body):
            raise RequestRejected("body_incomplete", status=400)
        return body  # type: ignore[return-value]  # the caller makes bytes of the whole

    def _note(self, reason: str, scope: Scope, *, status: int) -> None:
        self._on_refusal(reason, status)
        suppressed = self._rejections.pass_or_count()
        if suppressed is not None:
            log.warning(
                "webhook.rejected",
                reason=reason,
                status=status,
                suppressed=suppressed,
                request_id=request_id_of(scope),
            )


def _understood(error: Exception) -> Refusal:
    """Give the refusal that `error` is; of a defect only that the event is not on disk."""
    if isinstance(error, REFUSALS):
        return error
    log.error("webhook.failed", **described(error))
    return NotDurable("defect")


async def _next(receive: Receive, end: float) -> Message:
    """Give the next part of a request, or refuse it at `end`; what is here needs no timer."""
    steps = receive().__await__()
    try:
        # Nearly every body is here already, and a time-out costs more than to take it.
        first = next(steps)
    except StopIteration as here:
        message: Message = here.value
    else:
        try:
            async with asyncio.timeout_at(end):
                message = await _Begun(first, steps)
        except TimeoutError:
            raise RequestRejected("body_too_slow", status=400) from None
    if message["type"] == "http.disconnect":
        raise Abandoned
    return message


class _Begun:
    """What was begun by hand and has to wait, for `await` to go on with."""

    def __init__(self, first: Any, steps: Generator[Any, Any, Any]) -> None:
        self._first = first
        self._steps = steps

    def __await__(self) -> Generator[Any, Any, Message]:
        yield self._first
        message: Message = yield from self._steps
        return message


_ELSEWHERE = "/"


def _account_of(path: str) -> str | None:
    """Read the account that a path names: None for the undirected door."""
    rest = path[len(PATH) :].removesuffix("/")
    if not rest:
        return None
    account = rest[1:]
    return account if rest[0] == "/" and account and "/" not in account else _ELSEWHERE


def _check_head(scope: Scope, *, limit: int) -> tuple[bytes, int | None]:
    """Refuse by the head alone what can be; give the signature and the declared length."""
    if scope["method"] != "POST":
        raise RequestRejected("method_not_allowed", status=405)
    signatures: list[bytes] = []
    length: int | None = None
    for name, value in scope["headers"]:
        if name == b"x-atlas-signature":
            signatures.append(value)
        elif name == b"content-length":
            length = _length(value)
        elif name == b"content-encoding" and value.strip().lower() not in {b"", b"identity"}:
            raise RequestRejected("body_encoded", status=415)
    if length is not None and length > limit:
        raise RequestRejected("body_too_large", status=413)
    return read_signature(signatures), length


def _length(value: bytes) -> int:
    # A parser passes on what is one number; anything else could be read two ways.
    if not value.isdigit() or len(value) > 18:  # noqa: PLR2004  # fits 64 bits
        raise RequestRejected("length_malformed", status=400)
    return int(value)


def _retry_after(error: NotDurable) -> tuple[bytes, bytes]:
    seconds = max(1, math.ceil(error.retry_after.total_seconds()))
    return b"retry-after", str(seconds).encode()


def _acknowledge(receipt: Receipt) -> Answer:
    body = b'{"outcome":"%s","event_id":"%s"}' % (
        receipt.outcome.value.encode(),
        str(receipt.event_id).encode(),
    )
    return Answer(200, body, (_JSON,))


def _refusal(error: Refusal) -> Answer:
    if isinstance(error, NotDurable):
        return Answer(503, _UNAVAILABLE, (_PROBLEM, _retry_after(error)))
    if isinstance(error, SignatureRejected):
        return Answer(401, _UNAUTHORIZED, (_PROBLEM,))
    extra = [_PROBLEM]
    if error.status == 405:  # noqa: PLR2004  # RFC 9110 asks for Allow with it
        extra.append((b"allow", b"POST"))
    elif error.status == 400:  # noqa: PLR2004  # the rest of the body is not waited for
        extra.append((b"connection", b"close"))
    # Elsewhere the rest is read and thrown away, for a while: a sender whose connection is
    # closed in the middle of its body often never sees the answer.
    return Answer(error.status, _REFUSALS[error.status], tuple(extra))


async def _send(send: Send, answer: Answer) -> None:
    length = (b"content-length", str(len(answer.body)).encode())
    headers = [length, *answer.headers]
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": answer.body})


_UNAUTHORIZED = problem(401, "The request is not proven to be from Atlas.")
_UNAVAILABLE = problem(503, "The event could not be stored in time; send it again.")
_REFUSALS = {
    400: problem(400, "The request is incomplete or malformed."),
    405: problem(405, "This door takes POST only."),
    413: problem(413, "The body is larger than this service takes."),
    415: problem(415, "Send the body as it was signed, without a content encoding."),
}
