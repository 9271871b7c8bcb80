"""What events look like, and what was never seen in one before."""

from datetime import datetime, timedelta
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field

from app.errors import InvalidCursor, NotFound
from app.store import shapes, sight
from app.store.shapes import Known
from app.web import cursors
from app.web.deps import AtlasAccount, Pool, Reader
from app.web.errors import problems

LIMIT = timedelta(seconds=3)
_LIST = "drift"

router = APIRouter(prefix="/api/drift", tags=["events"])


class TraitView(BaseModel):
    """One thing that bodies of a type have."""

    model_config = ConfigDict(from_attributes=True)

    type: str = Field(description="The type of the events.", examples=["envelope.signed"])
    kind: str = Field(
        description="`field`, `status` (a word for one), or `type`: of the type itself.",
        examples=["field"],
    )
    path: str = Field(
        description=(
            "A field with its JSON type, or a word with where it stood. Of a type itself: "
            "`seen`, and `learned` once what is new counts as drift."
        ),
        examples=["parties[].email:string", "status=signed"],
    )
    first_seen_at: datetime = Field(examples=["2026-07-01T09:30:00Z"])
    event_id: UUID | None = Field(
        description="The event that showed it first; null if it is not yours to see.",
        examples=["01890a5d-ac96-774b-bcce-b302099a8057"],
    )
    is_drift: bool = Field(
        description="It was new when the type had been learned already.", examples=[True]
    )


class DriftPage(BaseModel):
    """Some of what is known, and where to go on."""

    items: list[TraitView]
    next_cursor: str | None = Field(examples=[None])


@router.get("", summary="What events look like", responses=problems(404, 422))
async def list_drift(
    consumer: Reader,
    database: Pool,
    *,
    type_: Annotated[
        str | None, Query(alias="type", max_length=128, description="Only of this type.")
    ] = None,
    cursor: Annotated[
        str | None, Query(max_length=4096, description="Where an earlier answer ended.")
    ] = None,
    limit: Annotated[int, Query(ge=1, le=100, description="At most so many.")] = 50,
    atlas_account: AtlasAccount = None,
) -> DriftPage:
    """List fields, status words and types with when each was first seen, in their order.

    Only names are kept, and no values. What is new in a type that was learned already says
    `is_drift`: Atlas may have begun to send something that nobody here reads yet.
    """
    if "\x00" in (type_ or "") + (atlas_account or ""):
        raise NotFound("There is no type or account with a NUL in it.")
    after = None if cursor is None else _place(cursor)
    async with database.begin(limit=LIMIT, is_reading=True) as connection:
        seen = await sight.resolve(connection, consumer.accounts, atlas_account)
        found = await shapes.page(connection, seen, of_type=type_, after=after, limit=limit + 1)
    items = [TraitView.model_validate(shape) for shape in found[:limit]]
    more = len(found) > limit
    return DriftPage(
        items=items,
        next_cursor=cursors.write(_LIST, found[limit - 1][:3]) if more else None,
    )


def _place(cursor: str) -> Known:
    place = Known(*cursors.read(_LIST, cursor, [str, str, str]))
    # Our names are printable; what is not may not even be asked for.
    if not "".join(place).isprintable():
        raise InvalidCursor("a cursor is what an earlier answer gave; this one was changed")
    return place
