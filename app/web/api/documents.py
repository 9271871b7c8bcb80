"""The signed PDF of an envelope, as it was archived: every byte is checked before one is sent."""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import aclosing
from hashlib import sha256
from tempfile import SpooledTemporaryFile
from typing import IO, Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Depends, HTTPException, Request, Response
from fastapi.responses import StreamingResponse

from app.callbacks.shelf import CHUNK, Shelf, ShelfError, open_shelf
from app.errors import ConfigError, Gone, NotFound
from app.telemetry import get_logger
from app.web.api.envelopes import IfNoneMatch
from app.web.api.finding import VARY, EnvelopeId, find
from app.web.api.watching import matches
from app.web.deps import AtlasAccount, Pool, Reader
from app.web.errors import problems

log = get_logger("api")

# What is larger than this waits on disk, not in memory, while it is checked.
IN_MEMORY = 1024 * 1024
# So many at once are read from the archive; others wait for their turn.
AT_ONCE = 4
_LATER = {"Retry-After": "60"}
_UNSAFE = re.compile(r'[\x00-\x1f\x7f-\x9f/\\:*?"<>|\ud800-\udfff\u200e\u200f\u202a-\u202e]')

router = APIRouter(prefix="/api/envelope", tags=["envelopes"])


class Documents:
    """The archive, opened when it is first asked for: many services have none."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._shelf: Shelf | None = None
        self._turns = asyncio.Semaphore(AT_ONCE)

    async def fetch(self, name: str, *, digest: str, size: int) -> IO[bytes]:
        """Give a file that is what it was when it was archived. Raises `ShelfError`, `NotFound`."""
        spool: Any = SpooledTemporaryFile(max_size=IN_MEMORY)  # noqa: SIM115  # whoever sends it closes it
        try:
            async with self._turns:
                await self._copy(name, spool, digest=digest, size=size)
        except BaseException:
            spool.close()
            raise
        return spool  # type: ignore[no-any-return]  # it is one, and says so only to checkers

    async def _copy(self, name: str, spool: Any, *, digest: str, size: int) -> None:
        if self._shelf is None:
            self._shelf = await asyncio.to_thread(open_shelf, self._url)
        found, length = sha256(), 0
        async with aclosing(self._shelf.read(name)) as pieces:
            async for piece in pieces:
                length += len(piece)
                if length > size:
                    break
                found.update(piece)
                await asyncio.to_thread(spool.write, piece)
        if length != size or found.hexdigest() != digest:
            raise ShelfError("the file in the archive is not the one that was put there")
        spool.seek(0)


def _documents(request: Request) -> Documents:
    found: Documents = request.app.state.documents
    return found


@router.get(
    "/{envelope_id:path}/pdf",
    response_class=Response,
    summary="Its signed PDF",
    responses={
        200: {
            "description": "The document as it was archived",
            "content": {"application/pdf": {"schema": {"type": "string", "format": "binary"}}},
        },
        304: {"description": "You have this document"},
        **problems(404, 409, 410),
    },
)
async def get_document(
    envelope_id: EnvelopeId,
    consumer: Reader,
    database: Pool,
    documents: Annotated[Documents, Depends(_documents)],
    *,
    atlas_account: AtlasAccount = None,
    if_none_match: IfNoneMatch = None,
) -> Response:
    """Give the signed PDF that the callback `archive` has kept.

    404 as long as none is kept, 410 once the envelope was erased, and 503 if the archive cannot
    be read, or holds something else than was put there.
    """
    row = await find(database, consumer, envelope_id, atlas_account)
    if row.erased_at is not None:
        raise Gone(f"The envelope {envelope_id} was erased, and its document with it.")
    if row.archive_name is None:
        raise NotFound(f"The signed PDF of {envelope_id} is not archived, or not yet.")
    headers = {
        "ETag": f'"{row.archive_sha256}"',
        "Vary": VARY,
        "Cache-Control": "private, no-cache",
    }
    if if_none_match is not None and matches(if_none_match, headers["ETag"]):
        return Response(status_code=304, headers=headers)
    file = await _fetch(documents, row)
    headers |= {
        "Content-Length": str(row.archive_bytes),
        "Content-Disposition": _disposition(envelope_id),
        "X-Content-Type-Options": "nosniff",
    }
    return StreamingResponse(_pieces(file), headers=headers, media_type="application/pdf")


async def _fetch(documents: Documents, row: Any) -> IO[bytes]:
    try:
        return await documents.fetch(
            row.archive_name, digest=row.archive_sha256, size=row.archive_bytes
        )
    except (ShelfError, NotFound, ConfigError, OSError) as error:
        log.error(  # noqa: TRY400  # the text says all, and the place is always here
            "document.unreadable",
            envelope_id=row.id,
            account=row.account,
            name=row.archive_name,
            error=str(error),
        )
        detail = "The archive cannot be read, or has not what was put there; the log says more."
        raise HTTPException(503, detail, headers=_LATER) from None


async def _pieces(file: IO[bytes]) -> AsyncIterator[bytes]:
    try:
        while piece := await asyncio.to_thread(file.read, CHUNK):
            yield piece
    finally:
        file.close()


def _disposition(envelope_id: str) -> str:
    """Name the file after the envelope, of which only harmless characters are left."""
    name = f"envelope-{_UNSAFE.sub('_', envelope_id)}.pdf"
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", name)
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(name, safe='')}"
