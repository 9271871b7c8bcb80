"""What may be asked about envelopes: the values of queries, checked and put in order."""

import re
from datetime import UTC, datetime
from typing import Annotated, Any

from pydantic import AfterValidator, AwareDatetime, BaseModel, BeforeValidator, Field

from app.events.payload import STATUS_OF_WORD
from app.store.envelope_lists import Filters
from app.store.list_statements import NO_STATUS

LONGEST_WAIT = 60
# A place names a term and an envelope, which may have 255 characters each, of six bytes.
LONGEST_CURSOR = 10_000
_ZONE_WITHOUT_PLUS = re.compile(r" (\d\d:?\d\d)$")
_WORDS = ", ".join(sorted(STATUS_OF_WORD))


def _storable(text: str) -> str:
    if "\x00" in text:
        raise ValueError("nothing has a NUL in it")
    return text


def _status(word: str) -> str:
    if word not in STATUS_OF_WORD:
        raise ValueError(f"is none of {_WORDS}")
    return STATUS_OF_WORD[word]


def _status_or_none(word: str) -> str:
    if word != NO_STATUS and word not in STATUS_OF_WORD:
        raise ValueError(f"is none of {_WORDS}, {NO_STATUS}")
    return STATUS_OF_WORD.get(word, word)


def _with_plus(text: Any) -> Any:
    # In an address a plus is a blank, and who writes one by hand forgets that.
    return _ZONE_WITHOUT_PLUS.sub(r"+\1", text) if isinstance(text, str) else text


def _in_utc(moment: datetime) -> datetime:
    try:
        return moment.astimezone(UTC)
    except OverflowError:
        raise ValueError("is no time of this calendar") from None


Text = Annotated[str, Field(max_length=255), AfterValidator(_storable)]
Moment = Annotated[AwareDatetime, BeforeValidator(_with_plus), AfterValidator(_in_utc)]


class ListQuery(BaseModel):
    """Which envelopes are listed."""

    status: Annotated[str, Field(max_length=64), AfterValidator(_status_or_none)] | None = Field(
        default=None,
        description=(
            "Only those with this status, in the words of either generation of Atlas' API; "
            "`none` for those of which no event has said one yet."
        ),
        examples=["signed"],
    )
    external_id: Text | None = Field(default=None, description="Only those with this id of yours.")
    client_reference_id: Text | None = Field(
        default=None, description="Only those with this reference of yours."
    )
    is_test: bool | None = Field(
        default=None, description="Only tests, or only those that are not marked as tests."
    )
    tenant: Text | None = Field(
        default=None, description="Only those of this connected account, with or without `ext_`."
    )
    updated_after: Moment | None = Field(
        default=None,
        description=(
            "Only those that changed after this time (ISO 8601 with a zone), the earliest change "
            "first. To follow changes for good, and miss none, read `/api/events`."
        ),
        examples=["2026-07-01T12:00:00Z"],
    )
    q: Annotated[Text, Field(min_length=1)] | None = Field(
        default=None,
        description=(
            "Only those of which an id, or the e-mail address of a party, is this or begins with "
            "it, in any case; in the order of what was found. One that several of these find may "
            "come again on a later page."
        ),
        examples=["ada@"],
    )
    cursor: str | None = Field(
        default=None,
        max_length=LONGEST_CURSOR,
        description="The `next_cursor` of an earlier page of the same list.",
    )
    limit: int = Field(default=50, ge=1, le=100, description="At most so many.")

    def filters(self) -> Filters:
        """Give what the envelopes must have in common."""
        tenant = self.tenant
        return Filters(
            external_id=self.external_id,
            client_reference_id=self.client_reference_id,
            tenant=None if tenant is None else tenant.removeprefix("ext_"),
            status=self.status,
            is_test=self.is_test,
            updated_after=self.updated_after,
        )


class WaitQuery(BaseModel):
    """For what an answer waits."""

    wait: int = Field(
        default=0, ge=0, le=LONGEST_WAIT, description="Wait so many seconds, at most."
    )
    until: Annotated[str, Field(max_length=64), AfterValidator(_status)] | None = Field(
        default=None,
        description=(
            "With `wait`: until it has this status, has passed it, or has come to an end; in the "
            "words of either generation of Atlas' API."
        ),
        examples=["signed"],
    )
    min_version: int | None = Field(
        default=None,
        ge=1,
        lt=2**63,
        description="Only in this version or a later one: 503 if there is none in time.",
    )
