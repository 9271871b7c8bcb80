"""Answer `/metrics`: what this process counts, and how much waits in the database."""

from fastapi import APIRouter, Request, Response

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
async def read_metrics(request: Request, _: Reader) -> Response:
    """Give all metrics of this process in the text format of Prometheus.

    Levels of the database are at most ten seconds old. While it does not answer they are
    the last known, and `atlas_levels_age_seconds` says how old these are.
    """
    metrics: Metrics = request.app.state.metrics
    gauges: Gauges = request.app.state.gauges
    await gauges.refresh()
    return Response(metrics.write(), media_type=MEDIA_TYPE)
