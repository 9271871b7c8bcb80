"""The change feed: by page, by long-poll, and as a stream, all from the same cursors.

Whoever is behind reads from the database, a few at a time; whoever has come to the end
waits for the tail, without a connection, and is served from what is kept there.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property, lru_cache
from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from pydantic import StringConstraints
from starlette.types import Receive, Scope, Send

from app.errors import Gone, InvalidCursor
from app.events.frozen import frozen
from app.store import feed as rows
from app.store.feed import Item, Place
from app.store.session import Connection, Database, DatabaseError
from app.store.sight import Sight, resolve
from app.upkeep.tail import START, Tail, place_of
from app.web import cursors
from app.web.api.event_views import FeedItem, FeedPage
from app.web.deps import AtlasAccount, Pool, Reader, Waiting
from app.web.errors import problems
from app.web.seats import CUT, Seats, until_gone

READ_LIMIT = timedelta(seconds=3)
LONGEST_WAIT = 60
LATEST: Final = "latest"

# How many readers at once look something up, so that they leave connections to others.
_READERS = 2
# How many items one look goes through for those that are asked for.
_SCAN = 2000
# How many items a stream is given at once: what a slow reader keeps in memory.
_AT_ONCE = 100
_PAUSE = 1.0
# How many pages are remembered for others who want the same.
_GIVEN = 64
# How long a reader whose stream has ended waits before it comes again, in milliseconds.
_HELLO = b"retry: 2000\n\n"
_HEARTBEAT = b":\n\n"
_MICROSECOND = timedelta(microseconds=1)


@frozen
class Wanted:
    """What a reader asks for: of what it may see, these types (none: all)."""

    sight: Sight
    types: tuple[str, ...]

    def takes(self, item: Item) -> bool:
        """Whether an item is wanted."""
        accounts, tenant = self.sight.accounts, self.sight.tenant
        if accounts is not None and item.account not in accounts:
            return False
        if tenant is not None and item.tenant != tenant:
            return False
        return not self.types or any(_fits(pattern, item.type) for pattern in self.types)


def _fits(pattern: str, name: str | None) -> bool:
    if pattern == "*":
        return True
    if name is None:
        return False
    if pattern.endswith(".*"):
        return name.startswith(pattern[:-1])
    return name == pattern


@dataclass(frozen=True)
class Page:
    """Items that a reader asked for, and the place up to which everything was looked at.

    Readers who want the same are given the same page, which is written once.
    """

    items: list[Item]
    place: Place
    has_more: bool

    @cached_property
    def content(self) -> bytes:
        """Write it as the answer to one who asked."""
        return b'{"items":[%b],"next_cursor":"%b","has_more":%b}' % (
            b",".join(map(written, self.items)),
            write_cursor(self.place).encode(),
            b"true" if self.has_more else b"false",
        )

    @cached_property
    def frames(self) -> bytes:
        """Write its items as events of a stream."""
        return b"".join(map(framed, self.items))


class Feed:
    """The feed as consumers read it: from the tail what is kept there, else from the database."""

    def __init__(self, database: Database, tail: Tail) -> None:
        self.heartbeat = timedelta(seconds=15)
        # How long a reader of the stream may take nothing of what it was sent.
        self.patience = timedelta(seconds=60)
        self._database = database
        self._tail = tail
        self._looking_up = asyncio.Semaphore(_READERS)
        # What was given from the tail while it ended there: many ask for the same at once.
        self._given: dict[tuple[Place, Wanted, int], Page] = {}
        self._given_at = START

    @property
    def is_closed(self) -> bool:
        """Whether the process is about to stop."""
        return self._tail.is_closed

    async def latest(self) -> Place:
        """Give the place of the newest item."""
        if (known := self._tail.newest) is not None:
            return known
        async with (
            asyncio.timeout(READ_LIMIT.total_seconds()),
            self._looking_up,
            self._database.begin(limit=READ_LIMIT, is_reading=True, is_split=True) as connection,
        ):
            return await rows.head(connection) or START

    async def behind(self, place: Place, wanted: Wanted, *, limit: int, until: float) -> Page:
        """Give what comes next behind a place. Raises `Gone` if that is not known any more.

        Raises a `DatabaseError` if it takes until `until`, a time of the running loop.
        """
        kept = self._tail.behind(place)
        if kept is None:
            return await self.look_up(place, wanted, limit=limit, until=until)
        if not kept:
            return Page([], place, has_more=False)
        end = place_of(kept[-1])
        if self._given_at != end or len(self._given) == _GIVEN:
            self._given, self._given_at = {}, end
        key = place, wanted, limit
        if key not in self._given:
            self._given[key] = self._select(kept, wanted, limit=limit)
        return self._given[key]

    @staticmethod
    def _select(kept: list[Item], wanted: Wanted, *, limit: int) -> Page:
        items: list[Item] = []
        for item in kept:
            if wanted.takes(item):
                items.append(item)
                if len(items) == limit:
                    break
        last = items[-1] if len(items) == limit else kept[-1]
        return Page(items, place_of(last), has_more=last is not kept[-1])

    async def look_up(self, place: Place, wanted: Wanted, *, limit: int, until: float) -> Page:
        """Read from the database what comes next behind a place, and see that it is known."""
        async with asyncio.timeout_at(until):
            await self._looking_up.acquire()
        try:
            async with self._database.begin(
                limit=READ_LIMIT, is_reading=True, is_split=True
            ) as connection:
                await _require_known(connection, place)
                return await _read(connection, place, wanted, limit=limit)
        finally:
            self._looking_up.release()

    async def more(self, place: Place, wanted: Wanted, *, until: float) -> Place:
        """Wait until there may be more behind a place; give the one up to which there is none."""
        return await self._tail.more(place, wanted, until=until)

    async def pause(self, *, until: float) -> None:
        """Wait for a time; the end of the process ends it."""
        await self._tail.pause(until=until)


async def _require_known(connection: Connection, place: Place) -> None:
    if place.position == 0 or place == await rows.place_at(connection, place.position):
        return
    raise Gone(
        "the feed of this database does not have the place that this cursor names: the database "
        "was restored from a backup, or is another one. What was read behind the backup may have "
        "been undone, or have happened again in another order. Compare what you keep with "
        "GET /api/envelopes, and begin anew: without `after` from the first item, or with "
        "after=latest from now on"
    )


async def _read(connection: Connection, place: Place, wanted: Wanted, *, limit: int) -> Page:
    found = await rows.read_filtered(
        connection,
        place.position,
        sight=wanted.sight,
        types=wanted.types,
        limit=limit,
        scan=max(limit, _SCAN),
    )
    head = await rows.head(connection) or START
    last = place
    if found.last == head.position:
        last = head
    elif found.items and found.items[-1].position == found.last:
        last = place_of(found.items[-1])
    elif found.last > place.position:
        last = await rows.place_at(connection, found.last) or place
    return Page(found.items, last, has_more=last.position < head.position)


def write_cursor(place: Place) -> str:
    """Write a place as its readers keep it."""
    return cursors.write("feed", [place.position, (place.at - START.at) // _MICROSECOND])


def read_cursor(cursor: str) -> Place:
    """Give the place that a cursor names. Raises `InvalidCursor`."""
    position, microseconds = cursors.read("feed", cursor, [int, int])
    try:
        place = Place(position, START.at + timedelta(microseconds=microseconds))
    except OverflowError:
        place = None
    if place is None or not 0 <= position < 2**63:
        raise InvalidCursor("a cursor is what an earlier answer gave; this one was changed")
    return place if position else START


# Readers of the same feed are given the same bytes.
@lru_cache(maxsize=2048)
def written(item: Item) -> bytes:
    """Write an item as JSON."""
    values: dict[str, Any] = {
        name: getattr(item, name) for name in FeedItem.model_fields if name != "cursor"
    }
    view = FeedItem.model_construct(cursor=write_cursor(place_of(item)), **values)
    return view.model_dump_json().encode()


@lru_cache(maxsize=2048)
def framed(item: Item) -> bytes:
    """Write an item as an event of a stream."""
    # Without a line break, that would begin another field: types are printable, or no types.
    name = (item.type or item.kind).encode()
    cursor = write_cursor(place_of(item)).encode()
    return b"id: %b\nevent: %b\ndata: %b\n\n" % (cursor, name, written(item))


router = APIRouter(prefix="/api/events", tags=["feed"])

After = Annotated[
    str | None,
    Query(
        max_length=200,
        description=(
            "The cursor behind which to go on. Absent: from the first item. `latest`: from now on."
        ),
    ),
]
Pattern = Annotated[
    str, StringConstraints(max_length=255, pattern=r"^(\*|[^*\x00]+|[^*\x00]+\.\*)$")
]
Types = Annotated[
    list[Pattern] | None,
    Query(
        alias="type",
        max_length=50,
        description=(
            "Only items of these types; may be repeated. A name, a prefix as `envelope.*`, or `*`."
        ),
        examples=[["envelope.signed", "receiver.*"]],
    ),
]


async def _feed(request: Request) -> Feed:
    found: Feed = request.app.state.feed
    return found


async def _wanted(
    database: Pool,
    consumer: Reader,
    *,
    types: Types = None,
    atlas_account: AtlasAccount = None,
) -> Wanted:
    if atlas_account is None:
        accounts = consumer.accounts
        return Wanted(
            Sight(None if accounts is None else tuple(sorted(accounts))), tuple(types or ())
        )
    async with database.begin(limit=READ_LIMIT, is_reading=True) as connection:
        sight = await resolve(connection, consumer.accounts, atlas_account)
    return Wanted(sight, tuple(types or ()))


FeedPart = Annotated[Feed, Depends(_feed)]
WantedItems = Annotated[Wanted, Depends(_wanted)]


async def _place(feed: Feed, after: str | None) -> Place:
    if after is None:
        return START
    return await feed.latest() if after == LATEST else read_cursor(after)


@router.get(
    "",
    response_model=FeedPage,
    summary="The change feed, by page",
    responses=problems(410, 429),
)
async def get_events(  # noqa: PLR0913  # each is a parameter of the request
    request: Request,
    consumer: Reader,
    feed: FeedPart,
    wanted: WantedItems,
    seats: Waiting,
    *,
    after: After = None,
    wait: Annotated[
        int,
        Query(ge=0, le=LONGEST_WAIT, description="Wait so many seconds for an item to come."),
    ] = 0,
    limit: Annotated[int, Query(ge=1, le=1000, description="At most so many items.")] = 100,
) -> Response:
    """Give what happened behind a cursor, in the one order that all readers see.

    Nothing ever appears behind a cursor that was given. Keep `next_cursor` once the items are
    dealt with, also that of an empty page: it has moved on past items that were not asked for.
    A database that was restored from a backup answers the cursors of its lost future with 410.
    """
    until = _now() + READ_LIMIT.total_seconds()
    place = await _place(feed, after)
    # Who does not wait wants what is there now, and not what the tail saw a moment ago.
    look = feed.behind if wait else feed.look_up
    page = await look(place, wanted, limit=limit, until=until)
    if wait and not page.items:
        until = _now() + wait
        with seats.take(consumer.name):
            async with until_gone(request.scope, request.receive):
                page = await _wait(feed, page, wanted, limit=limit, until=until)
    return _answer(page)


def _now() -> float:
    return asyncio.get_running_loop().time()


async def _wait(feed: Feed, page: Page, wanted: Wanted, *, limit: int, until: float) -> Page:
    """Go on until there is something; what is not asked for is left behind meanwhile."""
    while not page.items and not feed.is_closed and _now() < until:
        place = page.place
        if not page.has_more:
            place = await feed.more(place, wanted, until=until)
        soon = _now() + READ_LIMIT.total_seconds()
        page = await feed.behind(place, wanted, limit=limit, until=soon)
    return page


def _answer(page: Page) -> Response:
    return Response(page.content, media_type="application/json")


@router.get(
    "/stream",
    response_class=Response,
    summary="The change feed, as server-sent events",
    responses={
        200: {
            "description": "Each event has the cursor as its id, and the item as its data.",
            "content": {"text/event-stream": {"schema": {"type": "string"}}},
        },
        **problems(410, 429),
    },
)
async def stream_events(
    consumer: Reader,
    feed: FeedPart,
    wanted: WantedItems,
    seats: Waiting,
    *,
    after: After = None,
    last_event_id: Annotated[
        str | None,
        Header(
            alias="Last-Event-ID",
            max_length=200,
            description="The cursor of the item seen last; it counts before `after`.",
        ),
    ] = None,
) -> Response:
    """Give what happened behind a cursor, and then what happens, for as long as you read.

    An event without data moves only the id on, past items that were not asked for. A comment
    each 15 seconds tells that nothing has happened; the stream ends when the service stops, or
    its database was restored: come again with the last id.
    """
    place = await _place(feed, last_event_id or after)
    until = _now() + READ_LIMIT.total_seconds()
    # Refused here, while there still is a status to say it with.
    await feed.behind(place, wanted, limit=1, until=until)
    return Stream(feed, place, wanted, seats=seats, consumer=consumer.name)


class Stream(Response):
    """An answer that goes on for as long as its reader does, on one seat."""

    media_type = "text/event-stream"

    def __init__(
        self, feed: Feed, place: Place, wanted: Wanted, *, seats: Seats, consumer: str
    ) -> None:
        # A proxy in between must not collect what it passes on.
        super().__init__(headers={"X-Accel-Buffering": "no"})
        # Its length is not known.
        del self.headers["content-length"]
        self._feed, self._place, self._wanted = feed, place, wanted
        self._seats, self._consumer = seats, consumer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Take a seat, and tell what there is until the reader leaves or the process stops."""

        async def tell(text: bytes, *, is_more: bool = True) -> None:
            async with asyncio.timeout(self._feed.patience.total_seconds()):
                await send({"type": "http.response.body", "body": text, "more_body": is_more})

        with self._seats.take(self._consumer):
            status, headers = self.status_code, self.raw_headers
            await send({"type": "http.response.start", "status": status, "headers": headers})
            try:
                async with until_gone(scope, receive):
                    await _Telling(self._feed, self._place, self._wanted, tell).run()
                await tell(b"", is_more=False)
            except TimeoutError:
                # It would keep its seat, and what is meant for it, for as long as it likes.
                scope[CUT]()


class _Telling:
    """How far one reader of the stream was told, and when it must hear of us again."""

    def __init__(
        self, feed: Feed, place: Place, wanted: Wanted, tell: Callable[[bytes], Awaitable[None]]
    ) -> None:
        self._feed, self._wanted = feed, wanted
        self._place = self._told = place
        self._send = tell
        self._beat_at = 0.0

    async def run(self) -> None:
        await self._tell(_HELLO)
        # Who is told that the feed is another one comes again with its cursor, and learns why.
        with suppress(Gone):
            while not self._feed.is_closed:
                await self._step()

    async def _step(self) -> None:
        try:
            page = await self._feed.behind(
                self._place, self._wanted, limit=_AT_ONCE, until=self._beat_at
            )
        except DatabaseError:
            page = Page([], self._place, has_more=True)
            await self._feed.pause(until=min(self._beat_at, _now() + _PAUSE))
        self._place = page.place
        if page.items:
            self._told = place_of(page.items[-1])
            await self._tell(page.frames)
        elif not page.has_more:
            self._place = await self._feed.more(page.place, self._wanted, until=self._beat_at)
        if _now() >= self._beat_at:
            await self._tell(self._heartbeat())

    def _heartbeat(self) -> bytes:
        """Say that nothing has come, and how far it was looked at: so no reader looks again."""
        if self._told == self._place:
            return _HEARTBEAT
        self._told = self._place
        return b"id: %b\n\n" % write_cursor(self._place).encode()

    async def _tell(self, text: bytes) -> None:
        await self._send(text)
        self._beat_at = _now() + self._feed.heartbeat.total_seconds()
