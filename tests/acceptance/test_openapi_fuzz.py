"""Whatever is asked of an operation: never a 500, and always an answer of the document."""

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis import APIOperation, Case
from schemathesis.checks import not_a_server_error
from schemathesis.generation.hypothesis.builder import (
    HypothesisTestConfig,
    HypothesisTestMode,
    create_test,
)
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
TOKENS = {"root": {"tokens": [ROOT_TOKEN], "scopes": ["read", "operate", "raw"]}}
EXAMPLES = 3
# PostgreSQL takes fewer values than SQLite, so it is asked everything; SQLite one in so many.
RARELY = 5
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
# Its answer does not end.
ENDLESS = "/api/events/stream"
LONGEST_WAIT = 60
METHODS = {"get", "put", "post", "delete", "patch"}

DOCUMENT = describe()
SCHEMA = schemathesis.openapi.from_dict(DOCUMENT)
SETTINGS = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
OPERATIONS = [
    pytest.param(method, path, id=f"{method.upper()} {path}")
    for path, operations in DOCUMENT["paths"].items()
    for method in operations
    if method in METHODS and path != ENDLESS
]


@dataclass(slots=True)
class Fuzzed:
    """A service that is asked, and what it knows."""

    service: Service
    known: dict[str, str]
    session: requests.Session = field(default_factory=requests.Session)
    asked: Iterator[int] = field(default_factory=count)
    turns: Iterator[int] = field(default_factory=count)

    def ask(self, case: Case[Any]) -> None:
        """Ask it, and compare what it answers with the document."""
        # Now and then about nothing that it knows.
        hurry(case, self.known if next(self.asked) % 2 else {})
        response = case.call(
            base_url=f"http://127.0.0.1:{self.service.port}",
            headers={"Authorization": f"Bearer {ROOT_TOKEN}"},
            session=self.session,
            timeout=30,
        )
        # That is an answer, too: what was waited for has not come, or the database is busy.
        checks = CHECKS[1:] if response.status_code == 503 else CHECKS
        case.validate_response(response, checks=checks)


def hurry(case: Case[Any], known: dict[str, str]) -> None:
    """Let no request wait, and let some be about what is there."""
    parameters: dict[str, Any] = case.path_parameters or {}
    parameters.update({name: known[name] for name in parameters.keys() & known.keys()})
    with suppress(TypeError, ValueError, KeyError, OverflowError):
        if 0 < float(case.query["wait"]) <= LONGEST_WAIT:
            case.query["wait"] = 0


@pytest.fixture(name="on_postgres", scope="module")
def _on_postgres(
    server: str, postgres_template: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Fuzzed]:
    home = tmp_path_factory.mktemp("fuzz")
    name = f"receiver_{home.name}_{id(home):x}"
    create_database(server, name, template=postgres_template)
    yield from fuzzed(with_password(replace_database(server, name)), home)
    drop_database(server, name)


@pytest.fixture(name="on_sqlite", scope="module")
def _on_sqlite(sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fuzzed]:
    home = tmp_path_factory.mktemp("fuzz")
    copy_sqlite(sqlite_template, home / "receiver.db")
    yield from fuzzed(f"sqlite:///{home / 'receiver.db'}", home)


def fuzzed(url: str, home: Path) -> Iterator[Fuzzed]:
    """Run a service that nothing may make stumble."""
    named = {"DATABASE_URL": url, "API_TOKENS": json.dumps(TOKENS)}
    callbacks = "app.callbacks.audit_log:callbacks"
    with Service("serve", home=home, CALLBACKS=callbacks, **named) as service:
        event_id = service.deliver(make_body(envelope_id="env_fuzz"), KEY).json()["event_id"]
        known = {"envelope_id": "env_fuzz", "event_id": event_id, "name": "audit_log"}
        yield Fuzzed(service, known)
        assert [] == service.lines("request.crashed") + service.lines("loop.failed")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("method, path", OPERATIONS)
def test_every_operation_answers_as_the_document_says(
    method: str, path: str, on_postgres: Fuzzed, on_sqlite: Fuzzed
) -> None:
    def ask(case: Case[Any]) -> None:
        on_postgres.ask(case)
        if next(on_sqlite.turns) % RARELY == 0:
            on_sqlite.ask(case)

    fuzz(SCHEMA[path][method], ask)


def fuzz(operation: APIOperation[Any, Any, Any, Any], ask: Callable[[Case[Any]], None]) -> None:
    """Think of cases at the edges of what the document says, and of some more.

    To think takes longer than to ask. So it is done when a test runs, and not, as
    `SCHEMA.parametrize` does it, by every worker for every operation when it collects.
    """
    modes = [HypothesisTestMode.COVERAGE, HypothesisTestMode.FUZZING]
    config = HypothesisTestConfig(project=SCHEMA.config, modes=modes, explicit_settings=SETTINGS)
    create_test(operation=operation, test_func=ask, config=config)()
