"""What is left of an envelope, and of what is said of it, once a person has had it erased.

Identity, type, status and times stay: without them a copy would look like news. Everything
that Atlas or a caller wrote in words of their own goes.
"""

from dataclasses import replace
from typing import Final

from app.events.lifecycle import STATUSES, Envelope
from app.events.payload import Event

# Stands where a text was, so that a copy is not taken for a contradiction.
ERASED: Final = "[erased]"


def bare(event: Event) -> Event:
    """Return what is kept of an event of an erased envelope: identity, type and status."""
    return Event(
        event.type,
        event.envelope_id,
        event.atlas_event_id,
        occurred_at=event.occurred_at,
        status=event.status,
    )


def erased_text(text: str | None) -> str | None:
    """Return what stands where `text` stood; nothing where there was none."""
    return None if text is None else ERASED


def erased_status(word: str | None) -> str | None:
    """Return a status as it may stay: a word of the lattice as it is."""
    return word if word in STATUSES else erased_text(word)


def erased(envelope: Envelope) -> Envelope:
    """Return an envelope without what Atlas or a caller wrote in words of their own."""
    ours = envelope.marks.get("ours")
    return replace(
        envelope,
        status_word=None,
        parties=None,
        next_signer_email=None,
        metadata=None,
        external_id=None,
        client_reference_id=None,
        send_error=None,
        detection_error=None,
        fields_status=None,
        extraction=None,
        decline_reason=None,
        void_reason=None,
        # Among the others are the addresses of the parties.
        marks={"ours": ours} if ours else {},
    )


def completed(envelope: Envelope) -> Envelope:
    """Return an erased envelope whose counts fit its status: nobody is left to be counted."""
    if envelope.status != "signed" or envelope.signed_count == envelope.total:
        return envelope
    return replace(envelope, signed_count=envelope.total)
