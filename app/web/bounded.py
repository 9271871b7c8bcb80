"""Routes that read no more of a request's body, and for no longer, than they could ever need."""

import asyncio
from collections.abc import Callable, Coroutine
from datetime import timedelta
from typing import Any, Final

from fastapi import HTTPException, Request, Response
from fastapi.routing import APIRoute
from starlette.types import Message, Receive

MAX_BYTES: Final = 64 * 1024
MAX_TIME: Final = timedelta(seconds=10)


class BoundedRoute(APIRoute):
    """Refuses a body that is larger than anything the API takes, or comes too slowly."""

    max_time = MAX_TIME

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Give the handler, which sees a request that ends in a refusal."""
        answer = super().get_route_handler()

        async def answer_bounded(request: Request) -> Response:
            return await answer(Request(request.scope, _bounded(request.receive, self.max_time)))

        return answer_bounded


def _bounded(receive: Receive, time: timedelta) -> Receive:
    size = 0
    is_over = False
    end = asyncio.get_running_loop().time() + time.total_seconds()

    async def receive_so_much() -> Message:
        nonlocal size, is_over
        # What comes after the body tells only that the caller has gone, and may be long.
        if is_over:
            return await receive()
        try:
            async with asyncio.timeout_at(end):
                message = await receive()
        except TimeoutError:
            detail = f"The body did not arrive within {time.total_seconds():g} seconds."
            raise HTTPException(408, detail, headers={"Connection": "close"}) from None
        is_over = not message.get("more_body", False)
        size += len(message.get("body", b""))
        if size > MAX_BYTES:
            raise HTTPException(413, f"The body is larger than {MAX_BYTES} bytes.")
        return message

    return receive_so_much
