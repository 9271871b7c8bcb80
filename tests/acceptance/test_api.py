"""What other services may ask, and what they are told: as Atlas would tell them."""

import json
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.acceptance.conftest import copy_sqlite
from tests.acceptance.raw import Answer, Header, exchange, request
from tests.acceptance.service import (
    BETA_KEY,
    BETA_TOKEN,
    DOOR,
    KEY,
    OPERATOR_TOKEN,
    TOKEN,
    Service,
    free_port,
    run,
    wait_for,
)
from tests.factories import SIGN_TOKEN, make_body, new_envelope_id

PARTIES = [
    {"email": "first@example.com", "name": "First", "order": 1, "status": "signed"},
    {"email": "second@example.com", "name": "Second", "order": 2, "status": "pending"},
]


def bearer(token: bytes | str, scheme: str = "Bearer") -> Header:
    value = token if isinstance(token, bytes) else token.encode()
    return b"Authorization", scheme.encode() + b" " + value


def account(label: str) -> Header:
    return b"Atlas-Account", label.encode()


@pytest.fixture(name="pending", scope="module")
def _pending(service: Service) -> str:
    """An envelope that the first of two has signed."""
    envelope_id = new_envelope_id()
    body = make_body(
        event="envelope.sent",
        envelope_id=envelope_id,
        status="pending",
        parties=PARTIES,
        metadata={"order": 17},
        external_id="ext-1",
        fields_status="complete",
        timestamp="2026-07-01T12:00:00Z",
    )
    assert 200 == service.deliver(body, KEY).status
    return envelope_id


@pytest.fixture(name="shared", scope="module")
def _shared(service: Service) -> str:
    """An id that stands in two accounts, for different tenants."""
    envelope_id = new_envelope_id()
    for key, tenant in ((KEY, "org_1"), (BETA_KEY, "org_2")):
        body = make_body(envelope_id=envelope_id, organization_id=f"ext_{tenant}")
        assert 200 == service.deliver(body, key).status
    return envelope_id


class TestToken:
    @pytest.mark.parametrize(
        "headers",
        [
            pytest.param([], id="none"),
            pytest.param([(b"Authorization", b"")], id="empty"),
            pytest.param([(b"Authorization", b"Bearer")], id="scheme-only"),
            pytest.param([bearer("")], id="empty-token"),
            pytest.param([bearer("wrong")], id="wrong"),
            pytest.param([bearer(TOKEN[:-1])], id="cut"),
            pytest.param([bearer(TOKEN + "x")], id="extended"),
            pytest.param([bearer(TOKEN.upper())], id="other-case"),
            pytest.param([bearer(b"\xff\xfe\x80")], id="bytes-above-127"),
            pytest.param([bearer(TOKEN.encode() + b"\xa0")], id="no-break-space"),
            pytest.param([bearer(KEY)], id="the-atlas-key"),
            pytest.param([bearer(TOKEN, "Basic")], id="other-scheme"),
            pytest.param([bearer(TOKEN, "Bearer:")], id="scheme-with-colon"),
            pytest.param([(b"Authorization", TOKEN.encode())], id="no-scheme"),
            pytest.param([(b"X-Api-Key", TOKEN.encode())], id="other-header"),
        ],
    )
    @pytest.mark.parametrize("suffix", ["", "/status"])
    def test_is_needed(
        self, service: Service, pending: str, suffix: str, headers: list[Header]
    ) -> None:
        answer = service.get(f"/api/envelope/{pending}{suffix}", *headers)

        assert 401 == answer.status
        assert "Bearer" == answer.headers["www-authenticate"]
        assert answer.is_problem
        assert pending.encode() not in answer.body

    def test_counts_in_the_header_only(self, service: Service, pending: str) -> None:
        """What stands in an address stands in logs."""
        assert 401 == service.get(f"/api/envelope/{pending}?token={TOKEN}").status

    @pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
    def test_has_a_scheme_in_any_case(self, service: Service, pending: str, scheme: str) -> None:
        assert 200 == service.get(f"/api/envelope/{pending}", bearer(TOKEN, scheme)).status

    def test_has_scopes(self, service: Service, pending: str) -> None:
        answer = service.ask(f"/api/envelope/{pending}", OPERATOR_TOKEN)

        assert 403 == answer.status
        assert answer.is_problem


class TestEnvelope:
    def test_shows_what_is_known(self, service: Service, pending: str) -> None:
        answer = service.ask(f"/api/envelope/{pending}", TOKEN)

        shown = answer.json()
        assert 200 == answer.status
        assert {
            "envelope_id": pending,
            "account": "default",
            "status": "pending",
            "signed_count": 1,
            "total": 2,
            "next_signer_email": "second@example.com",
            "metadata": {"order": 17},
            "external_id": "ext-1",
            "fields_status": "complete",
            "sent_at": "2026-07-01T12:00:00Z",
            "disputed": False,
            "version": 1,
            "sequence": 1,
        }.items() <= shown.items()
        assert [party["email"] for party in PARTIES] == [p["email"] for p in shown["parties"]]

    def test_never_shows_a_link_to_sign(self, service: Service) -> None:
        envelope_id = new_envelope_id()
        link = f"https://atlaswork.ai/sign/env?token={SIGN_TOKEN}"
        body = make_body(
            envelope_id=envelope_id,
            sign_url=link,
            review_url=link,
            metadata={"sign_url": link, "note": f"sign at {link} please"},
            reason=f"see {link}",
            extracted_data={"nested": [{"signUrl": link}, link]},
            send_error=f"could not send {link}",
        )
        assert 200 == service.deliver(body, KEY).status

        answer = service.ask(f"/api/envelope/{envelope_id}", TOKEN)

        assert 200 == answer.status
        assert SIGN_TOKEN.encode() not in answer.body

    def test_is_not_sent_again_while_it_is_the_same(self, service: Service) -> None:
        envelope_id = new_envelope_id()
        target = f"/api/envelope/{envelope_id}"
        sent = make_body(event="envelope.sent", envelope_id=envelope_id)
        service.deliver(sent, KEY)
        tag = service.ask(target, TOKEN).headers["etag"].encode()

        same = [
            service.ask(target, TOKEN, (b"If-None-Match", value))
            for value in (tag, b"W/" + tag, b'"other", ' + tag, b"*")
        ]
        other = service.ask(target, TOKEN, (b"If-None-Match", b'"other"'))
        service.deliver(make_body(envelope_id=envelope_id), KEY)
        changed = service.ask(target, TOKEN, (b"If-None-Match", tag))

        assert [(304, b"")] * 4 == [(answer.status, answer.body) for answer in same]
        assert {tag.decode()} == {answer.headers["etag"] for answer in same}
        assert (200, 200) == (other.status, changed.status)
        assert tag.decode() != changed.headers["etag"]

    def test_keeps_its_tag_when_a_webhook_comes_twice(self, service: Service) -> None:
        envelope_id = new_envelope_id()
        body = make_body(envelope_id=envelope_id)

        tags = []
        for _ in range(2):
            service.deliver(body, KEY)
            tags.append(service.ask(f"/api/envelope/{envelope_id}", TOKEN).headers["etag"])

        assert tags[0] == tags[1]


class TestStatus:
    def test_has_the_fields_of_atlas_and_no_others(self, service: Service, pending: str) -> None:
        """A program that polls Atlas can poll us."""
        answer = service.ask(f"/api/envelope/{pending}/status", TOKEN)

        assert {
            "status": "pending",
            "signed_count": 1,
            "total": 2,
            "next_signer_email": "second@example.com",
        } == answer.json()

    def test_of_a_signed_envelope_has_no_next_signer(self, service: Service) -> None:
        envelope_id = new_envelope_id()
        service.deliver(make_body(envelope_id=envelope_id, parties=PARTIES), KEY)

        answer = service.ask(f"/api/envelope/{envelope_id}/status", TOKEN)

        assert {
            "status": "signed",
            "signed_count": 2,
            "total": 2,
            "next_signer_email": None,
        } == answer.json()

    def test_without_known_parties_has_no_counts(self, service: Service) -> None:
        envelope_id = new_envelope_id()
        service.deliver(make_body(envelope_id=envelope_id, parties=None), KEY)

        answer = service.ask(f"/api/envelope/{envelope_id}/status", TOKEN)

        assert (None, None) == (answer.json()["signed_count"], answer.json()["total"])


class TestAccounts:
    @pytest.mark.parametrize("suffix", ["", "/status"])
    def test_of_others_have_no_envelopes(self, service: Service, pending: str, suffix: str) -> None:
        unknown = new_envelope_id()

        theirs = service.ask(f"/api/envelope/{pending}{suffix}", BETA_TOKEN)
        nobodys = service.ask(f"/api/envelope/{unknown}{suffix}", BETA_TOKEN)

        assert (404, 404) == (theirs.status, nobodys.status)
        assert theirs.body == nobodys.body.replace(unknown.encode(), pending.encode())

    def test_of_others_cannot_be_asked_for_by_name(self, service: Service, pending: str) -> None:
        answer = service.ask(f"/api/envelope/{pending}", BETA_TOKEN, account("default"))

        assert 404 == answer.status

    def test_must_be_named_if_two_have_an_envelope(self, service: Service, shared: str) -> None:
        answer = service.ask(f"/api/envelope/{shared}", TOKEN)

        assert 409 == answer.status
        assert answer.is_problem
        assert "'beta' and 'default'" in answer.json()["detail"]

    def test_need_no_name_if_only_one_may_be_seen(self, service: Service, shared: str) -> None:
        answer = service.ask(f"/api/envelope/{shared}", BETA_TOKEN)

        assert "beta" == answer.json()["account"]

    @pytest.mark.parametrize(
        "name, label",
        [
            ("default", "default"),
            ("beta", "beta"),
            ("ext_org_1", "default"),
            ("ext_org_2", "beta"),
            ("org_2", "beta"),
        ],
    )
    def test_are_named_by_label_or_tenant(
        self, service: Service, shared: str, name: str, label: str
    ) -> None:
        answer = service.ask(f"/api/envelope/{shared}", TOKEN, account(name))

        assert label == answer.json()["account"]

    def test_are_labels_before_they_are_tenants(self, service: Service) -> None:
        envelope_id = new_envelope_id()
        for key, tenant in ((KEY, "beta"), (BETA_KEY, "default")):
            service.deliver(make_body(envelope_id=envelope_id, organization_id=tenant), key)

        for name, label in (("beta", "beta"), ("default", "default"), ("ext_beta", "default")):
            answer = service.ask(f"/api/envelope/{envelope_id}", TOKEN, account(name))
            assert label == answer.json()["account"]

    @pytest.mark.parametrize("name", ["nobody", "ext_nobody", "", "ext_", "Default", "\xff"])
    def test_that_are_not_there_have_nothing(
        self, service: Service, shared: str, name: str
    ) -> None:
        answer = service.ask(f"/api/envelope/{shared}", TOKEN, account(name))

        assert 404 == answer.status


class TestId:
    @pytest.mark.parametrize(
        "text",
        [
            "%s.x~y",
            "%s x",
            "%s?x=1",
            "%s#x",
            "%s%%41",
            "%s+x",
            "é%s",
            "%s🖋",
            "%s'--",
            '%s"',
            "%s\\",
        ],
    )
    def test_may_be_any_text(self, service: Service, text: str) -> None:
        envelope_id = text.replace("%s", new_envelope_id())
        service.deliver(make_body(envelope_id=envelope_id), KEY)

        answer = service.ask(f"/api/envelope/{quote(envelope_id, safe='')}", TOKEN)

        assert 200 == answer.status
        assert envelope_id == answer.json()["envelope_id"]

    @pytest.mark.parametrize("text", ["a/%s", "%s/", "/%s", "%s//b", "%s/status/b", "../%s"])
    def test_may_hold_slashes(self, service: Service, text: str) -> None:
        envelope_id = text.replace("%s", new_envelope_id())
        service.deliver(make_body(envelope_id=envelope_id, parties=PARTIES), KEY)
        target = f"/api/envelope/{quote(envelope_id, safe='')}"

        assert envelope_id == service.ask(target, TOKEN).json()["envelope_id"]
        assert 2 == service.ask(f"{target}/status", TOKEN).json()["total"]

    def test_that_ends_like_the_other_route_shows_its_progress(self, service: Service) -> None:
        envelope_id = f"{new_envelope_id()}/status"
        service.deliver(make_body(envelope_id=envelope_id), KEY)
        target = f"/api/envelope/{quote(envelope_id, safe='')}"

        assert "signed" == service.ask(f"{target}/status", TOKEN).json()["status"]
        assert 404 == service.ask(target, TOKEN).status

    @pytest.mark.parametrize(
        "target",
        ["%00", "x%00y", "%FF", "%ED%A0%80", "%0D%0Ax", "..", "%2e%2e", "' OR 1=1 --", "%", "%zz"],
    )
    def test_that_nothing_has_is_not_found(self, service: Service, target: str) -> None:
        answer = service.ask(f"/api/envelope/{target.replace(' ', '%20')}", TOKEN)

        assert 404 == answer.status
        assert answer.is_problem

    def test_that_is_too_long_is_refused(self, service: Service) -> None:
        answer = service.ask(f"/api/envelope/{'x' * 300}", TOKEN)

        assert 422 == answer.status
        assert answer.is_problem


class TestOtherRoutes:
    @pytest.mark.parametrize(
        "target", ["/", "/api", "/api/envelope", "/docs/x", "/redoc", "/openapi.yaml", "/metrics/x"]
    )
    def test_are_problems(self, service: Service, target: str) -> None:
        answer = service.ask(target, TOKEN)

        assert 404 == answer.status
        assert answer.is_problem

    def test_say_which_method_they_take(self, service: Service, pending: str) -> None:
        answer = exchange(
            service.port, request("DELETE", f"/api/envelope/{pending}", [bearer(TOKEN)])
        )

        assert 405 == answer.status
        assert "GET" == answer.headers["allow"]
        assert answer.is_problem

    def test_tell_nothing_about_what_runs_here(self, service: Service) -> None:
        answers = [service.get(target) for target in ("/", "/livez", "/readyz", DOOR)]

        assert not [answer for answer in answers if "server" in answer.headers]


@pytest.fixture(name="webhooks", scope="module")
def _webhooks(tmp_path_factory: pytest.TempPathFactory, sqlite_template: Path) -> Iterator[Service]:
    """The public part alone."""
    home = tmp_path_factory.mktemp("webhooks")
    copy_sqlite(sqlite_template, home / "receiver.db")
    url = f"sqlite:///{home / 'receiver.db'}"
    with Service("serve", "--only", "webhooks", home=home, DATABASE_URL=url) as service:
        yield service


class TestParts:
    @pytest.mark.parametrize(
        "target", ["/api/envelope/env_1", "/api/envelope/env_1/status", "/openapi.json", "/docs"]
    )
    def test_for_webhooks_answer_nothing_else(self, webhooks: Service, target: str) -> None:
        assert 404 == webhooks.ask(target, TOKEN).status

    def test_for_webhooks_take_webhooks(self, webhooks: Service) -> None:
        assert 200 == webhooks.deliver(make_body(), KEY).status
        assert 200 == webhooks.get("/livez").status

    def test_for_the_api_take_no_webhooks_and_need_no_key(
        self, sqlite_url: str, tmp_path: Path
    ) -> None:
        with Service(
            "serve", "--only", "api", home=tmp_path, DATABASE_URL=sqlite_url, ATLAS_API_KEYS=""
        ) as service:
            assert 404 == service.deliver(make_body(), KEY).status
            assert 404 == service.ask("/api/envelope/env_1", TOKEN).status
            assert (
                "There is no envelope" in service.ask("/api/envelope/env_1", TOKEN).json()["detail"]
            )

    def test_may_have_a_port_each_and_stop_together(self, sqlite_url: str, tmp_path: Path) -> None:
        inner = free_port()
        with Service(
            "serve", home=tmp_path, DATABASE_URL=sqlite_url, API_PORT=str(inner)
        ) as service:
            envelope_id = new_envelope_id()
            target = f"/api/envelope/{envelope_id}"
            delivered = service.deliver(make_body(envelope_id=envelope_id), KEY)

            def asked(port: int) -> Answer:
                return exchange(port, request("GET", target, [bearer(TOKEN)]))

            wait_for(lambda: is_listening(inner), "the inner port")
            assert 200 == delivered.status
            assert (404, 200) == (asked(service.port).status, asked(inner).status)
            assert 404 == exchange(inner, request("POST", DOOR, [], b"{}")).status
            assert 0 == service.terminate()
            assert not is_listening(inner)
            assert not is_listening(service.port)


def is_listening(port: int) -> bool:
    try:
        return exchange(port, request("GET", "/livez")).status == 200
    except (OSError, EOFError):
        return False


def test_openapi_is_printed_with_door_and_api(sqlite_url: str) -> None:
    said = run("openapi", DATABASE_URL=sqlite_url)

    document = json.loads(said.stdout)
    assert 0 == said.returncode
    assert {DOOR, f"{DOOR}/{{account}}", "/api/envelope/{envelope_id}"} <= set(document["paths"])
