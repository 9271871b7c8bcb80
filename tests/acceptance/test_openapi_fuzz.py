"""Whatever is asked of an operation: never a 500, and always an answer of the document."""

import json
from collections.abc import Iterator
from contextlib import suppress
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis import Case
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from app.main import describe
from tests.acceptance.conftest import copy_sqlite, with_password
from tests.acceptance.service import KEY, Service
from tests.factories import make_body
from tests.postgres import create_database, drop_database, replace_database

# May do everything: refusals for want of a scope would hide the rest.
ROOT_TOKEN = "token-canary-that-may-do-it-all"
EXAMPLES = 5
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
# Its answer does not end.
ENDLESS = "/api/events/stream"
LONGEST_WAIT = 60

schema = schemathesis.openapi.from_dict(describe()).exclude(path=ENDLESS)


@pytest.fixture(name="url", scope="module", params=["sqlite", "postgres"])
def _url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if request.param == "sqlite":
        path: Path = tmp_path_factory.mktemp("fuzz") / "receiver.db"
        copy_sqlite(request.getfixturevalue("sqlite_template"), path)
        yield f"sqlite:///{path}"
        return
    server, name = request.getfixturevalue("server"), f"receiver_fuzz_{id(request):x}"
    create_database(server, name, template=request.getfixturevalue("postgres_template"))
    yield with_password(replace_database(server, name))
    drop_database(server, name)


@pytest.fixture(name="fuzzed", scope="module")
def _fuzzed(url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    tokens = {"root": {"tokens": [ROOT_TOKEN], "scopes": ["read", "operate", "raw"]}}
    with Service(
        "serve",
        home=tmp_path_factory.mktemp("fuzzed"),
        DATABASE_URL=url,
        API_TOKENS=json.dumps(tokens),
        CALLBACKS="app.callbacks.audit_log:callbacks",
    ) as service:
        yield service
        assert [] == service.lines("request.crashed") + service.lines("loop.failed")


@pytest.fixture(name="known", scope="module")
def _known(fuzzed: Service) -> Iterator[dict[str, str]]:
    """Ids that are there, so that not every answer is a 404; and now and then none."""
    body = make_body(envelope_id="env_fuzz")
    event_id = fuzzed.deliver(body, KEY).json()["event_id"]
    return cycle([{"envelope_id": "env_fuzz", "event_id": event_id, "name": "audit_log"}, {}])


def hurry(case: Case[Any], known: dict[str, str]) -> None:
    """Let no request wait, and let some be about what is there."""
    parameters: dict[str, Any] = case.path_parameters or {}
    parameters.update({name: known[name] for name in parameters.keys() & known.keys()})
    with suppress(TypeError, ValueError, KeyError, OverflowError):
        if 0 < float(case.query["wait"]) <= LONGEST_WAIT:
            case.query["wait"] = 0


@schema.parametrize()
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_every_operation_answers_as_the_document_says(
    case: Case[Any], fuzzed: Service, known: Iterator[dict[str, str]]
) -> None:
    hurry(case, next(known))

    response = case.call(
        base_url=f"http://127.0.0.1:{fuzzed.port}",
        headers={"Authorization": f"Bearer {ROOT_TOKEN}"},
        timeout=15,
    )

    # That is an answer, too: what was waited for has not come, or the database is busy.
    checks = CHECKS[1:] if response.status_code == 503 else CHECKS
    case.validate_response(response, checks=checks)
