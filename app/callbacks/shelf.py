"""Where signed PDFs are kept: a directory, or a bucket at Amazon, Google or Azure.

A file appears under its name complete or not at all, and what stands there is never
overwritten. A name is made by us: nothing that a stranger wrote becomes part of a path.
"""

import asyncio
import errno
import os
import re
import secrets
import stat
import time
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, TYPE_CHECKING, Protocol

from app.errors import AppError, ConfigError, NotFound

if TYPE_CHECKING:
    from obstore.store import ObjectStore, RetryConfig

ROOT = Path(__file__).resolve().parents[2]
# Account, year, month, file: see `app.callbacks.archive`.
NAME = re.compile(
    r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}/[0-9]{4}/[0-9]{2}/[0-9a-f]{32}-[0-9a-f]{16}\.pdf"
)
# What the names of all files of one envelope begin with.
STEM = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}/[0-9]{4}/[0-9]{2}/[0-9a-f]{32}-")
CHUNK = 256 * 1024
# A PDF says what it is within its first KiB, and that it ends within its last.
EDGE = 1024

_DRAFTS = ".drafts"
_LONGEST_DRAFT = timedelta(days=1)
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_INSIDE = _DIRECTORY | os.O_NOFOLLOW
_NEW_FILE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
# Without waiting, should somebody have put a pipe there.
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_FORBIDDEN = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_PLANTED = frozenset({errno.ELOOP, errno.ENOTDIR})
_BUCKETS = ("s3", "gs", "az")


class ShelfError(AppError):
    """A file cannot be kept, or not be read, for now; the text says why."""


class Draft:
    """A file on its way to the shelf: what came so far, and what it looks like."""

    def __init__(self, file: IO[bytes], name: str = "") -> None:
        self.file = file
        self.name = name
        self.size = 0
        self.head = b""
        self.tail = b""
        self._digest = sha256()

    @property
    def sha256(self) -> str:
        """The digest of what came so far."""
        return self._digest.hexdigest()

    def write(self, chunk: bytes) -> None:
        """Take the next piece. It gets as far as the system's memory; disks are slower."""
        self._digest.update(chunk)
        self.size += len(chunk)
        self.head = (self.head + chunk[:EDGE])[:EDGE]
        self.tail = (self.tail + chunk[-EDGE:])[-EDGE:]
        with _named_failures():
            self.file.write(chunk)


class Shelf(Protocol):
    """A place for files that nobody overwrites."""

    def draft(self) -> AbstractAsyncContextManager[Draft]:
        """Open a file to be filled; nothing of it is left unless it is kept."""
        ...

    async def keep(self, draft: Draft, name: str) -> None:
        """Make the draft appear under `name`, on disk; the same content may stand there."""
        ...

    def read(self, name: str) -> AsyncGenerator[bytes]:
        """Give the content of a file, piece by piece; raises `NotFound`."""
        ...

    async def remove(self, stem: str) -> int:
        """Remove the files whose names begin with this, for good; say how many."""
        ...


def open_shelf(url: str) -> Shelf:
    """Read `ARCHIVE_URL`; raises `ConfigError` with the remedy. Nothing is made yet."""
    scheme, is_url, _ = url.partition("://")
    if not is_url:
        return Directory(_checked_directory(url))
    if scheme not in _BUCKETS:
        raise ConfigError(
            f"ARCHIVE_URL starts with {scheme[:40]!r}://; it is a directory, "
            "or s3://bucket/prefix, gs://bucket/prefix, az://container/prefix"
        )
    return Bucket(_store(url))


def _checked_directory(path: str) -> Path:
    root = ROOT / path
    # `var` is ours; elsewhere a missing parent is more likely a disk that is not mounted.
    nearest = root if root.exists() else root.parent
    if nearest == ROOT / "var" and not nearest.exists():
        nearest = ROOT
    if not nearest.is_dir():
        raise ConfigError(f"ARCHIVE_URL: {nearest} is not a directory; make it, or name another")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"ARCHIVE_URL: this user may not write in {nearest}")
    return root


def _store(url: str) -> "ObjectStore":
    try:
        from obstore.exceptions import BaseError  # noqa: PLC0415  # an extra: many do without it
        from obstore.store import from_url  # noqa: PLC0415  # likewise
    except ImportError:
        raise ConfigError(
            "ARCHIVE_URL names a bucket, which needs a library that is not installed: "
            "start with EXTRAS=blob make run"
        ) from None
    if "@" in url.split("/")[2]:
        raise ConfigError(
            "ARCHIVE_URL must hold no password: the library of the bucket reads its own variables, "
            "such as AWS_ACCESS_KEY_ID"
        )
    # The wait for another try is the dispatcher's; the library's would use up the time.
    retries: RetryConfig = {"max_retries": 2, "retry_timeout": timedelta(seconds=30)}
    try:
        return from_url(url, retry_config=retries)
    except (BaseError, ValueError) as error:
        # Below its first line the library quotes its own source.
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"ARCHIVE_URL cannot be used: {reason}") from None


class Directory:
    """A directory; only this user may look into it.

    Below it no link is followed, so that nobody who may write there can lead us elsewhere.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    @asynccontextmanager
    async def draft(self) -> AsyncGenerator[Draft]:
        """Open a file among the drafts; they lie on the same disk as what is kept."""
        draft = await asyncio.to_thread(self._begin, secrets.token_hex(16))
        try:
            yield draft
        finally:
            await asyncio.shield(asyncio.to_thread(self._end, draft))

    def _begin(self, name: str) -> Draft:
        with _named_failures(), self._folder([_DRAFTS], is_making=True) as drafts:
            _sweep(drafts)
            return Draft(os.fdopen(os.open(name, _NEW_FILE, 0o600, dir_fd=drafts), "w+b"), name)

    def _end(self, draft: Draft) -> None:
        # Closing writes what is left in the buffer, for which the disk may have no room.
        with suppress(OSError):
            draft.file.close()
        with suppress(OSError), self._folder([_DRAFTS]) as drafts:
            os.unlink(draft.name, dir_fd=drafts)

    async def keep(self, draft: Draft, name: str) -> None:
        """Give the draft its name, once all of it is on disk."""
        *folder, last = _parts(name)
        await asyncio.to_thread(self._keep, draft, folder, last)

    def _keep(self, draft: Draft, folder: Sequence[str], last: str) -> None:
        with (
            _named_failures(),
            self._folder([_DRAFTS]) as drafts,
            self._folder(folder, is_making=True) as target,
        ):
            draft.file.flush()
            os.fsync(draft.file.fileno())
            try:
                os.link(
                    draft.name, last, src_dir_fd=drafts, dst_dir_fd=target, follow_symlinks=False
                )
            except FileExistsError:
                _require_same(draft, _pieces(_open(last, target)))
            # A name is on disk when its directory is; a crash may have come between.
            os.fsync(target)

    async def read(self, name: str) -> AsyncGenerator[bytes]:
        """Give the content of a file, piece by piece."""
        *folder, last = _parts(name)
        file = await asyncio.to_thread(self._open_kept, folder, last)
        try:
            while chunk := await asyncio.to_thread(file.read, CHUNK):
                yield chunk
        finally:
            file.close()

    async def remove(self, stem: str) -> int:
        """Remove the files of one envelope from one folder."""
        *folder, beginning = _stem_parts(stem)
        return await asyncio.to_thread(self._remove, folder, beginning)

    def _remove(self, folder: Sequence[str], beginning: str) -> int:
        with _named_failures(), suppress(FileNotFoundError), self._folder(folder) as here:
            return _unlink(beginning, here)
        # Where there is no folder there is no file.
        return 0

    def _open_kept(self, folder: Sequence[str], last: str) -> IO[bytes]:
        with _named_failures():
            try:
                with self._folder(folder) as target:
                    return _open(last, target)
            except FileNotFoundError:
                raise _missing() from None

    @contextmanager
    def _folder(self, parts: Sequence[str], *, is_making: bool = False) -> Iterator[int]:
        """Walk down from the root, one step at a time; lend the descriptor of the last."""
        if is_making:
            _make_root(self._root)
        here = os.open(self._root, _DIRECTORY)
        try:
            for part in parts:
                if is_making:
                    _make(part, here)
                here, above = os.open(part, _INSIDE, dir_fd=here), here
                os.close(above)
            yield here
        finally:
            os.close(here)


def _make_root(root: Path) -> None:
    if root.parent == ROOT / "var":
        root.parent.mkdir(exist_ok=True)
    root.mkdir(mode=0o700, exist_ok=True)


def _make(part: str, above: int) -> None:
    try:
        os.mkdir(part, 0o700, dir_fd=above)
    except FileExistsError:
        return
    os.fsync(above)


def _sweep(drafts: int) -> None:
    """Remove drafts whose process died over them."""
    oldest = time.time() - _LONGEST_DRAFT.total_seconds()
    for name in os.listdir(drafts):
        # Another process may be faster.
        with suppress(FileNotFoundError):
            if os.stat(name, dir_fd=drafts, follow_symlinks=False).st_mtime < oldest:
                os.unlink(name, dir_fd=drafts)


def _unlink(beginning: str, folder: int) -> int:
    """Remove the files whose names begin so."""
    removed = 0
    for name in os.listdir(folder):
        if name.startswith(beginning):
            # Another process may be faster.
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=folder)
                removed += 1
    os.fsync(folder)
    return removed


def _open(name: str, folder: int) -> IO[bytes]:
    file = os.fdopen(os.open(name, _FILE, dir_fd=folder), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise _occupied()
    return file


def _pieces(file: IO[bytes]) -> Iterator[bytes]:
    with file:
        while chunk := file.read(CHUNK):
            yield chunk


def _require_same(draft: Draft, pieces: Iterable[bytes]) -> None:
    digest = sha256()
    for piece in pieces:
        digest.update(piece)
    if digest.hexdigest() != draft.sha256:
        raise _occupied()


def _occupied() -> ShelfError:
    return ShelfError(
        "something else stands in the archive where this file belongs, and is not overwritten: "
        "look at it, and move it away"
    )


def _parts(name: str) -> list[str]:
    """Take a name apart; whatever was not made by us leads nowhere."""
    if not NAME.fullmatch(name):
        raise _missing()
    return name.split("/")


def _stem_parts(stem: str) -> list[str]:
    if not STEM.fullmatch(stem):
        raise _missing()
    return stem.split("/")


def _missing() -> NotFound:
    return NotFound("the archive has no file of this name")


@contextmanager
def _named_failures() -> Iterator[None]:
    """Say what is wrong with the disk in words that name the setting."""
    try:
        yield
    except OSError as error:
        raise ShelfError(_reason(error)) from error


def _reason(error: OSError) -> str:
    if error.errno in _FULL:
        return "the disk of ARCHIVE_URL is full: make room, and the file is fetched again"
    if error.errno in _FORBIDDEN:
        return "ARCHIVE_URL: this user may not write there, or the disk cannot be written"
    if error.errno in _PLANTED:
        return "ARCHIVE_URL: a symbolic link, or a file, stands where a directory should; remove it"
    return f"ARCHIVE_URL cannot be used: {error.strerror or type(error).__name__}"


class Bucket:
    """A bucket, through a store of obstore.

    The store puts a file that must not be there yet in one piece, out of memory.
    """

    def __init__(self, store: "ObjectStore") -> None:
        self._store = store

    @asynccontextmanager
    async def draft(self) -> AsyncGenerator[Draft]:
        """Open a file without a name among the system's temporary ones."""
        with _named_failures():
            file = await asyncio.to_thread(TemporaryFile)
        try:
            yield Draft(file)
        finally:
            with suppress(OSError):
                file.close()

    async def keep(self, draft: Draft, name: str) -> None:
        """Put the draft under its name, unless something is there."""
        from obstore.exceptions import AlreadyExistsError  # noqa: PLC0415  # an extra

        _parts(name)
        content = await asyncio.to_thread(_content, draft)
        try:
            with _named_faults():
                await self._store.put_async(
                    name, content, mode="create", attributes={"Content-Type": "application/pdf"}
                )
        except AlreadyExistsError:
            _require_same(draft, [piece async for piece in self.read(name)])

    async def read(self, name: str) -> AsyncGenerator[bytes]:
        """Give the content of a file, piece by piece."""
        _parts(name)
        with _named_faults():
            try:
                found = await self._store.get_async(name)
            except FileNotFoundError:
                raise _missing() from None
            async for piece in found.stream(min_chunk_size=CHUNK):
                yield bytes(piece)

    async def remove(self, stem: str) -> int:
        """Remove the files of one envelope from one folder."""
        *folder, _ = _stem_parts(stem)
        with _named_faults():
            found = [
                file["path"]
                async for files in self._store.list("/".join(folder))
                for file in files
                if file["path"].startswith(stem)
            ]
            if found:
                await self._store.delete_async(found)
        return len(found)


def _content(draft: Draft) -> bytes:
    with _named_failures():
        draft.file.seek(0)
        return draft.file.read()


@contextmanager
def _named_faults() -> Iterator[None]:
    """Say what is wrong with the bucket; the library's own text may quote addresses and keys."""
    from obstore.exceptions import AlreadyExistsError, BaseError  # noqa: PLC0415  # an extra

    try:
        yield
    except AlreadyExistsError:
        raise
    except (BaseError, OSError) as error:
        kind = type(error).__name__.removesuffix("Error")
        raise ShelfError(f"the bucket of ARCHIVE_URL cannot be used: {kind}") from error


def stem_of(account: str, envelope_id: str, received_at: datetime) -> str:
    """Make what the names of all files of one event's envelope begin with."""
    of = sha256(f"{account}\n{envelope_id}".encode("utf-8", "surrogatepass")).hexdigest()
    return f"{account}/{received_at:%Y/%m}/{of[:32]}-"


async def remove_documents(
    shelf: Shelf, account: str, envelope_id: str, received: Iterable[datetime]
) -> int:
    """Remove every PDF of an envelope whose events were received then; say how many."""
    stems = {stem_of(account, envelope_id, at.astimezone(UTC)) for at in received}
    return sum([await shelf.remove(stem) for stem in sorted(stems)])
