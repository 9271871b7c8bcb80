"""Rows on their way to and from each database."""

import json
import uuid
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Table

from app.store.bulk import Columns, Insert, dumps
from app.store.models import EnvelopeRow, EventRow

EVENTS: Table = EventRow.__table__  # type: ignore[assignment]
ENVELOPES: Table = EnvelopeRow.__table__  # type: ignore[assignment]
NOW = datetime(2026, 7, 1, tzinfo=UTC)
DOCUMENTS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("aé\U0001f600"), inner),
    max_leaves=5,
)


class TestDocuments:
    @given(document=DOCUMENTS)
    def test_a_document_is_read_back_as_it_was(self, document: Any) -> None:
        text = dumps(document)

        assert document == (None if text is None else json.loads(text))

    @given(document=DOCUMENTS)
    def test_no_number_is_written_that_jsonb_would_write_anew(self, document: Any) -> None:
        """`jsonb` writes 1e+23 out as an integer, which is another number than the float."""
        text = dumps([document])

        assert text is not None
        assert "e+" not in text

    def test_text_that_looks_like_a_number_is_left_alone(self) -> None:
        assert '["1e+23",1.5,[2]]' == dumps(("1e+23", 1.5, (2,)))


class TestColumns:
    @pytest.mark.parametrize("value", [None, "full"])
    def test_a_row_survives_the_way_through_sqlite(self, value: str | None) -> None:
        columns = Columns(EVENTS, ["id", "account", "received_at", "degraded", "copies"])
        row = (uuid.uuid4(), "acme", NOW, ["a", "b"], 3)
        if value is None:
            row = (None, "acme", None, None, 3)  # type: ignore[assignment]

        [written] = columns.tuples([row])

        assert row == columns.read(written, is_postgresql=False)
        assert all(isinstance(each, str | int | None) for each in written)

    @pytest.mark.parametrize("flag", [True, False, None])
    def test_sqlite_has_no_truth_values(self, flag: bool | None) -> None:  # noqa: FBT001
        columns = Columns(ENVELOPES, ["is_test"])

        stored = None if flag is None else int(flag)

        assert (flag,) == columns.read((stored,), is_postgresql=False)

    def test_arrays_are_columns(self) -> None:
        columns = Columns(EVENTS, ["account", "degraded"])

        assert [["a", "b"], ['["x"]', None]] == columns.arrays([("a", ["x"]), ("b", None)])

    def test_rows_of_a_type_have_their_documents_as_text(self) -> None:
        columns = Columns(EVENTS, ["account", "degraded"])

        rows = columns.tuples([("a", ["x"]), ("b", None)], is_postgresql=True)

        assert [("a", '["x"]'), ("b", None)] == rows

    def test_documents_that_a_driver_has_read_already_are_taken_as_they_are(self) -> None:
        columns = Columns(EVENTS, ["degraded"])

        assert (["x"],) == columns.read((["x"],), is_postgresql=True)
        # A document may be a mere text.
        assert ("x",) == columns.read(("x",), is_postgresql=True)

    def test_documents_are_text_or_a_number_to_sqlite(self) -> None:
        columns = Columns(EVENTS, ["degraded"])

        assert (["x"],) == columns.read(('["x"]',), is_postgresql=False)
        assert (5,) == columns.read((5,), is_postgresql=False)

    def test_every_type_has_its_array(self) -> None:
        names = ["id", "is_test", "fields_version", "version", "parties", "updated_at"]

        assert (
            "unnest($1::text[], $2::bool[], $3::int4[], $4::int8[], $5::text[], $6::timestamptz[])"
            " AS incoming (id, is_test, fields_version, version, parties, updated_at)"
        ) == Columns(ENVELOPES, names).unnested


async def test_nothing_to_insert_asks_for_nothing() -> None:
    await Insert(Columns(EVENTS, ["id"])).run(None, [])  # type: ignore[arg-type]
