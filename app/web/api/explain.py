"""The flight recorder of one envelope."""

from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field

from app.errors import InvalidCursor
from app.upkeep import explain as recorder
from app.upkeep.explain import Entry, Story
from app.web import cursors
from app.web.api.deliveries import Seen
from app.web.api.finding import EnvelopeId, refuse_unusable
from app.web.api.operator_views import ShownState
from app.web.deps import AtlasAccount, Pool, Reader
from app.web.errors import problems

LIST = "explain"
_AT = "2026-07-01T12:00:00Z"
_ID = "01990000-0000-7000-8000-000000000002"

router = APIRouter(prefix="/api/envelope", tags=["envelopes"])


class Happening(BaseModel):
    """One thing that happened."""

    at: datetime = Field(examples=[_AT])
    summary: str = Field(
        description="The same in one sentence, for people; its wording may change.",
        examples=["envelope.signed changed the envelope; it is signed (version 3)."],
    )


class EventEntry(Happening):
    """Atlas, or the service about itself, said something."""

    kind: Literal["event"]
    event_id: UUID = Field(examples=[_ID])
    type: str = Field(examples=["envelope.signed"])
    atlas_event_id: str | None
    occurred_at: datetime | None
    received_at: datetime = Field(examples=[_AT])
    sequence: int | None = Field(examples=[3])
    effect: str = Field(
        description="applied, refreshed, stale, milestone, unknown, conflict", examples=["applied"]
    )
    status: str | None = Field(description="The envelope's after it.", examples=["signed"])
    version: int | None = Field(examples=[3])
    reason: str | None
    degraded: list[str] | None = Field(description="Paths of values that could not be used.")
    original_id: UUID | None = Field(description="The event that it copies or contradicts.")
    copies: int = Field(examples=[0])
    last_copy_at: datetime | None
    key_label: str | None = Field(examples=["k_0123abcd"])
    body: Literal["kept", "pruned", "erased"] = Field(examples=["kept"])


class CopiesEntry(Happening):
    """An event came again; the time is that of the last copy."""

    kind: Literal["copies"]
    event_id: UUID
    copies: int


class DeliveryEntry(Happening):
    """An event was owed to a callback; how that stands now."""

    kind: Literal["delivery"]
    delivery_id: UUID
    event_id: UUID
    callback: str
    generation: int
    state: ShownState
    attempts: int
    due_at: datetime | None
    settled_at: datetime | None
    last_error: str | None
    fingerprint: str | None
    asked_by: str | None = Field(description="Who had it delivered once more.")


class AttemptEntry(Happening):
    """A callback was called; the time is that of its end."""

    kind: Literal["attempt"]
    delivery_id: UUID
    event_id: UUID
    callback: str
    number: int
    started_at: datetime | None
    finished_at: datetime
    seconds: float | None
    verdict: str
    worker: str
    error: str | None


class ActEntry(Happening):
    """Somebody did something to the envelope, an event or a delivery."""

    kind: Literal["act"]
    actor: str
    action: str
    subject: str
    details: dict[str, Any] | None


class ExpectedEntry(Happening):
    """A consumer said that it created the envelope."""

    kind: Literal["expected"]
    consumer: str
    due_at: datetime | None


class ArchivedEntry(Happening):
    """The signed PDF was put into the archive."""

    kind: Literal["archived"]
    size: int | None


class MomentEntry(Happening):
    """Something about the envelope as a whole."""

    kind: Literal["silent", "erased"]


AnyEntry = Annotated[
    EventEntry
    | CopiesEntry
    | DeliveryEntry
    | AttemptEntry
    | ActEntry
    | ExpectedEntry
    | ArchivedEntry
    | MomentEntry,
    Field(discriminator="kind"),
]


class HeadView(BaseModel):
    """What the envelope is now."""

    model_config = ConfigDict(from_attributes=True)

    status: str | None = Field(examples=["signed"])
    version: int = Field(examples=[3])
    disputed: bool
    tenant: str | None
    first_seen_at: datetime
    updated_at: datetime
    archived_at: datetime | None
    erased_at: datetime | None


class StoryView(BaseModel):
    """Everything that happened to one envelope."""

    envelope_id: str = Field(examples=["env_1"])
    account: str = Field(examples=["default"])
    envelope: HeadView | None = Field(description="Null if no event of Atlas has come yet.")
    items: list[AnyEntry] = Field(description="In the order of time, within this page.")
    next_cursor: str | None = Field(description="Where the next page of events begins.")
    is_complete: bool = Field(
        description="False if some deliveries, attempts or acts of these events were left out: "
        "they are too many; `limit` makes the page shorter."
    )


@router.get(
    "/{envelope_id:path}/explain",
    summary="Everything that happened to it",
    responses=problems(404, 409),
)
async def explain(
    envelope_id: EnvelopeId,
    _: Reader,
    sight: Seen,
    database: Pool,
    *,
    atlas_account: AtlasAccount = None,
    cursor: Annotated[
        str | None, Query(max_length=500, description="The `next_cursor` of an earlier page.")
    ] = None,
    limit: Annotated[
        int, Query(ge=1, le=recorder.LARGEST_PAGE, description="At most so many events.")
    ] = recorder.PAGE,
) -> StoryView:
    """Tell every event, what it changed or why not, every delivery and attempt, who did what.

    A page has some events, oldest first, and all that came of them, in one order of time. An
    envelope that was only announced, and never heard of, is explained, too.
    """
    refuse_unusable(envelope_id, atlas_account)
    story = await recorder.explain(
        database, envelope_id, sight=sight, after=_place(cursor), limit=limit
    )
    return _shown(story)


def _place(cursor: str | None) -> UUID | None:
    if cursor is None:
        return None
    [place] = cursors.read(LIST, cursor, [str])
    try:
        return UUID(place)
    except ValueError:
        raise InvalidCursor(
            "a cursor is what an earlier answer gave; this one was changed"
        ) from None


def _shown(story: Story) -> StoryView:
    following = story.next_after
    return StoryView.model_validate(
        {
            "envelope_id": story.envelope_id,
            "account": story.account,
            "envelope": story.envelope,
            "items": [_entry(entry) for entry in story.entries],
            "next_cursor": None if following is None else cursors.write(LIST, [str(following)]),
            "is_complete": story.is_complete,
        }
    )


def _entry(entry: Entry) -> dict[str, Any]:
    return {"kind": entry.kind, "at": entry.at, "summary": entry.summary, **entry.about}
