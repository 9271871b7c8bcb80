"""Small changes of a statement: another comparison, a lock or a condition left out."""

import re
from collections.abc import Iterator
from typing import Final

_STATEMENT: Final = re.compile(
    r"\b(SELECT|UPDATE|INSERT|DELETE|EXISTS|WHERE|CASE WHEN|RETURNING|SET state)\b"
)
# What stands in the text, and what shall stand there.
_SWAPS: Final = (
    (r" <= ", " < "),
    (r" < ", " <= "),
    (r" > ", " >= "),
    (r" >= ", " > "),
    (r"(?<=WHERE )(\S+) = ", r"\1 <> "),
    (r"(?<=AND )(\S+) = ", r"\1 <> "),
    (r"(?<=OR )(\S+) = ", r"\1 <> "),
    (r"\bAND\b", "OR"),
    (r"\bOR\b", "AND"),
    (r"\bNOT (?=EXISTS|\()", ""),
    (r"\bIS NULL\b", "IS NOT NULL"),
    (r"\bIS NOT NULL\b", "IS NULL"),
    (r" FOR UPDATE(?: OF \w+)?(?: SKIP LOCKED)?", ""),
    (r" SKIP LOCKED", ""),
    (r"\+ 1\b", "+ 2"),
    (r"- 1\b", "- 2"),
    (r"\bTHEN 0 ELSE 1\b", "THEN 1 ELSE 0"),
    (r" / 2\b", " / 4"),
    (r"'running'", "'pending'"),
    (r"'pending'", "'running'"),
    (r"\b(?:LEAST|min)\(", "max("),
    (r"\bGREATEST\(", "LEAST("),
    (r" ON CONFLICT DO NOTHING", ""),
    (r"\battempts = attempts [+-] 1, ", ""),
    (r"\bdue_at = NULL\b", "due_at = due_at"),
    (r"\bDISTINCT FROM\b", "NOT DISTINCT FROM"),
)


def is_statement(text: str) -> bool:
    """Tell SQL from other text."""
    return _STATEMENT.search(text) is not None


def changes(text: str) -> Iterator[tuple[str, str, str]]:
    """Give every changed text, after what stood there and what stands there now."""
    found = [(match, match.expand(new)) for old, new in _SWAPS for match in re.finditer(old, text)]
    for match, new in sorted(found, key=lambda each: each[0].start()):
        before = " ".join(text[max(0, match.start() - 24) : match.end() + 16].split())
        yield text[: match.start()] + new + text[match.end() :], before, new.strip() or "nothing"
