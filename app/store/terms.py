"""What envelopes are found by: their ids, and the e-mail addresses of their parties.

Folded by the database, when they are written and when they are asked for, so that both
are folded alike.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from sqlalchemy.ext.asyncio import AsyncConnection

from app.store.dialects import is_postgresql
from app.store.envelopes import EnvelopeKey
from app.store.session import fetch
from app.store.sight import Sight

# Longer ones are found by what they begin with.
LONGEST = 255
# How many rows one page looks at, seen or not.
SCANNED = 1000


class Term(NamedTuple):
    """A text that one envelope is found by, folded; also the place of a list that goes on."""

    term: str
    account: str
    envelope_id: str


class Found(NamedTuple):
    """The terms of one page, and where the next one begins: None behind the last."""

    terms: list[Term]
    next: Term | None


_FOLDED_POSTGRESQL = f"left(lower({{text}}), {LONGEST})"
_FOLDED_SQLITE = f"substr(lower({{text}}), 1, {LONGEST})"
_FOLD_POSTGRESQL = f"SELECT {_FOLDED_POSTGRESQL.format(text='$1::text')}"
_FOLD_SQLITE = f"SELECT {_FOLDED_SQLITE.format(text='?')}"

_WORDS = "e.id, e.external_id, e.client_reference_id, e.next_signer_email"
_LEARN_POSTGRESQL = f"""
INSERT INTO terms (term, account, envelope_id)
SELECT {_FOLDED_POSTGRESQL.format(text="said.word")}, e.account, e.id
FROM unnest($1::text[], $2::text[]) AS named (account, id)
JOIN envelopes e ON e.account = named.account AND e.id = named.id
CROSS JOIN LATERAL (
    SELECT unnest(ARRAY[{_WORDS}])
    UNION ALL
    SELECT party ->> 'email' FROM jsonb_array_elements(
        CASE jsonb_typeof(e.parties) WHEN 'array' THEN e.parties ELSE '[]'::jsonb END
    ) AS party
) AS said (word)
WHERE e.erased_at IS NULL AND said.word <> ''
ON CONFLICT DO NOTHING
"""
_LEARN_SQLITE = f"""
WITH named (account, id) AS (SELECT value ->> 0, value ->> 1 FROM json_each(?)),
known AS (
    SELECT e.account, e.id AS envelope_id, e.parties, json_array({_WORDS}) AS words
    FROM named CROSS JOIN envelopes e ON e.account = named.account AND e.id = named.id
    WHERE e.erased_at IS NULL
),
said (word, account, envelope_id) AS (
    SELECT word.value, account, envelope_id FROM known, json_each(known.words) AS word
    UNION ALL
    SELECT party.value ->> 'email', account, envelope_id
    FROM known, json_each(known.parties) AS party WHERE party.type = 'object'
)
INSERT INTO terms (term, account, envelope_id)
SELECT {_FOLDED_SQLITE.format(text="word")}, account, envelope_id FROM said WHERE word <> ''
ON CONFLICT DO NOTHING
"""
_ERASED_POSTGRESQL = """
SELECT e.account, e.id FROM unnest($1::text[], $2::text[]) AS named (account, id)
JOIN envelopes e ON e.account = named.account AND e.id = named.id
WHERE e.erased_at IS NOT NULL
"""
_ERASED_SQLITE = """
SELECT e.account, e.id FROM json_each(?) AS named
CROSS JOIN envelopes e ON e.account = named.value ->> 0 AND e.id = named.value ->> 1
WHERE e.erased_at IS NOT NULL
"""
_FORGET = "DELETE FROM terms WHERE account = {account} AND envelope_id = {envelope_id}"
_FORGET_POSTGRESQL = _FORGET.format(account="$1::text", envelope_id="$2::text")
_FORGET_SQLITE = _FORGET.format(account="?", envelope_id="?")


async def learn(connection: AsyncConnection, keys: Iterable[EnvelopeKey]) -> None:
    """Take over what these envelopes are found by; what they said before still finds them.

    One that was erased is found by nothing.
    """
    named = _named(connection, sorted(set(keys)))
    on_postgresql = is_postgresql(connection)
    await fetch(connection, _LEARN_POSTGRESQL if on_postgresql else _LEARN_SQLITE, named)
    # It may have been erased between two looks at it.
    erased = await fetch(connection, _ERASED_POSTGRESQL if on_postgresql else _ERASED_SQLITE, named)
    for account, envelope_id in erased:
        await forget(connection, account, envelope_id)


def _named(connection: AsyncConnection, keys: Sequence[EnvelopeKey]) -> tuple[Any, ...]:
    if is_postgresql(connection):
        return [key[0] for key in keys], [key[1] for key in keys]
    return (json.dumps(keys),)


async def forget(connection: AsyncConnection, account: str, envelope_id: str) -> int:
    """Let an envelope be found by nothing any more; say how many terms there were."""
    if is_postgresql(connection):
        statement = f"{_FORGET_POSTGRESQL} RETURNING 1"
    else:
        statement = f"{_FORGET_SQLITE} RETURNING 1"
    return len(await fetch(connection, statement, (account, envelope_id)))


_KEY = "term, account, envelope_id"
_SCAN = (
    f"SELECT {_KEY} FROM terms WHERE ({_KEY}) > ({{after}}) AND term < {{end}} "
    f"ORDER BY {_KEY} LIMIT {SCANNED}"
)
_SCAN_POSTGRESQL = _SCAN.format(after="$1::text, $2::text, $3::text", end="$4::text")
_SCAN_SQLITE = _SCAN.format(after="?1, ?2, ?3", end="?4")
_FIND = f"""
SELECT {_KEY} FROM ({{scan}}) AS scanned
WHERE {{of_accounts}} AND ({{tenant}} IS NULL OR EXISTS (
    SELECT 1 FROM envelopes e
    WHERE e.account = scanned.account AND e.id = scanned.envelope_id AND e.tenant = {{tenant}}))
ORDER BY {_KEY} LIMIT {{limit}}
"""
_FIND_POSTGRESQL = _FIND.format(
    scan=_SCAN_POSTGRESQL,
    of_accounts="($5::text[] IS NULL OR scanned.account = ANY ($5::text[]))",
    tenant="$6::text",
    limit="$7::int8",
)
_FIND_SQLITE = _FIND.format(
    scan=_SCAN_SQLITE,
    of_accounts="(?5 IS NULL OR scanned.account IN (SELECT value FROM json_each(?5)))",
    tenant="?6",
    limit="?7",
)
_LAST = f"SELECT {_KEY} FROM ({{scan}}) AS scanned ORDER BY {_KEY} LIMIT 1 OFFSET {SCANNED - 1}"
_LAST_POSTGRESQL = _LAST.format(scan=_SCAN_POSTGRESQL)
_LAST_SQLITE = _LAST.format(scan=_SCAN_SQLITE)


async def find(
    connection: AsyncConnection, sight: Sight, q: str, *, after: Term | None = None, limit: int
) -> Found:
    """Give the terms that begin with `q`, of the envelopes that may be seen, in their order.

    One envelope may come several times. A page looks at a bounded number of terms, so it may
    be short or empty although there is a next one.
    """
    folded = await _fold(connection, q)
    start = Term(folded, "", "")
    scan = (*(start if after is None else max(after, start)), successor(folded))
    found = await _find(connection, scan, sight, limit)
    if len(found) == limit:
        return Found(found, found[-1])
    last = await fetch(
        connection, _LAST_POSTGRESQL if is_postgresql(connection) else _LAST_SQLITE, scan
    )
    return Found(found, Term(*last[0]) if last else None)


async def _fold(connection: AsyncConnection, q: str) -> str:
    statement = _FOLD_POSTGRESQL if is_postgresql(connection) else _FOLD_SQLITE
    folded: str = (await fetch(connection, statement, (q,)))[0][0]
    return folded


async def _find(
    connection: AsyncConnection, scan: tuple[str, ...], sight: Sight, limit: int
) -> list[Term]:
    accounts: Any = sight.accounts
    if is_postgresql(connection):
        statement = _FIND_POSTGRESQL
    else:
        statement = _FIND_SQLITE
        accounts = None if accounts is None else json.dumps(accounts)
    rows = await fetch(connection, statement, (*scan, accounts, sight.tenant, limit))
    return [Term(*row) for row in rows]


_LAST_CHARACTER = "\U0010ffff"
_BEHIND_ALL = _LAST_CHARACTER * (LONGEST + 1)


def successor(text: str) -> str:
    """Give the first text, byte by byte, behind all those that begin with `text`."""
    kept = text.rstrip(_LAST_CHARACTER)
    if not kept:
        return _BEHIND_ALL
    following = chr(ord(kept[-1]) + 1)
    # What comes next are halves of pairs, which are no characters.
    return kept[:-1] + ("\ue000" if following == "\ud800" else following)
