"""The answers of the internal API."""

from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class PartyView(BaseModel):
    """One who signs, as far as events told."""

    email: str | None = None
    name: str | None = None
    role: str | None = None
    order: int | None = None
    status: str | None = Field(default=None, examples=["waiting", "pending", "signed"])


class StatusView(BaseModel):
    """Progress, as Atlas' own `/status` answers it."""

    status: str | None = Field(examples=["pending"])
    signed_count: int | None = Field(description="Null while no parties are known.", examples=[1])
    total: int | None = Field(examples=[2])
    next_signer_email: str | None = Field(
        description="Null once the status is final.", examples=["ada@example.com"]
    )


class EnvelopeView(StatusView):
    """What is known of one envelope."""

    model_config = ConfigDict(from_attributes=True)

    envelope_id: str = Field(examples=["env_1"])
    account: str = Field(examples=["default"])
    tenant: str | None = Field(description="The connected account, without `ext_`.")
    disputed: bool = Field(description="Contradicting things were said of this envelope.")
    parties: list[PartyView] | None
    metadata: dict[str, Any] | None
    external_id: str | None = Field(examples=["crm-17"])
    client_reference_id: str | None
    is_test: bool | None
    fields_status: str | None
    fields_version: int | None
    send_error: str | None
    detection_error: str | None
    extraction: Any | None
    decline_reason: str | None
    void_reason: str | None
    created_at: datetime | None
    sent_at: datetime | None
    viewed_at: datetime | None
    signed_at: datetime | None
    declined_at: datetime | None
    voided_at: datetime | None
    expired_at: datetime | None
    extracted_at: datetime | None
    first_seen_at: datetime
    updated_at: datetime = Field(examples=["2026-07-01T12:00:00Z"])
    erased_at: datetime | None
    archived_at: datetime | None = Field(description="Since when the signed PDF is kept.")
    version: int = Field(description="Rises with every change, and never falls.")
    sequence: int = Field(description="How many events were recorded.")


class EnvelopePage(BaseModel):
    """Some envelopes of a list."""

    items: list[EnvelopeView]
    next_cursor: str | None = Field(description="Where the list goes on; null at its end.")
