"""What a callback is given: one event, as its author wants to read it."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from datetime import datetime
from typing import Any

from app.errors import AppError
from app.events.frozen import frozen
from app.events.parties import Party
from app.events.redaction import may_hold_secrets, redact
from app.store.callbacks import OWN_EVENTS
from app.store.claims import Claim
from app.store.contents import Content, Decoded, decode, decode_envelope


class Undecodable(AppError):
    """What is stored can no longer be read; the text says which part."""


@frozen
class Envelope:
    """An envelope as it is now; None stands for whatever no event has told yet."""

    account: str
    id: str
    # Atlas' connected account, if it belongs to one.
    tenant: str | None
    # draft, pending, expired, voided, declined or signed.
    status: str | None
    # A word that this release does not know, and that changes nothing.
    status_word: str | None
    # Contradicting things were said of it.
    disputed: bool
    created_at: datetime | None
    sent_at: datetime | None
    viewed_at: datetime | None
    signed_at: datetime | None
    declined_at: datetime | None
    voided_at: datetime | None
    expired_at: datetime | None
    extracted_at: datetime | None
    parties: Sequence[Party] | None
    signed_count: int | None
    total: int | None
    next_signer_email: str | None
    metadata: Mapping[str, Any] | None
    external_id: str | None
    client_reference_id: str | None
    is_test: bool | None
    send_error: str | None
    detection_error: str | None
    fields_status: str | None
    fields_version: int | None
    extraction: Any
    decline_reason: str | None
    void_reason: str | None
    # Rises with every change.
    version: int
    first_seen_at: datetime
    updated_at: datetime
    erased_at: datetime | None
    # Where `archive` keeps the signed PDF.
    archived_at: datetime | None
    archive_name: str | None
    archive_sha256: str | None
    archive_bytes: int | None


class Lazy:
    """A value that is made when it is asked for; most callbacks look at a part of an event."""

    __slots__ = ("_make", "_value")

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make: Callable[[], Any] | None = make
        self._value: Any = None

    def get(self) -> Any:
        """Give the value, the same each time."""
        if self._make is not None:
            self._value, self._make = self._make(), None
        return self._value


@frozen
class Event:
    """One thing that Atlas said, owed to one callback.

    A callback may be called more than once for one event: after a failure, after a crash,
    and when an operator replays it. `delivery_id` is the same in every attempt, so give it
    to whatever you call as the idempotency key.
    """

    id: str
    type: str
    account: str
    # Atlas' connected account, if the envelope belongs to one.
    tenant: str | None
    envelope_id: str | None
    # The sender's own id, if it gave one.
    atlas_event_id: str | None
    occurred_at: datetime | None
    received_at: datetime
    # The place among the events of this envelope; they are delivered in this order.
    sequence: int | None
    # What it did to the envelope: applied, stale, milestone, …
    effect: str
    # The envelope's status and version after this event.
    status: str | None
    version: int | None
    # The idempotency key.
    delivery_id: str
    attempt: int
    # A later event of this envelope has been delivered already.
    is_late: bool
    # Somebody asked for this event to be delivered again.
    is_replay: bool
    callback: str
    # When the call will be given up.
    deadline: datetime
    _data: Lazy = field(repr=False, compare=False)
    _envelope: Lazy = field(repr=False, compare=False)

    @property
    def data(self) -> Any:
        """The parsed body without its secrets; None once the bytes are pruned.

        Of an envelope that was erased it is what is left: event, envelope_id, event_id, status.
        """
        return self._data.get()

    @property
    def envelope(self) -> Envelope | None:
        """The envelope as it is now, which may be ahead of this event."""
        envelope: Envelope | None = self._envelope.get()
        return envelope


def build(claim: Claim, content: Content | None, *, deadline: datetime) -> Event:
    """Make the event of a claimed delivery. Raises `Undecodable` for a damaged row."""
    if content is None:
        raise Undecodable("the delivery is not in the database any more")
    stored: Decoded = _decoded(decode, content)
    event, body = stored.event, stored.body
    if event is None:
        raise Undecodable("the event of this delivery is not in the database any more")
    is_erased = stored.is_erased and not _is_own_and_kept(event, body)
    return Event(
        id=str(event["id"]),
        type=event["type"] or "",
        account=event["account"],
        tenant=stored.tenant,
        envelope_id=event["envelope_id"],
        atlas_event_id=event["atlas_event_id"],
        occurred_at=event["occurred_at"],
        received_at=event["received_at"],
        sequence=event["sequence"],
        effect=event["effect"],
        status=event["status"],
        version=event["version"],
        delivery_id=str(claim.id),
        attempt=claim.attempt,
        is_late=stored.is_late,
        is_replay=claim.generation > 1,
        callback=claim.callback,
        deadline=deadline,
        _data=Lazy(lambda: _remains(event) if is_erased else _data(body)),
        _envelope=Lazy(lambda: _envelope(content)),
    )


def _is_own_and_kept(event: Mapping[str, Any], body: bytes | None) -> bool:
    """Whether we have said it ourselves, after the erasure: nothing of before is in it."""
    return body is not None and (event["type"] or "").startswith(OWN_EVENTS)


def _remains(event: Mapping[str, Any]) -> dict[str, Any]:
    """Give what an event of an erased envelope still says: identity, type and status."""
    said = {
        "event": event["type"],
        "envelope_id": event["envelope_id"],
        "event_id": event["atlas_event_id"],
        "status": event["status"],
    }
    return {name: value for name, value in said.items() if value is not None}


def _envelope(content: Content) -> Envelope | None:
    row: Mapping[str, Any] | None = _decoded(decode_envelope, content)
    if row is None:
        return None
    parties = row["parties"]
    known = None if parties is None else tuple(Party(**party) for party in parties)
    return Envelope(**{**row, "parties": known})


def _decoded(read: Callable[[Content], Any], content: Content) -> Any:
    try:
        return read(content)
    except (ValueError, TypeError) as error:
        raise Undecodable(f"a stored value can no longer be read: {error}") from error


def _data(body: bytes | None) -> Any:
    if body is None:
        return None
    try:
        data = json.loads(body)
        return redact(data) if may_hold_secrets(body) else data
    except (ValueError, RecursionError) as error:
        # The text of a decoding error may quote the body.
        name = type(error).__name__
        raise Undecodable(f"the stored body can no longer be decoded ({name})") from None
