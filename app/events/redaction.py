"""Take secrets out of what Atlas sends, before any of it stands in a readable column.

A signing link is a password: whoever holds it signs. So are the links to review and to
download. The raw body keeps them; nothing that is derived from it does.
"""

import re
from functools import lru_cache
from typing import Any, Final

# A value as JSON knows it: nobody can say what stands in there.
Json = Any

REDACTED: Final = "[redacted]"
MAX_DEPTH: Final = 64

_SECRET_NAME_ENDINGS = ("token", "secret", "password", "apikey")
_LINK_ENDING = re.compile(r"(?:url|uri|link|href)s?$")
# Links to these open a document, or sign it, for whoever follows them.
_SECRET_LINKS = re.compile(
    r"sign(?:ing|ed|er|ature)?|review|(?:signed|executed)?(?:pdf|document|file)|download|upload"
    r"|preview|embed(?:ded)?|certificate|access|magic"
)

# One of these stands in every name and every link that is redacted.
_TRACES = (
    b"token",
    b"secret",
    b"word",
    b"key",
    b"signature",
    b"url",
    b"uri",
    b"link",
    b"href",
    b"://",
)

_BACKSLASH, _SLASH = rb"\/"
_SEPARATORS = re.compile(r"""([\s"'<>`{}|^()]+)""")
_USERINFO = re.compile(r"://[^/?#@]*@")
_QUERY = re.compile(r"[?#]")
_PARAMETERS = re.compile(r"[&;?#]")
_SECRET_PARAMETER = re.compile(
    r"t|rt|at|st|se|sp|sv|sr|sig|auth|code|jwt|pwd|otp|hmac|hash|policy|credential"
    r"|awsaccesskeyid|googleaccessid|(?:x-amz-|x-goog-|x-oss-).*"
    r"|.*(?:token|signature|secret|password|key)"
)


def has_links(body: bytes) -> bool:
    """Whether `body` may hold a link, however escaped."""
    # A single byte is found twenty times as fast as three.
    return _BACKSLASH in body or (_SLASH in body and b"://" in body)


def may_hold_secrets(body: bytes) -> bool:
    """Whether anything in `body` may have to be redacted; quicker than to look at all of it."""
    # What is escaped, or has letters that fold into others, is looked at in full.
    if _BACKSLASH in body or not body.isascii():
        return True
    folded = body.lower()
    return any(trace in folded for trace in _TRACES)


def redact(value: Json, depth: int = 0) -> Json:
    """Return `value`, a JSON value, without the secrets in it; the original stays as it is."""
    if isinstance(value, str):
        return redact_text(value)
    if not isinstance(value, (dict, list)):
        return value
    if depth >= MAX_DEPTH:
        return REDACTED
    if isinstance(value, list):
        return [redact(item, depth + 1) for item in value]
    return {
        key: REDACTED if inner and _is_secret_name(key) else redact(inner, depth + 1)
        for key, inner in value.items()
    }


def redact_text(text: str) -> str:
    """Return `text` with the query of every link that carries a token left out."""
    if "://" not in text and r":\/\/" not in text:
        return text
    return "".join(map(_redact_link, _SEPARATORS.split(text)))


# The same few names come again and again; the bound is for those that do not.
@lru_cache(maxsize=4096)
def _is_secret_name(name: str) -> bool:
    plain = "".join(filter(str.isalnum, name.casefold()))
    if plain.endswith(_SECRET_NAME_ENDINGS) or plain == "signature":
        return True
    ending = _LINK_ENDING.search(plain)
    return ending is not None and bool(_SECRET_LINKS.fullmatch(plain, 0, ending.start()))


def _redact_link(word: str) -> str:
    if "://" not in word and r":\/\/" not in word:
        return word
    word = _USERINFO.sub(f"://{REDACTED}@", word)
    query = _QUERY.search(word)
    if query is None or not any(map(_is_secret_parameter, _PARAMETERS.split(word[query.end() :]))):
        return word
    return word[: query.end()] + REDACTED


def _is_secret_parameter(parameter: str) -> bool:
    name = parameter.partition("=")[0].casefold()
    return _SECRET_PARAMETER.fullmatch(name) is not None
