"""Routes that read no more of a request's body than they could ever need."""

from collections.abc import Callable, Coroutine
from typing import Any, Final

from fastapi import HTTPException, Request, Response
from fastapi.routing import APIRoute
from starlette.types import Message, Receive

MAX_BYTES: Final = 64 * 1024


class BoundedRoute(APIRoute):
    """Refuses a body that is larger than anything the API takes, however it was declared."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Give the handler, which sees a request that ends in a refusal."""
        answer = super().get_route_handler()

        async def answer_bounded(request: Request) -> Response:
            return await answer(Request(request.scope, _bounded(request.receive)))

        return answer_bounded


def _bounded(receive: Receive) -> Receive:
    size = 0

    async def receive_so_much() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > MAX_BYTES:
            raise HTTPException(413, f"The body is larger than {MAX_BYTES} bytes.")
        return message

    return receive_so_much
