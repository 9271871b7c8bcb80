"""Built in: every event to a message broker. `CALLBACKS=app.callbacks.publish:callbacks`.

`PUBLISH_URL` picks the broker: `nats://` (JetStream), `amqp://` (RabbitMQ), `redis://` (a
stream) or `kafka://`; `tls://`, `amqps://`, `rediss://` and `kafkas://` are the same,
encrypted. A message is a CloudEvent 1.0 in JSON. A delivery is done when the broker has
confirmed that it has the message, and is tried again until then; every try has the same id.
"""

import asyncio
import importlib
import logging
import re
from collections.abc import Awaitable, Sequence
from datetime import timedelta
from typing import Final, Protocol

from pydantic import SecretStr

from app.callbacks import Callbacks, Event
from app.callbacks.publish import address, cloudevent
from app.callbacks.publish.address import Address
from app.callbacks.publish.connections import Connection, Connections
from app.callbacks.publish.failures import BrokerAway, NotPublished, Refused, Unconfirmed
from app.callbacks.publish.kinds import Kind
from app.errors import ConfigError, GiveUp

__all__ = [
    "BrokerAway",
    "NotPublished",
    "Publish",
    "PublishSettings",
    "Refused",
    "Unconfirmed",
    "callbacks",
]

# From looking for a connection to the confirmation; and the end of a call that is stuck.
LIMIT: Final = timedelta(seconds=20)
TIMEOUT: Final = timedelta(seconds=30)

_SOURCE = re.compile(r"[A-Za-z0-9._~:/?#\[\]@!$&'()*+,;=%-]+")


class PublishSettings(Protocol):
    """The settings that this callback reads."""

    @property
    def publish_url(self) -> SecretStr | None: ...

    @property
    def publish_to(self) -> str: ...

    @property
    def publish_source(self) -> str: ...

    @property
    def publish_events(self) -> Sequence[str]: ...


def callbacks(settings: PublishSettings) -> Callbacks:
    """Make the callback `publish` of the settings `PUBLISH_…`."""
    if settings.publish_url is None:
        raise ConfigError(
            "PUBLISH_URL is not set: write where the broker is, for example "
            "PUBLISH_URL=nats://localhost:4222"
        )
    publish = Publish(
        url=settings.publish_url.get_secret_value(),
        to=settings.publish_to,
        source=settings.publish_source,
    )
    registered = Callbacks()
    registered.on(*settings.publish_events, name="publish", timeout=TIMEOUT)(publish)
    return registered


class Publish:
    """Publishes events to one broker. Its connections belong to the event loops that call it.

    Usage::

        callbacks.on("envelope.*", name="to_nats")(Publish(url="nats://localhost:4222"))
    """

    def __init__(
        self,
        *,
        url: str,
        to: str = "atlas",
        source: str = "atlas-receiver",
        limit: timedelta = LIMIT,
    ) -> None:
        """Check everything that can be checked without the broker; nothing is opened yet.

        `to` is the beginning of a subject (NATS), an exchange (RabbitMQ), a stream (Redis)
        or a topic (Kafka). A call fails after `limit`.
        """
        self._address = address.parse(url)
        self._to = _checked_target(to, self._address.kind)
        self._source = _checked_source(source)
        self._limit = limit.total_seconds()
        self._library = _loaded(self._address.kind)
        self._connections = Connections(self._connect)

    def __repr__(self) -> str:
        return f"<Publish to {self._to!r} of {self._address}>"

    async def __call__(self, event: Event) -> None:
        """Return once the broker has confirmed the event; raises `NotPublished`, `GiveUp`."""
        message = cloudevent.make(event, source=self._source)
        try:
            async with asyncio.timeout(self._limit), self._connections.borrow() as connection:
                await connection.publish(message)
        except (NotPublished, GiveUp):
            raise
        except TimeoutError:
            raise Unconfirmed(f"{self._address} did not confirm within {self._limit:g} s") from None
        except asyncio.CancelledError:
            if _is_cancelled():
                raise
            # A library cancels what waits on a connection that it has lost.
            raise Unconfirmed(f"{self._address} ended before it confirmed") from None
        except Exception as error:  # noqa: BLE001  # four libraries, each with errors of its own
            # Without its cause, whose text may have the password in it.
            raise Unconfirmed(
                f"{self._address} did not confirm: {self._address.describe(error)}"
            ) from None

    async def close(self) -> None:
        """Close the connection of the running event loop now, and not at the end of the loop."""
        await self._connections.close()

    async def _connect(self) -> Connection:
        try:
            return await self._library(self._address, to=self._to, limit=self._limit)
        except NotPublished:
            raise
        except Exception as error:  # noqa: BLE001  # likewise
            raise BrokerAway(
                f"{self._address} cannot be used: {self._address.describe(error)}"
            ) from None


def _is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


class _Library(Protocol):
    def __call__(self, address: Address, *, to: str, limit: float) -> Awaitable[Connection]: ...


def _loaded(kind: Kind) -> _Library:
    try:
        module = importlib.import_module(kind.module)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"PUBLISH_URL names {kind.title}, but its library is not installed ({error.name}): "
            f"EXTRAS={kind.extra} make run installs it"
        ) from error
    for name in kind.loggers:
        # A broken connection fails a delivery, which has the reason and is logged.
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    connect: _Library = module.connect
    return connect


def _checked_target(to: str, kind: Kind) -> str:
    if not re.fullmatch(kind.pattern, to):
        raise ConfigError(
            f"PUBLISH_TO={to!r} cannot be {kind.target} of {kind.title}: it has {kind.rule}"
        )
    return to


def _checked_source(source: str) -> str:
    if not _SOURCE.fullmatch(source):
        raise ConfigError(
            f"PUBLISH_SOURCE={source!r} cannot be the source of a CloudEvent: it is a URI or the "
            "end of one, such as atlas-receiver or https://example.com/receiver"
        )
    return source
