"""What events look like, as other services and operators are told."""

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest

from app.web import cursors
from tests.acceptance.conftest import with_password
from tests.acceptance.service import (
    BETA_KEY,
    BETA_TOKEN,
    KEY,
    OPERATOR_TOKEN,
    TOKEN,
    Service,
    wait_for,
)
from tests.acceptance.test_command_line import Operator
from tests.factories import make_body

TOKENS = json.dumps(
    {
        "office": TOKEN,
        "beta-team": {"tokens": [BETA_TOKEN], "accounts": ["beta"]},
        "operator": {"tokens": [OPERATOR_TOKEN], "scopes": ["operate"]},
    }
)


@pytest.fixture(name="service", scope="module")
def _service(database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service that knows one type well, and has then seen something new in one."""
    with Service(
        "serve",
        home=tmp_path_factory.mktemp("service"),
        DATABASE_URL=with_password(database),
        API_TOKENS=TOKENS,
    ) as service:
        for _ in range(20):
            assert 200 == service.deliver(make_body(event="survey.sent"), KEY).status

        def is_known() -> bool:
            # Whoever learns may have to begin anew where the database was too late.
            assert 200 == service.deliver(make_body(event="survey.sent"), KEY).status
            return "learned" in paths(service)

        wait_for(is_known, "the type is known")
        body = make_body(event="survey.sent", mood={"ada@example.com": 1})
        assert 200 == service.deliver(body, BETA_KEY).status
        wait_for(lambda: "mood:object" in paths(service), "something new is seen")
        yield service


def ask(service: Service, query: str = "", token: str = TOKEN) -> dict[str, Any]:
    answer = service.ask(f"/api/drift{query}", token)
    assert 200 == answer.status, answer.body
    said: dict[str, Any] = answer.json()
    return said


def paths(service: Service) -> set[str]:
    return {item["path"] for item in ask(service, "?limit=100")["items"]}


class TestList:
    def test_tells_what_is_new(self, service: Service) -> None:
        items = ask(service, "?type=survey.sent")["items"]

        new = {item["path"]: item for item in items if item["is_drift"]}
        assert {"mood:object", "mood.*:number"} == new.keys()
        assert {"type", "kind", "path", "first_seen_at", "event_id", "is_drift"} == (
            new["mood:object"].keys()
        )
        assert new["mood:object"]["event_id"] is not None

    def test_goes_on_behind_a_cursor(self, service: Service) -> None:
        page = ask(service, "?limit=3")
        found = page["items"]
        while page["next_cursor"] is not None:
            page = ask(service, f"?limit=3&cursor={page['next_cursor']}")
            found += page["items"]

        assert found == ask(service, "?limit=100")["items"]

    def test_hides_which_events_of_others_showed_it(self, service: Service) -> None:
        items = ask(service, token=BETA_TOKEN)["items"]

        shown = {item["path"] for item in items if item["event_id"] is not None}
        assert {"mood:object", "mood.*:number"} == shown
        assert len(items) == len(ask(service)["items"])

    def test_of_an_unknown_type_is_empty(self, service: Service) -> None:
        assert {"items": [], "next_cursor": None} == ask(service, "?type=nothing")

    @pytest.mark.parametrize(
        "query, status",
        [
            ("?type=%00", 404),
            ("?cursor=x", 422),
            (f"?cursor={cursors.write('drift', ['a', 'b'])}", 422),
            (f"?cursor={cursors.write('drift', ['a', 'b', chr(0)])}", 422),
            (f"?cursor={cursors.write('drift', ['a', 'b', chr(0xD800)])}", 422),
            ("?limit=0", 422),
            ("?limit=101", 422),
            (f"?type={'x' * 129}", 422),
        ],
    )
    def test_refuses_what_it_cannot_answer(self, service: Service, query: str, status: int) -> None:
        answer = service.ask(f"/api/drift{query}", TOKEN)

        assert status == answer.status
        assert "application/problem+json" in answer.headers["content-type"]

    def test_needs_a_token_that_reads(self, service: Service) -> None:
        assert 403 == service.ask("/api/drift", OPERATOR_TOKEN).status
        assert 401 == service.ask("/api/drift", quote("nobody")).status


class TestCommand:
    def test_lists_what_is_new(
        self,
        service: Service,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        operator = Operator(service, capsys, monkeypatch)

        new = operator.say("events", "drift")
        of_type = operator.say("events", "drift", "--type", "survey.sent", "--all", "--json")
        nothing = operator.say("events", "drift", "--type", "nothing")
        cut = operator.say("events", "drift", "--all", "--limit", "1")

        assert ["mood.*:number", "mood:object"] == sorted(
            line.split("\t")[-1] for line in new.out.splitlines()[1:]
        )
        assert "learned" in {each["path"] for each in json.loads(of_type.out)}
        assert (0, "") == (nothing.code, nothing.out)
        assert "there are more" in cut.err
