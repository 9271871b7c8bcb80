"""What is kept is there complete or not at all, and under no name but its own."""

import asyncio
import errno
import io
import os
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

import pytest

from app.callbacks import shelf as shelves
from app.callbacks.shelf import CHUNK, Bucket, Directory, Draft, Shelf, ShelfError, open_shelf
from app.errors import ConfigError, NotFound

NAME = f"acme/2026/11/{'0' * 32}-{'a' * 16}.pdf"
OTHER = f"acme/2026/12/{'0' * 32}-{'b' * 16}.pdf"
CONTENT = b"%PDF-1.7 " + bytes(range(256)) * 5000 + b"%%EOF"


def directory(path: Path) -> Shelf:
    return Directory(path / "archive")


def bucket(_: Path) -> Shelf:
    obstore = pytest.importorskip("obstore.store")
    return Bucket(obstore.MemoryStore())


@pytest.fixture(name="shelf", params=[directory, bucket])
def _shelf(request: pytest.FixtureRequest, tmp_path: Path) -> Shelf:
    make: Callable[[Path], Shelf] = request.param
    return make(tmp_path)


@pytest.fixture(name="root")
def _root(tmp_path: Path) -> Path:
    return tmp_path / "archive"


@pytest.fixture(name="full_disk")
def _full_disk() -> Iterator[IO[bytes]]:
    device = Path("/dev/full")
    if not device.exists():
        pytest.skip("only Linux has a disk that is always full")
    file = device.open("wb")
    yield file
    with suppress(OSError):
        file.close()


async def keep(shelf: Shelf, content: bytes = CONTENT, name: str = NAME) -> None:
    async with shelf.draft() as draft:
        for start in range(0, len(content), 70_000):
            draft.write(content[start : start + 70_000])
        await shelf.keep(draft, name)


async def content_of(shelf: Shelf, name: str = NAME) -> bytes:
    return b"".join([piece async for piece in shelf.read(name)])


def files_in(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir())


def modes_in(root: Path, is_meant: Callable[[Path], bool]) -> set[int]:
    paths = filter(is_meant, [root, *root.rglob("*")])
    return {stat.S_IMODE(path.stat().st_mode) for path in paths}


class TestEveryShelf:
    async def test_gives_back_what_was_kept(self, shelf: Shelf) -> None:
        await keep(shelf)

        assert await content_of(shelf) == CONTENT

    async def test_keeping_the_same_twice_is_fine(self, shelf: Shelf) -> None:
        await keep(shelf)
        await keep(shelf)

        assert await content_of(shelf) == CONTENT

    async def test_many_at_once_are_kept_once(self, shelf: Shelf) -> None:
        await asyncio.gather(*(keep(shelf) for _ in range(8)))

        assert await content_of(shelf) == CONTENT

    async def test_what_stands_there_is_never_overwritten(self, shelf: Shelf) -> None:
        await keep(shelf, b"the first")

        with pytest.raises(ShelfError, match="not overwritten"):
            await keep(shelf, b"the second")

        assert b"the first" == await content_of(shelf)

    async def test_a_file_that_is_not_there_is_not_found(self, shelf: Shelf) -> None:
        with pytest.raises(NotFound):
            await content_of(shelf)

        await keep(shelf)
        with pytest.raises(NotFound):
            await content_of(shelf, OTHER)

    @pytest.mark.parametrize(
        "name",
        [
            "../../../etc/passwd",
            "/etc/passwd",
            f"../{NAME}",
            f"./{NAME}",
            f"{NAME}/",
            f"{NAME}\n",
            f"{NAME}\x00",
            NAME.replace("acme", ".drafts"),
            NAME.replace("acme", "x" * 300),
            NAME.replace(".pdf", ".PDF"),
            NAME.replace("acme", "a\\b"),
            "CON",
            "",
        ],
    )
    async def test_a_name_that_is_not_ours_leads_nowhere(self, shelf: Shelf, name: str) -> None:
        await keep(shelf)

        with pytest.raises(NotFound):
            await content_of(shelf, name)
        with pytest.raises(NotFound):
            await keep(shelf, name=name)

    async def test_removes_every_file_of_one_envelope_and_no_other(self, shelf: Shelf) -> None:
        again = NAME.replace("a" * 16, "c" * 16)
        of_other = NAME.replace("0" * 32, "1" * 32)
        for name in (NAME, again, of_other, OTHER):
            await keep(shelf, name=name)

        assert 2 == await shelf.remove(NAME.removesuffix(f"{'a' * 16}.pdf"))
        assert 0 == await shelf.remove(NAME.removesuffix(f"{'a' * 16}.pdf"))

        for name in (NAME, again):
            with pytest.raises(NotFound):
                await content_of(shelf, name)
        assert CONTENT == await content_of(shelf, of_other) == await content_of(shelf, OTHER)

    async def test_has_nothing_to_remove_where_nothing_was_kept(self, shelf: Shelf) -> None:
        assert 0 == await shelf.remove(f"acme/2026/11/{'0' * 32}-")

    @pytest.mark.parametrize("stem", ["", "acme", "acme/2026/11/", f"../2026/11/{'0' * 32}-"])
    async def test_removes_nothing_by_a_name_that_is_not_ours(
        self, shelf: Shelf, stem: str
    ) -> None:
        with pytest.raises(NotFound):
            await shelf.remove(stem)


class TestDraft:
    def test_knows_what_came(self) -> None:
        draft = Draft(io.BytesIO())

        for position in range(0, len(CONTENT), 1000):
            draft.write(CONTENT[position : position + 1000])

        assert (len(CONTENT), sha256(CONTENT).hexdigest()) == (draft.size, draft.sha256)
        assert (CONTENT[:1024], CONTENT[-1024:]) == (draft.head, draft.tail)


class TestDirectory:
    async def test_nothing_but_the_file_is_left(self, root: Path) -> None:
        await keep(Directory(root))

        assert [NAME] == files_in(root)

    async def test_nobody_else_may_look(self, root: Path) -> None:
        await keep(Directory(root))

        assert {0o600} == modes_in(root, Path.is_file)
        assert {0o700} == modes_in(root, Path.is_dir)

    async def test_of_a_draft_that_is_not_kept_nothing_is_left(self, root: Path) -> None:
        async with Directory(root).draft() as draft:
            draft.write(CONTENT)

        assert [] == files_in(root)

    async def test_of_a_draft_that_is_cut_off_nothing_is_left(self, root: Path) -> None:
        begun = asyncio.Event()

        async def write() -> None:
            async with Directory(root).draft() as draft:
                draft.write(CONTENT)
                begun.set()
                await asyncio.Event().wait()

        writing = asyncio.create_task(write())
        await begun.wait()
        writing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await writing

        assert [] == files_in(root)

    async def test_no_half_file_is_ever_seen_under_the_name(self, root: Path) -> None:
        shelf = Directory(root)
        async with shelf.draft() as draft:
            draft.write(CONTENT)

            assert not (root / NAME).exists()

            await shelf.keep(draft, NAME)

            assert (root / NAME).read_bytes() == CONTENT

    async def test_a_draft_that_a_crash_left_goes_with_a_later_one(self, root: Path) -> None:
        await keep(Directory(root))
        dead, alive = root / ".drafts" / "dead", root / ".drafts" / "alive"
        for path in (dead, alive):
            path.write_bytes(b"half")
        long_ago = dead.stat().st_mtime - timedelta(days=2).total_seconds()
        os.utime(dead, (long_ago, long_ago))

        await keep(Directory(root), name=OTHER)

        assert (False, True) == (dead.exists(), alive.exists())

    async def test_a_damaged_file_is_reported_and_left_alone(self, root: Path) -> None:
        await keep(Directory(root))
        (root / NAME).write_bytes(CONTENT[:100])

        with pytest.raises(ShelfError, match="look at it"):
            await keep(Directory(root))

        assert CONTENT[:100] == (root / NAME).read_bytes()

    async def test_a_file_in_pieces_is_read_whole(self, root: Path) -> None:
        await keep(Directory(root), b"x" * (3 * CHUNK + 1))

        sizes = [len(piece) async for piece in Directory(root).read(NAME)]

        assert [CHUNK, CHUNK, CHUNK, 1] == sizes


class TestPlantedThings:
    """Somebody who may write below the root must not lead us out of it."""

    @pytest.mark.parametrize("place", ["acme", "acme/2026", "acme/2026/11", ".drafts"])
    async def test_a_link_in_place_of_a_directory_is_not_followed(
        self, root: Path, tmp_path: Path, place: str
    ) -> None:
        outside = tmp_path / "outside"
        outside.mkdir()
        link = root / place
        link.parent.mkdir(parents=True)
        link.symlink_to(outside)

        with pytest.raises(ShelfError, match="symbolic link"):
            await keep(Directory(root))

        assert [] == files_in(outside)

    async def test_a_link_in_place_of_the_file_is_neither_followed_nor_replaced(
        self, root: Path, tmp_path: Path
    ) -> None:
        target = tmp_path / "target"
        target.write_bytes(CONTENT)
        link = root / NAME
        link.parent.mkdir(parents=True)
        link.symlink_to(target)

        with pytest.raises(ShelfError, match="symbolic link"):
            await keep(Directory(root))
        with pytest.raises(ShelfError, match="symbolic link"):
            await content_of(Directory(root))

        assert link.is_symlink()
        assert target.read_bytes() == CONTENT

    async def test_a_pipe_in_place_of_the_file_holds_nobody_up(self, root: Path) -> None:
        (root / NAME).parent.mkdir(parents=True)
        os.mkfifo(root / NAME)

        with pytest.raises(ShelfError, match="something else"):
            await keep(Directory(root))

    async def test_a_directory_in_place_of_the_file_is_reported(self, root: Path) -> None:
        (root / NAME).mkdir(parents=True)

        with pytest.raises(ShelfError):
            await keep(Directory(root))

    async def test_the_root_itself_may_be_a_link(self, tmp_path: Path) -> None:
        mounted, link = tmp_path / "mounted", tmp_path / "link"
        mounted.mkdir()
        link.symlink_to(mounted)

        await keep(Directory(link))

        assert (mounted / NAME).read_bytes() == CONTENT


class TestTroubleWithTheDisk:
    def test_a_full_disk_is_named(self, full_disk: IO[bytes]) -> None:
        draft = Draft(full_disk)

        with pytest.raises(ShelfError, match="full"):
            draft.write(CONTENT)

    async def test_a_disk_that_is_full_at_the_last_moment_is_named(
        self, root: Path, full_disk: IO[bytes]
    ) -> None:
        shelf = Directory(root)
        async with shelf.draft() as draft:
            draft.file.close()
            draft.file = full_disk
            draft.write(b"less than a buffer")

            with pytest.raises(ShelfError, match="full"):
                await shelf.keep(draft, NAME)

        assert [] == files_in(root)

    async def test_a_file_in_place_of_the_root_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"")

        with pytest.raises(ShelfError, match="ARCHIVE_URL"):
            await keep(Directory(tmp_path / "file"))

    async def test_a_root_whose_disk_is_gone_is_not_made_elsewhere(self, tmp_path: Path) -> None:
        gone = tmp_path / "mount" / "archive"

        with pytest.raises(ShelfError, match="ARCHIVE_URL"):
            await keep(Directory(gone))

        assert not gone.parent.exists()

    @pytest.mark.parametrize(
        "number, word",
        [
            (errno.ENOSPC, "full"),
            (errno.EDQUOT, "full"),
            (errno.EROFS, "may not write"),
            (errno.EACCES, "may not write"),
            (errno.EIO, "Input/output error"),
        ],
    )
    def test_every_reason_has_words(self, number: int, word: str) -> None:
        with pytest.raises(ShelfError, match=word), shelves._named_failures():
            raise OSError(number, os.strerror(number))


class TestOpening:
    def test_a_relative_directory_counts_from_the_project(self) -> None:
        shelf = open_shelf("var/archive")

        assert isinstance(shelf, Directory)
        assert Path(__file__).parents[3] / "var" / "archive" == shelf._root

    def test_nothing_is_made_yet(self, tmp_path: Path) -> None:
        open_shelf(str(tmp_path / "archive"))

        assert [] == list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        "url, remedy",
        [
            ("/nowhere/at/all", "is not a directory"),
            ("/dev/null", "is not a directory"),
            ("file:///tmp", "it is a directory"),
            ("https://bucket.example/x", "s3://bucket/prefix"),
            ("s3://key:secret@bucket/prefix", "no password"),
            ("s3://[", "cannot be used"),
            ("s3://", "cannot be used"),
            ("az://box/prefix", "cannot be used: .*Account must be specified$"),
        ],
    )
    def test_what_cannot_be_one_stops_the_start(
        self, url: str, remedy: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pytest.importorskip("obstore")
        monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)

        with pytest.raises(ConfigError, match=remedy) as caught:
            open_shelf(url)

        assert "ARCHIVE_URL" in str(caught.value)
        assert "secret" not in str(caught.value)

    @pytest.mark.parametrize("url", ["s3://bucket/prefix", "gs://bucket/prefix", "az://box/prefix"])
    def test_a_bucket_is_one_of_three(self, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("obstore")
        monkeypatch.setenv("AWS_REGION", "eu-central-1")
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")

        assert isinstance(open_shelf(url), Bucket)

    def test_without_the_library_it_says_what_to_run(self, monkeypatch: pytest.MonkeyPatch) -> None:
        missing: Any = None
        monkeypatch.setitem(sys.modules, "obstore.store", missing)

        with pytest.raises(ConfigError, match="EXTRAS=blob make run"):
            open_shelf("s3://bucket/prefix")


class TestBucket:
    async def test_trouble_is_named_without_the_librarys_own_words(self) -> None:
        obstore = pytest.importorskip("obstore.store")
        nowhere = obstore.S3Store(
            "bucket",
            endpoint="http://127.0.0.1:1",
            region="eu-central-1",
            access_key_id="AKIACANARY",
            secret_access_key="secret-canary",
            client_options={"allow_http": True},
            retry_config={"max_retries": 0, "retry_timeout": timedelta(seconds=1)},
        )

        with pytest.raises(ShelfError, match="the bucket of ARCHIVE_URL") as caught:
            await keep(Bucket(nowhere))

        assert "127.0.0.1" not in str(caught.value)
        assert "CANARY" not in str(caught.value)
