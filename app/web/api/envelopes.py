"""Envelopes: lists of them, and one of them, at once or when something has happened to it."""

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request, Response

from app.errors import InvalidCursor, NotFound, NotYet
from app.store import envelope_lists, searches, sight
from app.store.envelope_lists import Place
from app.store.session import Connection
from app.store.sight import Sight
from app.store.terms import Term
from app.web import cursors
from app.web.api.asked import ListQuery, WaitQuery
from app.web.api.finding import READ_LIMIT, VARY, EnvelopeId, find, refuse_unusable
from app.web.api.schemas import EnvelopePage, EnvelopeView
from app.web.api.watching import Wanted, tag_of, watch
from app.web.deps import AtlasAccount, Newest, Pool, Reader, Waiting
from app.web.errors import problems
from app.web.seats import until_gone

router = APIRouter(prefix="/api", tags=["envelopes"])

IfNoneMatch = Annotated[
    str | None,
    Header(alias="If-None-Match", max_length=2000, description="The ETag of what you have."),
]


@router.get("/envelopes", summary="Envelopes, by what they have in common", responses=problems(404))
async def list_envelopes(
    asked: Annotated[ListQuery, Query()],
    consumer: Reader,
    database: Pool,
    *,
    atlas_account: AtlasAccount = None,
) -> EnvelopePage:
    """Give envelopes, the latest change first.

    A page looks at a bounded number of envelopes, so it may be short, or empty, and still have
    a `next_cursor`; only at the end that is null. One that changes while you read moves to the
    front (with `updated_after`: to the end).
    """
    refuse_unusable("", atlas_account)
    async with database.begin(limit=READ_LIMIT, is_reading=True) as connection:
        seen = await sight.resolve(connection, consumer.accounts, atlas_account)
        rows, following = await _page(connection, seen, asked)
    return EnvelopePage(items=[_shown(row) for row in rows], next_cursor=following)


async def _page(
    connection: Connection, seen: Sight, asked: ListQuery
) -> tuple[Sequence[Any], str | None]:
    if asked.q is not None:
        term = None if asked.cursor is None else Term(*_keys(SEARCH, asked.cursor))
        hits = await searches.search(
            connection, seen, asked.filters(), asked.q, after=term, limit=asked.limit
        )
        return hits.rows, hits.next and cursors.write(SEARCH, hits.next)
    name = BACKWARD if asked.updated_after is None else FORWARD
    after = None if asked.cursor is None else _place(name, asked.cursor)
    page = await envelope_lists.page(
        connection, seen, asked.filters(), after=after, limit=asked.limit
    )
    return page.rows, page.next and _cursor(name, page.next)


# What a cursor names: a place in one list is none in another.
SEARCH, BACKWARD, FORWARD = "envelopes by term", "envelopes", "envelopes forward"


def _cursor(name: str, place: Place) -> str:
    return cursors.write(name, [place.updated_at.isoformat(), place.account, place.id])


def _place(name: str, cursor: str) -> Place:
    moment, account, envelope_id = _keys(name, cursor)
    try:
        updated_at = datetime.fromisoformat(moment)
        return Place(updated_at.astimezone(UTC), account, envelope_id)
    except (ValueError, OverflowError):
        raise _changed() from None


def _keys(name: str, cursor: str) -> list[str]:
    keys = cursors.read(name, cursor, [str, str, str])
    if any(_is_unusable(key) for key in keys):
        raise _changed()
    return keys


def _is_unusable(key: str) -> bool:
    # No row of ours has these, and PostgreSQL could not be asked for them.
    return "\x00" in key or any("\ud800" <= character <= "\udfff" for character in key)


def _changed() -> InvalidCursor:
    return InvalidCursor("a cursor is what an earlier answer gave; this one was changed")


# Takes any path, because an id may hold a "/": so it comes after all others.
@router.get(
    "/envelope/{envelope_id:path}",
    response_model=EnvelopeView,
    summary="One envelope",
    responses={304: {"description": "You have this version"}, **problems(404, 409, 429)},
)
async def get_envelope(  # noqa: PLR0913  # each is a part of the request
    request: Request,
    envelope_id: EnvelopeId,
    asked: Annotated[WaitQuery, Query()],
    *,
    consumer: Reader,
    database: Pool,
    tail: Newest,
    seats: Waiting,
    atlas_account: AtlasAccount = None,
    if_none_match: IfNoneMatch = None,
) -> Any:
    """Give everything known of it, at once or, with `wait`, when something has happened.

    - With `until` the answer leaves as soon as that status has come, or the envelope has come
      to an end; with `min_version`, as soon as it has that version; with both, once both are
      true.
    - With neither, a request that has `If-None-Match` waits for another version, and one that
      has not waits until the envelope is there.
    - When the time is over, or the service stops, the envelope is given as it is: 404 if there
      is none, 503 if `min_version` has not come, and 304 if you have this version.

    Of an id that ends in `/status`, only the progress can be asked for, at `…%2Fstatus/status`;
    the same goes for the other names of routes.
    """
    wanted = Wanted(asked.until, asked.min_version, if_none_match)

    async def look() -> Any | None:
        try:
            return await find(database, consumer, envelope_id, atlas_account)
        except NotFound:
            return None

    row = await look()
    if asked.wait and not (row is not None and wanted.is_met(row)):
        end = asyncio.get_running_loop().time() + asked.wait
        with seats.take(consumer.name):
            async with until_gone(request.scope, request.receive):
                row = await watch(look, wanted, tail=tail, envelope_id=envelope_id, until=end)
    return _answer(row, wanted, envelope_id)


def _answer(row: Any | None, wanted: Wanted, envelope_id: str) -> Response:
    if row is None:
        raise NotFound(f"There is no envelope {envelope_id} here.")
    if not wanted.is_new_enough(row):
        raise NotYet(f"This envelope has version {row.version} so far: ask again later.")
    headers = {"ETag": tag_of(row), "Vary": VARY, "Cache-Control": "private, no-cache"}
    if wanted.is_known(row):
        return Response(status_code=304, headers=headers)
    content = _shown(row).model_dump_json()
    return Response(content, headers=headers, media_type="application/json")


_SHOWN = tuple(name for name in EnvelopeView.model_fields if name != "envelope_id")


def _shown(row: Any) -> EnvelopeView:
    return EnvelopeView(envelope_id=row.id, **{name: getattr(row, name) for name in _SHOWN})
