"""What the routes about events and the feed answer."""

from datetime import datetime
from typing import Any
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field

_EVENT_ID = "019a9d1c-6a3b-7c4e-9d54-0f6c2b1a7e88"
_CURSOR = "WzEsImZlZWQiLDQyLDE3ODM5MDM2MDAwMDAwMDBd"


class FeedItem(BaseModel):
    """One item of the feed: something that happened, at its place in the one order."""

    cursor: str = Field(description="Where to go on behind this item; opaque.", examples=[_CURSOR])
    kind: str = Field(
        description="`event`, `correction`, `erasure`, or `archive` (of a signed PDF).",
        examples=["event"],
    )
    type: str | None = Field(
        description="Null for an event that could not be understood.",
        examples=["envelope.signed"],
    )
    account: str = Field(examples=["default"])
    envelope_id: str | None = Field(examples=["env_1"])
    event_id: UUID | None = Field(description="Ours.", examples=[_EVENT_ID])
    atlas_event_id: str | None = Field(description="The sender's own.", examples=["evt_1"])
    occurred_at: datetime | None = Field(description="As the sender says.")
    received_at: datetime | None
    sequence: int | None = Field(description="Its number among its envelope's events.")
    effect: str | None = Field(
        description="What it did to its envelope, as far as is known now.", examples=["applied"]
    )
    status: str | None = Field(description="The envelope's, behind it.", examples=["signed"])
    version: int | None = Field(description="The envelope's, behind it.")
    original_id: UUID | None = Field(description="The event that it copies or contradicts.")
    at: datetime = Field(description="When it was given its place.")


class FeedPage(BaseModel):
    """Some items, oldest first."""

    items: list[FeedItem]
    next_cursor: str = Field(
        description="Where to go on; also of a page without items, which moves on, too.",
        examples=[_CURSOR],
    )
    has_more: bool = Field(description="There is more behind this page already.")


class EventView(BaseModel):
    """One event: what was said, and what came of it."""

    model_config = ConfigDict(from_attributes=True)

    event_id: UUID = Field(description="Ours.", examples=[_EVENT_ID])
    account: str = Field(examples=["default"])
    envelope_id: str | None = Field(
        description="Null in quarantine, and for what is about no envelope.", examples=["env_1"]
    )
    type: str | None = Field(examples=["envelope.signed"])
    atlas_event_id: str | None = Field(description="The sender's own.", examples=["evt_1"])
    occurred_at: datetime | None = Field(description="As the sender says.")
    received_at: datetime
    sequence: int | None = Field(description="Its number among its envelope's events.")
    effect: str = Field(description="What it did to its envelope.", examples=["applied"])
    status: str | None = Field(description="The envelope's, behind it.", examples=["signed"])
    version: int | None = Field(description="The envelope's, behind it.")
    reason: str | None = Field(description="Why it is in quarantine.", examples=["not_json"])
    degraded: list[str] | None = Field(description="Paths of values that could not be used.")
    original_id: UUID | None = Field(description="The event that it copies or contradicts.")
    copies: int = Field(description="How often it came once more.", examples=[0])
    last_copy_at: datetime | None
    key_label: str | None = Field(description="Of the key that proved it.", examples=["new"])
    data: Any | None = Field(
        description="Its body without secrets. Null if that is no JSON, or no longer kept.",
        examples=[{"event": "envelope.signed", "envelope_id": "env_1"}],
    )


class Redispatch(BaseModel):
    """To whom an event is owed again."""

    model_config = ConfigDict(extra="forbid")

    callbacks: list[str] | None = Field(
        default=None,
        min_length=1,
        max_length=100,
        description="Their names; absent: all that ask for it now.",
        examples=[["onboarding"]],
    )


class RedeliveryView(BaseModel):
    """A delivery that was made for it."""

    model_config = ConfigDict(from_attributes=True)

    id: UUID = Field(description="Of the delivery, and its idempotency key.")
    callback: str = Field(examples=["onboarding"])
    generation: int = Field(description="1 was the first; each replay is one more.", examples=[2])


class RedispatchView(BaseModel):
    """The deliveries that were made."""

    event_id: UUID = Field(examples=[_EVENT_ID])
    deliveries: list[RedeliveryView]


class ReprojectView(BaseModel):
    """What became of an event that was applied again."""

    model_config = ConfigDict(from_attributes=True)

    event_id: UUID = Field(examples=[_EVENT_ID])
    result: str = Field(
        description=(
            "`recorded`, `duplicate` or `conflict` for one from quarantine; else `refreshed`, "
            "`unchanged`, or `accepted` for a conflict."
        ),
        examples=["refreshed"],
    )
    effect: str = Field(examples=["applied"])
    was: str = Field(description="Its effect before.", examples=["quarantined"])
    type: str = Field(examples=["envelope.signed"])
    envelope_id: str | None = Field(examples=["env_1"])
    original_id: UUID | None = Field(description="The event that it copies or contradicts.")
    owed: list[str] = Field(description="Callbacks that are owed it now.", examples=[["crm"]])
