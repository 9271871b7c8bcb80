"""The page about the API: from here alone, safe in a browser, closed in production."""

import base64
import re
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from tests.acceptance.conftest import with_password
from tests.acceptance.raw import Answer, Header
from tests.acceptance.service import OPERATOR_TOKEN, TOKEN, Service

TARGETS = ["/docs", "/docs/page.js", "/docs/page.css", "/docs/swagger-ui.css", "/openapi.json"]


@pytest.fixture(name="laptop", scope="module")
def _laptop(sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    from tests.acceptance.conftest import copy_sqlite

    home = tmp_path_factory.mktemp("laptop")
    copy_sqlite(sqlite_template, home / "receiver.db")
    with Service("serve", home=home, DATABASE_URL=f"sqlite:///{home / 'receiver.db'}") as service:
        yield service


@pytest.fixture(name="production", scope="module")
def _production(
    server: str, postgres_template: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    from tests.postgres import create_database, drop_database, replace_database

    name = f"receiver_{uuid4().hex}"
    create_database(server, name, template=postgres_template)
    url = with_password(replace_database(server, name))
    home = tmp_path_factory.mktemp("production")
    with Service("serve", "--only", "api", home=home, DATABASE_URL=url) as service:
        yield service
    drop_database(server, name)


def basic(user: str, password: str) -> Header:
    return b"Authorization", b"Basic " + base64.b64encode(f"{user}:{password}".encode())


class TestPage:
    def test_loads_nothing_from_elsewhere(self, laptop: Service) -> None:
        page = laptop.get("/docs").body.decode()
        script = laptop.get("/docs/page.js").body.decode()

        assert not re.findall(r"https?:|//", page)
        assert not re.findall(r"https?:", script)

    def test_has_every_part_that_it_names(self, laptop: Service) -> None:
        page = laptop.get("/docs").body.decode()
        parts = re.findall(r'(?:src|href)="(docs/[^"]+)"', page)

        assert 4 == len(parts)
        for part in parts:
            answer = laptop.get(f"/{part}")
            kind = "text/css" if part.endswith("css") else "text/javascript"
            assert 200 == answer.status
            assert answer.headers["content-type"].startswith(kind)

    def test_has_no_script_inside(self, laptop: Service) -> None:
        answer = laptop.get("/docs")
        page, policy = answer.body.decode(), answer.headers["content-security-policy"]

        assert not re.findall(r"<script(?![^>]*src=)|\son\w+=|javascript:", page)
        assert "script-src 'self';" in policy
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy

    def test_fits_a_phone_and_says_its_language(self, laptop: Service) -> None:
        page = laptop.get("/docs").body.decode()

        assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
        assert '<html lang="en">' in page
        assert ":focus-visible" in laptop.get("/docs/page.css").body.decode()

    def test_lets_a_token_be_given(self, laptop: Service) -> None:
        document = laptop.get("/openapi.json").json()

        [scheme] = document["components"]["securitySchemes"].values()
        assert ("http", "bearer") == (scheme["type"], scheme["scheme"])

    @pytest.mark.parametrize(
        "name", ["redoc.standalone.js", "favicon.png", "..%2f__init__.py", "%2e%2e/core.py", "x"]
    )
    def test_gives_no_other_file(self, laptop: Service, name: str) -> None:
        assert 404 == laptop.get(f"/docs/{name}").status


class TestProduction:
    @pytest.mark.parametrize("target", TARGETS)
    def test_wants_a_token(self, production: Service, target: str) -> None:
        """Case 182: what describes the service is not for strangers."""
        answer = production.get(target)

        assert 401 == answer.status
        assert answer.is_problem
        # So that a browser asks for it.
        assert answer.headers["www-authenticate"].startswith("Basic ")
        assert 200 == production.ask(target, TOKEN).status
        assert 200 == production.get(target, basic("anybody", TOKEN)).status

    @pytest.mark.parametrize(
        "header",
        [
            basic("anybody", "nobody"),
            basic(TOKEN, ""),
            basic("anybody", OPERATOR_TOKEN),
            (b"Authorization", b"Basic not base64"),
            (b"Authorization", b"Basic \xff"),
            (b"Authorization", b"Basic"),
            (b"Authorization", b"Bearer"),
            (b"Authorization", b"Digest " + TOKEN.encode()),
            (b"Authorization", b"Bearer " + OPERATOR_TOKEN.encode()),
        ],
        ids=str,
    )
    def test_takes_nothing_else_for_one(self, production: Service, header: Header) -> None:
        answers = [production.get(target, header) for target in ("/docs", "/openapi.json")]

        assert [401, 401] == [answer.status for answer in answers]

    def test_does_not_take_a_password_for_the_api(self, production: Service) -> None:
        """A browser sends one by itself, also when another site has it ask."""
        assert 401 == production.get("/api/stats", basic("anybody", TOKEN)).status

    def test_is_not_needed_on_a_laptop(self, laptop: Service) -> None:
        answers: list[Answer] = [laptop.get(target) for target in TARGETS]

        assert {200} == {answer.status for answer in answers}
        assert 401 == laptop.get("/metrics").status
