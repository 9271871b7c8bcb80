"""The four kinds of broker, and what has to be known of one before its library is loaded."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One kind of broker."""

    title: str
    # Of pyproject.toml; it brings the library.
    extra: str
    # Of ours; it imports the library.
    module: str
    # Without and with encryption.
    ports: tuple[int, int]
    takes_several_hosts: bool
    # What may stand behind the host.
    path: str = ""
    # What PUBLISH_TO names there, how that is written, and the same in words.
    target: str
    pattern: str
    rule: str
    # What the library logs of a broken connection is the text of a failure, too.
    loggers: tuple[str, ...]


NATS: Final = Kind(
    title="NATS",
    extra="nats",
    module="app.callbacks.publish.to_nats",
    ports=(4222, 4222),
    takes_several_hosts=True,
    target="the beginning of a subject",
    pattern=r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*",
    rule="letters, digits, _ and -, in parts with dots between them",
    loggers=("nats",),
)

RABBITMQ: Final = Kind(
    title="RabbitMQ",
    extra="rabbitmq",
    module="app.callbacks.publish.to_rabbitmq",
    ports=(5672, 5671),
    takes_several_hosts=False,
    path=r".*",
    target="an exchange",
    pattern=r"(?!amq\.)[A-Za-z0-9_.:-]{1,255}",
    rule="letters, digits and _ - . : (not amq. in front, which RabbitMQ keeps for itself)",
    loggers=("aio_pika", "aiormq"),
)

REDIS: Final = Kind(
    title="Redis",
    extra="redis",
    module="app.callbacks.publish.to_redis",
    ports=(6379, 6379),
    takes_several_hosts=False,
    path=r"[0-9]{0,5}",
    target="a stream",
    pattern=r"[!-~]{1,255}",
    rule="printable ASCII without spaces",
    loggers=("redis",),
)

KAFKA: Final = Kind(
    title="Kafka",
    extra="kafka",
    module="app.callbacks.publish.to_kafka",
    ports=(9092, 9092),
    takes_several_hosts=True,
    target="a topic",
    pattern=r"(?!\.{1,2}$)[A-Za-z0-9._-]{1,249}",
    rule="letters, digits and . _ -",
    loggers=("aiokafka",),
)

# What a URL begins with, and whether the connection is encrypted then.
SCHEMES: Final[Mapping[str, tuple[Kind, bool]]] = MappingProxyType(
    {
        "nats": (NATS, False),
        "tls": (NATS, True),
        "amqp": (RABBITMQ, False),
        "amqps": (RABBITMQ, True),
        "redis": (REDIS, False),
        "rediss": (REDIS, True),
        "kafka": (KAFKA, False),
        "kafkas": (KAFKA, True),
    }
)
