"""What a consumer says of an envelope that it has created: that something must be heard of it."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Body
from pydantic import BaseModel, ConfigDict, Field

from app.errors import NotAllowed, NotFound
from app.store import expectations, lookups, sight
from app.store.deliveries import audit
from app.store.session import Connection
from app.store.sight import Sight
from app.web.api.finding import EnvelopeId, refuse_unusable, the_one
from app.web.bounded import BoundedRoute
from app.web.deps import AtlasAccount, Operator, Pool
from app.web.errors import problems

LIMIT = timedelta(seconds=3)
# So many accounts stand in a refusal.
MOST_NAMED = 10

router = APIRouter(prefix="/api/envelope", tags=["envelopes"], route_class=BoundedRoute)


class Expecting(BaseModel):
    """How soon something must be heard of it."""

    model_config = ConfigDict(extra="forbid")

    within: int = Field(
        default=3600,
        ge=60,
        le=604_800,
        description="In seconds, from the first time that it was expected.",
        examples=[3600],
    )


class ExpectationView(BaseModel):
    """An envelope that is expected."""

    account: str = Field(examples=["default"])
    envelope_id: str = Field(examples=["env_1"])
    expected_by: str = Field(
        description="The name of the token that said so first.", examples=["onboarding"]
    )
    expected_at: datetime = Field(examples=["2026-07-01T12:00:00Z"])
    due_at: datetime | None = Field(
        description="When its silence is noticed; null once it was heard of, or found silent."
    )
    silent_at: datetime | None = Field(
        description="When `receiver.silent` was raised, because nothing had come in time."
    )
    seen: bool = Field(description="Whether any event about it has come.")


@router.put(
    "/{envelope_id:path}/expect",
    summary="Say that you created it",
    responses=problems(404, 408, 409, 413),
)
async def expect_envelope(
    envelope_id: EnvelopeId,
    consumer: Operator,
    database: Pool,
    *,
    expecting: Annotated[Expecting | None, Body()] = None,
    atlas_account: AtlasAccount = None,
) -> ExpectationView:
    """Have it noticed if no webhook about this envelope comes in time.

    If nothing was heard of it by then, the event `receiver.silent` is raised, once. The same
    request again changes nothing; another `within` counts from the first one, too. A token that
    sees several accounts says with `Atlas-Account` whose the envelope will be.
    """
    refuse_unusable(envelope_id, atlas_account)
    within = (expecting or Expecting()).within
    async with database.begin(limit=LIMIT) as connection:
        seen = await sight.resolve(connection, consumer.accounts, atlas_account)
        account = await _account(connection, seen, envelope_id, meant=atlas_account)
        expectation, is_seen = await expectations.expect(
            connection,
            account,
            envelope_id,
            consumer=consumer.name,
            within=timedelta(seconds=within),
        )
        await audit(
            connection,
            actor=consumer.actor,
            action="envelope.expected",
            subject=f"envelope:{envelope_id}",
            details={"account": account, "within": within},
        )
    return ExpectationView(
        account=account,
        envelope_id=envelope_id,
        expected_by=expectation.consumer,
        expected_at=expectation.created_at,
        # The row keeps it until somebody looks whether it is over.
        due_at=None if is_seen else expectation.due_at,
        silent_at=expectation.silent_at,
        seen=is_seen,
    )


async def _account(
    connection: Connection, seen: Sight, envelope_id: str, *, meant: str | None
) -> str:
    """Give the account that has the envelope, or else the only one that can be meant."""
    if rows := await lookups.find(connection, seen, envelope_id):
        account: str = the_one(rows, envelope_id).account
        return account
    accounts = seen.accounts
    if accounts is None:
        accounts = tuple(await expectations.accounts(connection))
    if not accounts or (seen.tenant is not None and not _names_tenant(meant or "")):
        raise NotFound("There is no such account here.")
    if len(accounts) > 1:
        raise NotAllowed(_undecided(accounts))
    # Whose tenant's a new one is, nobody knows; but this one is known to be another's.
    if await lookups.find(connection, Sight(accounts), envelope_id):
        raise NotFound(f"There is no envelope {envelope_id} here.")
    return accounts[0]


def _names_tenant(meant: str) -> bool:
    """Whether this names a tenant for sure, and is no account that was mistyped, or is hidden."""
    try:
        return meant.startswith("ext_") or bool(UUID(meant))
    except ValueError:
        return False


def _undecided(accounts: Sequence[str]) -> str:
    names = ", ".join(map(repr, accounts[:MOST_NAMED]))
    more = "" if len(accounts) <= MOST_NAMED else ", …"
    return (
        f"This envelope is not known yet, and its account may be any of {names}{more}: say which "
        "with the header Atlas-Account."
    )
