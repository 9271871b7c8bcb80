"""One envelope, and its progress."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Annotated, Any

from fastapi import APIRouter, Header, HTTPException, Path, Response

from app.store import envelopes
from app.store.session import Database
from app.web.api.schemas import EnvelopeView, StatusView
from app.web.deps import AtlasAccount, Consumer, Pool, Reader

READ_LIMIT = timedelta(seconds=3)
# Which envelope is meant depends on these, too, and versions of two may be equal.
_VARY = "Authorization, Atlas-Account"

router = APIRouter(prefix="/api/envelope", tags=["envelopes"])

EnvelopeId = Annotated[str, Path(min_length=1, max_length=255)]
IfNoneMatch = Annotated[str | None, Header(alias="If-None-Match")]


# Before the other route, which takes any path: an id may hold a "/".
@router.get(
    "/{envelope_id:path}/status",
    response_model=StatusView,
    summary="Its progress",
    responses={404: {}, 409: {}},
)
async def get_status(
    envelope_id: EnvelopeId,
    consumer: Reader,
    database: Pool,
    *,
    atlas_account: AtlasAccount = None,
) -> Any:
    """Give status, counts and the next signer, under the names that Atlas uses."""
    row = await _find(database, envelope_id, consumer=consumer, account=atlas_account)
    return {name: getattr(row, name) for name in StatusView.model_fields}


@router.get(
    "/{envelope_id:path}",
    response_model=EnvelopeView,
    summary="One envelope",
    responses={304: {}, 404: {}, 409: {}},
)
async def get_envelope(
    envelope_id: EnvelopeId,
    response: Response,
    consumer: Reader,
    database: Pool,
    *,
    atlas_account: AtlasAccount = None,
    if_none_match: IfNoneMatch = None,
) -> Any:
    """Give everything known; `If-None-Match` saves the body when nothing has changed.

    A `/` in the id is written `%2F`. Of an id that ends in `/status` only the progress can be
    asked for, at `…%2Fstatus/status`.
    """
    row = await _find(database, envelope_id, consumer=consumer, account=atlas_account)
    tag = f'"{row.version}"'
    if if_none_match is not None and _matches(if_none_match, tag):
        return Response(status_code=304, headers={"ETag": tag, "Vary": _VARY})
    response.headers["ETag"], response.headers["Vary"] = tag, _VARY
    return EnvelopeView(envelope_id=row.id, **_shown(row))


def _shown(row: Any) -> dict[str, Any]:
    names = set(EnvelopeView.model_fields) - {"envelope_id"}
    return {name: row._mapping[name] for name in names}  # noqa: SLF001  # SQLAlchemy's public way


def _matches(header: str, tag: str) -> bool:
    tags = (part.strip().removeprefix("W/") for part in header.split(","))
    return header.strip() == "*" or tag in tags


async def _find(
    database: Database, envelope_id: str, *, consumer: Consumer, account: str | None
) -> Any:
    """Find the one row that is meant; what the consumer may not see is not there."""
    if "\x00" in envelope_id:
        # No id holds a NUL, and PostgreSQL does not even let one be asked for.
        raise HTTPException(404, "There is no envelope with a NUL in its id.")
    async with database.begin(limit=READ_LIMIT, is_reading=True) as connection:
        rows = await envelopes.find(
            connection, envelope_id, accounts=consumer.accounts, meant=account
        )
    if not rows:
        raise HTTPException(404, f"There is no envelope {envelope_id} here.")
    if len(rows) > 1:
        raise HTTPException(409, _ambiguous(rows))
    return rows[0]


def _ambiguous(rows: Sequence[Any]) -> str:
    names = " and ".join(repr(row.account) for row in rows)
    return f"The accounts {names} both have this envelope: say which with the header Atlas-Account."
