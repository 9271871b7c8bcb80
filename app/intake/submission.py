"""One event on its way in: the bytes, what they were understood to say, and the answer."""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from functools import cached_property
from uuid import UUID

from app.errors import NotDurable, PayloadRejected
from app.events.erasure import bare
from app.events.frozen import frozen
from app.events.identity import (
    Core,
    Keys,
    content_digest,
    core_of,
    kept_of,
    keys_of,
    quarantine_key,
)
from app.events.payload import Event, parse
from app.store.envelopes import EnvelopeKey
from app.store.events import Claim
from app.store.ids import new_id


class Outcome(StrEnum):
    """What became of an authentic request; the sender reads it in the answer."""

    RECORDED = "recorded"
    DUPLICATE = "duplicate"
    CONFLICT = "conflict"
    QUARANTINED = "quarantined"


@frozen
class Receipt:
    """The answer: what became of the event, and by which id it is known here."""

    outcome: Outcome
    event_id: UUID


# Is told once what became of an event: its receipt, or that it is not known to be on disk.
OnAnswer = Callable[[Receipt | NotDurable], None]


@dataclass(eq=False)
class Submission:
    """One authentic body, waiting to be recorded.

    Its id is made here, before any transaction: a retry that finds its own id in the
    database knows that an earlier try had committed after all.
    """

    account: str
    body: bytes
    key_label: str
    received_at: datetime
    # None in quarantine, and then `reason` says why.
    event: Event | None
    keys: Keys | None
    reason: str | None = None
    event_id: UUID = field(default_factory=new_id)
    # The envelope that this changes, if it changes one.
    envelope_key: EnvelopeKey | None = field(init=False)
    # When the sender must have its answer, by the loop's clock.
    deadline: float = 0.0
    # None as soon as it is told, and if nobody waits.
    on_answer: OnAnswer | None = None
    # What is kept of the core, if its envelope is erased; then the bytes are not kept at all.
    bared: Core | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.change(self.event.envelope_id if self.event is not None else None)

    def change(self, envelope_id: str | None) -> None:
        """Say which envelope this changes."""
        self.envelope_key = None if envelope_id is None else (self.account, envelope_id)

    @property
    def named_key(self) -> EnvelopeKey | None:
        """The envelope that the event names, whichever it changes."""
        if self.event is None or self.event.envelope_id is None:
            return None
        return self.account, self.event.envelope_id

    @cached_property
    def claims(self) -> tuple[Claim, ...]:
        """The keys by which this event is recognised, each within its account."""
        keys = (quarantine_key(self.body),) if self.keys is None else self.keys.all
        return tuple((self.account, key) for key in keys)

    @cached_property
    def content(self) -> str:
        """The digest of what the body says; made only when two bodies are compared."""
        if self.keys is not None and self.keys.content is not None:
            return self.keys.content.rpartition(":")[2]
        return content_digest(self.body)

    def bare(self, event: Event) -> None:
        """Keep identity, type and status only: the envelope of this event is erased."""
        if self.bared is None:
            # The bytes will not be there to be compared with those of a copy.
            _ = self.content
            self.bared = kept_of(core_of(event))
            self.event = bare(event)

    def quarantine(self, reason: str) -> None:
        """Keep the bytes only: the database refused what was made of them."""
        self.event, self.keys, self.reason = None, None, reason
        self.change(None)
        self.__dict__.pop("claims", None)
        self.__dict__.pop("content", None)


def understand(body: bytes, *, account: str, key_label: str, received_at: datetime) -> Submission:
    """Make a submission of any bytes; what cannot be understood is for quarantine."""
    try:
        event = parse(body, received_at=received_at)
    except PayloadRejected as error:
        return Submission(account, body, key_label, received_at, None, None, error.reason)
    return Submission(account, body, key_label, received_at, event, keys_of(event, body))
