"""How far one envelope is: what programs ask again and again while they wait.

The route is described like every other one, but answered by a plain function: what a
decorated route does around an answer costs more than this answer.
"""

import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute

from app.store import lookups, sight
from app.store.lookups import Progress
from app.web.api.finding import (
    READ_LIMIT,
    VARY,
    EnvelopeId,
    refuse_unusable,
    the_one,
)
from app.web.api.schemas import StatusView
from app.web.deps import AtlasAccount, Reader, reader
from app.web.errors import problems


async def answer_status(request: Request) -> Response:
    """Answer with the progress of the one envelope that is meant."""
    consumer = reader(request)
    envelope_id: str = request.path_params["envelope_id"]
    account = request.headers.get("atlas-account")
    refuse_unusable(envelope_id, account)
    database = request.app.state.database
    async with database.begin(limit=READ_LIMIT, is_reading=True, is_split=True) as connection:
        seen = await sight.resolve(connection, consumer.accounts, account)
        rows = await lookups.find_progress(connection, seen, envelope_id)
    content = _written(the_one(rows, envelope_id))
    return Response(content, headers={"Vary": VARY}, media_type="application/json")


def _written(row: Progress) -> bytes:
    said = {name: getattr(row, name) for name in StatusView.model_fields}
    return json.dumps(said, ensure_ascii=False).encode()


class Plain(APIRoute):
    """A route whose declaration is for OpenAPI only."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Give the function that answers, past everything that reads declarations."""
        return answer_status


router = APIRouter(prefix="/api/envelope", tags=["envelopes"], route_class=Plain)


@router.get(
    "/{envelope_id:path}/status",
    response_model=StatusView,
    summary="Its progress",
    responses=problems(404, 409),
)
async def get_status(
    envelope_id: EnvelopeId, consumer: Reader, atlas_account: AtlasAccount = None
) -> None:
    """Give status, counts and the next signer, under the names that Atlas uses."""
