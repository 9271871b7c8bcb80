"""Dead letters by their cause: shown, tried again with care, or given up."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import ExitStack, aclosing
from typing import Annotated

from fastapi import APIRouter, HTTPException, Path, Query
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from app.dispatch import failures
from app.dispatch.failures import Progress
from app.store.failures import Cause
from app.store.session import DatabaseError
from app.store.sight import Sight
from app.telemetry import described, get_logger
from app.upkeep.tail import Tail
from app.web.api.deliveries import CallbackName, Seen, refuse_nul
from app.web.api.operator_views import (
    NO_FINGERPRINT,
    Discarded,
    FailureList,
    RetryProgress,
    Why,
    shown_group,
    shown_progress,
)
from app.web.bounded import BoundedRoute
from app.web.deps import Newest, Pool, Waiting
from app.web.deps import Operator as Acting
from app.web.deps import Reader as Looking
from app.web.errors import problems

log = get_logger("api")

MEDIA_TYPE = "application/x-ndjson"
STOPPING = "the service is about to stop; the same request goes on"
FAILED = "the service failed; its log says where"
AWAY = "the database does not answer in time; the same request goes on"
# For what a retry writes down at its end.
LAST_WORDS = 5.0

router = APIRouter(prefix="/api/failures", tags=["failures"], route_class=BoundedRoute)

Fingerprint = Annotated[
    str,
    Path(
        max_length=255,
        description="The cause, as the list names it; `-` goes with `callback`.",
        examples=["0123456789abcdef"],
    ),
]
WhoseCallback = Annotated[
    str | None,
    Query(max_length=255, description="With `-`: whose dead letters without a fingerprint."),
]


@router.get(
    "",
    summary="What deliveries died of",
    responses=problems(404),
)
async def list_failures(
    _: Looking,
    sight: Seen,
    database: Pool,
    *,
    callback: CallbackName = None,
    limit: Annotated[int, Query(ge=1, le=100, description="At most so many causes.")] = 50,
) -> FailureList:
    """Give one item for each cause of which there are dead letters, the latest first.

    What died of the same error, at the same place, in the same callback, for the same type of
    event has one fingerprint. Everything that is dead is read for it.
    """
    refuse_nul("callback", callback)
    found = await failures.list_groups(database, callback=callback, sight=sight, limit=limit)
    return FailureList(items=[shown_group(group) for group in found])


@router.post(
    "/{fingerprint}/retry",
    response_class=StreamingResponse,
    summary="Try again all that died of one cause",
    responses={
        **problems(404, 408, 409, 413, 429),
        200: {
            "description": "One `RetryProgress` a line, until it is over",
            "content": {MEDIA_TYPE: {"schema": RetryProgress.model_json_schema()}},
        },
    },
)
async def retry(  # noqa: PLR0913  # each is a parameter of the request
    fingerprint: Fingerprint,
    acting: Acting,
    sight: Seen,
    database: Pool,
    tail: Newest,
    seats: Waiting,
    *,
    callback: WhoseCallback = None,
    rate: Annotated[
        float,
        Query(ge=0.01, le=10_000, allow_inf_nan=False, description="At most so many a second."),
    ] = failures.RATE,
) -> StreamingResponse:
    """Make dead letters of one cause due, oldest first and a few at a time, and say what comes.

    The answer is a line of JSON four times a second, and ends once each was tried; or before,
    if the failures return, if nothing is delivered to the callback now, or if no worker tries
    anything: its last line says so. Who hangs up stops it, too. What was not made due is a dead
    letter still, and the same request goes on with it.
    """
    cause = _cause(fingerprint, callback, sight)
    with ExitStack() as seat:
        seat.enter_context(seats.take(acting.name))
        steps = failures.retry_group(database, cause, actor=acting.actor, rate=rate)
        # What is refused is refused before anything is answered.
        first = await anext(steps)
        return RetryStream(Retry(first, steps, tail), on_end=seat.pop_all().close)


def _cause(fingerprint: str, callback: str | None, sight: Sight) -> Cause:
    refuse_nul("fingerprint", fingerprint)
    refuse_nul("callback", callback)
    if (fingerprint == NO_FINGERPRINT) != (callback is not None):
        raise HTTPException(422, "`callback` goes with the fingerprint `-`, and only with that.")
    return Cause(None if callback is not None else fingerprint, callback, sight)


@router.post(
    "/{fingerprint}/discard",
    summary="Give up all that died of one cause",
    responses=problems(404, 408, 413),
)
async def discard(  # each is a parameter of the request
    fingerprint: Fingerprint,
    why: Why,
    acting: Acting,
    sight: Seen,
    database: Pool,
    *,
    callback: WhoseCallback = None,
) -> Discarded:
    """Owe the dead letters of one cause no longer; those that die meanwhile stay.

    Cut off in the middle, the same request goes on.
    """
    cause = _cause(fingerprint, callback, sight)
    count = await failures.discard_group(database, cause, reason=why.reason, actor=acting.actor)
    return Discarded(discarded=count)


class Retry:
    """A bulk retry in a task of its own, so that it can come to its end behind who hangs up."""

    def __init__(self, first: Progress, steps: AsyncGenerator[Progress, None], tail: Tail) -> None:
        self._latest = first
        self._is_new = asyncio.Event()
        self._tail = tail
        self._stopped: str | None = None
        self._task = asyncio.create_task(self._run(steps))

    async def _run(self, steps: AsyncGenerator[Progress, None]) -> None:
        try:
            async with aclosing(steps):
                async for self._latest in steps:
                    self._is_new.set()
                    if self._tail.is_closed:
                        self._stopped = STOPPING
                        return
        except DatabaseError as error:
            log.warning("request.failed", error=type(error).__name__)
            self._stopped = AWAY
        except Exception as error:  # noqa: BLE001  # the answer has begun: it has to say so
            log.error("request.crashed", **described(error))  # noqa: TRY400  # no values
            self._stopped = FAILED
        finally:
            self._is_new.set()

    async def lines(self) -> AsyncIterator[bytes]:
        """Give a line for each step; who reads slowly misses some, but never the last."""
        yield self._line()
        while True:
            await self._is_new.wait()
            self._is_new.clear()
            if self._task.done():
                break
            yield self._line()
        yield self._line(is_last=True)

    def _line(self, *, is_last: bool = False) -> bytes:
        stopped = self._stopped or self._latest.stopped
        shown = shown_progress(self._latest, is_last=is_last, stopped=stopped if is_last else None)
        return shown.model_dump_json().encode() + b"\n"

    async def stop(self) -> None:
        """End it where it is, as Ctrl-C does on the command line, and let it write that down."""
        self._task.cancel()
        await asyncio.wait([self._task], timeout=LAST_WORDS)


class RetryStream(StreamingResponse):
    """The lines of a bulk retry, which ends with its reader."""

    def __init__(self, retry: Retry, *, on_end: Callable[[], None]) -> None:
        super().__init__(
            retry.lines(),
            media_type=MEDIA_TYPE,
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )
        self._retry = retry
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the lines while somebody reads them."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            try:
                await self._retry.stop()
            finally:
                self._on_end()
