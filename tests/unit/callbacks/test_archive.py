"""The built-in `archive` starts only with settings that can work."""

import io
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from app.callbacks.archive import callbacks, is_pdf
from app.callbacks.loader import load
from app.callbacks.shelf import Draft
from app.errors import ConfigError
from app.settings import Settings
from tests.atlas_stand_in import KEY, PDF


def settings(tmp_path: Path, **values: Any) -> Settings:
    usual = {"atlas_api_key": KEY, "archive_url": str(tmp_path / "archive")}
    return Settings(**{**usual, **values})


def draft_of(*pieces: bytes) -> Draft:
    draft = Draft(io.BytesIO())
    for piece in pieces:
        draft.write(piece)
    return draft


class TestSettings:
    def test_one_name_in_callbacks_is_all_it_takes(self, tmp_path: Path) -> None:
        (archive,) = load("app.callbacks.archive:callbacks", settings(tmp_path))

        assert ("archive", ("envelope.signed",)) == (archive.name, archive.patterns)
        assert archive.takes_session
        assert archive.timeout > timedelta(minutes=4)

    @pytest.mark.parametrize(
        "values, name",
        [
            ({"archive_url": "/nowhere/at/all"}, "ARCHIVE_URL"),
            ({"archive_url": "ftp://example.com"}, "ARCHIVE_URL"),
            ({"atlas_base_url": "http://atlas.example/api"}, "ATLAS_BASE_URL"),
            ({"atlas_api_key": None}, "ATLAS_API_KEY"),
            ({"atlas_api_key": "local_0123456789abcdef"}, "ATLAS_API_KEY"),
            (
                {
                    "atlas_api_key": None,
                    "atlas_api_keys": {"acme": [{"key": KEY, "use": ["verify"]}]},
                },
                "ATLAS_API_KEY",
            ),
        ],
    )
    def test_what_cannot_work_stops_the_start_and_names_the_setting(
        self, tmp_path: Path, values: dict[str, Any], name: str
    ) -> None:
        with pytest.raises(ConfigError, match=name) as caught:
            callbacks(settings(tmp_path, **values))

        assert KEY not in str(caught.value)

    def test_a_key_that_was_made_here_is_enough_for_a_server_here(self, tmp_path: Path) -> None:
        made_here = settings(
            tmp_path,
            atlas_api_key="local_0123456789abcdef",
            atlas_base_url="http://127.0.0.1:8001/api",
        )

        assert 1 == len(callbacks(made_here))


class TestIsPdf:
    @pytest.mark.parametrize(
        "pieces",
        [
            pytest.param([PDF], id="plain"),
            pytest.param([b"\xef\xbb\xbf\r\n", PDF, b"\r\n" * 100], id="something around it"),
            pytest.param([bytes([byte]) for byte in PDF], id="byte by byte"),
            pytest.param([b"%PDF-2.0", b"x" * 5_000_000, b"%%EOF"], id="large"),
        ],
    )
    def test_a_pdf_is_one(self, pieces: list[bytes]) -> None:
        assert is_pdf(draft_of(*pieces))

    @pytest.mark.parametrize(
        "pieces",
        [
            pytest.param([], id="nothing"),
            pytest.param([b"<html>", b"please log in", b"</html>"], id="a page"),
            pytest.param([b"PK\x03\x04" + b"\0" * 2000, PDF], id="an archive with a PDF inside"),
            pytest.param([PDF[:-8]], id="cut off"),
            pytest.param([PDF, b"\0" * 2000], id="much behind it"),
        ],
    )
    def test_anything_else_is_none(self, pieces: list[bytes]) -> None:
        assert not is_pdf(draft_of(*pieces))
