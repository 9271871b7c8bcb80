"""The statements of the lists of envelopes: constant text, for each index and direction."""

from collections.abc import Mapping
from typing import Final, NamedTuple

from app.store import lookups

# How many rows one page looks at, wanted or not.
SCANNED: Final = 2000
# The filter `status` for envelopes of which no event has said one yet.
NO_STATUS: Final = "none"
# PostgreSQL's only, for the transaction: where few rows are guessed to fit, it would rather
# fetch and sort them all, and for some value they are a hundred thousand.
IN_ORDER: Final = (
    "SELECT set_config('enable_bitmapscan', 'off', true), set_config('enable_sort', 'off', true)"
)
# In the order of their parameters.
COMPARED: Final = ("external_id", "client_reference_id", "tenant", "status", "is_test")


class Indexed(NamedTuple):
    """How a list stays within one index: what its rows are, and the order that only it has.

    The column of the filter is compared together with the place. An equality beside it would
    say as much, but then every list would be in the order of `updated_at` alone, and PostgreSQL
    might go along that index for a value that hardly any row has.
    """

    condition: str
    columns: tuple[str, ...] = ()
    value: str | None = None


def _filtered(name: str) -> Indexed:
    return Indexed(f"e.{name} IS NOT NULL", (name,), value=name)


# From the one that leaves least.
INDEXED: Final[Mapping[str, Indexed]] = {
    "external_id": _filtered("external_id"),
    "client_reference_id": _filtered("client_reference_id"),
    "tenant": _filtered("tenant"),
    "no_status": Indexed("e.status IS NULL", ("status",)),
    "status": _filtered("status"),
    # Once to choose the index, and once to say that its first column is constant.
    "is_test": Indexed("e.is_test AND e.is_test = true"),
    "updated_at": Indexed("true"),
}

_PLACE = ("updated_at", "account", "id")
_MATCHES = f"""
    ({{external_id}} IS NULL OR e.external_id = {{external_id}})
    AND ({{client_reference_id}} IS NULL OR e.client_reference_id = {{client_reference_id}})
    AND ({{tenant}} IS NULL OR e.tenant = {{tenant}})
    AND ({{status}} IS NULL OR coalesce(e.status, '{NO_STATUS}') = {{status}})
    AND ({{is_test}} IS NULL OR coalesce(e.is_test, false) = {{is_test}})
    AND {{of_accounts}}"""
_RANGE = (
    "FROM envelopes e WHERE {condition} "
    "AND ({compared}) {behind} ({value}{after}) AND ({compared}) {up_to} ({value}{until})"
)
_PAGE = (
    f"SELECT {', '.join(f'e.{name}' for name in lookups.SHOWN.names)} {_RANGE} "
    f"AND {_MATCHES} ORDER BY {{order}} LIMIT {{limit}}"
)
_BOUND = (
    f"SELECT {', '.join(f'e.{name}' for name in _PLACE)} {_RANGE} "
    f"ORDER BY {{order}} LIMIT 1 OFFSET {SCANNED - 1}"
)

# The marks of the parameters, by whether it is PostgreSQL's.
_MARKS = {
    True: {
        "after": "$1::timestamptz, $2::text, $3::text",
        "until": "$4::timestamptz, $5::text, $6::text",
        "external_id": "$7::text",
        "client_reference_id": "$8::text",
        "tenant": "$9::text",
        "status": "$10::text",
        "is_test": "$11::bool",
        "of_accounts": "($12::text[] IS NULL OR e.account = ANY ($12::text[]))",
        "limit": "$13::int8",
    },
    False: {
        "after": "?1, ?2, ?3",
        "until": "?4, ?5, ?6",
        "external_id": "?7",
        "client_reference_id": "?8",
        "tenant": "?9",
        "status": "?10",
        "is_test": "?11",
        "of_accounts": "(?12 IS NULL OR e.account IN (SELECT value FROM json_each(?12)))",
        "limit": "?13",
    },
}

# Index, whether it goes forward, whether it is PostgreSQL's.
Way = tuple[str, bool, bool]


def _page_statement(way: Way) -> str:
    return _statement(_PAGE, way, _MARKS[way[2]])


def _bound_statement(way: Way) -> str:
    # Of the filters it has only that of the index, behind the two places.
    filtered = dict.fromkeys(COMPARED, "$7::text" if way[2] else "?7")
    return _statement(_BOUND, way, {**_MARKS[way[2]], **filtered})


def _statement(template: str, way: Way, marks: Mapping[str, str]) -> str:
    condition, columns, value = INDEXED[way[0]]
    direction = "" if way[1] else " DESC"
    compared = (*(columns if value else ()), *_PLACE)
    return template.format(
        condition=condition,
        compared=", ".join(f"e.{name}" for name in compared),
        value=f"{marks[value]}, " if value else "",
        order=", ".join(f"e.{name}{direction}" for name in (*columns, *_PLACE)),
        behind=">" if way[1] else "<",
        up_to="<=" if way[1] else ">=",
        **marks,
    )


_ALL = [(index, way, kind) for index in INDEXED for way in (True, False) for kind in (True, False)]
# The rows of a page, and the last row that it may look at.
PAGES: Final[Mapping[Way, str]] = {way: _page_statement(way) for way in _ALL}
BOUNDS: Final[Mapping[Way, str]] = {way: _bound_statement(way) for way in _ALL}
