"""The tables: columns and constraints, no behaviour.

There are no foreign keys from the rows that intake writes in one transaction: their
parents are in the same statement and are never deleted, and each check would cost a
look-up and a row lock for every event.
"""

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import (
    BigInteger,
    Index,
    Integer,
    LargeBinary,
    Text,
    UniqueConstraint,
    Uuid,
    text,
)
from sqlalchemy.orm import Mapped, mapped_column

from app.store.base import Base, Document, UtcDateTime

OWED = text("due_at IS NOT NULL")
SET_ASIDE = text("state IN ('dead', 'parked', 'discarded')")
# The order of every list of envelopes, so that none of them needs a sort.
_LISTED = ("updated_at", "account", "id")


def _time() -> Mapped[datetime | None]:
    return mapped_column(UtcDateTime())


def _listed_where(condition: str, column: str) -> Index:
    return Index(
        f"envelopes_{column}_idx",
        column,
        *_LISTED,
        postgresql_where=text(condition),
        sqlite_where=text(condition),
    )


class EnvelopeRow(Base):
    """What is known of one envelope; decided by `app.events.lifecycle` alone."""

    __tablename__ = "envelopes"
    __table_args__ = (
        Index("envelopes_updated_at_idx", *_LISTED),
        Index("envelopes_status_idx", "status", *_LISTED),
        _listed_where("external_id IS NOT NULL", "external_id"),
        _listed_where("client_reference_id IS NOT NULL", "client_reference_id"),
        _listed_where("tenant IS NOT NULL", "tenant"),
        _listed_where("is_test", "is_test"),
    )

    account: Mapped[str] = mapped_column(Text, primary_key=True)
    id: Mapped[str] = mapped_column(Text, primary_key=True)
    tenant: Mapped[str | None] = mapped_column(Text)
    # Null until an event says one: a milestone may arrive first.
    status: Mapped[str | None] = mapped_column(Text)
    # A word that this release does not know is kept beside and changes nothing.
    status_word: Mapped[str | None] = mapped_column(Text)
    disputed: Mapped[bool] = mapped_column(server_default=text("false"))
    created_at: Mapped[datetime | None] = _time()
    sent_at: Mapped[datetime | None] = _time()
    viewed_at: Mapped[datetime | None] = _time()
    signed_at: Mapped[datetime | None] = _time()
    declined_at: Mapped[datetime | None] = _time()
    voided_at: Mapped[datetime | None] = _time()
    expired_at: Mapped[datetime | None] = _time()
    extracted_at: Mapped[datetime | None] = _time()
    parties: Mapped[list[dict[str, Any]] | None] = mapped_column(Document)
    signed_count: Mapped[int | None]
    total: Mapped[int | None]
    next_signer_email: Mapped[str | None] = mapped_column(Text)
    # `metadata` is SQLAlchemy's own word on a model, so the attribute has another name.
    caller_metadata: Mapped[dict[str, Any] | None] = mapped_column("metadata", Document)
    external_id: Mapped[str | None] = mapped_column(Text)
    client_reference_id: Mapped[str | None] = mapped_column(Text)
    is_test: Mapped[bool | None]
    send_error: Mapped[str | None] = mapped_column(Text)
    detection_error: Mapped[str | None] = mapped_column(Text)
    fields_status: Mapped[str | None] = mapped_column(Text)
    fields_version: Mapped[int | None]
    extraction: Mapped[Any | None] = mapped_column(Document)
    decline_reason: Mapped[str | None] = mapped_column(Text)
    void_reason: Mapped[str | None] = mapped_column(Text)
    # Book-keeping of the lattice: which stamp each context column carries.
    marks: Mapped[dict[str, Any]] = mapped_column(Document, server_default=text("'{}'"))
    # Rises with every change of the row; it is the ETag, and never falls.
    version: Mapped[int] = mapped_column(BigInteger)
    # Counts this envelope's events; given under the row's lock, so it is their order.
    sequence: Mapped[int] = mapped_column(BigInteger)
    first_seen_at: Mapped[datetime] = mapped_column(UtcDateTime())
    updated_at: Mapped[datetime] = mapped_column(UtcDateTime())
    erased_at: Mapped[datetime | None] = _time()
    # The signed PDF, once it is kept: its name in the archive, and what it must be like.
    archived_at: Mapped[datetime | None] = _time()
    archive_name: Mapped[str | None] = mapped_column(Text)
    archive_sha256: Mapped[str | None] = mapped_column(Text)
    archive_bytes: Mapped[int | None] = mapped_column(BigInteger)


class EventRow(Base):
    """One thing that Atlas said. Narrow and immortal; the bytes are in `bodies`."""

    __tablename__ = "events"
    __table_args__ = (Index("events_envelope_idx", "account", "envelope_id", "sequence"),)

    # A UUIDv7: sorts by the time of receipt, so it is the order of every listing.
    id: Mapped[UUID] = mapped_column(Uuid(), primary_key=True)
    account: Mapped[str] = mapped_column(Text)
    # Null in quarantine, and for events that are about no envelope.
    envelope_id: Mapped[str | None] = mapped_column(Text)
    type: Mapped[str | None] = mapped_column(Text)
    atlas_event_id: Mapped[str | None] = mapped_column(Text)
    occurred_at: Mapped[datetime | None] = _time()
    received_at: Mapped[datetime] = mapped_column(UtcDateTime())
    sequence: Mapped[int | None] = mapped_column(BigInteger)
    effect: Mapped[str] = mapped_column(Text)
    # The envelope after this event.
    status: Mapped[str | None] = mapped_column(Text)
    version: Mapped[int | None] = mapped_column(BigInteger)
    # With type and envelope, the core that a copy must agree with.
    core_status: Mapped[str | None] = mapped_column(Text)
    core_reason: Mapped[str | None] = mapped_column(Text)
    # Known for types without a once-key; for others computed when two bodies are compared,
    # and before a body is pruned.
    content: Mapped[str | None] = mapped_column(Text)
    # Why an event is in quarantine, and which values were dropped from one that is not.
    reason: Mapped[str | None] = mapped_column(Text)
    degraded: Mapped[list[str] | None] = mapped_column(Document)
    # The event that this one copies or contradicts.
    original_id: Mapped[UUID | None] = mapped_column(Uuid())
    copies: Mapped[int] = mapped_column(server_default=text("0"))
    last_copy_at: Mapped[datetime | None] = _time()
    key_label: Mapped[str | None] = mapped_column(Text)


class BodyRow(Base):
    """The bytes as received, never altered; may be pruned while the event stays."""

    __tablename__ = "bodies"

    event_id: Mapped[UUID] = mapped_column(Uuid(), primary_key=True)
    body: Mapped[bytes] = mapped_column(LargeBinary)


class IdentityRow(Base):
    """A key that an event claims. Never deleted: a copy may come years later."""

    __tablename__ = "identities"

    account: Mapped[str] = mapped_column(Text, primary_key=True)
    key: Mapped[str] = mapped_column(Text, primary_key=True)
    event_id: Mapped[UUID] = mapped_column(Uuid())


class DeliveryRow(Base):
    """One event owed to one callback. A row is never deleted by a worker."""

    __tablename__ = "deliveries"
    __table_args__ = (
        UniqueConstraint("event_id", "callback", "generation"),
        # The claim asks every second; these two hold unfinished rows only.
        Index("deliveries_due_idx", "callback", "due_at", postgresql_where=OWED, sqlite_where=OWED),
        Index(
            "deliveries_order_idx",
            "callback",
            "account",
            "envelope_id",
            "sequence",
            postgresql_where=OWED,
            sqlite_where=OWED,
        ),
        # In the order of the lists of operators, which are asked for what is not done.
        Index("deliveries_owed_idx", "id", postgresql_where=OWED, sqlite_where=OWED),
        Index(
            "deliveries_set_aside_idx",
            "state",
            "id",
            postgresql_where=SET_ASIDE,
            sqlite_where=SET_ASIDE,
        ),
        Index(
            "deliveries_unsettled_idx",
            "state",
            "callback",
            postgresql_where=text("state IN ('dead', 'parked')"),
            sqlite_where=text("state IN ('dead', 'parked')"),
        ),
        Index(
            "deliveries_dead_idx",
            "fingerprint",
            "id",
            postgresql_where=text("state = 'dead'"),
            sqlite_where=text("state = 'dead'"),
        ),
    )

    # The idempotency key that callbacks see; the same in every attempt.
    id: Mapped[UUID] = mapped_column(Uuid(), primary_key=True)
    event_id: Mapped[UUID] = mapped_column(Uuid())
    callback: Mapped[str] = mapped_column(Text)
    # 1 for the first time an event is owed; a replay with intent makes the next.
    generation: Mapped[int] = mapped_column(server_default=text("1"))
    account: Mapped[str] = mapped_column(Text)
    envelope_id: Mapped[str | None] = mapped_column(Text)
    sequence: Mapped[int | None] = mapped_column(BigInteger)
    state: Mapped[str] = mapped_column(Text, server_default=text("'pending'"))
    # Null once nothing is owed. While running it is the lease: when it passes, the
    # row is up for grabs again.
    due_at: Mapped[datetime | None] = _time()
    attempts: Mapped[int] = mapped_column(server_default=text("0"))
    # Attempts that earlier rounds used up: a retry by an operator starts a fresh round.
    spent: Mapped[int] = mapped_column(server_default=text("0"))
    # Rises with every claim; a verdict that carries an older one is thrown away.
    token: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    # Who claimed it last; named in the history if that worker is lost.
    worker: Mapped[str | None] = mapped_column(Text)
    last_error: Mapped[str | None] = mapped_column(Text)
    fingerprint: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime())
    settled_at: Mapped[datetime | None] = _time()


class AttemptRow(Base):
    """One call of one callback, kept as history."""

    __tablename__ = "attempts"

    delivery_id: Mapped[UUID] = mapped_column(Uuid(), primary_key=True)
    token: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    number: Mapped[int]
    worker: Mapped[str] = mapped_column(Text)
    started_at: Mapped[datetime | None] = _time()
    finished_at: Mapped[datetime] = mapped_column(UtcDateTime())
    verdict: Mapped[str] = mapped_column(Text)
    error: Mapped[str | None] = mapped_column(Text)


class CallbackRow(Base):
    """A callback that some process has loaded: who is owed an event is read from here."""

    __tablename__ = "callbacks"

    name: Mapped[str] = mapped_column(Text, primary_key=True)
    patterns: Mapped[list[str]] = mapped_column(Document)
    account: Mapped[str | None] = mapped_column(Text)
    options: Mapped[dict[str, Any]] = mapped_column(Document, server_default=text("'{}'"))
    first_seen_at: Mapped[datetime] = mapped_column(UtcDateTime())
    last_seen_at: Mapped[datetime] = mapped_column(UtcDateTime())
    # Everything received before this has been checked for a missing delivery.
    swept_at: Mapped[datetime] = mapped_column(UtcDateTime())
    paused_at: Mapped[datetime | None] = _time()
    # How calls ended lately, counted by all processes together; see `dispatch.breaker`.
    breaker: Mapped[dict[str, Any] | None] = mapped_column(Document)
    # Until then nothing is claimed; after it, a few calls at a time, by whoever probes.
    open_until: Mapped[datetime | None] = _time()
    probe_until: Mapped[datetime | None] = _time()


class KeyRow(Base):
    """An API key, by its fingerprint, and when it last proved a request genuine."""

    __tablename__ = "keys"

    fingerprint: Mapped[str] = mapped_column(Text, primary_key=True)
    label: Mapped[str] = mapped_column(Text)
    account: Mapped[str] = mapped_column(Text)
    first_seen_at: Mapped[datetime] = mapped_column(UtcDateTime())
    last_match_at: Mapped[datetime | None] = _time()


class LeaseRow(Base):
    """Work that one process at a time does: who holds it, and until when."""

    __tablename__ = "leases"

    name: Mapped[str] = mapped_column(Text, primary_key=True)
    holder: Mapped[str] = mapped_column(Text)
    token: Mapped[int] = mapped_column(BigInteger)
    until: Mapped[datetime] = mapped_column(UtcDateTime())


class FeedRow(Base):
    """One item of the change feed, at the place that every reader sees it."""

    __tablename__ = "feed"

    position: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    kind: Mapped[str] = mapped_column(Text)
    event_id: Mapped[UUID | None] = mapped_column(Uuid())
    account: Mapped[str] = mapped_column(Text)
    envelope_id: Mapped[str | None] = mapped_column(Text)
    at: Mapped[datetime] = mapped_column(UtcDateTime())


class ChangeRow(Base):
    """Something that has happened, and has no place in the feed yet.

    A trigger writes one for each new event, so that no release and no writer can forget it.
    The id is given under the lock of the envelope: it is the order of an envelope's changes,
    but not that in which they are committed, so it says nothing to readers.
    """

    __tablename__ = "changes"
    __table_args__ = {"sqlite_autoincrement": True}  # noqa: RUF012  # SQLAlchemy reads it once

    id: Mapped[int] = mapped_column(
        BigInteger().with_variant(Integer(), "sqlite"), primary_key=True, autoincrement=True
    )
    kind: Mapped[str] = mapped_column(Text)
    event_id: Mapped[UUID | None] = mapped_column(Uuid())
    account: Mapped[str] = mapped_column(Text)
    envelope_id: Mapped[str | None] = mapped_column(Text)
    at: Mapped[datetime] = mapped_column(UtcDateTime())


class FollowerRow(Base):
    """Work that follows the feed off the path of a webhook, and how far it has come."""

    __tablename__ = "followers"

    name: Mapped[str] = mapped_column(Text, primary_key=True)
    position: Mapped[int] = mapped_column(BigInteger)


class TermRow(Base):
    """What an envelope can be found by: its ids, and the addresses of its parties."""

    __tablename__ = "terms"
    __table_args__ = (Index(None, "account", "envelope_id"),)

    # Compared byte by byte, so that what begins with a text lies side by side.
    term: Mapped[str] = mapped_column(
        Text().with_variant(Text(collation="C"), "postgresql"), primary_key=True
    )
    account: Mapped[str] = mapped_column(Text, primary_key=True)
    envelope_id: Mapped[str] = mapped_column(Text, primary_key=True)


class ExpectationRow(Base):
    """An envelope that a consumer has created, so that its silence is noticed."""

    __tablename__ = "expectations"
    __table_args__ = (
        Index("expectations_due_idx", "due_at", postgresql_where=OWED, sqlite_where=OWED),
    )

    account: Mapped[str] = mapped_column(Text, primary_key=True)
    envelope_id: Mapped[str] = mapped_column(Text, primary_key=True)
    # Who said so.
    consumer: Mapped[str] = mapped_column(Text)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime())
    # Null once the first event has come, or its absence was noticed.
    due_at: Mapped[datetime | None] = _time()
    silent_at: Mapped[datetime | None] = _time()


class ShapeRow(Base):
    """A type, a field or a status word that events have, and when it was first seen."""

    __tablename__ = "shapes"

    type: Mapped[str] = mapped_column(Text, primary_key=True)
    kind: Mapped[str] = mapped_column(Text, primary_key=True)
    path: Mapped[str] = mapped_column(Text, primary_key=True)
    first_seen_at: Mapped[datetime] = mapped_column(UtcDateTime())
    # The event that showed it first.
    event_id: Mapped[UUID] = mapped_column(Uuid())


class TallyRow(Base):
    """What all processes have counted, minute by minute."""

    __tablename__ = "tallies"

    at: Mapped[datetime] = mapped_column(UtcDateTime(), primary_key=True)
    account: Mapped[str] = mapped_column(Text, primary_key=True)
    name: Mapped[str] = mapped_column(Text, primary_key=True)
    label: Mapped[str] = mapped_column(Text, primary_key=True)
    count: Mapped[int] = mapped_column(BigInteger)


class AuditRow(Base):
    """What an operator did: who, when, to what."""

    __tablename__ = "audit"
    __table_args__ = (Index("audit_at_idx", "at"), Index("audit_subject_idx", "subject"))

    id: Mapped[UUID] = mapped_column(Uuid(), primary_key=True)
    at: Mapped[datetime] = mapped_column(UtcDateTime())
    actor: Mapped[str] = mapped_column(Text)
    action: Mapped[str] = mapped_column(Text)
    subject: Mapped[str] = mapped_column(Text)
    details: Mapped[dict[str, Any] | None] = mapped_column(Document)


class ReleaseRow(Base):
    """The oldest release that may serve this schema; written by its migrations."""

    __tablename__ = "releases"

    revision: Mapped[str] = mapped_column(Text, primary_key=True)
    min_release: Mapped[str] = mapped_column(Text)
    migrated_at: Mapped[datetime] = mapped_column(UtcDateTime())
