"""No secret is said anywhere, whatever breaks: lines, answers and last words are searched.

The canaries are an API key, a database password, tokens, the address of a party and the link
to sign; in plain and as URLs and headers would write them.
"""

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.acceptance.conftest import with_password
from tests.acceptance.raw import Answer, exchange, request
from tests.acceptance.service import (
    DATABASE_PASSWORD,
    DOOR,
    KEY,
    OPERATOR_TOKEN,
    SECRETS,
    SETTINGS,
    START_DEADLINE,
    TOKEN,
    Service,
    free_port,
    run,
    wait_for,
)
from tests.acceptance.tables import rows
from tests.factories import SIGN_TOKEN, SIGNER, make_body, signed
from tests.postgres import Postgres

SLACK = "slack-canary-path-0123456789"
FORWARD = "whsec_" + base64.b64encode(b"forward-canary-0123456789abcdef").decode()
# Nobody is told these, not even one who may ask.
NEVER = [*SECRETS, SIGN_TOKEN, SLACK, FORWARD]

CALLBACKS = """
import sys

from app.callbacks import Callbacks, Event, GiveUp

callbacks = Callbacks()


@callbacks.on("envelope.*", max_attempts=2, backoff=1)
async def repeats_the_payload(event: Event) -> None:
    raise ValueError(f"cannot do {event.data} for {event.envelope}")


@callbacks.on("envelope.*")
def gives_up_with_the_payload(event: Event) -> None:
    raise GiveUp(f"never: {event.data!r}")


@callbacks.on("envelope.*", max_attempts=1)
def ends_the_thread(event: Event) -> None:
    sys.exit(f"{event.data}")


@callbacks.on("envelope.*", max_attempts=1)
async def fails_in_the_database(event: Event, session: object) -> None:
    from sqlalchemy import text

    await session.execute(text("SELECT :email FROM nowhere"), {"email": str(event.data)})


@callbacks.on("envelope.*", where=lambda event: event.data["nothing"][str(event.data)])
async def chooses_badly(event: Event) -> None: ...
"""


MODULES = ["indiscreet", "app.callbacks.forward", "app.callbacks.slack"]


def forms(canary: str) -> list[str]:
    """Give a canary as it may be written."""
    return [canary, quote(canary, safe=""), base64.b64encode(canary.encode()).decode()]


def found_in(text: str, canaries: list[str]) -> list[str]:
    return [canary for canary in canaries if any(form in text for form in forms(canary))]


@pytest.fixture(name="own_server", scope="module")
def _own_server() -> Iterator[Postgres]:
    with Postgres() as server:
        yield server


@pytest.fixture(name="settings")
def _settings(own_server: Postgres, tmp_path: Path) -> dict[str, str]:
    (tmp_path / "indiscreet.py").write_text(CALLBACKS)
    url = own_server.create_database(f"receiver_{tmp_path.name}".lower())
    nobody = f"http://127.0.0.1:{free_port()}"
    return {
        "DATABASE_URL": with_password(url),
        "CALLBACKS": ",".join(f"{name}:callbacks" for name in MODULES),
        "PYTHONPATH": str(tmp_path),
        "FORWARD_URL": f"{nobody}/hook",
        "FORWARD_SECRETS": FORWARD,
        "FORWARD_ALLOW": "127.0.0.0/8",
        "SLACK_URL": f"{nobody}/services/{SLACK}",
        "LOG_LEVEL": "DEBUG",
    }


def rude_requests(service: Service) -> list[Answer]:
    """Requests that carry secrets to where they do not belong, and those that are refused."""
    body = make_body()
    key, token = KEY.encode(), TOKEN.encode()
    raw = [
        request("POST", DOOR, [(b"X-Atlas-Signature", key)], body),
        request("POST", DOOR, [(b"X-Atlas-Signature", b"sha256=" + b"0" * 64)], body),
        request("POST", f"{DOOR}/{KEY}", [signed(body, "another key of 16 bytes")], body),
        request("POST", f"{DOOR}?key={KEY}", [], body),
        request("POST", DOOR, [signed(body, KEY), (b"Content-Encoding", b"gzip")], body),
        request("GET", f"/api/events?token={TOKEN}"),
        request("GET", f"/api/envelope/{SIGNER}?q={SIGNER}", [(b"Authorization", token)]),
        request("GET", f"/api/envelopes?q={SIGNER}", [(b"Authorization", b"Bearer " + token[:-1])]),
        request(
            "GET", f"/{TOKEN}/{KEY}", [(b"Authorization", b"Basic " + base64.b64encode(token))]
        ),
        request("GET", "/docs", [(b"Authorization", b"Bearer " + token[:-1])]),
        request("GET", "/openapi.json"),
        request("GET", "/metrics", [(b"X-Request-ID", token + b"/")]),
        b"%b / HTTP/1.1\r\nHost: %b\r\n\r\n" % (key.upper(), token),
        b"POST / HTTP/1.1\r\nAuthorization : %b\r\n\r\n" % token,
        key + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nX: " + key * 4000 + b"\r\n\r\n",
    ]
    return [exchange(service.port, data) for data in raw]


def pages(service: Service) -> list[Answer]:
    """What there is to look at for one who may, beyond what names parties on purpose."""
    targets = ["/docs", "/openapi.json", "/metrics", "/api/stats", "/api/callbacks", "/api/drift"]
    targets += ["/livez", "/readyz", "/api/events?limit=1000", "/api/failures", "/api/deliveries"]
    return [service.ask(target, token) for target in targets for token in (TOKEN, OPERATOR_TOKEN)]


BROKEN = [
    "not json, but %s and %s",
    '{"event":"envelope.signed","envelope_id":["%s"],"sign_url":"https://a/?token=%s"}',
    '{"event":"%s","envelope_id":"\\u0000%s"}',
    '{"event":"envelope.signed","envelope_id":"e","event_id":17,"a":["%s","%s"',
]


def genuine_but_broken(service: Service) -> list[Answer]:
    """Bodies that are kept in quarantine, with what they hold."""
    bodies = [(text % (SIGNER, SIGN_TOKEN)).encode() for text in BROKEN]
    return [service.deliver(body, KEY) for body in bodies]


def were_all_tried(url: str) -> bool:
    """Whether each callback was called, and has failed."""
    query = "SELECT count(DISTINCT callback) FROM deliveries WHERE last_error IS NOT NULL"
    return rows(url, query) == [(7,)]


class TestSecrets:
    @pytest.mark.timeout(300)
    def test_are_in_nothing_that_is_said(
        self, own_server: Postgres, settings: dict[str, str], tmp_path: Path
    ) -> None:
        answers: list[Answer] = []
        service = Service("serve", "--migrate", home=tmp_path, **settings)
        with service:
            answers += [service.deliver(make_body(), KEY) for _ in range(2)]
            answers += genuine_but_broken(service)
            answers += rude_requests(service)
            service.wait_until(lambda: were_all_tried(settings["DATABASE_URL"]), "failed callbacks")
            answers += pages(service)

            service.kill()
            service.start().wait_until_ready()
            own_server.stop("immediate")
            answers += [service.deliver(make_body(), KEY) for _ in range(2)]
            answers += rude_requests(service)
            answers += [service.ask(f"/api/envelopes?q={SIGNER}", TOKEN), service.get("/readyz")]
            own_server.start()
            service.wait_until_ready()
            answers += pages(service)
            own_server.stop("immediate")
            service.terminate()
        own_server.start()

        told = "\n".join(f"{answer.headers}{answer.body!r}" for answer in answers)
        written = service.log + service.said
        assert {200, 401, 404, 503} <= {answer.status for answer in answers}
        assert [] == service.lines("request.crashed")
        assert [] == found_in(written, [*NEVER, SIGNER])
        assert [] == found_in(told, NEVER)
        refusals = "".join(repr(answer.body) for answer in answers if answer.status >= 400)
        assert [] == found_in(refusals, [SIGNER])

    @pytest.mark.parametrize(
        "verb",
        [("serve",), ("work",), ("migrate",), ("check",), ("keys",), ("events", "list")],
        ids=lambda words: words[0],
    )
    def test_are_in_no_word_about_a_database_that_lets_nobody_in(
        self, own_server: Postgres, verb: tuple[str, ...], tmp_path: Path
    ) -> None:
        url = own_server.url().replace("postgres@", f"nobody:{DATABASE_PASSWORD}@")
        if verb[0] in {"serve", "work"}:
            service = Service(*verb, home=tmp_path, DATABASE_URL=url).start()
            wait_for(
                lambda: service.is_alive() or not service.is_running,
                "a first word",
                seconds=START_DEADLINE,
            )
            service.terminate()
            said = service.log + service.said
        else:
            ended = run(*verb, DATABASE_URL=url)
            said = ended.stdout + ended.stderr

        assert said
        assert [] == found_in(said, NEVER)

    @pytest.mark.parametrize(
        "wrong",
        [
            pytest.param({"ATLAS_API_KEYS": SETTINGS["ATLAS_API_KEYS"][:-2]}, id="cut-off"),
            pytest.param({"ATLAS_API_KEYS": json.dumps({KEY: [TOKEN]})}, id="swapped"),
            pytest.param({"ATLAS_API_KEYS": json.dumps({"a": {"key": KEY}})}, id="no-list"),
            pytest.param({"API_TOKENS": json.dumps({"a": {"token": TOKEN}})}, id="unknown-word"),
            pytest.param({"API_TOKENS": TOKEN}, id="no-json"),
            pytest.param({"DATABASE_POOL": KEY}, id="in-a-number"),
            pytest.param({"LOG_LEVEL": TOKEN}, id="in-a-choice"),
            pytest.param({"DELIVERY_LEASE": KEY}, id="in-a-duration"),
            pytest.param({"DATABASE_URL": f"postgresql://a:{DATABASE_PASSWORD}@b:c/d"}, id="url"),
        ],
    )
    def test_are_in_no_refusal_to_start(self, wrong: dict[str, str], tmp_path: Path) -> None:
        url = f"sqlite:///{tmp_path}/nothing.db"

        ended = run("serve", seconds=START_DEADLINE, **{"DATABASE_URL": url, **wrong})

        assert ended.returncode > 0
        assert [] == found_in(ended.stdout + ended.stderr, NEVER)
