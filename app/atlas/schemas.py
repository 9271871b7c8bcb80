"""Read what Atlas answers, without knowing all of its names.

No public page shows the names under which the links to the signed PDF stand, so they are
found by the words in them: `signed_pdf_url`, `links.download`, `documents[].url` with
`type: executed`. What callers and signers wrote is never searched.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

MAX_DEPTH = 6

_OURS = ("envelope_id", "envelopeId", "id")
_WRAPPERS = ("envelope", "data")
# As both generations of Atlas call an envelope that all parties have signed.
_SIGNED = frozenset({"signed", "completed"})
_UNSIGNED = frozenset(
    {"draft", "detecting", "review", "pending", "in_progress"} | {"declined", "voided", "expired"}
)

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
# An entry of a list says with these what it is; a `name` would be the caller's file name.
_DESCRIPTIONS = ("type", "kind", "rel", "role", "variant")
# Written by callers and signers, who could put any link there.
_STRANGERS = frozenset(
    {"metadata", "parties", "participants", "fields", "events"}
    | {"extraction", "extracted", "extracted_data", "detected_parties"}
)
_FINAL = frozenset({"signed", "executed", "final", "completed"})
# From the surest on. A plain `document_url` is none of them: that is the name under which a
# caller hands in what is to be signed.
_RANKS = (_FINAL, frozenset({"pdf", "download", "downloads"}), frozenset({"documents"}))
_OTHERS = frozenset(
    {"audit", "certificate", "record", "summary", "unsigned", "original", "source", "preview"}
    | {"thumbnail", "upload", "review", "sign", "signing", "embed", "webhook", "callback", "docx"}
)


@dataclass(frozen=True, slots=True)
class AtlasEnvelope:
    """One envelope as Atlas tells it; `body` is all that it said, and holds secrets."""

    body: dict[str, Any] = field(repr=False)

    @property
    def ids(self) -> frozenset[str]:
        """Every id that may be meant to be the envelope's."""
        return frozenset(_texts(self.body, *_OURS))

    @property
    def status(self) -> str | None:
        """Atlas' own word for its state."""
        words = [word.lower() for word in _texts(self.body, "status")]
        # The outermost may also be the status of the answer, as in `ok`.
        known = [word for word in words if word in _SIGNED | _UNSIGNED]
        return next(iter(known or words), None)

    @property
    def pdf_url(self) -> str | None:
        """The link to the signed PDF, a secret; None as long as there is none."""
        if self.status in _UNSIGNED:
            return None
        # Without a word about the state, only a link that says "signed" is sure to be one.
        ranks = _RANKS if self.status in _SIGNED else _RANKS[:1]
        found = [(rank, url) for words, url in _links(self.body) for rank in _rank(words, ranks)]
        return min(found, key=lambda each: each[0])[1] if found else None


def _texts(body: dict[str, Any], *names: str) -> Iterator[str]:
    inner = [part for wrapper in _WRAPPERS if isinstance(part := body.get(wrapper), dict)]
    for values in (body, *inner):
        for name in names:
            if isinstance(value := values.get(name), str) and value:
                yield value


def _rank(words: frozenset[str], ranks: tuple[frozenset[str], ...]) -> Iterator[int]:
    if words & _OTHERS:
        return
    for rank, wanted in enumerate(ranks):
        if words & wanted:
            yield rank
            return


def _links(
    value: Any, words: frozenset[str] = frozenset(), depth: int = 0
) -> Iterator[tuple[frozenset[str], str]]:
    """Give each link with all the words on the way to it."""
    if isinstance(value, str) and value.startswith(("https://", "http://", "/")):
        yield words, value
    if depth == MAX_DEPTH:
        return
    if isinstance(value, list):
        for part in value:
            yield from _links(part, words | _description(part), depth + 1)
    if isinstance(value, dict):
        for name, part in value.items():
            if name not in _STRANGERS:
                yield from _links(part, words | _words(name), depth + 1)


def _description(part: Any) -> frozenset[str]:
    if not isinstance(part, dict):
        return frozenset()
    return frozenset().union(*(_words(part.get(name)) for name in _DESCRIPTIONS))


def _words(name: object) -> frozenset[str]:
    if not isinstance(name, str):
        return frozenset()
    return frozenset(word.lower() for word in _WORD.findall(name[:100]))
