"""Each listener shows its own part and nothing else, whatever is asked of it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from app.main import describe
from tests.acceptance.conftest import copy_sqlite, with_password
from tests.acceptance.raw import Answer, exchange, request
from tests.acceptance.service import DOOR, KEY, TOKEN, Service, free_port, run, wait_for
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
    with Service(
        "serve",
        "--only",
        "webhooks",
        home=tmp_path_factory.mktemp("webhooks"),
        DATABASE_URL=url,
        METRICS_PORT=str(free_port()),
    ) as service:
        yield service


@pytest.fixture(name="api", scope="module")
def _api(url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The inner part alone; it needs no key."""
    home = tmp_path_factory.mktemp("api")
    with Service("serve", "--only", "api", home=home, DATABASE_URL=url, ATLAS_API_KEYS="") as api:
        yield api


@pytest.fixture(name="both", scope="module")
def _both(url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Both in one process, at a port each."""
    home = tmp_path_factory.mktemp("both")
    with Service("serve", home=home, DATABASE_URL=url, API_PORT=str(free_port())) as service:
        wait_for(lambda: is_listening(inner(service)), "the inner port")
        yield service


def inner(service: Service, setting: str = "API_PORT") -> int:
    return int(service.settings[setting])


def is_listening(port: int) -> bool:
    try:
        return answered(port, "GET", "/livez").status == 200
    except OSError:
        return False


class TestDocument:
    def test_has_routes_for_each_part(self) -> None:
        assert 2 == len(AT_THE_DOOR)
        assert len(INSIDE) > 10


class TestPublicPart:
    @pytest.mark.parametrize("method, path", INSIDE)
    def test_has_no_route_of_the_inner_one(
        self, webhooks: Service, both: Service, method: str, path: str
    ) -> None:
        assert is_unknown(answered(webhooks.port, method, path))
        assert is_unknown(answered(both.port, method, path))

    @pytest.mark.parametrize("path", [*PAGES, "/metrics", "/api", "/", "/api/"])
    def test_has_no_pages(self, webhooks: Service, both: Service, path: str) -> None:
        assert is_unknown(answered(webhooks.port, "GET", path))
        assert is_unknown(answered(both.port, "GET", path))

    @pytest.mark.parametrize("path", HEALTH)
    def test_tells_its_health(self, webhooks: Service, both: Service, path: str) -> None:
        assert 200 == answered(webhooks.port, "GET", path).status
        assert 200 == answered(both.port, "GET", path).status

    def test_takes_webhooks(self, webhooks: Service, both: Service) -> None:
        assert 200 == webhooks.deliver(make_body(), KEY).status
        assert 200 == both.deliver(make_body(), KEY).status


class TestInnerPart:
    @pytest.mark.parametrize("target", [DOOR, f"{DOOR}/", f"{DOOR}/default"])
    def test_has_no_door(self, api: Service, both: Service, target: str) -> None:
        body = make_body()

        for port in (api.port, inner(both)):
            answer = exchange(port, request("POST", target, [signed(body, KEY)], body))
            assert is_unknown(answer)

    @pytest.mark.parametrize("method, path", INSIDE)
    def test_has_every_other_route(
        self, api: Service, both: Service, method: str, path: str
    ) -> None:
        for port in (api.port, inner(both)):
            assert 401 == answered(port, method, path, "nobody").status

    @pytest.mark.parametrize("path", [*PAGES, *HEALTH, "/metrics"])
    def test_has_every_page(self, api: Service, both: Service, path: str) -> None:
        for port in (api.port, inner(both)):
            assert 200 == answered(port, "GET", path).status


class TestMetricsPort:
    def test_shows_health_and_metrics_and_nothing_else(self, webhooks: Service) -> None:
        port = inner(webhooks, "METRICS_PORT")
        wait_for(lambda: is_listening(port), "the port for metrics")

        assert 200 == answered(port, "GET", "/metrics").status
        assert 401 == answered(port, "GET", "/metrics", "nobody").status
        assert 200 == answered(port, "GET", "/readyz").status
        for method, path in [*AT_THE_DOOR, *(o for o in INSIDE if o[1] != "/metrics")]:
            assert is_unknown(answered(port, method, path)), path
        for path in PAGES:
            assert is_unknown(answered(port, "GET", path)), path


class TestWorker:
    def test_shows_metrics_at_its_health_port(self, url: str, tmp_path: Path) -> None:
        with Service("work", home=tmp_path, DATABASE_URL=url) as worker:
            assert 200 == answered(worker.port, "GET", "/metrics").status
            assert 401 == worker.get("/metrics").status
            for method, path in [*AT_THE_DOOR, *(o for o in INSIDE if o[1] != "/metrics")]:
                assert is_unknown(answered(worker.port, method, path)), path


class TestOpenHost:
    def test_is_refused_while_the_public_port_would_show_all(self, url: str) -> None:
        said = run("serve", "--host", EVERYWHERE, "--port", str(free_port()), DATABASE_URL=url)

        assert 0 != said.returncode
        assert "--only webhooks" in said.stderr + said.stdout

    @pytest.mark.parametrize(
        "arguments, settings",
        [
            pytest.param(("--expose-api",), {}, id="expose-api"),
            pytest.param(("--only", "webhooks"), {}, id="webhooks"),
            pytest.param(("--only", "api"), {}, id="api"),
            pytest.param((), {"API_PORT": ""}, id="api-port"),
        ],
    )
    def test_is_served_by_whoever_says_what_is_meant(
        self, url: str, tmp_path: Path, arguments: tuple[str, ...], settings: dict[str, str]
    ) -> None:
        if "API_PORT" in settings:
            settings = {"API_PORT": str(free_port())}
        with Service(
            "serve",
            "--host",
            EVERYWHERE,
            *arguments,
            home=tmp_path,
            DATABASE_URL=url,
            **settings,
        ) as service:
            shows_api = not is_unknown(answered(service.port, "GET", "/api/stats"))
            # A host that others reach is production: the page wants a token.
            page = exchange(service.port, request("GET", "/docs")).status

        assert shows_api == (arguments in {("--expose-api",), ("--only", "api")})
        assert page == (401 if shows_api else 404)


class TestDeadDatabase:
    def test_makes_nobody_restart_anything(self, tmp_path: Path) -> None:
        """Case 155, shortened: liveness stays good and readiness bad for the whole time."""
        with Postgres() as server:
            url = with_password(server.create_database("receiver"))
            assert 0 == run("migrate", DATABASE_URL=url).returncode
            with Service("serve", home=tmp_path, DATABASE_URL=url) as service:
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
