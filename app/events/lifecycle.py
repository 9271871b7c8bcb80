"""Say what an event does to its envelope, so that the order of arrival cannot matter.

    draft < pending < expired < voided < declined < signed

The status is the largest that was ever said. Every other column follows the event with the
larger *stamp*: further along the lattice, later by Atlas' clock, more signatures, newer
fields, and at last by its text. Taking the largest of a set gives the same answer in any
order and however often, which is all that a sender without sequence numbers leaves us.
"""

import json
from collections.abc import Mapping
from dataclasses import field, fields, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from operator import attrgetter
from typing import Final

from app.events import parties as people
from app.events.frozen import frozen
from app.events.parties import Parties
from app.events.payload import Event
from app.events.redaction import Json

STATUSES: Final = ("draft", "pending", "expired", "voided", "declined", "signed")
TERMINAL: Final = frozenset({"expired", "voided", "declined", "signed"})

# What an event of the life cycle says by its name alone. Only these move the status.
IMPLIED_STATUS: Final[Mapping[str, str]] = {
    "envelope.created": "draft",
    "envelope.detecting": "draft",
    "envelope.review": "draft",
    "envelope.sent": "pending",
    "envelope.in_progress": "pending",
    "envelope.expired": "expired",
    "envelope.voided": "voided",
    "envelope.declined": "declined",
    "envelope.signed": "signed",
}
MILESTONES: Final[Mapping[str, str]] = {
    "envelope.created": "created_at",
    "envelope.sent": "sent_at",
    "envelope.viewed": "viewed_at",
    "envelope.signed": "signed_at",
    "envelope.declined": "declined_at",
    "envelope.voided": "voided_at",
    "envelope.expired": "expired_at",
    "envelope.extracted": "extracted_at",
    "contract.extracted": "extracted_at",
}

_RANK: Final = {status: rank for rank, status in enumerate(STATUSES)}
_UNKNOWN_RANK: Final = -1
_TYPE_RANK: Final = {
    "envelope.viewed": _RANK["pending"],
    "envelope.extracted": _RANK["signed"],
    "contract.extracted": _RANK["signed"],
    **{name: _RANK[status] for name, status in IMPLIED_STATUS.items()},
}
_FIRST_INSTANT: Final = datetime(1, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)

Stamp = list[int]


class Effect(StrEnum):
    """What an event did to its envelope."""

    APPLIED = "applied"
    REFRESHED = "refreshed"
    STALE = "stale"
    MILESTONE = "milestone"
    UNKNOWN = "unknown"
    CONFLICT = "conflict"
    QUARANTINED = "quarantined"


@frozen
class Envelope:
    """The columns of an envelope that events decide.

    `marks` is what the decision remembers, and is JSON: a stamp for every column
    (`stamps`), the furthest that each party ever got (`parties`), and the milestones whose
    time is that of our receipt (`ours`).
    """

    status: str | None = None
    status_word: str | None = None
    disputed: bool = False
    tenant: str | None = None
    created_at: datetime | None = None
    sent_at: datetime | None = None
    viewed_at: datetime | None = None
    signed_at: datetime | None = None
    declined_at: datetime | None = None
    voided_at: datetime | None = None
    expired_at: datetime | None = None
    extracted_at: datetime | None = None
    parties: Parties | None = None
    signed_count: int | None = None
    total: int | None = None
    next_signer_email: str | None = None
    metadata: dict[str, Json] | None = None
    external_id: str | None = None
    client_reference_id: str | None = None
    is_test: bool | None = None
    send_error: str | None = None
    detection_error: str | None = None
    fields_status: str | None = None
    fields_version: int | None = None
    extraction: Json | None = None
    decline_reason: str | None = None
    void_reason: str | None = None
    marks: dict[str, Json] = field(default_factory=dict)


BLANK: Final = Envelope()

_COLUMNS: Final = tuple(column.name for column in fields(Envelope))
_POSITION: Final = {name: position for position, name in enumerate(_COLUMNS)}
_read_columns = attrgetter(*_COLUMNS)
_CONTEXT: Final = (
    "tenant",
    "metadata",
    "external_id",
    "client_reference_id",
    "is_test",
    "send_error",
    "detection_error",
    "fields_status",
    "extraction",
    "decline_reason",
    "void_reason",
)
_read_context = attrgetter(*_CONTEXT)
_text_of = json.JSONEncoder(sort_keys=True, separators=(",", ":")).encode


def project(envelope: Envelope, event: Event, *, received_at: datetime) -> tuple[Envelope, Effect]:
    """Return the envelope after `event`, and what the event did to it."""
    step = _Step(envelope, event)
    step.say_status()
    step.pass_milestone(received_at)
    step.bring_context()
    step.bring_parties()
    after = step.taken()
    return after, _effect(envelope, after, event)


def refresh(envelope: Envelope, event: Event, *, received_at: datetime) -> Envelope:
    """Return the envelope after a duplicate: it says the same, but may know more.

    The status stays where it is: a duplicate repeats the core of the first, and what that
    said may have been overruled since.
    """
    step = _Step(envelope, event)
    step.pass_milestone(received_at)
    step.bring_context()
    step.bring_parties()
    return step.taken()


def accept(envelope: Envelope, event: Event, *, received_at: datetime) -> Envelope:
    """Return the envelope after an event whose word a person takes over all that was said.

    This is a way down for the status. Of the parties the furthest still stands, and every
    milestone that was passed. Whether it stays disputed is up to whoever knows what else was
    said.
    """
    stamps: dict[str, Stamp] = envelope.marks.get("stamps", {})
    said = _columns_of(event) & stamps.keys()
    others = {name: stamp for name, stamp in stamps.items() if name not in said}
    start = replace(
        envelope,
        status=None if event.type in IMPLIED_STATUS else envelope.status,
        disputed=False,
        marks={**envelope.marks, "stamps": others},
    )
    after, _ = project(start, event, received_at=received_at)
    # A copy of what is overruled must not come back by its larger stamp, or its larger text.
    fresh = dict(after.marks.get("stamps", {}))
    for name in said:
        is_kept = getattr(after, name) == getattr(envelope, name)
        fresh[name] = max(fresh[name], stamps[name] if is_kept else _just_above(stamps[name]))
    marks = {**after.marks, "stamps": fresh}
    kept = {name: mark for name, mark in marks.items() if mark}
    return replace(after, disputed=envelope.disputed, marks=kept)


def _just_above(stamp: Stamp) -> Stamp:
    *others, version = stamp
    return [*others, version + 1]


def _columns_of(event: Event) -> set[str]:
    """Name the columns of context that an event has a word on."""
    values = zip(_CONTEXT, _read_context(event), strict=True)
    said = {column for column, value in values if value or value is False}
    return said | {"status_word"} if event.status_word and event.status is None else said


def rank_of(status: str) -> int:
    """Say how far along the lattice a status is.

    A word that is not in it was stored by a later release, which may run beside this one. It
    counts as the furthest: whatever it means, what is known must not go back.
    """
    return _RANK.get(status, len(_RANK))


def ends_said(event_type: str, status: str | None) -> set[str]:
    """Name the ends of an envelope that an event of this type and status word speaks of."""
    implied = IMPLIED_STATUS.get(event_type)
    return set() if implied is None else {implied, status or implied} & TERMINAL


class _Step:
    """One event on its way onto one envelope: the columns and marks that it changes."""

    __slots__ = ("changes", "envelope", "event", "marks", "stamp", "stamps")

    def __init__(self, envelope: Envelope, event: Event) -> None:
        self.envelope = envelope
        self.event = event
        self.stamp = _stamp_of(event)
        self.stamps: dict[str, Stamp] = envelope.marks.get("stamps", {})
        self.changes: dict[str, Json] = {}
        self.marks: dict[str, Json] = {}

    def say_status(self) -> None:
        """Raise the status to what was said; two different ends are a dispute, in any order."""
        implied = IMPLIED_STATUS.get(self.event.type)
        if implied is None:
            return
        highest = self.envelope.status
        for status in (implied, self.event.status or implied):
            if status in TERMINAL and highest in TERMINAL and status != highest:
                self.changes["disputed"] = True
            if highest is None or rank_of(status) > rank_of(highest):
                highest = self.changes["status"] = status

    def pass_milestone(self, received_at: datetime) -> None:
        """Keep the earliest time; any time of Atlas' own beats that of our receipt."""
        column = MILESTONES.get(self.event.type)
        if column is None:
            return
        held: datetime | None = getattr(self.envelope, column)
        ours: list[str] = self.envelope.marks.get("ours", [])
        instant = self.event.occurred_at or received_at
        is_ours, was_ours = self.event.occurred_at is None, column in ours
        if held is None or (is_ours, instant) < (was_ours, held):
            self.changes[column] = instant
            if is_ours != was_ours:
                self.marks["ours"] = sorted({*ours} ^ {column})

    def bring_context(self) -> None:
        fresh: dict[str, Stamp] = {}
        for column, value in zip(_CONTEXT, _read_context(self.event), strict=True):
            # Absent, null and empty say nothing; False does.
            if (value or value is False) and self.is_newer(column, value):
                self.changes[column] = value
                fresh[column] = self.stamp
        # A word of the lattice moves the status; only another one is kept beside it.
        word = self.event.status_word if self.event.status is None else None
        if word and self.is_newer("status_word", word):
            self.changes["status_word"] = word
            fresh["status_word"] = self.stamp
        if fresh:
            self.marks["stamps"] = {**self.stamps, **fresh}
        version, known = self.event.fields_version, self.envelope.fields_version
        if version is not None and (known is None or version > known):
            self.changes["fields_version"] = version

    def is_newer(self, column: str, value: Json) -> bool:
        held = self.stamps.get(column)
        if held is None or self.stamp != held:
            return held is None or self.stamp > held
        return _text_of(value) > _text_of(getattr(self.envelope, column))

    def bring_parties(self) -> None:
        """Take the newer list, and raise everyone in it to the furthest they ever got."""
        parties, known = self.event.parties, self.envelope.parties
        if parties:
            keys = people.keys_of(parties)
            furthest = people.furthest_of(self.envelope.marks.get("parties", {}), keys, parties)
            self.marks["parties"] = furthest
            if known is None or self.is_newer_list(parties, known):
                stamps = self.marks.get("stamps", self.stamps)
                self.marks["stamps"] = {**stamps, "parties": self.stamp}
            else:
                parties, keys = known, people.keys_of(known)
            known = self.changes["parties"] = people.raised(parties, keys, furthest)
        if known is not None:
            self.count(known)

    def is_newer_list(self, parties: Parties, known: Parties) -> bool:
        held = self.stamps["parties"]
        # Statuses are left out of the comparison: they have risen since, the rest has not.
        return self.stamp > held or (
            self.stamp == held and people.text_of(parties) > people.text_of(known)
        )

    def count(self, parties: Parties) -> None:
        status = self.changes.get("status", self.envelope.status)
        total = len(parties)
        self.changes["total"] = total
        self.changes["signed_count"] = total if status == "signed" else people.signed_among(parties)
        self.changes["next_signer_email"] = (
            people.next_signer(parties) if status == "pending" else None
        )

    def taken(self) -> Envelope:
        if self.marks:
            marks = {**self.envelope.marks, **self.marks}
            self.changes["marks"] = {name: mark for name, mark in marks.items() if mark}
        if not self.changes:
            return self.envelope
        # By position: `replace` takes three times as long to match so many names.
        columns = list(_read_columns(self.envelope))
        for name, value in self.changes.items():
            columns[_POSITION[name]] = value
        return Envelope(*columns)


def _stamp_of(event: Event) -> Stamp:
    """Return what decides between two values of one column: the larger one stands."""
    instant, version = event.occurred_at, event.fields_version
    # A list, because it is compared with one that was stored as JSON.
    return [
        _TYPE_RANK.get(event.type, _UNKNOWN_RANK),
        -1 if instant is None else (instant - _FIRST_INSTANT) // _MICROSECOND,
        people.signed_among(event.parties) if event.parties else 0,
        -1 if version is None else version,
    ]


def _effect(before: Envelope, after: Envelope, event: Event) -> Effect:
    implied = IMPLIED_STATUS.get(event.type)
    if implied is None:
        return Effect.MILESTONE if event.type in MILESTONES else Effect.UNKNOWN
    said = max(rank_of(implied), rank_of(event.status or implied))
    known = -1 if before.status is None else rank_of(before.status)
    is_applied = said > known or (said == known and _is_changed(before, after))
    return Effect.APPLIED if is_applied else Effect.STALE


def _is_changed(before: Envelope, after: Envelope) -> bool:
    *columns, _marks = _read_columns(before)
    *others, _marks = _read_columns(after)
    return bool(columns != others)
