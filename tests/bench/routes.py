"""The routes of the API that are measured: what is asked for, and what must be answered."""

import json
import random
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from http.client import HTTPConnection
from typing import Any
from urllib.parse import quote, urlencode

import asyncpg

from tests.bench.filling import CAUSES, SET_ASIDE, TENANTS, Filling, envelope
from tests.bench.owed import PARTY

# So many different things are asked of each route.
PATHS = 300
PAGE = 50
FEED_PAGE = 100
# The empty route of tests/bench/reading_service.py.
NOTHING = "/api/nothing"

Json = dict[str, Any]
# Says, in a sentence, what is wrong with an answer.
Check = Callable[[asyncpg.Connection, Json], Awaitable[str | None]]


@dataclass(frozen=True, slots=True)
class Route:
    """One kind of question: the paths that may be asked, and what each has to be answered."""

    name: str
    checks: dict[str, Check]

    @property
    def paths(self) -> Sequence[str]:
        return list(self.checks)

    async def find_faults(
        self, connection: asyncpg.Connection, samples: Sequence[tuple[str, str]]
    ) -> list[str]:
        """Compare some answers with the database."""
        faults = []
        for path, body in samples:
            fault = await self._fault(connection, path, body)
            if fault is not None:
                faults.append(f"{self.name}: {path} {fault}")
        return faults

    async def _fault(self, connection: asyncpg.Connection, path: str, body: str) -> str | None:
        try:
            return await self.checks[path](connection, json.loads(body))
        except (KeyError, TypeError, ValueError) as error:
            return f"cannot be read: {type(error).__name__} {error}"


class Caller:
    """Asks one thing at a time, before anything is measured."""

    def __init__(self, port: int, token: str) -> None:
        self._port = port
        self._headers = {"Authorization": f"Bearer {token}"}

    def get(self, path: str) -> Json:
        connection = HTTPConnection("127.0.0.1", self._port, timeout=60)
        try:
            connection.request("GET", path, headers=self._headers)
            response = connection.getresponse()
            body = response.read()
        finally:
            connection.close()
        if response.status != 200:
            raise RuntimeError(f"GET {path} was answered {response.status}: {body[:500]!r}")
        answered: Json = json.loads(body)
        return answered

    def pages(self, path: str, *, cursor: str, count: int) -> list[str]:
        """Give the paths of the pages behind one, each behind the one before."""
        pages, page = [path], path
        while len(pages) < count and (following := self.get(page)["next_cursor"]) is not None:
            page = f"{path}{'&' if '?' in path else '?'}{urlencode({cursor: following})}"
            pages.append(page)
        return pages


def one_envelope(number: int) -> Iterator[Route]:
    """Give the routes of one envelope; `number` is how many there are."""
    ids = [envelope(n) for n in _some(number)]
    checks: dict[str, Callable[[str], Check]] = {
        "": lambda id_: partial(_is_envelope, id_),
        "/status": lambda id_: partial(_is_status, id_),
        "/explain": lambda id_: partial(_is_explained, id_),
    }
    for suffix, check in checks.items():
        name = f"envelope/{{id}}{suffix}"
        yield Route(name, {f"/api/envelope/{id_}{suffix}": check(id_) for id_ in ids})


def envelope_lists(filling: Filling, caller: Caller) -> Iterator[Route]:
    """Give the lists of envelopes, by every filter."""
    count = filling.envelopes
    first, second = caller.pages("/api/envelopes", cursor="cursor", count=2)
    yield _envelopes("", {first: PAGE})
    yield _envelopes("second page", {second: PAGE})
    for word, of, there in (("signed", "common", PAGE), ("declined", "one of 100", count // 100)):
        queries = _queries(min(PAGE, there), status=[word])
        yield _envelopes(f"status, {of}", queries, status=word)
    numbers = _some(count)
    yield _envelopes("external_id", _queries(1, external_id=[f"crm-{n}" for n in numbers]))
    references = [f"ref-{n // 10}" for n in numbers if n < count // 10 * 10]
    yield _envelopes("client_reference_id", _queries(10, client_reference_id=references))
    tenants = [f"tenant-{n}" for n in range(TENANTS)]
    yield _envelopes("tenant", _queries(min(PAGE, count // TENANTS), tenant=tenants))
    is_test = _queries(min(PAGE, count // 50), is_test=["true"])
    yield _envelopes("is_test", is_test, is_test=True)
    times = [filling.updated_at(n).isoformat() for n in _some(count - 2 * PAGE)]
    yield _envelopes("updated_after", _queries(PAGE, updated_after=times))
    yield from _searches(count)


def _searches(count: int) -> Iterator[Route]:
    numbers = _some(count)
    yield _envelopes("q, an id", _queries(1, q=[envelope(n) for n in numbers]))
    yield _envelopes("q, part of an id", _queries(1, q=[envelope(n)[:20] for n in numbers]))
    yield _envelopes("q, an e-mail", _queries(1, q=[f"ada.{n}@example.com" for n in numbers]))
    # Of ten thousand, each of these begins a hundred and more.
    parts = [f"ada.{n}" for n in range(10, min(100, count // 100))] or ["ada."]
    yield _envelopes("q, part of an e-mail", _queries(PAGE, q=parts))
    yield _envelopes("q, everybody's e-mail", _queries(PAGE, q=[PARTY]))


def feed(filling: Filling, places: dict[str, str]) -> Iterator[Route]:
    """Give the pages of the feed behind the cursors that are given by name."""
    path = f"/api/events?limit={FEED_PAGE}"
    for name, cursor in places.items():
        page = f"{path}&{urlencode({'after': cursor})}" if cursor else path
        yield Route(f"events, {name}", {page: partial(_is_feed, FEED_PAGE)})
    kind = "envelope.viewed"
    middle = urlencode({"after": places["the middle"], "type": kind})
    yield Route("events, by type", {f"{path}&{middle}": partial(_are_events, {"type": kind})})
    ids = [str(filling.event(m)) for m in _some(filling.events)]
    yield Route("events/{id}", {f"/api/events/{id_}": partial(_is_event, id_) for id_ in ids})


def envelope_pages(caller: Caller) -> Route:
    """Give some pages of the whole list, each behind the one before."""
    pages = caller.pages("/api/envelopes", cursor="cursor", count=20)
    return _envelopes("a page", dict.fromkeys(pages, PAGE))


def feed_pages(caller: Caller) -> Route:
    """Give some pages of the feed, each behind the one before."""
    pages = caller.pages(f"/api/events?limit={FEED_PAGE}", cursor="after", count=20)
    return Route("events, a page", dict.fromkeys(pages, partial(_is_feed, FEED_PAGE)))


def deliveries(filling: Filling) -> Iterator[Route]:
    """Give the lists of deliveries, by every filter."""
    yield _deliveries("", {}, PAGE)
    for state in ("dead", "pending", "done"):
        yield _deliveries(f"state {state}", {"state": [state]}, PAGE)
    yield _deliveries("callback", {"callback": ["bench"]}, PAGE)
    ids = [envelope(n) for n in _some(filling.envelopes)]
    yield _deliveries("envelope_id", {"envelope_id": ids}, filling.per_envelope)


def overviews() -> Iterator[Route]:
    """Give what is counted and summed up."""
    yield Route("failures", {"/api/failures": _are_failures})
    yield Route("callbacks", {"/api/callbacks": _are_callbacks})
    yield Route("stats", {"/api/stats": _is_something})


def _some(count: int) -> list[int]:
    return random.sample(range(count), min(PATHS, count))


# The path, what it filters by, and how many items it must give.
Queries = dict[str, int]


def _queries(expected: int, **values: Sequence[str]) -> Queries:
    [(name, texts)] = values.items()
    return {
        f"/api/envelopes?{urlencode({name: text}, quote_via=quote)}": expected for text in texts
    }


def _envelopes(by: str, queries: Queries, **wanted: Any) -> Route:
    checks = {path: partial(_are_envelopes, expected, wanted) for path, expected in queries.items()}
    return Route(f"envelopes, {by}".removesuffix(", "), dict(checks))


def _deliveries(by: str, filters: dict[str, Sequence[str]], expected: int) -> Route:
    checks: dict[str, Check] = {}
    for name, values in filters.items():
        for value in values:
            path = f"/api/deliveries?{urlencode({name: value})}"
            checks[path] = partial(_are_deliveries, expected, {name: value})
    checks = checks or {"/api/deliveries": partial(_are_deliveries, expected, {})}
    return Route(f"deliveries, {by}".removesuffix(", "), checks)


_ENVELOPES = """
SELECT id, account, tenant, status, signed_count, total, next_signer_email, external_id,
    client_reference_id, is_test, version FROM envelopes WHERE id = ANY ($1::text[])
"""
_EVENTS = """
SELECT e.id, e.type, e.envelope_id, e.status, f.position
FROM events e JOIN feed f ON f.event_id = e.id WHERE e.id = ANY ($1::uuid[])
ORDER BY f.position
"""
_DELIVERIES = """
SELECT id, event_id, callback, state, envelope_id FROM deliveries WHERE id = ANY ($1::uuid[])
"""


def _differ(answered: Json, stored: asyncpg.Record, names: Sequence[str]) -> str | None:
    for name in names:
        if _text(answered[name]) != _text(stored[name]):
            return f"says {name} {answered[name]!r}, and the database has {stored[name]!r}"
    return None


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


async def _rows(connection: asyncpg.Connection, query: str, ids: Sequence[str]) -> Json:
    return {str(row["id"]): row for row in await connection.fetch(query, ids)}


async def _is_status(id_: str, connection: asyncpg.Connection, body: Json) -> str | None:
    [row] = (await _rows(connection, _ENVELOPES, [id_])).values()
    return _differ(body, row, ("status", "signed_count", "total", "next_signer_email"))


async def _is_envelope(id_: str, connection: asyncpg.Connection, body: Json) -> str | None:
    if body["envelope_id"] != id_:
        return f"is about {body['envelope_id']}"
    return await _are_like(connection, [body], {})


async def _is_explained(id_: str, connection: asyncpg.Connection, body: Json) -> str | None:
    text = json.dumps(body)
    ids = await connection.fetch(
        "SELECT id FROM events WHERE account = 'default' AND envelope_id = $1", id_
    )
    missing = [str(row["id"]) for row in ids if str(row["id"]) not in text]
    return f"does not tell of {', '.join(missing)}" if missing or not ids else None


async def _are_envelopes(
    expected: int, wanted: Json, connection: asyncpg.Connection, body: Json
) -> str | None:
    items = body["items"]
    if len(items) != expected:
        return f"gives {len(items)} envelopes instead of {expected}"
    return await _are_like(connection, items, wanted)


async def _are_like(
    connection: asyncpg.Connection, items: Sequence[Json], wanted: Json
) -> str | None:
    stored = await _rows(connection, _ENVELOPES, [item["envelope_id"] for item in items])
    names = ("account", "tenant", "status", "external_id", "client_reference_id", "version")
    for item in items:
        fault = _differ(item, stored[item["envelope_id"]], names) or _misses(item, wanted)
        if fault is not None:
            return fault
    return None


def _misses(item: Json, wanted: Json) -> str | None:
    other = {name: item[name] for name, value in wanted.items() if item[name] != value}
    return f"gives {other} where {wanted} was asked for" if other else None


async def _is_feed(expected: int, connection: asyncpg.Connection, body: Json) -> str | None:
    """Check that nothing is left out between the first item and the last."""
    items = body["items"]
    if len(items) != expected:
        return f"gives {len(items)} items instead of {expected}"
    rows = await connection.fetch(_EVENTS, [item["event_id"] for item in items])
    if [str(row["id"]) for row in rows] != [item["event_id"] for item in items]:
        return "gives events in another order than that of the feed"
    if rows[-1]["position"] - rows[0]["position"] != expected - 1:
        return "leaves out events of the feed"
    return await _are_events({}, connection, body)


async def _are_events(wanted: Json, connection: asyncpg.Connection, body: Json) -> str | None:
    items = body["items"]
    stored = await _rows(connection, _EVENTS, [item["event_id"] for item in items])
    for item in items:
        fault = _differ(item, stored[item["event_id"]], ("type", "envelope_id", "status"))
        if fault := fault or _misses(item, wanted):
            return fault
    return None if items else "gives nothing"


async def _is_event(id_: str, connection: asyncpg.Connection, body: Json) -> str | None:
    if body["event_id"] != id_:
        return f"is about {body['event_id']}"
    return await _are_events({}, connection, {"items": [body]})


async def _are_deliveries(
    expected: int, wanted: Json, connection: asyncpg.Connection, body: Json
) -> str | None:
    items = body["items"]
    if len(items) != expected:
        return f"gives {len(items)} deliveries instead of {expected}"
    stored = await _rows(connection, _DELIVERIES, [item["id"] for item in items])
    for item in items:
        fault = _differ(item, stored[item["id"]], ("event_id", "callback", "state", "envelope_id"))
        if fault := fault or _misses(item, wanted):
            return fault
    return None


async def _are_failures(_: asyncpg.Connection, body: Json) -> str | None:
    counts = [item["count"] for item in body["items"]]
    if (len(counts), sum(counts)) != (CAUSES, SET_ASIDE):
        return f"counts {sum(counts)} of {len(counts)} causes instead of {SET_ASIDE} of {CAUSES}"
    return None


async def _are_callbacks(_: asyncpg.Connection, body: Json) -> str | None:
    names = [item["name"] for item in body["items"]]
    return None if names == ["bench"] else f"gives {names}"


async def _is_something(_: asyncpg.Connection, body: Json) -> str | None:
    return None if body else "gives nothing"
