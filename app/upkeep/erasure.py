"""Erase the personal data of an envelope, or every trace of an e-mail address.

First it is found, in small reads; then it is erased, one envelope in one transaction. Ended in
the middle, or killed, it can be said again: what is erased is found no more, or changes no more.
What is recorded meanwhile for an envelope that is erased already is recorded without it.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from hashlib import sha256
from typing import Any
from uuid import UUID

from app.errors import AppError, NotAllowed, NotFound
from app.events.erasure import ERASED
from app.events.mentions import Mention, address, identifier
from app.store import deliveries, erasure, terms, traces
from app.store.callbacks import OWN_EVENTS
from app.store.envelopes import EnvelopeKey
from app.store.session import Connection, Database
from app.store.traces import Place, Row
from app.telemetry import get_logger
from app.upkeep.patience import patiently

log = get_logger("retention")

LIMIT, LONG_LIMIT = timedelta(seconds=10), timedelta(seconds=60)
# Of bodies each may be as large as a body may be.
AT_ONCE = 100
# After each page of what is looked through: whoever records events comes first.
PAUSE = timedelta(milliseconds=5)

# Given an account, an envelope and when its events were received: how many files were removed.
RemoveFiles = Callable[[str, str, Iterable[datetime]], Awaitable[int]]


@dataclass(slots=True)
class Traces:
    """Where something was found, and how far the search has come."""

    total: int = 0
    seen: int = 0
    envelopes: set[EnvelopeKey] = field(default_factory=set)
    # About no envelope, or said by ourselves.
    events: set[UUID] = field(default_factory=set)
    deliveries: set[UUID] = field(default_factory=set)
    attempts: set[tuple[UUID, int]] = field(default_factory=set)
    acts: set[UUID] = field(default_factory=set)
    shapes: set[tuple[str, str, str]] = field(default_factory=set)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to erase."""
        others = (self.deliveries, self.attempts, self.acts, self.shapes)
        return not (self.envelopes or self.events or any(others))


@dataclass(frozen=True, slots=True)
class Search:
    """What is to be erased, who wants it, and what of it may be written down."""

    mention: Mention
    account: str | None
    # None if it is about an address.
    envelope: EnvelopeKey | None
    noted: Mapping[str, str]


async def of_envelope(database: Database, envelope_id: str, account: str | None) -> Search:
    """Look for an envelope; raises `NotFound`, or `NotAllowed` if it stands in two accounts."""
    async with database.begin(limit=LIMIT, is_reading=True) as connection:
        keys = await erasure.find(connection, envelope_id, account)
    if not keys:
        raise NotFound(f"there is no envelope {envelope_id} here")
    if len(keys) > 1:
        named = ", ".join(key[0] for key in keys)
        raise NotAllowed(f"envelope {envelope_id} stands in several accounts: {named}; name one")
    [key] = keys
    return Search(identifier(envelope_id), key[0], key, {"by": "envelope"})


def of_address(email: str, account: str | None) -> Search:
    """Look for an e-mail address; of itself only a digest is ever written down."""
    digest = sha256(email.strip().lower().encode("utf-8", "surrogatepass")).hexdigest()
    return Search(address(email), account, None, {"by": "email", "address_sha256": digest})


async def find(
    database: Database, search: Search, *, at_once: int = AT_ONCE
) -> AsyncGenerator[Traces, None]:
    """Look through everything that holds texts; give what was found so far, again and again.

    For one envelope only bytes that belong to no envelope are looked at, such as those in
    quarantine: everything else of it is known.
    """
    places = (traces.EVENTS,) if search.envelope is not None else traces.PLACES
    found = Traces()
    if search.envelope is not None:
        found.envelopes.add(search.envelope)
    async with database.begin(limit=LONG_LIMIT, is_reading=True) as connection:
        found.total = sum([await traces.count(connection, place) for place in places])
    yield found
    for place in places:
        after: tuple[Any, ...] | None = None
        while rows := await patiently(partial(_page, database, place, after, at_once)):
            await asyncio.to_thread(_look, search, place, rows, found)
            after = rows[-1].key
            found.seen += len(rows)
            found.total = max(found.total, found.seen)
            yield found
            await asyncio.sleep(PAUSE.total_seconds())


async def _page(
    database: Database, place: Place, after: Sequence[Any] | None, limit: int
) -> list[Row]:
    async with database.begin(limit=LIMIT, is_reading=True) as connection:
        return await traces.page(connection, place, after=after, limit=limit)


def _look(search: Search, place: Place, rows: Sequence[Row], found: Traces) -> None:
    for row in rows:
        if _is_meant(search, row) and _mentions(search.mention, row):
            _note(place, row, found)


def _is_meant(search: Search, row: Row) -> bool:
    if search.envelope is not None and row.envelope_id is not None:
        return False
    return search.account is None or row.account in {search.account, None}


def _mentions(mention: Mention, row: Row) -> bool:
    return any(_stands_in(mention, text) for text in row.texts) or any(
        map(mention.is_in_path, row.paths)
    )


def _stands_in(mention: Mention, text: Any) -> bool:
    return mention.is_in(text) if isinstance(text, bytes) else mention.is_in_value(text)


def _note(place: Place, row: Row, found: Traces) -> None:
    """Say what has to go. An error that mentions it goes alone: it may be about anything."""
    is_own = (row.type or "").startswith(OWN_EVENTS)
    if place is traces.EVENTS and (is_own or row.envelope_id is None):
        found.events.add(row.key[0])
    elif place in {traces.EVENTS, traces.ENVELOPES, traces.TERMS}:
        found.envelopes.add((row.account or "", row.envelope_id or ""))
    elif place is traces.DELIVERIES:
        found.deliveries.add(row.key[0])
    elif place is traces.ATTEMPTS:
        found.attempts.add((row.key[0], row.key[1]))
    elif place is traces.ACTS:
        found.acts.add(row.key[0])
    else:
        found.shapes.add((row.key[0], row.key[1], row.key[2]))


class _Rehearsed(AppError):
    """Nothing of it counts: it was only to be seen what would happen."""


@dataclass(slots=True)
class Erased:
    """How far it has come: of how many things, what was touched where, and what failed."""

    total: int
    done: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


async def erase(
    database: Database,
    search: Search,
    found: Traces,
    *,
    actor: str,
    remove_files: RemoveFiles,
    is_dry: bool = False,
) -> AsyncGenerator[Erased, None]:
    """Erase what was found; or, if it `is_dry`, do it and take it back, to count what it is."""
    work = _Work(database, search, actor=actor, remove_files=remove_files, is_dry=is_dry)
    steps: list[Callable[[], Awaitable[None]]] = [
        partial(work.envelope, key) for key in sorted(found.envelopes)
    ]
    steps.append(partial(work.rest, found))
    progress = Erased(len(steps))
    yield progress
    for step in steps:
        await step()
        progress.done += 1
        progress.counts, progress.failures = work.counts, work.failures
        yield progress
    if not is_dry:
        log.info(
            "data.erased",
            by=search.noted["by"],
            envelope_id=search.envelope[1] if search.envelope is not None else None,
            counts=dict(work.counts),
            failures=len(work.failures),
        )


class _Work:
    """One erasure while it goes on."""

    def __init__(
        self,
        database: Database,
        search: Search,
        *,
        actor: str,
        remove_files: RemoveFiles,
        is_dry: bool,
    ) -> None:
        self._database = database
        self._search = search
        self._actor = actor
        self._remove_files = remove_files
        self._is_dry = is_dry
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []

    async def _transact(
        self, act: Callable[[Connection], Awaitable[Mapping[str, int]]], limit: timedelta = LIMIT
    ) -> None:
        """Do something in a transaction of its own, and count what it has touched."""
        done: Mapping[str, int] = {}

        async def transact() -> None:
            nonlocal done
            async with self._database.begin(limit=limit) as connection:
                done = await act(connection)
                if self._is_dry:
                    raise _Rehearsed

        with suppress(_Rehearsed):
            await patiently(transact)
        self.counts.update(done)

    async def envelope(self, key: EnvelopeKey) -> None:
        """Erase one envelope: its rows first, so that nothing new is kept; then its files."""
        received: list[datetime] = []
        await self._transact(partial(self._clear, key, received), LONG_LIMIT)
        await self._transact(partial(self._forget_terms, key), LONG_LIMIT)
        await self._clear_files(key, received)

    async def _clear(
        self, key: EnvelopeKey, received: list[datetime], connection: Connection
    ) -> Mapping[str, int]:
        held = await erasure.lock(connection, key)
        is_news = held is not None and await erasure.clear_envelope(connection, held)
        said = await erasure.said_of(connection, key)
        received[:] = [row.received_at for row in said]
        ids = [row.id for row in said]
        counts = {
            "envelopes": int(is_news),
            **await erasure.clear_events(connection, ids),
            "expectations": await erasure.drop_expectation(connection, key),
            "audit": await erasure.clear_acts(connection, key, ids),
        }
        if is_news:
            await deliveries.audit(
                connection,
                actor=self._actor,
                action="envelope.erased",
                subject=f"envelope:{key[1]}",
                details={"account": key[0], **self._search.noted},
            )
        return counts

    async def _forget_terms(self, key: EnvelopeKey, connection: Connection) -> Mapping[str, int]:
        return {"terms": await terms.forget(connection, *key)}

    async def _clear_files(self, key: EnvelopeKey, received: Sequence[datetime]) -> None:
        """Remove what was archived. While that fails, the row says that something is left."""
        async with self._database.begin(limit=LIMIT, is_reading=True) as connection:
            name = await erasure.archived(connection, key)
        if self._is_dry:
            self.counts["files"] += int(name is not None)
            return
        months = {datetime(at.year, at.month, 1, tzinfo=UTC) for at in received}
        # What was kept before the account got its label of today lies under the one of then.
        labels = {key[0], name.partition("/")[0] if name is not None else key[0]}
        try:
            removed = sum([await self._remove_files(each, key[1], months) for each in labels])
        except AppError as error:
            self.failures.append(f"the archived PDF of {key[1]} was not removed: {error}")
            return
        self.counts["files"] += removed
        if name is not None:
            await self._transact(partial(self._forget_archive, key))
        if name is not None and not removed:
            self.failures.append(
                f"ARCHIVE_URL has no file {name}: if another archive has it, remove it there"
            )

    async def _forget_archive(self, key: EnvelopeKey, connection: Connection) -> Mapping[str, int]:
        await erasure.forget_archive(connection, key)
        return {}

    async def rest(self, found: Traces) -> None:
        """Erase what was found apart from envelopes, and write down that all of it was."""
        events = sorted(found.events)
        for start in range(0, len(events), AT_ONCE):
            part = events[start : start + AT_ONCE]
            await self._transact(partial(erasure.clear_events, ids=part))
        await self._transact(partial(self._clear_texts, found))
        if self._search.envelope is None and not self._is_dry:
            await self._transact(self._note)

    async def _clear_texts(self, found: Traces, connection: Connection) -> Mapping[str, int]:
        counts: Counter[str] = Counter()
        counts["deliveries"] += await erasure.clear_errors(connection, sorted(found.deliveries))
        for delivery_id, token in sorted(found.attempts):
            counts["attempts"] += await erasure.clear_attempt(connection, delivery_id, token)
        for act in await erasure.acts(connection, sorted(found.acts)):
            details = self._search.mention.without(act.details, ERASED)
            await erasure.change_act(connection, act.id, details)
            counts["audit"] += 1
        for shape in sorted(found.shapes):
            counts["shapes"] += await erasure.drop_shape(connection, shape)
        return counts

    async def _note(self, connection: Connection) -> Mapping[str, int]:
        noted = self._search.noted
        await deliveries.audit(
            connection,
            actor=self._actor,
            action="address.erased",
            subject=f"address:{noted['address_sha256']}",
            details={**self.counts, "failures": len(self.failures)},
        )
        return {}
