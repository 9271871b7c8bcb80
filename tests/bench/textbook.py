"""A receiver as one writes it on a first afternoon, to compare the service with.

FastAPI and the SQLAlchemy ORM as FastAPI's own tutorial on SQL databases has them: functions
without `async`, a session for each request, look first and insert then. Nothing gets lost: the
signature is checked, copies are recognised, one transaction holds it all, and who loses a race
comes again. The status is whatever came last.
"""

import hashlib
import hmac
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Header, HTTPException, Request
from pydantic import BaseModel
from sqlalchemy import (
    BigInteger,
    DateTime,
    ForeignKey,
    Identity,
    Index,
    create_engine,
    func,
    select,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

SECRET = os.environ["ATLAS_API_KEY"].encode()
DATABASE_URL = os.environ["DATABASE_URL"]
engine = create_engine(DATABASE_URL.replace("postgresql://", "postgresql+psycopg://"))


class Base(DeclarativeBase):
    type_annotation_map = {datetime: DateTime(timezone=True), dict[str, Any]: JSONB}  # noqa: RUF012


class Event(Base):
    __tablename__ = "events"
    __table_args__ = (Index("events_envelope_idx", "envelope_id", "id"),)

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    dedup_key: Mapped[str] = mapped_column(unique=True)
    type: Mapped[str]
    envelope_id: Mapped[str]
    occurred_at: Mapped[datetime | None]
    received_at: Mapped[datetime] = mapped_column(server_default=func.now())
    body: Mapped[bytes]


class Envelope(Base):
    __tablename__ = "envelopes"

    id: Mapped[str] = mapped_column(primary_key=True)
    status: Mapped[str]
    fields_status: Mapped[str | None]
    caller_metadata: Mapped[dict[str, Any] | None] = mapped_column("metadata")
    updated_at: Mapped[datetime] = mapped_column(
        server_default=func.now(), onupdate=func.now(), index=True
    )
    last_event_at: Mapped[datetime | None]


class Delivery(Base):
    __tablename__ = "deliveries"
    __table_args__ = (
        Index("deliveries_due_idx", "next_at", postgresql_where=text("state = 'pending'")),
    )

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    event_id: Mapped[int] = mapped_column(ForeignKey("events.id"))
    callback: Mapped[str]
    state: Mapped[str] = mapped_column(default="pending")
    attempts: Mapped[int] = mapped_column(default=0)
    next_at: Mapped[datetime] = mapped_column(server_default=func.now())


class Party(BaseModel):
    email: str
    name: str | None = None
    role: str | None = None
    order: int | None = None
    status: str | None = None


class Webhook(BaseModel):
    event: str
    event_id: str
    envelope_id: str
    timestamp: datetime
    status: str
    fields_status: str | None = None
    parties: list[Party] = []
    metadata: dict[str, Any] = {}


class Receipt(BaseModel):
    outcome: str
    event_id: str


def event_of(webhook: Webhook, body: bytes) -> Event:
    return Event(
        dedup_key=webhook.event_id,
        type=webhook.event,
        envelope_id=webhook.envelope_id,
        occurred_at=webhook.timestamp,
        body=body,
    )


def bring_up_to_date(envelope: Envelope, webhook: Webhook) -> None:
    envelope.status = webhook.status
    envelope.fields_status = webhook.fields_status
    envelope.caller_metadata = webhook.metadata
    envelope.last_event_at = webhook.timestamp


async def verified_body(
    request: Request, x_atlas_signature: Annotated[str | None, Header()] = None
) -> bytes:
    body = await request.body()
    expected = "sha256=" + hmac.new(SECRET, body, hashlib.sha256).hexdigest()
    if not hmac.compare_digest(expected, x_atlas_signature or ""):
        raise HTTPException(401)
    return body


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    Base.metadata.create_all(engine)
    yield
    engine.dispose()


app = FastAPI(lifespan=lifespan)


def get_session() -> Iterator[Session]:
    # To read again after the commit, as by default, takes a connection until a thread has closed
    # the session; and all threads may be waiting for a connection.
    with Session(engine, expire_on_commit=False) as session:
        yield session


@app.get("/readyz")
def ready() -> dict[str, str]:
    return {"status": "ok"}


@app.post("/webhooks/atlas")
def receive(
    webhook: Webhook,
    body: Annotated[bytes, Depends(verified_body)],
    session: Annotated[Session, Depends(get_session)],
) -> Receipt:
    seen = session.scalar(select(Event).where(Event.dedup_key == webhook.event_id))
    if seen is not None:
        return Receipt(outcome="duplicate", event_id=str(seen.id))
    try:
        event = record(session, webhook, body)
    except IntegrityError:
        # Somebody else was faster with the event or its envelope; the next try sees that.
        raise HTTPException(503) from None
    return Receipt(outcome="recorded", event_id=str(event.id))


def record(session: Session, webhook: Webhook, body: bytes) -> Event:
    event = event_of(webhook, body)
    session.add(event)
    envelope = session.get(Envelope, webhook.envelope_id)
    if envelope is None:
        envelope = Envelope(id=webhook.envelope_id)
        session.add(envelope)
    bring_up_to_date(envelope, webhook)
    session.flush()
    session.add(Delivery(event_id=event.id, callback="bench"))
    session.commit()
    return event
