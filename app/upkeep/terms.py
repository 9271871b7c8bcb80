"""Keep what envelopes are found by up to date."""

from collections.abc import Sequence

from app.store import terms
from app.store.feed import Item
from app.store.session import Connection


class Terms:
    """The follower that learns ids and addresses."""

    name = "terms"

    async def follow(self, connection: Connection, items: Sequence[Item]) -> None:
        """Learn by what each envelope that something happened to is found."""
        await terms.learn(
            connection,
            {(item.account, item.envelope_id) for item in items if item.envelope_id is not None},
        )
