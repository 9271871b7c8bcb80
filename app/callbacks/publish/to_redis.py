"""Publish to Redis: an entry of a stream, confirmed by its id.

Redis does not tell duplicates; readers can, by the field `id`. How safe an entry is, is a
setting of the server: `appendonly yes` and `appendfsync always` keep it through a crash.
"""

from typing import Final

from redis.asyncio import BlockingConnectionPool, Redis, SSLConnection
from redis.asyncio.connection import Connection as PlainConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.maint_notifications import MaintNotificationsConfig
from redis.typing import EncodableT, FieldT

from app.callbacks.publish.address import Address
from app.callbacks.publish.cloudevent import CONTENT_TYPE, Message, type_of
from app.callbacks.publish.connections import let_go

# A connection to Redis serves one call at a time.
CONNECTIONS: Final = 8


async def connect(address: Address, *, to: str, limit: float) -> "RedisConnection":
    """Open a few connections, the first of them at once."""
    ((host, port),) = address.hosts
    pool = BlockingConnectionPool(
        connection_class=SSLConnection if address.is_encrypted else PlainConnection,
        max_connections=CONNECTIONS,
        timeout=limit,
        host=host,
        port=port,
        db=int(address.path or 0),
        username=address.user,
        password=address.password,
        socket_timeout=limit,
        socket_connect_timeout=limit,
        # A second try on the quiet could add the entry twice.
        retry=Retry(NoBackoff(), 0),
        # Else the pool does not look whether an idle connection has ended meanwhile.
        maint_notifications_config=MaintNotificationsConfig(enabled=False),
    )
    connection = RedisConnection(Redis.from_pool(pool), to)
    try:
        await connection.check()
    except BaseException:
        await let_go(connection.close)
        raise
    return connection


class RedisConnection:
    """Connections to one database; a broken one is replaced when it is needed."""

    is_open = True

    def __init__(self, client: Redis, to: str) -> None:
        self._client = client
        self._to = to

    async def check(self) -> None:
        """Log in, and see that somebody answers."""
        await self._client.ping()

    async def publish(self, message: Message) -> None:
        """Return once the stream has the entry."""
        fields: dict[FieldT, EncodableT] = {
            "id": message.id,
            "type": type_of(message.event_type),
            "content-type": CONTENT_TYPE,
            "event": message.body,
        }
        await self._client.xadd(self._to, fields)

    async def close(self) -> None:
        """End all connections."""
        await self._client.aclose()
