"""Publish to NATS: the confirmation is JetStream's acknowledgement.

JetStream knows the id of each message for as long as the stream's duplicate window is
wide, and stores a second one of the same id no more.
"""

import asyncio
import math
import re
import ssl
from collections.abc import Callable
from typing import Final

from nats.aio.client import Client
from nats.errors import MaxPayloadError, NoServersError
from nats.js.api import Header
from nats.js.errors import APIError, NoStreamResponseError

from app.callbacks.publish.address import Address
from app.callbacks.publish.cloudevent import CONTENT_TYPE, Message
from app.callbacks.publish.connections import let_go
from app.callbacks.publish.failures import BrokerAway, Refused, Unconfirmed
from app.errors import GiveUp

# The caller decides how long to wait; the library wants a number, too.
_LONG: Final = 86_400.0
_UNUSABLE = re.compile(r"[^A-Za-z0-9_.-]")
_EMPTY_PART = re.compile(r"(?<=\.)(?=\.|$)")


def subject_of(to: str, event_type: str) -> str:
    """Name the subject of a type, without what NATS would read as more than a name."""
    return _EMPTY_PART.sub("_", f"{to}.{_UNUSABLE.sub('_', event_type)}")


async def connect(address: Address, *, to: str, limit: float) -> "NatsConnection":
    """Open a connection. One that breaks is not repaired: the next event opens another."""
    client = Client()
    connection = NatsConnection(client, address, to)
    # In this library a name without a password is a token.
    is_token = address.password is None
    try:
        await client.connect(
            servers=[_server(host, port, address) for host, port in address.hosts],
            user=None if is_token else _guarded(client, address, address.user or ""),
            password=address.password,
            token=_guarded(client, address, address.user) if is_token and address.user else None,
            name="atlas-receiver",
            error_cb=connection.note,
            closed_cb=connection.end,
            allow_reconnect=False,
            max_reconnect_attempts=1,
            reconnect_time_wait=0,
            connect_timeout=math.ceil(limit),
            tls=ssl.create_default_context() if address.is_encrypted else None,
        )
        _require_encryption(client, address)
    except BaseException as error:
        await let_go(connection.close)
        if isinstance(error, NoServersError) and connection.error is not None:
            raise connection.error from None
        raise
    return connection


def _server(host: str, port: int, address: Address) -> str:
    place = f"[{host}]" if ":" in host else host
    return f"{'tls' if address.is_encrypted else 'nats'}://{place}:{port}"


def _guarded(client: Client, address: Address, name: str) -> Callable[[], str]:
    def give() -> str:
        _require_encryption(client, address)
        return name

    return give


def _require_encryption(client: Client, address: Address) -> None:
    # With tls:// the library encrypts if the server asks for it, and else it goes on, with
    # the password in clear; nothing public tells which of the two happened.
    if address.is_encrypted and not client._server_info.get("tls_required"):  # noqa: SLF001
        raise BrokerAway(f"{address} does not encrypt: turn on its tls, or write nats://")


class NatsConnection:
    """One connection to a server of a cluster."""

    def __init__(self, client: Client, address: Address, to: str) -> None:
        self.error: Exception | None = None
        self._client = client
        self._address = address
        self._to = to
        self._ended = asyncio.get_running_loop().create_future()

    @property
    def is_open(self) -> bool:
        """False once the server has gone."""
        return self._client.is_connected and not self._ended.done()

    async def publish(self, message: Message) -> None:
        """Return once a stream has the message, or had it already."""
        subject = subject_of(self._to, message.event_type)
        try:
            await self._acknowledged(subject, message)
        except NoStreamResponseError:
            raise Refused(
                f"no JetStream stream of {self._address} takes the subject {subject}: create one, "
                f"for example: nats stream add ATLAS --subjects '{self._to}.>' --dupe-window 24h"
            ) from None
        except APIError as error:
            raise Refused(f"{self._address} stores no more: {error.description}") from None
        except MaxPayloadError:
            raise GiveUp(
                f"the message has {len(message.body)} bytes, and {self._address} takes at most "
                f"{self._client.max_payload}: raise its max_payload, then retry this delivery"
            ) from None

    async def close(self) -> None:
        """End the connection."""
        await self._client.close()

    async def note(self, error: Exception) -> None:
        """Keep what the library would write to the log with a traceback."""
        self.error = error
        if "permissions violation" in str(error).lower():
            # No acknowledgement follows this one.
            await self.end()

    async def end(self) -> None:
        """Tell those who wait that nothing comes any more."""
        if not self._ended.done():
            self._ended.set_result(None)

    async def _acknowledged(self, subject: str, message: Message) -> None:
        headers = {Header.MSG_ID: message.id, "Content-Type": CONTENT_TYPE}
        stream = self._client.jetstream()
        # The library does not tell a request that its connection has ended.
        request = asyncio.ensure_future(
            stream.publish(subject, message.body, timeout=_LONG, headers=headers)
        )
        try:
            await asyncio.wait({request, self._ended}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            is_answered = request.done()
            request.cancel()
        if not is_answered:
            cause = f": {self._address.describe(self.error)}" if self.error else ""
            raise Unconfirmed(f"{self._address} ended before it confirmed{cause}")
        await request
