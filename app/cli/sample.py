"""Events as Atlas would send them, made up: flat bodies, two parties, one of each type."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, NoReturn
from uuid import uuid4

from app.errors import ConfigError
from app.events.heading import ENVELOPE_ID_NAMES, OWN_ID_NAMES

# Whoever finds one of these anywhere knows at once that nobody has signed anything.
PREFIX: Final = "trigger-"

# What a type says of its envelope, and how far its two parties are.
_STATES: Final[Mapping[str, tuple[str, str, str]]] = {
    "envelope.created": ("draft", "waiting", "waiting"),
    "envelope.sent": ("pending", "pending", "waiting"),
    "envelope.viewed": ("pending", "pending", "waiting"),
    "envelope.signed": ("signed", "signed", "signed"),
    "envelope.declined": ("declined", "signed", "declined"),
    "envelope.voided": ("voided", "pending", "waiting"),
    "contract.extracted": ("signed", "signed", "signed"),
}
TYPES: Final = tuple(_STATES)
_REASONS: Final[Mapping[str, str]] = {
    "envelope.declined": "The notice period is too long.",
    "envelope.voided": "Sent to the wrong person.",
}
# Under any of these, anywhere, a receiver may look for an id, or for the mark of a test.
_ID_NAMES: Final = frozenset({"id", *OWN_ID_NAMES, *ENVELOPE_ID_NAMES})
_TEST_NAMES: Final = frozenset({"is_test", "isTest"})
_EXTRACTED: Final = {
    "title": "Service agreement",
    "effective_date": "2026-07-01",
    "term_months": 12,
    "total_value": {"amount": 18000, "currency": "EUR"},
    "governing_law": "Germany",
}

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Assignment:
    """A value for one place of a body: `metadata.external_id=crm-7`."""

    path: tuple[str, ...]
    value: Any


def make_sample(event_type: str, *, envelope_id: str | None, at: datetime) -> Json:
    """Make one event of `event_type`, with ids of its own; any other name is fine, too."""
    status, *parties = _STATES.get(event_type, (None, "pending", "waiting"))
    sample: Json = {
        "event": event_type,
        "event_id": f"{PREFIX}{uuid4()}",
        "envelope_id": envelope_id or f"{PREFIX}{uuid4()}",
        "timestamp": at.isoformat().replace("+00:00", "Z"),
    }
    if status is not None:
        sample["status"] = status
    sample["parties"] = [_party(order, status) for order, status in enumerate(parties, 1)]
    sample["metadata"] = {
        "external_id": "order-1042",
        "client_reference_id": "customer-7",
        "is_test": True,
    }
    sample |= {"fields_status": "ready", "fields_version": 1}
    if event_type in _REASONS:
        sample["reason"] = _REASONS[event_type]
    if event_type == "contract.extracted":
        sample["extracted_data"] = dict(_EXTRACTED)
    return sample


def _party(order: int, status: str) -> Json:
    # Addresses that can belong to nobody (RFC 2606).
    name = ("Ada Okafor", "Ben Lindqvist")[order - 1]
    email = f"{name.partition(' ')[0].lower()}@example.com"
    return {"email": email, "name": name, "role": "signer", "order": order, "status": status}


def ids_of(sample: Json) -> Iterator[tuple[str, Any]]:
    """Give every id of an event or an envelope, however deep it stands, with its name."""
    for each in _objects(sample):
        yield from ((name, each[name]) for name in sorted(each.keys() & _ID_NAMES))


def mark_as_test(sample: Json) -> None:
    """Say in every place where it is looked for that nobody has signed anything."""
    metadata = sample.get("metadata")
    sample["metadata"] = {**(metadata if isinstance(metadata, dict) else {}), "is_test": True}
    sample["is_test"] = True
    for each in _objects(sample):
        each.update(dict.fromkeys(each.keys() & _TEST_NAMES, True))


def _objects(value: Any) -> Iterator[Json]:
    # A stack, because a value of --set may be nested deeper than Python may call.
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict):
            yield each
            waiting += each.values()
        elif isinstance(each, list):
            waiting += each


def encode(sample: Json) -> bytes:
    """Write the body once: these bytes are signed, and these are sent."""
    return json.dumps(sample, ensure_ascii=False, separators=(",", ":")).encode()


def read_assignment(text: str) -> Assignment:
    """Read `path=value`; the value is JSON if it can be read as JSON, else text."""
    path, equals, value = text.partition("=")
    names = tuple(path.strip().split("."))
    if not equals or not all(names):
        raise ConfigError(
            f"--set {text[:80]!r}: write path=value, such as metadata.external_id=crm-7 "
            "or parties.0.email=ada@example.com"
        )
    return Assignment(names, _value(value))


def _value(text: str) -> Any:
    try:
        # NaN and Infinity are no JSON; as text they are at least what was typed.
        value = json.loads(text, parse_constant=_refuse)
        encode({"value": value})
    except (ValueError, RecursionError):
        return text
    return value


def _refuse(word: str) -> NoReturn:
    raise ValueError(word)


def assign(sample: Json, assignments: Iterable[Assignment]) -> None:
    """Put each value into its place; objects on the way are made."""
    for each in assignments:
        target: Any = sample
        for name in each.path[:-1]:
            target = _step(target, name, each)
        _place(target, each)


def _step(target: Any, name: str, each: Assignment) -> Any:
    if isinstance(target, list):
        index = _index(target, name, each)
        if index == len(target):
            target.append({})
        return target[index]
    if isinstance(target, dict):
        return target.setdefault(name, {})
    raise _misplaced(each, f"{name!r} would stand inside a value that is no object and no list")


def _place(target: Any, each: Assignment) -> None:
    name = each.path[-1]
    if isinstance(target, dict):
        target[name] = each.value
    elif isinstance(target, list):
        index = _index(target, name, each)
        target[index : index + 1] = [each.value]
    else:
        raise _misplaced(each, f"{name!r} would stand inside a value that is no object and no list")


def _index(target: list[Any], name: str, each: Assignment) -> int:
    if not (name.isascii() and name.isdigit() and int(name) <= len(target)):
        raise _misplaced(
            each, f"{name!r} is no place of a list with {len(target)} items, counted from 0"
        )
    return int(name)


def _misplaced(each: Assignment, why: str) -> ConfigError:
    return ConfigError(f"--set {'.'.join(each.path)}: {why}")
