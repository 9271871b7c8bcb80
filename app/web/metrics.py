"""Answer `/metrics`: what this process counts, and how much waits in the database."""

from fastapi import APIRouter, HTTPException, Request, Response

from app.metrics import MEDIA_TYPE, Metrics
from app.upkeep.levels import Gauges
from app.web.deps import Reader
from app.web.errors import problems

router = APIRouter(tags=["health"])


@router.get(
    "/metrics",
    summary="Metrics for Prometheus",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **problems()},
)
async def read_metrics(request: Request, consumer: Reader) -> Response:
    """Give all metrics of this process in the text format of Prometheus.

    They count for all accounts together, and name callbacks and keys, so a token that sees
    some accounts only is answered 403: `GET /api/stats` counts for these.

    Levels of the database are at most ten seconds old. While it does not answer they are
    the last known, and `atlas_levels_age_seconds` says how old these are.
    """
    if consumer.accounts is not None:
        raise HTTPException(403, "Metrics are of all accounts; this token sees some of them only.")
    metrics: Metrics = request.app.state.metrics
    gauges: Gauges = request.app.state.gauges
    await gauges.refresh()
    return Response(metrics.write(), media_type=MEDIA_TYPE)
