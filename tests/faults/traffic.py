"""What Atlas would send, made from a seed: the same seed makes the same bytes in the same order.

Envelopes live their lives, and their events come as senders send them: many at once, out of
order, some once more. Nothing is kept, so that a million events cost no memory, and whoever
judges a run afterwards makes the traffic once more.
"""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from tests.factories import SIGN_TOKEN, SIGNER

# How many events are shuffled at a time: the last of an envelope may overtake its first.
WINDOW = 300
# Written down anew: what the service believes of its own order is what is being tested.
STATUSES = ("draft", "pending", "voided", "declined", "signed")
SAYS = {
    "envelope.created": "draft",
    "envelope.sent": "pending",
    "envelope.voided": "voided",
    "envelope.declined": "declined",
    "envelope.signed": "signed",
}
LIVES: Sequence[tuple[str, ...]] = (
    ("envelope.created", "envelope.sent", "envelope.viewed", "envelope.signed"),
    ("envelope.created", "envelope.sent", "envelope.signed", "contract.extracted"),
    ("envelope.sent", "envelope.viewed", "envelope.viewed", "envelope.declined"),
    ("envelope.created", "envelope.sent", "envelope.voided"),
)


class Kind(StrEnum):
    """What a request is to the others that are about the same event."""

    ORIGINAL = "original"
    COPY = "the same bytes"
    REBUILT = "the same id in other bytes"
    ALIAS = "the same content under another id"


# Of a hundred events so many come once more, in each way.
AGAIN = {Kind.COPY: 10, Kind.REBUILT: 5, Kind.ALIAS: 5}


@dataclass(frozen=True, slots=True)
class Sending:
    """One body to be sent. All that are about one event have its `number`."""

    number: int
    account: str
    envelope_id: str
    type: str
    body: bytes
    kind: Kind = Kind.ORIGINAL

    @property
    def digest(self) -> bytes:
        return hashlib.sha256(self.body).digest()


@dataclass(frozen=True, slots=True)
class Traffic:
    """Some events of several accounts; `sendings` may be asked for as often as one likes."""

    seed: int
    events: int
    accounts: Sequence[str] = ("default", "beta")

    def sendings(self) -> Iterator[Sending]:
        """Give every body, in the order in which it is first sent."""
        dice = random.Random(f"{self.seed}:order")
        waiting: list[Sending] = []
        for sending in self._in_order():
            waiting.append(sending)
            if len(waiting) > WINDOW:
                yield _draw(waiting, dice)
        while waiting:
            yield _draw(waiting, dice)

    def _in_order(self) -> Iterator[Sending]:
        dice = random.Random(f"{self.seed}:lives")
        number = envelope = 0
        while number < self.events:
            account, life = dice.choice(self.accounts), dice.choice(LIVES)
            for event_type in life[: self.events - number]:
                said = _say(number, f"env_{self.seed}_{envelope}", event_type, dice)
                yield from _repeat(Sending(number, account, *said), dice)
                number += 1
            envelope += 1


def _draw(waiting: list[Sending], dice: random.Random) -> Sending:
    place = dice.randrange(len(waiting))
    waiting[place], waiting[-1] = waiting[-1], waiting[place]
    return waiting.pop()


def _say(
    number: int, envelope_id: str, event_type: str, dice: random.Random
) -> tuple[str, str, bytes]:
    said = {
        "event": event_type,
        "envelope_id": envelope_id,
        "event_id": f"evt_{number}",
        "parties": [
            {
                "email": SIGNER,
                "role": "Client",
                "sign_url": f"https://atlaswork.ai/sign/{envelope_id}?token={SIGN_TOKEN}",
            }
        ],
        # Without it, two views of one envelope would be one event.
        "metadata": {"number": number, "salt": dice.getrandbits(64)},
    }
    return envelope_id, event_type, json.dumps(said).encode()


def _repeat(first: Sending, dice: random.Random) -> Iterator[Sending]:
    yield first
    said = json.loads(first.body)
    bodies = {
        Kind.COPY: first.body,
        Kind.REBUILT: json.dumps({**said, "attempt": 2}, indent=1).encode(),
        Kind.ALIAS: json.dumps({**said, "event_id": f"{said['event_id']}_again"}).encode(),
    }
    for kind, body in bodies.items():
        if dice.randrange(100) < AGAIN[kind]:
            about = (first.number, first.account, first.envelope_id, first.type)
            yield Sending(*about, body, kind)


@dataclass(frozen=True, slots=True)
class Expected:
    """What the database must hold once everything is acknowledged."""

    sendings: int = 0
    # Event by the digest of each body that is about it.
    numbers: dict[bytes, int] = field(default_factory=dict)
    types: list[str] = field(default_factory=list)
    # By account and envelope.
    statuses: dict[tuple[str, str], str | None] = field(default_factory=dict)
    lengths: Counter[tuple[str, str]] = field(default_factory=Counter)

    @classmethod
    def of(cls, traffic: Traffic) -> "Expected":
        """Say it from the traffic alone."""
        numbers: dict[bytes, int] = {}
        types = [""] * traffic.events
        statuses: dict[tuple[str, str], str | None] = {}
        lengths: Counter[tuple[str, str]] = Counter()
        count = 0
        for count, sending in enumerate(traffic.sendings(), start=1):  # noqa: B007
            numbers[sending.digest] = sending.number
            if sending.kind is Kind.ORIGINAL:
                envelope = sending.account, sending.envelope_id
                types[sending.number] = sending.type
                lengths[envelope] += 1
                known = statuses.get(envelope)
                statuses[envelope] = max(SAYS.get(sending.type), known, key=_rank)
        return cls(count, numbers, types, statuses, lengths)


def _rank(status: str | None) -> int:
    return -1 if status is None else STATUSES.index(status)
