"""The textbook receiver with `async`: the same work, by someone who reads on."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from tests.bench.textbook import (
    DATABASE_URL,
    Base,
    Delivery,
    Envelope,
    Event,
    Receipt,
    Webhook,
    bring_up_to_date,
    event_of,
    verified_body,
)

engine = create_async_engine(DATABASE_URL.replace("postgresql://", "postgresql+asyncpg://"))
sessions = async_sessionmaker(engine, expire_on_commit=False)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    yield
    await engine.dispose()


app = FastAPI(lifespan=lifespan)


async def get_session() -> AsyncIterator[AsyncSession]:
    async with sessions() as session:
        yield session


@app.get("/readyz")
async def ready() -> dict[str, str]:
    return {"status": "ok"}


@app.post("/webhooks/atlas")
async def receive(
    webhook: Webhook,
    body: Annotated[bytes, Depends(verified_body)],
    session: Annotated[AsyncSession, Depends(get_session)],
) -> Receipt:
    seen = await session.scalar(select(Event).where(Event.dedup_key == webhook.event_id))
    if seen is not None:
        return Receipt(outcome="duplicate", event_id=str(seen.id))
    try:
        event = await record(session, webhook, body)
    except IntegrityError:
        # Somebody else was faster with the event or its envelope; the next try sees that.
        raise HTTPException(503) from None
    return Receipt(outcome="recorded", event_id=str(event.id))


async def record(session: AsyncSession, webhook: Webhook, body: bytes) -> Event:
    event = event_of(webhook, body)
    session.add(event)
    envelope = await session.get(Envelope, webhook.envelope_id)
    if envelope is None:
        envelope = Envelope(id=webhook.envelope_id)
        session.add(envelope)
    bring_up_to_date(envelope, webhook)
    await session.flush()
    session.add(Delivery(event_id=event.id, callback="bench"))
    await session.commit()
    return event
