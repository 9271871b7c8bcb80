"""The client asks a real server on this machine, which knows what it was asked."""

from collections.abc import AsyncIterator
from datetime import timedelta

import pytest

from app.atlas.client import (
    ApiKey,
    Atlas,
    AtlasBusy,
    AtlasError,
    AtlasRefused,
    AtlasUnavailable,
    AtlasUnreadable,
    EnvelopeUnknown,
)
from app.errors import ConfigError
from app.outbound import TooLarge
from tests.atlas_stand_in import (
    KEY,
    LINK_TOKEN,
    PDF,
    AtlasStandIn,
    Reply,
    atlas_stand_in,
    document,
    said,
)

MINE = ApiKey(KEY)


@pytest.fixture(name="stand_in")
async def _stand_in() -> AsyncIterator[AtlasStandIn]:
    async with atlas_stand_in() as stand_in:
        yield stand_in


@pytest.fixture(name="atlas")
def _atlas(stand_in: AtlasStandIn) -> Atlas:
    return Atlas(stand_in.base_url, allow=["127.0.0.1"])


class TestAskingForAnEnvelope:
    async def test_gives_what_atlas_tells(self, atlas: Atlas, stand_in: AtlasStandIn) -> None:
        stand_in.sign("env_1", fields_status="ready")

        envelope = await atlas.get("env_1", key=MINE)

        assert ("signed", "ready") == (envelope.status, envelope.body["fields_status"])
        assert f"Bearer {KEY}" == stand_in.asked[0].headers["authorization"]
        assert "atlas-account" not in stand_in.asked[0].headers

    @pytest.mark.parametrize(
        "tenant, header",
        [
            ("acme", "ext_acme"),
            ("ext_acme", "ext_acme"),
            ("3f2b8c1e-0f6a-4a52-9a3e-5f0a9d1c7b11", "3f2b8c1e-0f6a-4a52-9a3e-5f0a9d1c7b11"),
            ("a\r\nX-Evil: 1", None),
            ("Zoë", None),
        ],
    )
    async def test_speaks_for_a_connected_account(
        self, atlas: Atlas, stand_in: AtlasStandIn, tenant: str, header: str | None
    ) -> None:
        stand_in.sign("env_1")

        await atlas.get("env_1", key=MINE, tenant=tenant)

        assert header == stand_in.asked[0].headers.get("atlas-account")
        assert "x-evil" not in stand_in.asked[0].headers

    @pytest.mark.parametrize(
        "envelope_id", ["../../v1/keys", "a/b?c=d#e", "%2e%2e", "é\n\x00", "x" * 300, "\ud800"]
    )
    async def test_an_id_never_leads_to_another_route(
        self, atlas: Atlas, stand_in: AtlasStandIn, envelope_id: str
    ) -> None:
        with pytest.raises(EnvelopeUnknown):
            await atlas.get(envelope_id, key=MINE)

        (asked,) = stand_in.asked
        assert "/api/envelope" == asked.path.rpartition("/")[0]
        assert asked.path == asked.target

    @pytest.mark.parametrize("envelope_id", ["", ".", ".."])
    async def test_an_id_that_is_a_step_in_a_path_is_not_asked_for(
        self, atlas: Atlas, stand_in: AtlasStandIn, envelope_id: str
    ) -> None:
        with pytest.raises(EnvelopeUnknown):
            await atlas.get(envelope_id, key=MINE)

        assert [] == stand_in.asked

    @pytest.mark.parametrize(
        "reply, error",
        [
            (said({}, status=401), AtlasRefused),
            (said({}, status=403), AtlasRefused),
            (said({}, status=422), AtlasRefused),
            (said({}, status=404), EnvelopeUnknown),
            (said({}, status=410), EnvelopeUnknown),
            (said({}, status=429), AtlasBusy),
            (said({}, status=408), AtlasUnavailable),
            (said({}, status=500), AtlasUnavailable),
            (said({}, status=503), AtlasUnavailable),
            (said({}, status=302, Location="http://127.0.0.1:1/"), AtlasUnreadable),
            (Reply(b"<html>welcome</html>"), AtlasUnreadable),
            (Reply(b""), AtlasUnreadable),
            (Reply(b"[" * 100_000), AtlasUnreadable),
            (Reply(b'"' + b"x" * 5_000_000 + b'"'), AtlasUnreadable),
            (said([1]), AtlasUnreadable),
            (said({"envelope_id": "env_2"}), AtlasUnreadable),
            (Reply(b"{}", headers={"Content-Encoding": "gzip"}), AtlasUnreadable),
            (Reply(b"{}", length=3), AtlasUnavailable),
        ],
    )
    async def test_every_other_answer_is_one_of_a_few_errors(
        self, atlas: Atlas, stand_in: AtlasStandIn, reply: Reply, error: type[AtlasError]
    ) -> None:
        stand_in.replies = [reply]

        with pytest.raises(error):
            await atlas.get("env_1", key=MINE)

    async def test_a_wait_that_atlas_asks_for_is_passed_on(
        self, atlas: Atlas, stand_in: AtlasStandIn
    ) -> None:
        stand_in.replies = [
            said({"code": "rate_limited"}, status=429, **{"Retry-After": "17"}),
        ]

        with pytest.raises(AtlasBusy, match="429 \\(rate_limited\\)") as caught:
            await atlas.get("env_1", key=MINE)

        assert timedelta(seconds=17) == caught.value.retry_after

    async def test_no_error_tells_the_key_or_what_atlas_said(
        self, atlas: Atlas, stand_in: AtlasStandIn
    ) -> None:
        stand_in.replies = [
            said({"code": KEY, "message": stand_in.link("1")}, status=status)
            for status in (400, 401, 404, 429, 500)
        ]

        for _ in range(len(stand_in.replies)):
            with pytest.raises(AtlasError) as caught:
                await atlas.get("env_1", key=MINE)

            assert KEY not in str(caught.value)
            assert LINK_TOKEN not in str(caught.value)

    async def test_nobody_there_is_worth_another_try(self) -> None:
        nobody = Atlas("http://127.0.0.1:1/api", allow=["127.0.0.1"])

        with pytest.raises(AtlasUnavailable):
            await nobody.get("env_1", key=MINE)

    async def test_a_private_address_is_called_only_if_that_is_allowed(
        self, stand_in: AtlasStandIn
    ) -> None:
        with pytest.raises(AtlasUnavailable, match="FORWARD_ALLOW"):
            await Atlas(stand_in.base_url).get("env_1", key=MINE)

        assert [] == stand_in.asked


class TestKeys:
    async def test_one_that_was_made_here_stays_on_this_machine(self) -> None:
        made_here = ApiKey("local_0123456789abcdef")

        with pytest.raises(AtlasRefused, match="ATLAS_API_KEY") as caught:
            await Atlas("https://atlas.example/api").get("env_1", key=made_here)

        assert made_here.secret not in str(caught.value)

    async def test_one_that_was_made_here_may_be_used_here(
        self, atlas: Atlas, stand_in: AtlasStandIn
    ) -> None:
        stand_in.keys = {"local_0123456789abcdef"}
        stand_in.sign("env_1")

        await atlas.get("env_1", key=ApiKey("local_0123456789abcdef"))

        assert 1 == len(stand_in.asked)

    async def test_one_that_no_header_can_hold_is_refused_with_the_reason(
        self, atlas: Atlas
    ) -> None:
        with pytest.raises(AtlasRefused, match="ASCII"):
            await atlas.get("env_1", key=ApiKey("schlüssel-0123456789"))

    def test_are_not_shown(self) -> None:
        assert KEY not in repr(MINE)


class TestBaseUrl:
    @pytest.mark.parametrize(
        "url",
        [
            "http://atlas.example/api",
            "http://127.0.0.1.example/api",
            "ftp://atlas.example/api",
            "https://user:password@atlas.example/api",
            "https://atlas.example/api?x=1",
            "https://atlas.example/api#x",
            "https:///api",
            "atlas.example",
            "",
        ],
    )
    def test_one_that_cannot_be_atlas_stops_the_start(self, url: str) -> None:
        with pytest.raises(ConfigError, match="ATLAS_BASE_URL") as caught:
            Atlas(url)

        assert "password@" not in str(caught.value)

    @pytest.mark.parametrize(
        "url", ["https://atlas.example/api/", "http://localhost:9/api", "http://[::1]:9/api"]
    )
    def test_https_or_this_machine_is_fine(self, url: str) -> None:
        Atlas(url)


class TestDownload:
    async def test_gives_the_document_without_showing_the_key_to_a_bucket(
        self, atlas: Atlas
    ) -> None:
        async with atlas_stand_in() as bucket:
            bucket.documents["/documents/1"] = document(PDF)
            pieces: list[bytes] = []

            await atlas.download(bucket.link("1"), pieces.append, key=MINE, max_bytes=1000)

        assert b"".join(pieces) == PDF
        assert "authorization" not in bucket.asked[0].headers

    @pytest.mark.parametrize("link", ["/documents/1?token=a", "documents/1"])
    async def test_a_link_within_atlas_is_followed_with_the_key(
        self, atlas: Atlas, stand_in: AtlasStandIn, link: str
    ) -> None:
        stand_in.documents = dict.fromkeys(("/documents/1", "/api/documents/1"), document(PDF))
        pieces: list[bytes] = []

        await atlas.download(link, pieces.append, key=MINE, max_bytes=1000)

        assert b"".join(pieces) == PDF
        assert f"Bearer {KEY}" == stand_in.asked[0].headers["authorization"]

    @pytest.mark.parametrize(
        "reply",
        [
            pytest.param(document(PDF), id="declared"),
            pytest.param(Reply(PDF), id="not declared"),
        ],
    )
    async def test_more_than_asked_for_is_too_large(
        self, atlas: Atlas, stand_in: AtlasStandIn, reply: Reply
    ) -> None:
        stand_in.documents["/documents/1"] = reply
        pieces: list[bytes] = []

        with pytest.raises(TooLarge):
            await atlas.download(
                stand_in.link("1"), pieces.append, key=MINE, max_bytes=len(PDF) - 1
            )

        assert [] == pieces

    @pytest.mark.parametrize(
        "reply",
        [
            pytest.param(said({}, status=403), id="expired"),
            pytest.param(said({}, status=302, Location="/documents/2"), id="redirect"),
            pytest.param(Reply(b"", status=204), id="nothing"),
            pytest.param(Reply(PDF, length=len(PDF) + 1), id="cut off"),
            pytest.param(Reply(PDF, headers={"Content-Encoding": "gzip"}), id="packed"),
        ],
    )
    async def test_whatever_is_not_the_document_is_a_failure_that_shows_no_link(
        self, atlas: Atlas, stand_in: AtlasStandIn, reply: Reply
    ) -> None:
        stand_in.documents = {"/documents/1": reply, "/documents/2": document(PDF)}
        pieces: list[bytes] = []

        with pytest.raises(AtlasUnavailable) as caught:
            await atlas.download(stand_in.link("1"), pieces.append, key=MINE, max_bytes=1000)

        assert LINK_TOKEN not in str(caught.value)
        assert 1 == len(stand_in.asked)

    @pytest.mark.parametrize(
        "link",
        [
            f"http://bucket.example/1?token={LINK_TOKEN}",
            f"file:///etc/passwd?token={LINK_TOKEN}",
            f"https://user:{LINK_TOKEN}@bucket.example/",
            f"https://bucket.example:99999/?token={LINK_TOKEN}",
        ],
    )
    async def test_a_link_that_cannot_be_trusted_is_not_followed(
        self, atlas: Atlas, link: str
    ) -> None:
        with pytest.raises(AtlasUnreadable) as caught:
            await atlas.download(link, bytearray().extend, key=MINE, max_bytes=1000)

        assert LINK_TOKEN not in str(caught.value)

    async def test_a_link_into_a_private_network_is_not_followed(self, atlas: Atlas) -> None:
        with pytest.raises(AtlasUnavailable, match="FORWARD_ALLOW"):
            await atlas.download("https://10.0.0.1/1", bytearray().extend, key=MINE, max_bytes=1000)
