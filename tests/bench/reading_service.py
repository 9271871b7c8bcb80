"""The service's API as `serve --only api` runs it, and one empty route more to compare with.

Both are in one process and behind the same token, so that what lies between their rates is
the work of the route and nothing else.
"""

import argparse
from typing import Any

from app.cli import listening, serve
from app.main import Application, Face, create_app
from app.web.deps import Reader
from app.wiring import Services
from tests.bench.routes import NOTHING


async def nothing(consumer: Reader) -> dict[str, str]:
    """Answer nothing to whoever may read."""
    del consumer
    return {}


def create_app_with_nothing(services: Services, **options: Any) -> Application:
    """Build the application of the service, and add the empty route."""
    app = create_app(services, **options)
    app.get(NOTHING)(nothing)
    # In front: it shall not pay for the search among the others.
    app.router.routes.insert(0, app.router.routes.pop())
    return app


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    port = parser.parse_args().port
    # Everything else, from the event loop to uvicorn's options, is what `serve` itself does.
    listening.create_app = create_app_with_nothing  # type: ignore[attr-defined]
    listening._run(serve._settings(), [(Face.API, "127.0.0.1", port)], works=False)


if __name__ == "__main__":
    main()
