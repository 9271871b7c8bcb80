"""What operators are shown, and what they have to say: deliveries, failures, callbacks."""

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, Literal, get_args
from uuid import UUID

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from app.dispatch.control import CallbackStatus, Found
from app.dispatch.failures import Progress
from app.store.deliveries import Delivery
from app.store.failures import Group

State = Literal["pending", "running", "done", "dead", "discarded", "parked"]
# What is answered is any word: a later release, beside this one, may have written another.
ShownState = Annotated[
    str,
    Field(
        description=f"One of {', '.join(get_args(State))}; a later release may know more.",
        examples=["dead"],
    ),
]
_ID = "01990000-0000-7000-8000-000000000001"
_EVENT_ID = "01990000-0000-7000-8000-000000000002"
_AT = "2026-07-01T12:00:00Z"


def _sayable(text: str) -> str:
    if "\x00" in text:
        raise ValueError("a NUL cannot be kept")
    if not text.strip():
        raise ValueError("say why: whoever finds this later will ask")
    return text.strip()


class Why(BaseModel):
    """Why somebody does something."""

    model_config = ConfigDict(extra="forbid")

    reason: Annotated[str, AfterValidator(_sayable)] = Field(
        min_length=1,
        max_length=500,
        description="Kept in the audit, for whoever finds this later.",
        examples=["sent by hand"],
    )


class DeliveryView(BaseModel):
    """One event that is, or was, owed to one callback."""

    model_config = ConfigDict(from_attributes=True)

    id: UUID = Field(description="The idempotency key that the callback sees.", examples=[_ID])
    event_id: UUID = Field(examples=[_EVENT_ID])
    event_type: str | None = Field(examples=["envelope.signed"])
    callback: str = Field(examples=["onboarding"])
    generation: int = Field(description="1, or more after a replay with intent.", examples=[1])
    account: str = Field(examples=["default"])
    envelope_id: str | None = Field(examples=["env_1"])
    sequence: int | None = Field(description="The event's place in its envelope.", examples=[2])
    state: ShownState
    due_at: datetime | None = Field(description="Null once nothing is owed.", examples=[None])
    attempts: int = Field(examples=[12])
    last_error: str | None = Field(examples=["ConnectError: connection refused"])
    fingerprint: str | None = Field(description="Its cause.", examples=["0123456789abcdef"])
    worker: str | None = Field(description="Who tried it last.", examples=["host:17"])
    created_at: datetime = Field(examples=[_AT])
    settled_at: datetime | None = Field(examples=[_AT])


class DeliveryPage(BaseModel):
    """Deliveries, newest first."""

    items: list[DeliveryView]
    next_cursor: str | None = Field(
        description="Where the next page begins; a page may be short, or empty, and have one."
    )


class AttemptView(BaseModel):
    """One call of one callback."""

    model_config = ConfigDict(from_attributes=True)

    number: int = Field(examples=[1])
    started_at: datetime | None = Field(examples=[_AT])
    finished_at: datetime = Field(examples=[_AT])
    verdict: str = Field(description="done, failed, dead, skipped, lost, …", examples=["failed"])
    worker: str = Field(examples=["host:17"])
    error: str | None = Field(examples=["ConnectError: connection refused"])


class ActView(BaseModel):
    """What somebody did to a thing, as the audit has it."""

    model_config = ConfigDict(from_attributes=True)

    at: datetime = Field(examples=[_AT])
    actor: str = Field(examples=["api:office"])
    action: str = Field(examples=["delivery.retried"])
    details: dict[str, Any] | None = Field(examples=[{"reason": "sent by hand"}])


class DeliveryDetail(DeliveryView):
    """One delivery, every attempt at it, and what operators did to it."""

    tries: list[AttemptView]
    acts: list[ActView]


def shown(delivery: Delivery) -> DeliveryView:
    """Show one delivery of a list."""
    return DeliveryView.model_validate(delivery)


def shown_whole(found: Found) -> DeliveryDetail:
    """Show one delivery with its history."""
    return DeliveryDetail(
        **shown(found.delivery).model_dump(),
        tries=[AttemptView.model_validate(each) for each in found.attempts],
        acts=[ActView.model_validate(each) for each in found.acts],
    )


class FailureView(BaseModel):
    """Dead letters that died of the same error, at the same place, in the same callback."""

    model_config = ConfigDict(from_attributes=True)

    fingerprint: str = Field(
        description="How the cause is named; `-` for those of a callback that have none.",
        examples=["0123456789abcdef"],
    )
    callback: str = Field(examples=["onboarding"])
    event_type: str | None = Field(examples=["envelope.signed"])
    count: int = Field(examples=[17])
    first_at: datetime | None = Field(examples=[_AT])
    last_at: datetime | None = Field(examples=[_AT])
    error: str | None = Field(description="That of the youngest.", examples=["KeyError: 'id'"])
    delivery_id: UUID = Field(description="The youngest of them.", examples=[_ID])


class FailureList(BaseModel):
    """Causes of which there are dead letters, the latest first; these are all, up to `limit`."""

    items: list[FailureView]
    next_cursor: None = None


# How the list of causes writes that there is no fingerprint.
NO_FINGERPRINT = "-"


def shown_group(group: Group) -> FailureView:
    """Show what died of one cause."""
    names = FailureView.model_fields
    values = {name: getattr(group, name) for name in names}
    return FailureView(**{**values, "fingerprint": group.fingerprint or NO_FINGERPRINT})


class RetryProgress(BaseModel):
    """One line of a bulk retry: how far it has come."""

    total: int = Field(description="Dead letters of this cause.", examples=[17])
    retried: int = Field(description="Made due by this retry.", examples=[9])
    done: int = Field(examples=[7])
    failed: int = Field(description="Tried, and tried again as usual.", examples=[1])
    waiting: int = Field(description="Due, and not tried yet.", examples=[1])
    is_last: bool = Field(description="True in the last line, and only there.", examples=[False])
    stopped: str | None = Field(
        description="In the last line: why the rest stays dead. Null if each was tried.",
        examples=[None],
    )


def shown_progress(progress: Progress, *, is_last: bool, stopped: str | None) -> RetryProgress:
    """Show one step of a bulk retry."""
    return RetryProgress(
        total=progress.total,
        retried=progress.retried,
        done=progress.done,
        failed=progress.failed,
        waiting=progress.waiting,
        is_last=is_last,
        stopped=stopped,
    )


class Discarded(BaseModel):
    """How many dead letters of one cause were given up."""

    discarded: int = Field(examples=[17])


class CallbackView(BaseModel):
    """A callback that some process has registered, and what is owed to it."""

    name: str = Field(examples=["onboarding"])
    patterns: list[str] = Field(examples=[["envelope.signed"]])
    account: str | None = Field(description="Null: it is given those of all.", examples=[None])
    options: dict[str, Any] = Field(examples=[{"max_attempts": 12}])
    first_seen_at: datetime = Field(examples=[_AT])
    last_seen_at: datetime = Field(examples=[_AT])
    is_served: bool = Field(description="A process has said lately that it serves it.")
    paused_at: datetime | None = Field(examples=[None])
    pause_reason: str | None = Field(examples=[None])
    open_until: datetime | None = Field(
        description="Until then its breaker lets nothing through.", examples=[None]
    )
    counts: Mapping[str, int] = Field(
        description="Deliveries that are pending, running, dead or parked, as far as you may see.",
        examples=[{"pending": 3, "dead": 1}],
    )


class CallbackList(BaseModel):
    """Every callback that was ever registered, by name."""

    items: list[CallbackView]
    next_cursor: None = None


def shown_callback(status: CallbackStatus) -> CallbackView:
    """Show one callback."""
    registered, subscription = status.registered, status.registered.subscription
    return CallbackView(
        name=subscription.name,
        patterns=list(subscription.patterns),
        account=subscription.account,
        options=dict(subscription.options),
        first_seen_at=registered.first_seen_at,
        last_seen_at=registered.last_seen_at,
        is_served=registered.is_served,
        paused_at=status.flow.paused_at,
        pause_reason=status.pause_reason,
        open_until=status.flow.open_until,
        counts=status.counts,
    )


class CallbackChange(BaseModel):
    """A callback after somebody has paused or resumed it."""

    is_changed: bool = Field(description="False if it was so already.", examples=[True])
    callback: CallbackView
