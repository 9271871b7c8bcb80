"""Where a list goes on: only what was given counts, and only for the list that gave it."""

import base64
import json

import pytest

from app.errors import InvalidCursor
from app.upkeep.tail import START
from app.web import cursors
from app.web.api.feed import read_cursor, write_cursor


def encoded(value: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()


class TestCursors:
    @pytest.mark.parametrize("keys", [[], [1, "a"], ["ключ 🖋", -1], ["", 0, 2**70]])
    def test_give_back_what_they_were_given(self, keys: list[str | int]) -> None:
        cursor = cursors.write("list", keys)

        assert keys == cursors.read("list", cursor, [type(key) for key in keys])
        assert cursor.isascii()
        assert not set(cursor) & set("+/=&?# ")

    @pytest.mark.parametrize(
        "cursor",
        [
            pytest.param("", id="empty"),
            pytest.param("latest", id="a-word"),
            pytest.param("\x00", id="nul"),
            pytest.param("é", id="not-ascii"),
            pytest.param("a" * 5, id="broken-base64"),
            pytest.param("-_-_", id="no-text"),
            pytest.param(encoded("text"), id="no-list"),
            pytest.param(encoded([]), id="empty-list"),
            pytest.param(encoded([1]), id="no-name"),
            pytest.param(encoded({"1": 2}), id="an-object"),
            pytest.param(encoded([2, "list", 1]), id="another-release"),
            pytest.param(encoded([1, "other", 1]), id="another-list"),
            pytest.param(encoded([1, "list"]), id="too-few-keys"),
            pytest.param(encoded([1, "list", 1, 1]), id="too-many-keys"),
            pytest.param(encoded([1, "list", "1"]), id="another-kind"),
            pytest.param(encoded([1, "list", True]), id="a-flag"),
            pytest.param(encoded([1, "list", 1.0]), id="a-fraction"),
            pytest.param(encoded([1, "list", None]), id="nothing"),
            pytest.param("W" * 100_000, id="huge"),
            pytest.param(base64.urlsafe_b64encode(b"[" * 100_000).decode(), id="deep"),
            pytest.param(base64.urlsafe_b64encode(b"9" * 100_000).decode(), id="endless-number"),
        ],
    )
    def test_that_were_not_given_are_refused(self, cursor: str) -> None:
        with pytest.raises(InvalidCursor):
            cursors.read("list", cursor, [int])


class TestPlaces:
    def test_are_kept_to_the_microsecond(self) -> None:
        place = read_cursor(cursors.write("feed", [42, 1_783_903_600_123_457]))

        assert 42 == place.position
        assert 123_457 == place.at.microsecond
        assert place == read_cursor(write_cursor(place))

    def test_before_the_first_item_are_all_the_same(self) -> None:
        assert START == read_cursor(write_cursor(START))
        assert START == read_cursor(cursors.write("feed", [0, 17]))

    @pytest.mark.parametrize(
        "keys", [[-1, 0], [2**63, 0], [10**60, 0], [1, 10**30], [1, -(10**17)], [1, 10**18]]
    )
    def test_that_no_feed_can_have_are_refused(self, keys: list[int]) -> None:
        with pytest.raises(InvalidCursor):
            read_cursor(cursors.write("feed", keys))
