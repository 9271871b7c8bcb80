"""The flight recorder: everything that happened to one envelope, in one order."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from app.errors import NotAllowed, NotFound
from app.events.redaction import redact
from app.store import history
from app.store.deliveries import EVERYTHING
from app.store.history import Said
from app.store.session import Connection, Database
from app.store.sight import Sight
from app.upkeep import sentences

LIMIT = timedelta(seconds=5)
PAGE, LARGEST_PAGE = 100, 500
# What is of one instant stands in this order.
KINDS = (
    "expected",
    "silent",
    "event",
    "copies",
    "delivery",
    "attempt",
    "act",
    "archived",
    "erased",
)


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing that happened: when, in one sentence, and with what is known of it."""

    kind: str
    at: datetime
    summary: str
    about: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Story:
    """What happened to an envelope: a page of events, and all that belongs to them."""

    account: str
    envelope_id: str
    # What it is now; None if no event of Atlas has made a row.
    envelope: Any
    entries: tuple[Entry, ...]
    # The event behind which the next page begins; None behind the last.
    next_after: UUID | None
    # False if some deliveries, attempts or acts were left out: they were too many.
    is_complete: bool


async def explain(
    database: Database,
    envelope_id: str,
    *,
    sight: Sight = EVERYTHING,
    after: UUID | None = None,
    limit: int = PAGE,
) -> Story:
    """Tell what happened to an envelope, a page of its events at a time.

    What came of an event stands on its page, also if it happened later. Raises `NotFound`, and
    `NotAllowed` if several accounts that may be seen know this envelope.
    """
    size = max(1, min(limit, LARGEST_PAGE))
    async with database.begin(limit=LIMIT, is_reading=True) as connection:
        account = await _account(connection, sight, envelope_id)
        envelope = await history.envelope(connection, account, envelope_id)
        said = await history.events(connection, account, envelope_id, after=after, limit=size + 1)
        page = _Page(account, envelope_id, envelope, said[:size])
        await page.read(connection)
        begins = said[0].received_at if said and after is not None else None
        ends = said[size].received_at if len(said) > size else None
        expectation = await history.expectation(connection, account, envelope_id)
    moments = [
        entry
        for entry in _moments(envelope, expectation)
        if (begins is None or begins <= entry.at) and (ends is None or entry.at < ends)
    ]
    return Story(
        account=account,
        envelope_id=envelope_id,
        envelope=envelope,
        entries=tuple(sorted([*page.entries(), *moments], key=_order)),
        next_after=said[size - 1].id if len(said) > size else None,
        is_complete=page.is_complete,
    )


async def _account(connection: Connection, sight: Sight, envelope_id: str) -> str:
    accounts = await history.accounts_of(connection, sight, envelope_id)
    if not accounts:
        raise NotFound(f"There is no envelope {envelope_id} here.")
    if len(accounts) > 1:
        names = " and ".join(map(repr, accounts))
        raise NotAllowed(
            f"The accounts {names} both have this envelope: say which with the header "
            "Atlas-Account (--account on the command line)."
        )
    return accounts[0]


def _order(entry: Entry) -> tuple[datetime, int]:
    return entry.at, KINDS.index(entry.kind)


def _moments(envelope: Any, expectation: Any) -> list[Entry]:
    """Give what happened to the envelope as a whole."""
    moments = []
    if expectation is not None:
        about = {"consumer": expectation.consumer, "due_at": expectation.due_at}
        text = sentences.of_expectation(expectation)
        moments.append(Entry("expected", expectation.created_at, text, about))
        if expectation.silent_at is not None:
            moments.append(Entry("silent", expectation.silent_at, sentences.SILENT))
    if envelope is not None and envelope.archived_at is not None:
        about = {"size": envelope.archive_bytes}
        text = sentences.of_archive(envelope)
        moments.append(Entry("archived", envelope.archived_at, text, about))
    if envelope is not None and envelope.erased_at is not None:
        moments.append(Entry("erased", envelope.erased_at, sentences.ERASED))
    return moments


class _Page:
    """Some events of one envelope, and what belongs to them."""

    def __init__(self, account: str, envelope_id: str, envelope: Any, said: Sequence[Said]) -> None:
        self._account = account
        self._envelope_id = envelope_id
        self._is_erased = envelope is not None and envelope.erased_at is not None
        self._said = said
        self._deliveries: Sequence[Any] = ()
        self._attempts: Sequence[Any] = ()
        self._acts: Sequence[Any] = ()
        self.is_complete = True

    async def read(self, connection: Connection) -> None:
        """Read what belongs to the events; what is too much is left out, and said to be."""
        event_ids = [each.id for each in self._said]
        owed = await history.deliveries(connection, event_ids)
        self._deliveries = self._cut(owed, history.DELIVERIES)
        delivery_ids = [row.id for row in self._deliveries]
        tried = await history.attempts(connection, delivery_ids)
        self._attempts = self._cut(tried, history.ATTEMPTS)
        subjects = [f"event:{id_}" for id_ in event_ids]
        subjects += [f"delivery:{id_}" for id_ in delivery_ids]
        done = await history.acts(connection, [*subjects, self._name])
        self._acts = [act for act in self._cut(done, history.ACTS) if self._is_ours(act)]

    def _cut(self, rows: Sequence[Any], most: int) -> Sequence[Any]:
        self.is_complete = self.is_complete and len(rows) <= most
        return rows[:most]

    @property
    def _name(self) -> str:
        """The name under which the audit has what was done to the envelope itself."""
        return f"envelope:{self._envelope_id}"

    def _is_ours(self, act: Any) -> bool:
        # Another account's envelope of the same id has the same name.
        return act.subject != self._name or (act.details or {}).get("account") == self._account

    def entries(self) -> Iterable[Entry]:
        """Give everything that belongs to the events, in no order."""
        for said in self._said:
            yield self._event(said)
            if said.copies and said.last_copy_at is not None:
                about = {"event_id": said.id, "copies": said.copies}
                yield Entry("copies", said.last_copy_at, sentences.of_copies(said), about)
        asked = self._asked()
        owed = {row.id: row for row in self._deliveries}
        for row in self._deliveries:
            yield _delivery(row, asked_by=asked.get((row.event_id, row.callback, row.generation)))
        for attempt in self._attempts:
            yield _attempt(attempt, owed[attempt.delivery_id])
        yield from map(_act, self._acts)

    def _event(self, said: Said) -> Entry:
        body = "kept" if said.is_kept else "erased" if self._is_erased else "pruned"
        names = set(Said.__dataclass_fields__) - {"id", "is_kept"}
        about = {name: getattr(said, name) for name in names}
        about |= {"event_id": said.id, "body": body}
        return Entry("event", said.received_at, sentences.of_event(said), about)

    def _asked(self) -> dict[tuple[UUID, str, int], str]:
        """Say who asked for which generation of what."""
        return {
            (UUID(act.subject.partition(":")[2]), callback, generation): act.actor
            for act in self._acts
            if act.action == "event.redispatched"
            for callback, generation in (act.details or {}).get("generations", {}).items()
        }


def _delivery(row: Any, *, asked_by: str | None) -> Entry:
    names = ("event_id", "callback", "generation", "state", "attempts", "due_at", "settled_at")
    about = {name: getattr(row, name) for name in names}
    about |= {
        "delivery_id": row.id,
        "last_error": row.last_error,
        "fingerprint": row.fingerprint,
        "asked_by": asked_by,
    }
    return Entry("delivery", row.created_at, sentences.of_delivery(row, asked_by=asked_by), about)


def _attempt(row: Any, delivery: Any) -> Entry:
    names = ("delivery_id", "number", "started_at", "finished_at", "verdict", "worker", "error")
    about = {name: getattr(row, name) for name in names}
    lasted = None if row.started_at is None else row.finished_at - row.started_at
    about |= {
        "event_id": delivery.event_id,
        "callback": delivery.callback,
        "seconds": None if lasted is None else lasted.total_seconds(),
    }
    text = sentences.of_attempt(row, callback=delivery.callback)
    return Entry("attempt", row.finished_at, text, about)


def _act(row: Any) -> Entry:
    about = {
        "actor": row.actor,
        "action": row.action,
        "subject": row.subject,
        "details": redact(row.details),
    }
    return Entry("act", row.at, sentences.of_act(row), about)
