"""Each listener shows its own part and nothing else, whatever is asked of it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from app.main import describe
from tests.acceptance.conftest import copy_sqlite, with_password
from tests.acceptance.raw import Answer, exchange, request
from tests.acceptance.service import DOOR, KEY, TOKEN, Service, free_port, wait_for
from tests.factories import make_body, signed
from tests.postgres import Postgres

EVERYWHERE = "0.0.0.0"  # noqa: S104  # what is refused, or meant, is the point of these tests
HEALTH = ["/livez", "/readyz"]
PAGES = ["/docs", "/docs/page.js", "/docs/swagger-ui.css", "/openapi.json"]
OPERATIONS = [
    (method.upper(), path)
    for path, operations in sorted(describe()["paths"].items())
    for method in operations
]
AT_THE_DOOR = [path for path in OPERATIONS if path[1].startswith(DOOR)]
INSIDE = [path for path in OPERATIONS if path not in AT_THE_DOOR and path[1] not in HEALTH]


def answered(port: int, method: str, path: str, token: str = TOKEN) -> Answer:
    target = path.replace("{", "").replace("}", "")
    headers = [(b"Authorization", b"Bearer " + token.encode())]
    return exchange(port, request(method, target, headers))


def is_unknown(answer: Answer) -> bool:
    """True for a path that is not there: other things are missing with a reason."""
    return answer.status == 404 and answer.json()["detail"] == "Not Found"


@pytest.fixture(name="url", scope="module")
def _url(tmp_path_factory: pytest.TempPathFactory, sqlite_template: Path) -> str:
    path = tmp_path_factory.mktemp("faces") / "receiver.db"
    copy_sqlite(sqlite_template, path)
    return f"sqlite:///{path}"


@pytest.fixture(name="webhooks", scope="module")
def _webhooks(url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The public part alone, with a port for its metrics."""
    with served(url, tmp_path_factory, "--only", "webhooks", METRICS_PORT=str(free_port())) as it:
        wait_for(lambda: is_listening(inner(it, "METRICS_PORT")), "the port for metrics")
        yield it


@pytest.fixture(name="api", scope="module")
def _api(url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The inner part alone; it needs no key."""
    with served(url, tmp_path_factory, "--only", "api", ATLAS_API_KEYS="") as it:
        yield it


@pytest.fixture(name="both", scope="module")
def _both(url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Both in one process, at a port each."""
    with served(url, tmp_path_factory, API_PORT=str(free_port())) as it:
        wait_for(lambda: is_listening(inner(it)), "the inner port")
        yield it


def served(url: str, homes: pytest.TempPathFactory, *arguments: str, **settings: str) -> Service:
    """Serve where others reach it, which only those may who say what is meant."""
    home = homes.mktemp("served")
    return Service(
        "serve", "--host", EVERYWHERE, *arguments, home=home, DATABASE_URL=url, **settings
    )


def inner(service: Service, setting: str = "API_PORT") -> int:
    return int(service.settings[setting])


def is_listening(port: int) -> bool:
    try:
        return answered(port, "GET", "/livez").status == 200
    except (OSError, EOFError):
        return False


class TestDocument:
    def test_has_routes_for_each_part(self) -> None:
        assert 2 == len(AT_THE_DOOR)
        assert len(INSIDE) > 10


# Each class asks a few processes everything, because to start one takes longest.
class TestPublicPart:
    def test_has_no_route_of_the_inner_one(self, webhooks: Service, both: Service) -> None:
        pages = [("GET", path) for path in [*PAGES, "/metrics", "/api", "/", "/api/"]]

        for method, path in [*INSIDE, *pages]:
            for port in (webhooks.port, both.port):
                assert is_unknown(answered(port, method, path)), path

    def test_tells_its_health(self, webhooks: Service, both: Service) -> None:
        for port in (webhooks.port, both.port):
            assert [200, 200] == [answered(port, "GET", path).status for path in HEALTH]

    def test_takes_webhooks(self, webhooks: Service, both: Service) -> None:
        assert 200 == webhooks.deliver(make_body(), KEY).status
        assert 200 == both.deliver(make_body(), KEY).status


class TestInnerPart:
    def test_has_no_door(self, api: Service, both: Service) -> None:
        body = make_body()

        for target in (DOOR, f"{DOOR}/", f"{DOOR}/default"):
            for port in (api.port, inner(both)):
                answer = exchange(port, request("POST", target, [signed(body, KEY)], body))
                assert is_unknown(answer), target

    def test_has_every_other_route(self, api: Service, both: Service) -> None:
        for method, path in INSIDE:
            for port in (api.port, inner(both)):
                assert 401 == answered(port, method, path, "nobody").status, path

    def test_has_every_page(self, api: Service, both: Service) -> None:
        for path in [*PAGES, *HEALTH, "/metrics"]:
            for port in (api.port, inner(both)):
                assert 200 == answered(port, "GET", path).status, path

    def test_wants_a_token_for_its_pages(self, api: Service, both: Service) -> None:
        """A host that others reach is production, also on SQLite."""
        for path in PAGES:
            for port in (api.port, inner(both)):
                assert 401 == answered(port, "GET", path, "nobody").status, path


class TestMetricsPort:
    def test_shows_health_and_metrics_and_nothing_else(self, webhooks: Service) -> None:
        shows_health_and_metrics_alone(inner(webhooks, "METRICS_PORT"))


class TestWorker:
    def test_shows_health_and_metrics_and_nothing_else(self, url: str, tmp_path: Path) -> None:
        with Service("work", home=tmp_path, DATABASE_URL=url) as worker:
            shows_health_and_metrics_alone(worker.port)


def shows_health_and_metrics_alone(port: int) -> None:
    assert 200 == answered(port, "GET", "/metrics").status
    assert 401 == answered(port, "GET", "/metrics", "nobody").status
    assert [200, 200] == [answered(port, "GET", path).status for path in HEALTH]
    pages = [("GET", path) for path in PAGES]
    for method, path in [*AT_THE_DOOR, *INSIDE, *pages]:
        assert path == "/metrics" or is_unknown(answered(port, method, path)), path


class TestOpenHost:
    def test_is_served_with_everything_by_whoever_says_so(
        self, url: str, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        with served(url, tmp_path_factory, "--expose-api") as service:
            assert 200 == answered(service.port, "GET", "/api/stats").status
            assert 200 == service.deliver(make_body(), KEY).status
            assert 401 == answered(service.port, "GET", "/docs", "nobody").status


class TestDeadDatabase:
    def test_makes_nobody_restart_anything(self, tmp_path: Path) -> None:
        """Case 155, shortened: liveness stays good and readiness bad for the whole time."""
        with Postgres() as server:
            url = with_password(server.create_database("receiver"))
            with Service("serve", "--migrate", home=tmp_path, DATABASE_URL=url) as service:
                server.stop("immediate")
                service.wait_until(lambda: not service.is_ready(), "not ready")
                probes = [(service.get("/livez"), service.get("/readyz")) for _ in range(60)]
                metrics = answered(service.port, "GET", "/metrics")
                stats = answered(service.port, "GET", "/api/stats")
                server.start()
                service.wait_until_ready()

        assert {(200, 503)} == {(alive.status, ready.status) for alive, ready in probes}
        assert 200 == metrics.status
        assert (503, True) == (stats.status, stats.is_problem)
