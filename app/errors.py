"""Every exception this service raises on purpose.

AppError
├── Rejected                the bytes are refused; `reason` is a stable slug
│   ├── SignatureRejected   not proven to be from Atlas: 401
│   ├── PayloadRejected     authentic, but cannot be understood: quarantined
│   └── RequestRejected     broken, too large, too slow: its own status
├── NotDurable              not known to be on disk in time: 503, the sender retries
├── CallbackSignal          raised by authors of callbacks to steer a delivery
│   ├── RetryLater
│   └── GiveUp
├── TransactionRefused      a callback used its session as it must not
├── NotFound                an operator named something that is not there
├── NotAllowed              an operator asked for what the state of a thing forbids
├── InvalidCursor           a place in a list that this service did not give: 422
├── Gone                    it was there, and will not come back: 410
├── NotYet                  what was waited for has not come in time: 503
├── TooMany                 others wait already, as many as may: 429
└── ConfigError             wrong wiring: the process must not start
    ├── DuplicateCallback
    └── SchemaMismatch      the database is older or newer than this release can serve
"""

from datetime import timedelta


class AppError(Exception):
    """The root: catch it at the edges of the program only."""


class Rejected(AppError):
    """Bytes were refused.

    `reason` is a short stable slug: it goes to the log and to the metric label,
    never to the sender.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class SignatureRejected(Rejected):
    """The request is not proven to be from Atlas."""


class PayloadRejected(Rejected):
    """The body is authentic, but its name or its identity cannot be established."""


class RequestRejected(Rejected):
    """The request itself is unusable; `status` is what HTTP calls it."""

    def __init__(self, reason: str, *, status: int) -> None:
        super().__init__(reason)
        self.status = status


class NotDurable(AppError):
    """The event is not known to be on disk in time. It may still commit.

    `reason` is a slug for the log; `retry_after` is what the sender is told.
    """

    def __init__(self, reason: str, *, retry_after: timedelta = timedelta(seconds=5)) -> None:
        super().__init__(reason)
        self.reason = reason
        self.retry_after = retry_after


class CallbackSignal(AppError):
    """What a callback raises to say how its delivery goes on."""


class RetryLater(CallbackSignal):
    """Try this delivery again, `after` the given time (or after the usual wait)."""

    def __init__(self, reason: str = "", *, after: timedelta | None = None) -> None:
        super().__init__(reason or "the callback asked for another try")
        self.after = after


class GiveUp(CallbackSignal):
    """Do not try this delivery again: it becomes a dead letter at once."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)


class TransactionRefused(AppError):
    """A callback ended the transaction of its session, or kept it open for too long."""


class NotFound(AppError):
    """There is no such thing; the text says which."""


class NotAllowed(AppError):
    """The thing exists, but its state does not permit that; the text says why."""


class InvalidCursor(AppError):
    """A cursor is not one of ours, or belongs to another list."""


class Gone(AppError):
    """The thing was there and will not come back; the text says why."""


class NotYet(AppError):
    """What was waited for has not happened in time; asking again may help."""


class TooMany(AppError):
    """As many as may wait at once do so already; the text says of whom."""


class ConfigError(AppError):
    """The process must not start; the text names the setting and the remedy."""


class DuplicateCallback(ConfigError):
    """Two callbacks claim one name; names are data, so that would mix their deliveries."""


class SchemaMismatch(ConfigError):
    """The database schema does not fit this release; the text says what to run."""
