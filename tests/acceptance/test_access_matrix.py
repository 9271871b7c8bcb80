"""Who may do what: every route of the OpenAPI document, asked by every kind of token.

The routes are read from the document itself, so that a new one is asked, too. What is named
in a path belongs to the account `default`, and nothing of it may be seen by the token of
another account.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from app.main import describe
from tests.acceptance.conftest import with_password
from tests.acceptance.raw import Answer, Connection, exchange, request
from tests.acceptance.service import BETA_KEY, KEY, Service, wait_for
from tests.factories import make_body, new_envelope_id

READ = "token-canary-that-only-reads-1"
OPERATE = "token-canary-that-only-acts-01"
RAW = "token-canary-that-only-sees-raw"
OTHER = "token-canary-of-other-accounts"
BY_SCOPE = {"read": READ, "operate": OPERATE, "raw": RAW}
TOKENS = {
    "reading": READ,
    "acting": {"tokens": [OPERATE], "scopes": ["operate"]},
    "raw": {"tokens": [RAW], "scopes": ["raw"]},
    "other": {"tokens": [OTHER], "scopes": ["read", "operate", "raw"], "accounts": ["beta"]},
}
CALLBACKS = """
from app.callbacks import Callbacks, Event, GiveUp

callbacks = Callbacks()


@callbacks.on("contract.extracted", account="default")
async def of_the_default_account(event: Event) -> None:
    raise GiveUp("the words of a default failure")
"""

# They ask for no token.
OPEN = {"/livez", "/readyz"}
# Not behind a token, but signed: tests of their own ask them.
DOOR = "/webhooks/"
METHODS = {"get", "put", "post", "delete", "patch"}
# Scopes that the method does not tell.
SCOPES = {("get", "/api/events/{event_id}/body"): "raw"}
BODIES = {
    "pause": {"reason": "a test"},
    "discard": {"reason": "a test"},
}
# Whoever is named here may say it of an envelope that nobody knows, so it makes one.
MAKES_ITS_OWN = {("put", "/api/envelope/{envelope_id}/expect")}
# These count what the process does, for all accounts together, and name callbacks.
OF_THE_PROCESS = {"/metrics"}
# Lists that can be asked for those of a callback.
LISTS = ("deliveries", "failures")
# What a callback is told is everybody's affair: another account's token may not act.
SHARED = {
    ("post", "/api/callbacks/{name}/pause"),
    ("post", "/api/callbacks/{name}/resume"),
}


@dataclass(frozen=True, slots=True)
class Route:
    """One operation of the document."""

    method: str
    path: str

    @property
    def scope(self) -> str:
        usual = "read" if self.method == "get" else "operate"
        return SCOPES.get((self.method, self.path), usual)

    @property
    def name(self) -> str:
        return f"{self.method}-{self.path}"

    @property
    def has_parameters(self) -> bool:
        return "{" in self.path

    def target(self, examples: Mapping[str, str]) -> str:
        return re.sub(r"{(\w+)}", lambda found: quote(examples[found[1]], safe=""), self.path)

    @property
    def body(self) -> bytes:
        return json.dumps(BODIES.get(self.path.rpartition("/")[2], {})).encode()


def _routes() -> list[Route]:
    return [
        Route(method, path)
        for path, operations in describe()["paths"].items()
        for method in operations
        if method in METHODS and not path.startswith(DOOR) and path not in OPEN
    ]


ROUTES = _routes()
every_route = pytest.mark.parametrize(
    "route", [pytest.param(route, id=route.name) for route in ROUTES]
)


def allowed() -> list[Any]:
    """Give what a token may read; what it may change, tests of the route itself do."""
    return [
        pytest.param(route, BY_SCOPE[route.scope], id=route.name)
        for route in ROUTES
        if route.method == "get"
    ]


def forbidden() -> list[Any]:
    """Give every token with every route that is not for its scope."""
    return [
        pytest.param(route, token, id=f"{scope}-{route.name}")
        for route in ROUTES
        for scope, token in BY_SCOPE.items()
        if scope != route.scope
    ]


def foreign() -> list[Any]:
    """Give the routes that the token of another account is tried on."""
    return [
        pytest.param(route, id=route.name)
        for route in ROUTES
        if (route.method, route.path) not in MAKES_ITS_OWN
    ]


@dataclass(frozen=True, slots=True)
class Office:
    """A service, with something of the account `default` for every parameter of a path."""

    service: Service
    examples: Mapping[str, str]

    def ask(self, route: Route, token: str | None) -> Answer:
        headers = [(b"Content-Type", b"application/json")]
        if token is not None:
            headers.append((b"Authorization", b"Bearer " + token.encode()))
        body = b"" if route.method == "get" else route.body
        target = route.target(self.examples)
        with Connection(self.service.port) as connection:
            connection.send(request(route.method.upper(), target, headers, body))
            # A stream has a head at once, and an end never.
            return connection.read(is_head=route.path.endswith("/stream"))

    def post(self, target: str, token: str, body: bytes) -> Answer:
        headers = [
            (b"Authorization", b"Bearer " + token.encode()),
            (b"Content-Type", b"application/json"),
        ]
        return exchange(self.service.port, request("POST", target, headers, body))


@pytest.fixture(name="office", scope="module")
def _office(database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Office]:
    home: Path = tmp_path_factory.mktemp("office")
    (home / "matrix_callbacks.py").write_text(CALLBACKS)
    settings = {
        "DATABASE_URL": with_password(database),
        "CALLBACKS": "matrix_callbacks:callbacks",
        "PYTHONPATH": str(home),
        "API_TOKENS": json.dumps(TOKENS),
    }
    with Service("serve", home=home, **settings) as service:
        yield Office(service, make_examples(service))


def make_examples(service: Service) -> dict[str, str]:
    """Make a dead letter of the account `default`, and name all that belongs to it."""
    envelope_id = new_envelope_id()
    body = make_body(event="contract.extracted", envelope_id=envelope_id)
    event_id = service.deliver(body, KEY).json()["event_id"]
    wait_for(lambda: bool(service.ask("/api/failures", READ).json()["items"]), "a dead letter")
    [failure] = service.ask("/api/failures", READ).json()["items"]
    return {
        "envelope_id": envelope_id,
        "event_id": event_id,
        "delivery_id": failure["delivery_id"],
        "fingerprint": failure["fingerprint"],
        "name": failure["callback"],
    }


class TestMatrix:
    @every_route
    @pytest.mark.parametrize(
        "token",
        [
            pytest.param(None, id="none"),
            pytest.param("garbage", id="garbage"),
            pytest.param(KEY, id="the-atlas-key"),
        ],
    )
    def test_nobody_is_let_in_without_a_token(
        self, office: Office, route: Route, token: str | None
    ) -> None:
        answer = office.ask(route, token)

        assert (401, True) == (answer.status, _is_problem(answer))
        assert "Bearer" == answer.headers["www-authenticate"]

    @pytest.mark.parametrize("route, token", allowed())
    def test_a_token_may_read_what_its_scope_says(
        self, office: Office, route: Route, token: str
    ) -> None:
        answer = office.ask(route, token)

        assert answer.status not in {401, 403}
        assert answer.status < 500

    @pytest.mark.parametrize("route, token", forbidden())
    def test_a_token_may_do_nothing_else(self, office: Office, route: Route, token: str) -> None:
        answer = office.ask(route, token)

        assert (403, True) == (answer.status, _is_problem(answer))

    @pytest.mark.parametrize("route", foreign())
    def test_nothing_of_another_account_is_seen_or_changed(
        self, office: Office, route: Route
    ) -> None:
        answer = office.ask(route, OTHER)

        if (route.method, route.path) in SHARED:
            assert 403 == answer.status
        elif route.has_parameters:
            assert (404, True) == (answer.status, _is_problem(answer))
        else:
            assert answer.status in ({200, 403} if route.path in OF_THE_PROCESS else {200})
            hidden = set(office.examples) - ({"name"} if route.path in OF_THE_PROCESS else set())
            assert not [what for what in hidden if office.examples[what].encode() in answer.body]

    def test_no_refusal_names_a_callback_of_another_account(self, office: Office) -> None:
        envelope_id = new_envelope_id()
        body = make_body(event="survey.sent", envelope_id=envelope_id)
        event_id = office.service.deliver(body, BETA_KEY).json()["event_id"]
        name = office.examples["name"]
        lists = [f"/api/{of}?callback={who}" for of in LISTS for who in ("nobody", name)]

        listed = [office.service.ask(target, OTHER) for target in lists]
        acted = [
            office.post(f"/api/events/{event_id}/redispatch", OTHER, body)
            for body in (b"", b'{"callbacks": ["%s"]}' % name.encode())
        ]

        assert [404] * 4 == [answer.status for answer in listed]
        assert [409, 404] == [answer.status for answer in acted]
        known = [
            answer.json()["detail"].replace(f"callback '{name}'", "")
            for answer in [*listed, *acted]
        ]
        assert not [detail for detail in known if name in detail or "default" in detail]

    def test_after_all_of_that_nothing_has_changed(self, office: Office) -> None:
        delivery = office.service.ask(f"/api/deliveries/{office.examples['delivery_id']}", READ)

        assert ("dead", []) == (delivery.json()["state"], delivery.json()["acts"])

    def test_every_parameter_has_an_example(self, office: Office) -> None:
        wanted = {name for route in ROUTES for name in re.findall(r"{(\w+)}", route.path)}

        assert wanted <= set(office.examples)


def _is_problem(answer: Answer) -> bool:
    # Of a stream only the head is read.
    return "application/problem+json" == answer.headers.get("content-type")
