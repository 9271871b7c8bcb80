"""Built in: tell a Slack channel what was signed, declined or voided.

Usage::

    CALLBACKS=app.callbacks.slack:callbacks
    SLACK_URL=https://hooks.slack.com/services/…         # an incoming webhook
    SLACK_EVENTS=envelope.signed,envelope.declined,envelope.voided,receiver.dead

Envelopes that are marked `is_test` are left out. With `receiver.dead` in the list, the
channel also hears of the first dead letter of each kind, and likewise of
`receiver.conflict`, `receiver.disputed` and `receiver.quarantined`. A message names
envelope and document, never a signer.
"""

from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, NoReturn, Protocol

from pydantic import SecretStr

from app.callbacks import Callbacks, Event, GiveUp, RetryLater
from app.callbacks.forward import MARGIN, NotAccepted, encode
from app.dispatch.blame import clean
from app.errors import ConfigError
from app.outbound import Answer, Outbound, RequestRefused, read_url

TIMEOUT = timedelta(seconds=10)
MAX_ANSWER_BYTES = 4096
LONGEST_NAME = 120
LONGEST_TEXT = 300

_OWN = "receiver."
# Of what is wrong with a request, only these may be right the next time.
_PASSING = frozenset({408, 425, 429})
_DOCUMENT_NAMES = ("document_name", "originalFilename", "original_filename", "title", "name")
_ESCAPES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", "`": "'"})
_TRUE = ("true", "1")


class SlackSettings(Protocol):
    """What `slack` reads of the settings."""

    @property
    def slack_url(self) -> SecretStr | None: ...
    @property
    def slack_events(self) -> Sequence[str]: ...
    @property
    def forward_allow(self) -> Sequence[str]: ...


def callbacks(settings: SlackSettings) -> Callbacks:
    """Make the callback `slack` of the settings; raises `ConfigError` if they cannot work."""
    if settings.slack_url is None:
        raise ConfigError("SLACK_URL is not set: name the URL of an incoming webhook of Slack")
    slack = Slack(url=settings.slack_url.get_secret_value(), allow=settings.forward_allow)
    found = Callbacks()
    # One at a time: Slack takes about one message a second for a channel.
    found.on(
        *settings.slack_events,
        name="slack",
        timeout=TIMEOUT + MARGIN,
        concurrency=1,
        where=is_worth_telling,
    )(slack)
    return found


class Slack:
    """A callback that sends a short message to an incoming webhook of Slack."""

    def __init__(self, *, url: str, allow: Sequence[str] = ()) -> None:
        try:
            read_url(url)
        except RequestRefused as error:
            raise ConfigError(f"SLACK_URL: {error}") from None
        self._url = url
        self._outbound = Outbound(allow=allow, timeout=TIMEOUT, max_bytes=MAX_ANSWER_BYTES)

    async def __call__(self, event: Event) -> None:
        """Tell the channel of one event."""
        body = encode({"text": message(event), "unfurl_links": False, "unfurl_media": False})
        headers = {"Content-Type": "application/json"}
        answer = await self._outbound.request("POST", self._url, headers=headers, content=body)
        if not answer.is_success:
            _fail(answer)


def _fail(answer: Answer) -> NoReturn:
    quote = answer.excerpt()
    text = f"Slack answered {answer.status}" + (f": {quote}" if quote else "")
    # No wait at all would use up every attempt at once.
    after = answer.retry_after()
    if after and (answer.status in _PASSING or answer.status >= 500):  # noqa: PLR2004  # its own fault
        raise RetryLater(text, after=after)
    if 400 <= answer.status < 500 and answer.status not in _PASSING:  # noqa: PLR2004  # ours
        raise GiveUp(f"{text} (is SLACK_URL still that of an incoming webhook?)")
    raise NotAccepted(text)


def is_worth_telling(event: Event) -> bool:
    """Leave out test envelopes, and every dead letter but the first of its kind."""
    data = event.data if isinstance(event.data, Mapping) else {}
    if event.type == "receiver.dead":
        return data.get("is_first") is True
    return event.type.startswith(_OWN) or not _is_test(event, data)


def _is_test(event: Event, data: Mapping[str, Any]) -> bool:
    metadata = data.get("metadata")
    said = [data.get("is_test"), metadata.get("is_test") if isinstance(metadata, Mapping) else None]
    if event.envelope is not None:
        said.append(event.envelope.is_test)
    return any(str(each).strip().lower() in _TRUE for each in said)


def message(event: Event) -> str:
    """Say in Slack's markup what happened."""
    data = event.data if isinstance(event.data, Mapping) else {}
    write = _MESSAGES.get(event.type)
    return write(event, data) if write else f"*{_text(event.type)}*: {_subject(event, data)}"


def _signed(event: Event, data: Mapping[str, Any]) -> str:
    return f"*Signed*: {_subject(event, data)}"


def _declined(event: Event, data: Mapping[str, Any]) -> str:
    reason = event.envelope.decline_reason if event.envelope else None
    return f"*Declined*: {_subject(event, data)}{_because(reason)}"


def _voided(event: Event, data: Mapping[str, Any]) -> str:
    reason = event.envelope.void_reason if event.envelope else None
    return f"*Voided*: {_subject(event, data)}{_because(reason)}"


def _dead(_: Event, data: Mapping[str, Any]) -> str:
    said = {name: _text(data.get(name), LONGEST_NAME) for name in data}
    return (
        f"*Dead letter*: the callback `{said.get('callback', '?')}` does not get "
        f"`{said.get('type', '?')}` of the envelope `{said.get('envelope_id', '?')}` "
        f"after {said.get('attempts', '?')} attempts.\n"
        f"Error: {_text(data.get('error'))}\n"
        f"This is the first of its kind (`{said.get('fingerprint', '?')}`); "
        "see all with `python -m app deliveries failures`"
    )


def _conflict(event: Event, _: Mapping[str, Any]) -> str:
    return (
        f"*Conflict*: Atlas sent another content under an identity that is taken, for the "
        f"envelope `{_text(event.envelope_id or 'unknown')}`. It is kept, and was not applied: "
        f"{_how_to_look(event)}"
    )


def _disputed(event: Event, _: Mapping[str, Any]) -> str:
    return (
        f"*Disputed*: contradicting things were said of the envelope "
        f"`{_text(event.envelope_id or 'unknown')}`. Its status stays as it was: "
        f"{_how_to_look(event)}"
    )


def _quarantined(event: Event, data: Mapping[str, Any]) -> str:
    reason = _text(data.get("reason"), LONGEST_NAME)
    return (
        f"*Quarantined*: an authentic event of the account `{_text(event.account)}` cannot be "
        f"understood (`{reason}`). It is kept, and nobody is owed it: {_how_to_look(event)}"
    )


def _how_to_look(event: Event) -> str:
    about = event.data.get("about") if isinstance(event.data, Mapping) else None
    return f"see `python -m app events show {_text(about or event.id)}`"


_MESSAGES: Mapping[str, Callable[[Event, Mapping[str, Any]], str]] = {
    "envelope.signed": _signed,
    "envelope.declined": _declined,
    "envelope.voided": _voided,
    "receiver.dead": _dead,
    "receiver.conflict": _conflict,
    "receiver.disputed": _disputed,
    "receiver.quarantined": _quarantined,
}


def _subject(event: Event, data: Mapping[str, Any]) -> str:
    envelope = event.envelope
    document = next((name for key in _DOCUMENT_NAMES if isinstance(name := data.get(key), str)), "")
    parts = [_text(document, LONGEST_NAME)] if document.strip() else []
    parts.append(f"envelope `{_text(event.envelope_id or 'unknown', LONGEST_NAME)}`")
    if envelope is not None and envelope.external_id:
        parts.append(f"external id `{_text(envelope.external_id, LONGEST_NAME)}`")
    if event.account != "default":
        parts.append(f"account `{_text(event.account, LONGEST_NAME)}`")
    return ", ".join(parts)


def _because(reason: str | None) -> str:
    return f"\nReason: {_text(reason)}" if reason and reason.strip() else ""


def _text(value: Any, longest: int = LONGEST_TEXT) -> str:
    """Make strangers' words harmless: one line, no addresses or secrets, no markup of Slack's."""
    words = " ".join(clean("" if value is None else str(value)).split())
    printable = "".join(filter(str.isprintable, words))
    cut = printable if len(printable) <= longest else printable[: longest - 1].rstrip() + "…"
    return cut.translate(_ESCAPES) or "?"
