"""What every answer of the API has: an id, safe headers, one log line, and no secrets."""

import re
from uuid import uuid4

import pytest

from tests.acceptance.raw import Answer, exchange, request
from tests.acceptance.service import KEY, TOKEN, Service
from tests.factories import make_body

SAFE = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
}
TARGETS = [
    "/",
    "/livez",
    "/readyz",
    "/metrics",
    "/docs",
    "/docs/page.js",
    "/openapi.json",
    "/api/stats",
    "/api/stats?step=x",
    "/api/envelope/env_1",
    "/api/nothing",
]
# Case 176: what would be another line, another colour, or another order of characters.
NASTY = [
    "%0D%0A{}",
    "%0a%7B%22event%22:%22webhook.received%22%7D",
    "%1B%5B31mred",
    "%9B31m",
    "%E2%80%A8%E2%80%A9%C2%85",
    "%E2%80%AE%E2%81%A6",
    "%00",
    "%FF%FE",
    "%22%5C",
]


class TestHeaders:
    @pytest.mark.parametrize("target", TARGETS)
    @pytest.mark.parametrize("token", [TOKEN, "nobody"])
    def test_are_on_every_answer(self, service: Service, target: str, token: str) -> None:
        """Case 172: whatever is asked for, and however it is answered."""
        headers = service.ask(target, token).headers

        assert SAFE.items() <= headers.items()
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "no-store" in headers["cache-control"]
        assert "server" not in headers

    @pytest.mark.parametrize("method", ["DELETE", "OPTIONS", "PURGE", "HEAD"])
    def test_are_on_answers_to_odd_methods(self, service: Service, method: str) -> None:
        data = request(method, "/api/stats")

        headers = exchange(service.port, data, is_head=method == "HEAD").headers

        assert SAFE.items() <= headers.items()

    def test_are_kept_off_the_door(self, service: Service) -> None:
        """A webhook costs what it must, and no browser comes there."""
        headers = service.deliver(make_body(), KEY).headers

        assert {"date", "content-length", "content-type"} == headers.keys()


class TestRequestId:
    def test_is_the_callers_own(self, service: Service) -> None:
        given = "Abc-1.2_3"

        answer = service.ask("/api/envelope/nope", TOKEN, (b"X-Request-ID", given.encode()))

        assert given == answer.headers["x-request-id"]
        line = service.line(request_id=given)
        assert {
            "event": "request.answered",
            "method": "GET",
            "route": "/api/envelope/{envelope_id}",
            "status": 404,
            "consumer": "office",
        }.items() <= line.items()
        assert line["seconds"] >= 0

    @pytest.mark.parametrize(
        "given",
        [
            pytest.param(b"", id="empty"),
            pytest.param(b"x" * 65, id="long"),
            pytest.param(b"a b", id="blank"),
            pytest.param(b"<script>", id="script"),
            pytest.param(b"caf\xc3\xa9", id="not-ascii"),
        ],
    )
    def test_is_made_where_the_given_one_is_unusable(self, service: Service, given: bytes) -> None:
        answer = service.ask("/api/stats", TOKEN, (b"X-Request-ID", given))

        assert re.fullmatch(r"[0-9a-f]{32}", answer.headers["x-request-id"])

    def test_is_made_where_two_are_given(self, service: Service) -> None:
        twice = [(b"X-Request-ID", b"one"), (b"X-Request-ID", b"two")]

        answer = service.ask("/api/stats", TOKEN, *twice)

        assert answer.headers["x-request-id"] not in {"one", "two"}

    def test_of_a_refused_webhook_is_in_its_line(self, service: Service) -> None:
        service.post(b"{}", (b"X-Request-ID", b"from-atlas-7"))

        assert 401 == service.line("webhook.rejected", request_id="from-atlas-7")["status"]

    def test_of_probes_is_in_no_line(self, service: Service) -> None:
        for target in ("/livez", "/readyz", "/metrics"):
            service.ask(target, TOKEN, (b"X-Request-ID", b"probe-9"))
        service.ask("/api/stats", TOKEN, (b"X-Request-ID", b"after-9"))
        service.line(request_id="after-9")

        assert [] == service.lines("request.answered", request_id="probe-9")


class TestLines:
    @pytest.mark.parametrize("text", NASTY)
    def test_are_one_for_each_request(self, service: Service, text: str) -> None:
        """Case 176, in paths; `lines` reads each of them as JSON."""
        mine = uuid4().hex

        for target in (f"/api/envelope/{text}", f"/{text}", f"/api/stats?step={text}"):
            service.ask(target, TOKEN, (b"X-Request-ID", mine.encode()))

        service.wait_until(
            lambda: len(service.lines("request.answered", request_id=mine)) == 3, "three lines"
        )

    def test_hold_only_plain_characters(self, service: Service) -> None:
        for text in NASTY:
            service.ask(f"/api/envelope/{text}", TOKEN, (b"Atlas-Account", b"\xc2\x85\xe2\x80\xae"))
            body = make_body(envelope_id=f"env{text}\r\n\x1b[31m\u2028\u202e")
            service.deliver(body, KEY)

        assert service.log.isascii()
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", service.log)


class TestProblems:
    @pytest.mark.parametrize(
        "target",
        [
            "/",
            "/api/stats?step=x",
            "/api/stats?from=x",
            "/api/envelopes?cursor=x",
            "/api/envelopes?limit=x",
            "/api/events?after=x",
            "/api/events/x",
            "/api/envelope/%00",
            "/api/envelope/' OR 1=1 --",
        ],
    )
    def test_tell_nothing_of_what_is_inside(self, service: Service, target: str) -> None:
        """Case 178."""
        answer = service.ask(target.replace(" ", "%20"), TOKEN)

        assert 400 <= answer.status < 500
        assert answer.is_problem
        assert is_discreet(answer)

    def test_of_validators_come_at_once_whatever_the_length(self, service: Service) -> None:
        """Case 180: what is too long is refused for its length, before anything looks into it."""
        long = "a" * 50_000
        for target in (
            f"/api/envelope/{long}",
            f"/api/envelopes?q={long}",
            f"/api/envelopes?external_id={long}",
            f"/api/envelopes?cursor={long}",
            f"/api/envelopes?limit={'9' * 50_000}",
            f"/api/events?after={long}",
            f"/api/events?type={long}",
            f"/api/events/{long}",
            f"/api/stats?step={long}",
            f"/api/stats?from={'1' * 50_000}",
            f"/api/deliveries?state={long}",
            f"/api/deliveries?callback={long}",
        ):
            answer = service.ask(target, TOKEN)
            assert 422 == answer.status, target[:40]
            assert is_discreet(answer)
            # The answer does not repeat what was too long.
            assert len(answer.body) < 2_000, target[:40]

        answer = service.ask("/api/stats", TOKEN, (b"Atlas-Account", long.encode()))
        assert 422 == answer.status


def is_discreet(answer: Answer) -> bool:
    text = answer.body.decode()
    return not re.search(
        r"Traceback|\.py\b|SELECT|asyncpg|sqlalchemy|sqlite|postgres|/work|/home|site-packages|"
        r"pydantic|fastapi|uvicorn|0\.1\.0",
        text,
        re.IGNORECASE,
    )
