"""The link to the signed PDF is found under names that nobody has published."""

from typing import Any

import pytest

from app.atlas.schemas import AtlasEnvelope

LINK = "https://bucket.example/executed.pdf?sig=1"
OTHER = "https://bucket.example/other?sig=2"


def signed(**fields: Any) -> AtlasEnvelope:
    return AtlasEnvelope({"envelope_id": "env_1", "status": "signed", **fields})


class TestLinkToTheSignedPdf:
    @pytest.mark.parametrize(
        "fields",
        [
            {"signed_pdf_url": LINK},
            {"signedPdfUrl": LINK},
            {"SIGNED_PDF": LINK},
            {"executed_document": {"href": LINK}},
            {"final_pdf": {"url": LINK}},
            {"download_url": LINK},
            {"pdf_url": LINK},
            {"links": {"download": LINK}},
            {"downloads": [{"url": LINK}]},
            {"download_urls": {"document": LINK}},
            {"documents": [{"url": LINK, "name": "original.pdf"}]},
            {"envelope": {"status": "signed", "downloads": {"signed": LINK}}},
            {"data": {"artifacts": {"signed_pdf": LINK}}},
        ],
        ids=str,
    )
    def test_is_found_under_any_name_that_says_so(self, fields: dict[str, Any]) -> None:
        assert LINK == signed(**fields).pdf_url

    @pytest.mark.parametrize(
        "fields",
        [
            {"download_url": OTHER, "signed_pdf_url": LINK},
            {
                "documents": [
                    {"type": "certificate", "url": OTHER},
                    {"type": "executed", "url": LINK},
                ]
            },
            {"documents": [{"url": OTHER}], "downloads": {"pdf": LINK}},
            {"downloads": {"audit_trail": OTHER, "certificate": OTHER, "document": LINK}},
        ],
        ids=str,
    )
    def test_the_surest_name_wins(self, fields: dict[str, Any]) -> None:
        assert LINK == signed(**fields).pdf_url

    @pytest.mark.parametrize(
        "fields",
        [
            pytest.param({"document_url": LINK}, id="what was handed in to be signed"),
            pytest.param({"original_pdf_url": LINK}, id="what was uploaded"),
            pytest.param({"unsigned_pdf_url": LINK}, id="not signed"),
            pytest.param({"presigned_url": LINK}, id="signed by a bucket"),
            pytest.param({"sign_url": LINK, "review_url": LINK}, id="links for people"),
            pytest.param({"certificate_pdf_url": LINK}, id="only the certificate"),
            pytest.param({"signed_pdf_url": None}, id="null"),
            pytest.param({"signed_pdf_url": "soon"}, id="no link"),
            pytest.param({"metadata": {"signed_pdf_url": LINK}}, id="written by the caller"),
            pytest.param({"parties": [{"signed_pdf_url": LINK}]}, id="written by a signer"),
            pytest.param({"signed_pdf_url": 7, "downloads": [None, [], 1.5]}, id="other types"),
        ],
    )
    def test_other_links_are_not_taken_for_it(self, fields: dict[str, Any]) -> None:
        assert signed(**fields).pdf_url is None

    @pytest.mark.parametrize("status", ["pending", "in_progress", "draft", "declined", "voided"])
    def test_there_is_none_before_all_have_signed(self, status: str) -> None:
        assert signed(status=status, signed_pdf_url=LINK).pdf_url is None

    def test_without_a_state_only_a_link_that_says_signed_counts(self) -> None:
        assert signed(status="archived", pdf_url=OTHER).pdf_url is None
        assert LINK == signed(status=None, pdf_url=OTHER, signed_pdf_url=LINK).pdf_url

    def test_a_very_deep_answer_is_not_searched_to_its_end(self) -> None:
        nested: Any = {"signed_pdf_url": LINK}
        for _ in range(500):
            nested = {"data": nested}

        assert signed(data=nested).pdf_url is None


class TestEnvelope:
    def test_is_known_by_each_of_its_ids(self) -> None:
        envelope = AtlasEnvelope({"id": "row-7", "envelope": {"envelopeId": "env_1"}})

        assert {"row-7", "env_1"} == envelope.ids

    def test_its_state_is_not_that_of_the_answer(self) -> None:
        envelope = AtlasEnvelope({"status": "ok", "data": {"status": "Completed"}})

        assert "completed" == envelope.status

    def test_its_links_are_not_shown(self) -> None:
        assert LINK not in repr(signed(signed_pdf_url=LINK))
