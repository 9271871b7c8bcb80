"""Who is asking: bearer tokens, what each may do, and whose envelopes it may see."""

import hashlib
import hmac
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Header, HTTPException, Request

from app.store.session import Database
from app.upkeep.tail import Tail
from app.web.seats import Seats


@dataclass(frozen=True, slots=True)
class Consumer:
    """Another service that may ask: its scopes, and its accounts (None: all)."""

    name: str
    scopes: frozenset[str]
    accounts: frozenset[str] | None

    @property
    def actor(self) -> str:
        """How the audit names this consumer."""
        return f"api:{self.name}"


class Tokens:
    """Recognises a consumer by its token, in a time that does not tell how near a guess is."""

    def __init__(self, tokens: Iterable[tuple[str, Consumer]]) -> None:
        # Digests are compared, so that neither length nor content shows in the time.
        self._known = [(_digest(token.encode()), consumer) for token, consumer in tokens]

    def recognise(self, token: bytes) -> Consumer | None:
        """Give the consumer whose token this is; every known token is compared."""
        digest = _digest(token)
        found = None
        for known, consumer in self._known:
            if hmac.compare_digest(known, digest):
                found = consumer
        return found


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()


# What follows is asynchronous only so that FastAPI does not run it in a thread each time, which
# costs more than everything else that such a request does.
async def database(request: Request) -> Database:
    """Give the pool of the API."""
    found: Database = request.app.state.database
    return found


async def tail(request: Request) -> Tail:
    """Give the newest items of the feed, which all who wait share."""
    found: Tail = request.app.state.tail
    return found


async def seats(request: Request) -> Seats:
    """Give the places of those who wait."""
    found: Seats = request.app.state.seats
    return found


def recognise(request: Request) -> Consumer:
    """Require a bearer token."""
    tokens: Tokens = request.app.state.tokens
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    found = None
    if scheme.lower() == "bearer":
        # Starlette reads headers as latin-1; this gives back the bytes that were sent.
        found = tokens.recognise(token.strip(" \t").encode("latin-1"))
    if found is None:
        raise HTTPException(
            401, "This needs a token of API_TOKENS.", headers={"WWW-Authenticate": "Bearer"}
        )
    # For the line that the log has of every answer.
    request.scope["consumer"] = found.name
    return found


def require(consumer: Consumer, scope: str) -> Consumer:
    """Require that a consumer has a scope."""
    if scope not in consumer.scopes:
        raise HTTPException(403, f"This token has not the scope {scope!r}.")
    return consumer


def reader(request: Request) -> Consumer:
    """Require a token that may read, for a route that reads no declarations."""
    return require(recognise(request), "read")


async def consumer(request: Request) -> Consumer:
    """Require a bearer token, whatever it may do."""
    return recognise(request)


def _allowed(scope: str) -> Callable[[Consumer], Coroutine[Any, Any, Consumer]]:
    async def allowed(consumer: Annotated[Consumer, Depends(consumer)]) -> Consumer:
        return require(consumer, scope)

    return allowed


Reader = Annotated[Consumer, Depends(_allowed("read"))]
Operator = Annotated[Consumer, Depends(_allowed("operate"))]
RawReader = Annotated[Consumer, Depends(_allowed("raw"))]
Pool = Annotated[Database, Depends(database)]
Newest = Annotated[Tail, Depends(tail)]
Waiting = Annotated[Seats, Depends(seats)]
AtlasAccount = Annotated[
    str | None,
    Header(
        alias="Atlas-Account",
        description="An account label, `ext_<tenant>`, or a connected account's id.",
        max_length=255,
    ),
]
