"""Publish to Kafka: the confirmation is that of all replicas in sync (`acks=all`).

What the library sends twice by itself, Kafka stores once (`enable.idempotence`); a second
attempt of ours it cannot tell, but readers can, by the id. The envelope is the key, so that
its events are in one partition, in order.
"""

import asyncio
import ssl
from typing import Any, Final

from aiokafka import AIOKafkaProducer  # type: ignore[import-untyped]  # it has no types
from aiokafka.errors import (  # type: ignore[import-untyped]  # likewise
    MessageSizeTooLargeError,
    UnknownTopicOrPartitionError,
)

from app.callbacks.publish.address import Address
from app.callbacks.publish.cloudevent import CONTENT_TYPE, Message, type_of
from app.callbacks.publish.connections import CLOSING, let_go
from app.callbacks.publish.failures import Refused
from app.errors import GiveUp

# The broker decides what is too large.
LARGEST: Final = 64 * 1024 * 1024
# The library's own limits end before ours, so that its words are the ones that are heard.
SHARE: Final = 0.6


async def connect(address: Address, *, to: str, limit: float) -> "KafkaConnection":
    """Find the cluster, and register as a producer of it."""
    producer = AIOKafkaProducer(
        bootstrap_servers=[f"{host}:{port}" for host, port in address.hosts],
        client_id="atlas-receiver",
        acks="all",
        enable_idempotence=True,
        max_request_size=LARGEST,
        request_timeout_ms=int(limit * SHARE * 1000),
        ssl_context=ssl.create_default_context() if address.is_encrypted else None,
        **login_of(address),
    )
    connection = KafkaConnection(producer, to)
    try:
        await producer.start()
    except BaseException:
        await let_go(connection.close)
        raise
    return connection


def login_of(address: Address) -> dict[str, Any]:
    """Say in the words of the library who we are, and whether that is encrypted."""
    transport = "SSL" if address.is_encrypted else "PLAINTEXT"
    if address.user is None:
        return {"security_protocol": transport}
    return {
        "security_protocol": f"SASL_{transport}",
        "sasl_mechanism": address.mechanism,
        "sasl_plain_username": address.user,
        "sasl_plain_password": address.password or "",
    }


class KafkaConnection:
    """One producer, with a connection to each broker that it needs."""

    def __init__(self, producer: Any, to: str) -> None:
        self.is_open = True
        self._producer = producer
        self._to = to

    async def publish(self, message: Message) -> None:
        """Return once the replicas in sync have the message."""
        try:
            await self._confirmed(message)
        except UnknownTopicOrPartitionError:
            raise Refused(f"Kafka has no topic {self._to!r}: create it") from None
        except MessageSizeTooLargeError:
            raise GiveUp(
                f"the message has {len(message.body)} bytes, more than Kafka takes: raise "
                f"max.message.bytes of the topic {self._to!r}, then retry this delivery"
            ) from None

    async def _confirmed(self, message: Message) -> None:
        key = None if message.envelope_id is None else message.envelope_id.encode()
        headers = {
            "content-type": CONTENT_TYPE,
            "ce_id": message.id,
            "ce_type": type_of(message.event_type),
        }
        try:
            await self._producer.send_and_wait(
                self._to,
                message.body,
                key=key,
                headers=[(name, value.encode()) for name, value in headers.items()],
            )
        except BaseException:
            # A message that was not taken leaves a gap in the numbers of this producer,
            # and Kafka takes none after a gap.
            self.is_open = False
            raise

    async def close(self) -> None:
        """End the producer without its last messages.

        Its own `stop` waits for them, and an idempotent producer never gives one up.
        """
        producer, sender = self._producer, self._producer._sender.sender_task  # noqa: SLF001
        while sender is not None and not sender.done():
            # The first time ends its own wait, the next ones those for single requests.
            sender.cancel()
            await asyncio.wait({sender}, timeout=CLOSING / 10)
        producer._closed = True  # noqa: SLF001  # else it complains of not being stopped
        await producer.client.close()
