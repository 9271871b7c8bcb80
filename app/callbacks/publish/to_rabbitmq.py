"""Publish to RabbitMQ: persistent messages to a topic exchange, with publisher confirms.

A message that no queue would get comes back (`mandatory`), and counts as a failure.
"""

import ssl
from typing import Final

import aio_pika
from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractExchange
from aio_pika.exceptions import (
    ChannelPreconditionFailed,
    DeliveryError,
    InvalidFrameError,
    PublishError,
)

from app.callbacks.publish.address import Address
from app.callbacks.publish.cloudevent import CONTENT_TYPE, Message, type_of
from app.callbacks.publish.connections import let_go
from app.callbacks.publish.failures import BrokerAway, Refused

# What RabbitMQ has, and allows on its own machine, until somebody changes it.
GUEST: Final = "guest"


async def connect(address: Address, *, to: str, limit: float) -> "RabbitConnection":
    """Open a connection and a channel, and declare the exchange."""
    connection = await _connected(address, limit)
    try:
        channel = await connection.channel(publisher_confirms=True, on_return_raises=True)
        exchange = await _declared(channel, to)
    except BaseException:
        await let_go(connection.close)
        raise
    return RabbitConnection(connection, channel, exchange)


async def _connected(address: Address, limit: float) -> AbstractConnection:
    ((host, port),) = address.hosts
    virtual_host = address.path or "/"
    try:
        return await aio_pika.connect(
            host=host,
            port=port,
            login=address.user or GUEST,
            password=GUEST if address.password is None else address.password,
            virtualhost=virtual_host,
            ssl=address.is_encrypted,
            ssl_context=ssl.create_default_context() if address.is_encrypted else None,
            timeout=limit,
        )
    except InvalidFrameError:
        # The library has no words for it.
        raise BrokerAway(
            f"{address} does not open the virtual host {virtual_host!r}: it must exist, and this "
            "user needs permissions there"
        ) from None


async def _declared(channel: AbstractChannel, name: str) -> AbstractExchange:
    try:
        return await channel.declare_exchange(name, aio_pika.ExchangeType.TOPIC, durable=True)
    except ChannelPreconditionFailed:
        raise Refused(
            f"RabbitMQ has another exchange of the name {name!r}: it must be of the type topic and "
            "durable; delete it, or name another one in PUBLISH_TO"
        ) from None


class RabbitConnection:
    """One connection with one channel."""

    def __init__(
        self,
        connection: AbstractConnection,
        channel: AbstractChannel,
        exchange: AbstractExchange,
    ) -> None:
        self._connection = connection
        self._channel = channel
        self._exchange = exchange

    @property
    def is_open(self) -> bool:
        """False once the connection or the channel has ended."""
        return not (self._connection.is_closed or self._channel.is_closed)

    async def publish(self, message: Message) -> None:
        """Return once all queues that get the message have it."""
        content = aio_pika.Message(
            message.body,
            content_type=CONTENT_TYPE,
            delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
            message_id=message.id,
            type=type_of(message.event_type),
        )
        try:
            await self._exchange.publish(content, message.event_type, mandatory=True)
        except PublishError:
            raise Refused(
                f"no queue is bound to the exchange {self._exchange.name!r} for the routing key "
                f"{message.event_type!r}: bind one, for all events with the key #"
            ) from None
        except DeliveryError:
            raise Refused(
                "RabbitMQ did not take the message: a queue is full, or cannot store it"
            ) from None

    async def close(self) -> None:
        """End the connection, and the channel with it."""
        await self._connection.close()
