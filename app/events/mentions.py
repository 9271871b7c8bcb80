"""Find an e-mail address, or an id, in whatever was received, however it is escaped there.

Bytes in quarantine may be no JSON at all, and JSON may stand as text in other JSON, so nothing
is parsed: escapes are undone one layer after the other, and the text is looked at each time.
"""

import re
from typing import Final
from urllib.parse import unquote

from app.events.redaction import Json

# What has to be undone first; half of the bytes of UTF-16 are NUL.
_ESCAPES: Final = (b"\\", b"%", b"\0")
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|(.))", re.DOTALL)
# Text within text within text; nobody writes more of it.
_LAYERS: Final = 6
# What else may stand there without being part of it: ann@x.com is not in joann@x.com, nor
# in ann@x.com.au. At the end of a sentence it is.
_NOT_BEFORE = r"(?<![\w.+-])"
_NOT_BEHIND = r"(?![\w-]|\.\w)"
# In a path, what stands there is set off by dots.
_NOT_BEFORE_IN_PATH, _NOT_BEHIND_IN_PATH = r"(?<![\w+-])", r"(?![\w-])"


class Mention:
    """A text that is looked for: as it stands, or as it stands in JSON or in a link."""

    def __init__(self, text: str, *, is_folded: bool) -> None:
        self._fold = str.lower if is_folded else str
        wanted = re.escape(self._fold(text))
        self._pattern = re.compile(f"{_NOT_BEFORE}{wanted}{_NOT_BEHIND}")
        self._in_path = re.compile(f"{_NOT_BEFORE_IN_PATH}{wanted}{_NOT_BEHIND_IN_PATH}")
        # Quick, and right for nearly everything: without this, or an escape, it is nowhere.
        self._trace = text.lower().encode() if text.isascii() else b""

    def is_in(self, body: bytes) -> bool:
        """Whether `body` mentions it."""
        if not any(escape in body for escape in _ESCAPES) and self._trace not in body.lower():
            return False
        return self.is_in_text(body.replace(b"\0", b"").decode("utf-8", "replace"))

    def is_in_text(self, text: str) -> bool:
        """Whether `text` mentions it."""
        for _ in range(_LAYERS):
            if self._pattern.search(self._fold(text)):
                return True
            plain = unquote(_ESCAPE.sub(_unescaped, text))
            if plain == text:
                break
            text = plain
        return False

    def is_in_path(self, path: str) -> bool:
        """Whether a path such as `metadata.key` leads through it."""
        return bool(self._in_path.search(self._fold(unquote(path))))

    def is_in_value(self, value: Json) -> bool:
        """Whether any text in `value`, a JSON value, mentions it."""
        if isinstance(value, str):
            return self.is_in_text(value)
        if isinstance(value, dict):
            return any(self.is_in_text(k) or self.is_in_value(v) for k, v in value.items())
        return isinstance(value, list) and any(map(self.is_in_value, value))

    def without(self, value: Json, mark: str) -> Json:
        """Return `value`, a JSON value, with `mark` for each text that mentions it."""
        if isinstance(value, str):
            return mark if self.is_in_text(value) else value
        if isinstance(value, dict):
            return {self.without(k, mark): self.without(v, mark) for k, v in value.items()}
        return [self.without(each, mark) for each in value] if isinstance(value, list) else value


def address(email: str) -> Mention:
    """Look for an e-mail address, in capitals or not."""
    return Mention(email.strip(), is_folded=True)


def identifier(text: str) -> Mention:
    """Look for an id; its letters count as they are."""
    return Mention(text, is_folded=False)


_CONTROLS: Final = {"n": "\n", "r": "\r", "t": "\t", "b": "\b", "f": "\f"}


def _unescaped(match: re.Match[str]) -> str:
    if match[1] is not None:
        return chr(int(match[1], 16))
    return _CONTROLS.get(match[2], match[2])
