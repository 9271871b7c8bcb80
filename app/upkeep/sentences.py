"""One sentence for each thing that happened to an envelope, for whoever was not there."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final

from app.events.lifecycle import Effect
from app.store.deliveries import DEAD, DISCARDED, DONE, PARKED, PENDING, RUNNING
from app.store.history import Said

OWN_EVENTS: Final = "receiver."
_OWN: Final[Mapping[str, str]] = {
    "receiver.accepted": "An operator took the word of an event that contradicts another",
    "receiver.rebuilt": "The envelope was computed anew from its events, and mended",
    "receiver.conflict": "An event contradicts another one: what it says was not applied",
    "receiver.disputed": "Contradicting things were said of the envelope: it is disputed",
    "receiver.dead": "A delivery became a dead letter",
    "receiver.silent": "Nothing was heard of the envelope in the time that was expected",
}
_EFFECTS: Final[Mapping[str, str]] = {
    Effect.APPLIED: "{type} changed the envelope{after}",
    Effect.REFRESHED: "A copy of event {original} knew more: that was taken over{after}, and "
    "callbacks are not told again",
    Effect.STALE: "{type} changed nothing: as much, or more, was known already{after}",
    Effect.MILESTONE: "{type} was noted: a milestone never moves the status{after}",
    Effect.UNKNOWN: "{type} changed nothing: this release does not know the type; it is kept, "
    "and delivered to who asks for it",
    Effect.CONFLICT: "{type} contradicts event {original}: it is kept, and was not applied",
}
# Of an event that was a conflict first; its own words are those of today.
_ACCEPTED: Final = "{type} contradicts event {original}, and its word was taken later{after}"
_ACTS: Final[Mapping[str, str]] = {
    "delivery.retried": "made the delivery due again",
    "delivery.discarded": "gave the delivery up",
    "event.redispatched": "had the event delivered once more",
    "event.reprojected": "applied the event again",
    "event.accepted": "took the event's word, whatever was said before",
    # On the command line, and over HTTP.
    "body.read": "read the bytes as they were received",
    "envelope.erased": "erased the envelope",
    "envelope.expected": "said that the envelope was created",
    "envelope.rebuilt": "had the envelope computed anew from its events",
}


def of_event(said: Said) -> str:
    """Say what an event did to its envelope, or why it did nothing."""
    after = _after(said)
    if said.type.startswith(OWN_EVENTS):
        text = _OWN.get(said.type, f"The service says {said.type}") + after
    else:
        text = _effect(said).format(type=said.type, original=said.original_id, after=after)
    lost = f"; values that could not be used: {', '.join(said.degraded)}" if said.degraded else ""
    return f"{text}{lost}."


def _effect(said: Said) -> str:
    if said.effect == Effect.APPLIED and said.original_id is not None:
        return _ACCEPTED
    return _EFFECTS.get(said.effect, "{type} was recorded as " + said.effect)


def _after(said: Said) -> str:
    if said.status is None:
        return ""
    version = "" if said.version is None else f" (version {said.version})"
    return f"; it is {said.status}{version}"


def of_copies(said: Said) -> str:
    """Say how often an event came again."""
    times = "once more" if said.copies == 1 else f"{said.copies} more times"
    return f"{said.type} came {times}; a copy changes nothing, and this was the last."


def of_delivery(row: Any, *, asked_by: str | None) -> str:
    """Say to whom an event was owed, why, and how that stands now."""
    again = "" if row.generation == 1 else f" once more, as generation {row.generation}"
    who = f" because {asked_by} asked for it" if asked_by is not None else ""
    return f"Owed to {row.callback}{again}{who}: {_standing(row)}."


def _standing(row: Any) -> str:
    tries = f"{row.attempts} attempt{'' if row.attempts == 1 else 's'}"
    error = f": {_in_one_line(row.last_error)}" if row.last_error else ""
    known = {
        PENDING: f"waiting after {tries}, due {_time(row.due_at)}{error}",
        RUNNING: f"being tried just now, after {tries}",
        DONE: f"done after {tries}",
        DEAD: f"dead after {tries}{error}",
        DISCARDED: f"discarded after {tries}",
        PARKED: "parked, because no process serves the callback any more",
    }
    return known.get(row.state, f"{row.state} after {tries}")


def of_attempt(row: Any, *, callback: str) -> str:
    """Say how one call of a callback ended."""
    lasted = ""
    if row.started_at is not None:
        lasted = f" after {(row.finished_at - row.started_at).total_seconds():.3g} s"
    error = f": {_in_one_line(row.error)}" if row.error else ""
    return f"Attempt {row.number} at {callback} ended {row.verdict}{lasted}{error}."


def of_act(row: Any) -> str:
    """Say what somebody did, and why if they said so."""
    reason = (row.details or {}).get("reason")
    why = f": {_in_one_line(str(reason))}" if reason else ""
    return f"{row.actor} {_ACTS.get(row.action, f'did {row.action}')}{why}."


def of_expectation(row: Any) -> str:
    """Say who announced an envelope, and whether anything was heard."""
    awaited = f"; something is expected until {_time(row.due_at)}" if row.due_at else ""
    return f"{row.consumer} said that the envelope was created{awaited}."


SILENT: Final = "Nothing had been heard of the envelope by now, though it was expected."
ERASED: Final = "What was known of the envelope was erased; its identities stay."


def of_archive(row: Any) -> str:
    """Say that the signed document is kept."""
    size = "" if row.archive_bytes is None else f" ({row.archive_bytes} bytes)"
    return f"The signed PDF{size} was put into the archive."


def _time(moment: datetime | None) -> str:
    return "now" if moment is None else moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _in_one_line(text: str) -> str:
    return " ".join(text.split())
