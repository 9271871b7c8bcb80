"""A body that the API reads is short and comes at once; another one is not waited for."""

import asyncio
import json
from collections.abc import MutableMapping
from datetime import timedelta
from typing import Annotated, Any

import pytest
from fastapi import Body, FastAPI

from app.web import errors
from app.web.bounded import MAX_BYTES, BoundedRoute

Message = MutableMapping[str, Any]


class Hurried(BoundedRoute):
    """With a deadline that a test can wait for."""

    max_time = timedelta(milliseconds=200)


def _application(route: type[BoundedRoute]) -> FastAPI:
    app = FastAPI()
    app.router.route_class = route
    errors.install(app)

    @app.post("/")
    async def echo(text: Annotated[str, Body()]) -> str:
        return text

    return app


async def post(
    *pieces: bytes, pause: float = 0, route: type[BoundedRoute] = BoundedRoute
) -> tuple[int, dict[bytes, bytes], Any]:
    """Send a body in pieces, with a pause before each; after the last one, say nothing."""
    waiting = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
    waiting[-1]["more_body"] = pieces[-1] == b""
    said: list[Message] = []

    async def receive() -> Message:
        if not waiting:
            await asyncio.Event().wait()
        await asyncio.sleep(pause)
        return waiting.pop(0)

    async def send(message: Message) -> None:
        said.append(message)

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": headers}
    async with asyncio.timeout(10):
        await _application(route)(scope, receive, send)
    body = b"".join(message.get("body", b"") for message in said)
    return said[0]["status"], dict(said[0]["headers"]), json.loads(body)


class TestBody:
    async def test_that_comes_in_time_is_read(self) -> None:
        status, _, said = await post(b'"what was ', b'sent"')

        assert (200, "what was sent") == (status, said)

    @pytest.mark.parametrize("is_moving", [False, True], ids=["stalls", "trickles"])
    async def test_that_does_not_end_is_not_waited_for(self, *, is_moving: bool) -> None:
        pieces = [b" "] * 100 if is_moving else [b'"']

        status, headers, said = await post(
            *pieces, b"", pause=0.05 if is_moving else 0, route=Hurried
        )

        assert (408, 408) == (status, said["status"])
        assert b"close" == headers[b"connection"]

    async def test_that_is_larger_than_any_is_refused(self) -> None:
        status, _, _ = await post(b"x" * MAX_BYTES, b"x")

        assert 413 == status
