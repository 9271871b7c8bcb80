"""Ask Atlas about an envelope, and fetch what it links to.

The key, the links and what stands in them are secrets: no text and no log line of this
module has any of them.

AtlasError
├── EnvelopeUnknown     Atlas has no such envelope, or not for this key
├── AtlasRefused        it refused the key, or the question
├── AtlasBusy           too many questions; `retry_after` is what it asked for
├── AtlasUnavailable    no answer, or an error of its own: worth another try
└── AtlasUnreadable     an answer that cannot be understood
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from ipaddress import ip_address
from typing import Any
from urllib.parse import quote, urljoin
from uuid import UUID

from app.atlas.schemas import AtlasEnvelope
from app.errors import AppError, ConfigError
from app.outbound import Answer, Outbound, OutboundError, RequestRefused, TooLarge, read_url

# What `make run` puts before a key that it made.
GENERATED = "local_"
CALL_TIMEOUT = timedelta(seconds=20)
DOWNLOAD_TIMEOUT = timedelta(minutes=4)
LONGEST_ANSWER = 4 * 1024 * 1024

_CODE = re.compile(r"[a-z][a-z0-9_]{0,39}")
_TENANT = re.compile(r"[!-~]{1,200}")
_SUCCESS = range(200, 300)
_REDIRECTS = range(300, 400)
_GONE = frozenset({404, 410})
_TOO_MANY = 429
# Of the 4xx, those that are no fault of the question.
_PASSING = frozenset({408, 421, 425})
_SERVER_ERRORS = range(500, 600)


class AtlasError(AppError):
    """Atlas did not give what it was asked for."""

    def __init__(self, text: str, *, retry_after: timedelta | None = None) -> None:
        super().__init__(text)
        self.retry_after = retry_after


class EnvelopeUnknown(AtlasError):
    """Atlas does not know the envelope, or does not show it to this key."""


class AtlasRefused(AtlasError):
    """Atlas refused the key, or the question; the same one will be refused again."""


class AtlasBusy(AtlasError):
    """Atlas was asked too often; `retry_after` is its own wish, if it has one."""


class AtlasUnavailable(AtlasError):
    """Atlas did not answer, or with an error of its own."""


class AtlasUnreadable(AtlasError):
    """Atlas answered something that cannot be understood."""


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key with which Atlas may be called."""

    secret: str = field(repr=False)
    not_after: datetime | None = None

    @property
    def is_generated(self) -> bool:
        """True for one that Atlas has never seen."""
        return self.secret.startswith(GENERATED)

    def is_valid(self, *, at: datetime) -> bool:
        """False once its time is over."""
        return self.not_after is None or at <= self.not_after


class Atlas:
    """Atlas' API, as far as this service needs it; may be shared by event loops.

    `allow` are the networks that may be called although they are not public. Raises
    `ConfigError` for a `base_url` that cannot be Atlas'.
    """

    def __init__(self, base_url: str, *, allow: Sequence[str] = ()) -> None:
        self._base_url = _checked(base_url)
        self._is_here = _is_loopback(self._base_url)
        self._calls = Outbound(allow=allow, timeout=CALL_TIMEOUT, max_bytes=LONGEST_ANSWER)
        self._downloads = Outbound(allow=allow, timeout=DOWNLOAD_TIMEOUT, max_bytes=LONGEST_ANSWER)

    def may_send(self, key: ApiKey) -> bool:
        """Whether `key` may be sent there: one that was made here never leaves the machine."""
        return key.secret.isascii() and (self._is_here or not key.is_generated)

    async def get(
        self, envelope_id: str, *, key: ApiKey, tenant: str | None = None
    ) -> AtlasEnvelope:
        """Ask for one envelope, perhaps as a connected account. Raises `AtlasError`."""
        segment = quote(envelope_id, safe="", errors="replace")
        # These two would lead to another route, however they are escaped.
        if segment in {"", ".", ".."}:
            raise EnvelopeUnknown("no envelope can have this id")
        headers = {"Accept": "application/json", **self._authorization(key), **_scope(tenant)}
        url = f"{self._base_url}/envelope/{segment}"
        try:
            answer = await self._calls.request("GET", url, headers=headers)
        except OutboundError as error:
            raise AtlasUnavailable(f"Atlas cannot be asked: {error}") from error
        envelope = AtlasEnvelope(_read(answer))
        if envelope.ids and envelope_id not in envelope.ids:
            raise AtlasUnreadable("Atlas answered with another envelope than it was asked for")
        return envelope

    async def download(
        self, link: str, sink: Callable[[bytes], object], *, key: ApiKey, max_bytes: int
    ) -> None:
        """Give what `link` leads to to `sink`, piece by piece.

        Raises `AtlasError`, or `TooLarge` beyond `max_bytes`; what `sink` has by then is to
        be thrown away.
        """
        url = urljoin(f"{self._base_url}/", link)
        _require_safe(url)
        # A link into a bucket brings its own right to be read; only Atlas gets to see the key.
        headers = self._authorization(key) if _origin(url) == _origin(self._base_url) else {}
        try:
            answer = await self._downloads.download(url, sink, max_bytes=max_bytes, headers=headers)
        except TooLarge:
            raise
        except OutboundError as error:
            raise AtlasUnavailable(f"the document cannot be fetched: {error}") from error
        if answer.status != 200:  # noqa: PLR2004  # anything else is not the document
            raise AtlasUnavailable(
                f"the link to the document was answered with {answer.status}",
                retry_after=answer.retry_after(),
            )

    def _authorization(self, key: ApiKey) -> dict[str, str]:
        if not self.may_send(key):
            raise AtlasRefused(
                "this key is not sent to Atlas: it was made by `make run` or is not ASCII; "
                "put a key from Atlas' dashboard into ATLAS_API_KEY"
            )
        return {"Authorization": f"Bearer {key.secret}"}


def _checked(base_url: str) -> str:
    try:
        target = read_url(base_url)
    except RequestRefused as error:
        raise ConfigError(f"ATLAS_BASE_URL: {error}") from None
    if target.query or target.fragment:
        raise ConfigError("ATLAS_BASE_URL must end with a path, such as /api, not with ? or #")
    if target.scheme != "https" and not _is_loopback(base_url):
        raise ConfigError(
            "ATLAS_BASE_URL must begin with https://, or every key could be read on the way"
        )
    return base_url.rstrip("/")


def _is_loopback(url: str) -> bool:
    host = read_url(url).host
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _require_safe(url: str) -> None:
    try:
        read_url(url)
    except RequestRefused as error:
        raise AtlasUnreadable(f"Atlas gave a link that cannot be followed: {error}") from None
    if not url.startswith("https://") and not _is_loopback(url):
        raise AtlasUnreadable("Atlas gave a link without https, which is not followed")


def _origin(url: str) -> tuple[str, str, int]:
    # Read by the same parser that the call uses: two could disagree about the host.
    target = read_url(url)
    default = 443 if target.scheme == "https" else 80
    return target.scheme, target.host, target.port or default


def _scope(tenant: str | None) -> dict[str, str]:
    """Name the connected account: by Atlas' own id as it is, by the platform's with `ext_`."""
    if tenant is None or not _TENANT.fullmatch(tenant):
        return {}
    try:
        return {"Atlas-Account": str(UUID(tenant))}
    except ValueError:
        return {"Atlas-Account": f"ext_{tenant.removeprefix('ext_')}"}


def _read(answer: Answer) -> dict[str, Any]:
    if answer.status not in _SUCCESS:
        raise _failure(answer)
    if answer.is_cut or answer.is_packed:
        raise AtlasUnreadable("Atlas' answer is longer than can be read, or packed")
    try:
        body = json.loads(answer.body)
    except (ValueError, RecursionError):
        # The text of that error may quote the answer.
        body = None
    if not isinstance(body, dict):
        raise AtlasUnreadable(
            f"Atlas answered {answer.status}, but not with a JSON object: "
            "does ATLAS_BASE_URL lead to its API?"
        )
    return body


def _failure(answer: Answer) -> AtlasError:
    status = answer.status
    text = f"Atlas answered {status}{_code(answer)}"
    if status in _GONE:
        return EnvelopeUnknown(f"{text}: it has no such envelope, or not for this key")
    if status == _TOO_MANY:
        return AtlasBusy(text, retry_after=answer.retry_after())
    if status in _SERVER_ERRORS or status in _PASSING:
        return AtlasUnavailable(text, retry_after=answer.retry_after())
    if status in _REDIRECTS:
        return AtlasUnreadable(
            f"{text}, a redirect, which is not followed: "
            "put the address that it leads to into ATLAS_BASE_URL"
        )
    return AtlasRefused(f"{text}: is the key in ATLAS_API_KEY or ATLAS_API_KEYS still right?")


def _code(answer: Answer) -> str:
    """Quote the one word of an error that was made to be read by programs."""
    try:
        code = json.loads(answer.body)["code"]
    except (ValueError, RecursionError, LookupError, TypeError):
        return ""
    return f" ({code})" if isinstance(code, str) and _CODE.fullmatch(code) else ""
