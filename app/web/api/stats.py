"""Counts and rates over time, of all processes together: for pictures and for alerts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Query, Request
from pydantic import AwareDatetime, BaseModel, Field

from app.errors import NotFound
from app.store import tallies
from app.store.levels import Levels
from app.store.session import Database
from app.store.sight import Sight, resolve
from app.store.tallies import Point, Step
from app.upkeep.counting import ATTEMPTS, DELIVERIES, EVENTS, WEBHOOKS
from app.upkeep.levels import Gauges, oldest, seconds_since
from app.web.deps import AtlasAccount, Pool, Reader
from app.web.errors import problems

READ_LIMIT = timedelta(seconds=3)
MOST_POINTS = 1500
DEFAULT_POINTS = 60
# No clock of ours says anything else; a few such times could not even be rounded.
_YEARS = range(2000, 3000)
# What has a line in every picture, also before the first of it happens.
ALWAYS: Mapping[str, Sequence[str]] = {
    WEBHOOKS: ("recorded", "duplicate", "conflict", "quarantined"),
    EVENTS: (),
    ATTEMPTS: ("done", "failed", "dead", "skipped"),
    DELIVERIES: ("done", "dead"),
}
# These are counted before it is known whose they are.
ALWAYS_OF_NOBODY = ("rejected", "refused")

router = APIRouter(prefix="/api/stats", tags=["stats"])


class SeriesView(BaseModel):
    """How often one thing happened."""

    name: str = Field(examples=["webhooks"])
    label: str = Field(examples=["recorded"])
    total: int = Field(examples=[120])
    rate: float = Field(description="How often in a second, on average.", examples=[0.0333])
    points: list[int] = Field(description="One for each of `times`.", examples=[[2, 0, 118]])


class NowView(BaseModel):
    """How much waits just now; null while the database does not say."""

    owed: int = Field(description="Deliveries that are to be made.", examples=[3])
    dead: int = Field(description="Deliveries that wait for a person.", examples=[0])
    parked: int = Field(description="Deliveries that no process serves.", examples=[0])
    oldest_due_seconds: float = Field(examples=[0.2])
    feed_lag_seconds: float = Field(examples=[0.0])


class StatsView(BaseModel):
    """Counts and rates over time."""

    since: datetime = Field(alias="from")
    to: datetime
    step: Step
    times: list[datetime] = Field(description="When each step begins.")
    series: list[SeriesView]
    now: NowView | None


@dataclass(frozen=True, slots=True)
class Window:
    """The steps that are asked for."""

    times: Sequence[datetime]
    step: Step

    @property
    def end(self) -> datetime:
        """When the last step ends."""
        return self.times[-1] + self.step.span

    def seconds(self, now: datetime) -> float:
        """How much of it is over: of what is to come there is no rate."""
        over = min(self.end, now) - self.times[0]
        return max(1.0, over.total_seconds())


class Asked(BaseModel):
    """Which time is asked for, and how finely."""

    since: AwareDatetime | None = Field(
        default=None, alias="from", description="The first step is the one that holds this time."
    )
    to: AwareDatetime | None = Field(default=None, description="Before this time; without it, now.")
    step: Step = Field(
        default=Step.MINUTE, description=f"How finely; at most {MOST_POINTS} steps in one answer."
    )


@router.get(
    "",
    response_model=StatsView,
    summary="Counts and rates over time",
    responses=problems(404),
)
async def read(
    request: Request,
    consumer: Reader,
    database: Pool,
    asked: Annotated[Asked, Query()],
    atlas_account: AtlasAccount = None,
) -> Any:
    """Give what all processes counted, of the accounts that the token may see.

    Counts are a few seconds behind. Minutes are kept for three days, hours for ninety, days
    for ever. Requests that were refused belong to no account, so only a token that sees all
    accounts is told of them.
    """
    now = datetime.now(UTC)
    window = _window(asked, now=now)
    sight, points = await _points(database, consumer.accounts, atlas_account, window)
    gauges: Gauges = request.app.state.gauges
    levels = await gauges.refresh()
    return {
        "from": window.times[0],
        "to": window.end,
        "step": asked.step,
        "times": window.times,
        "series": _series(points, window, sees_all=sight.accounts is None, now=now),
        "now": None if levels is None else _now(levels, sight),
    }


def _window(asked: Asked, *, now: datetime) -> Window:
    step = asked.step
    for moment in (asked.since, asked.to):
        if moment is not None and moment.year not in _YEARS:
            raise HTTPException(422, "`from` and `to` lie between the years 2000 and 2999.")
    end = (asked.to or now).astimezone(UTC)
    first = step.floor((asked.since or end - (DEFAULT_POINTS - 1) * step.span).astimezone(UTC))
    if first >= end:
        raise HTTPException(422, "`from` lies before `to`.")
    count = -((first - end) // step.span)
    if count > MOST_POINTS:
        raise HTTPException(
            422, f"These are {count} steps; {MOST_POINTS} may be asked for: take a longer `step`."
        )
    return Window([first + number * step.span for number in range(count)], step)


async def _points(
    database: Database, accounts: frozenset[str] | None, meant: str | None, window: Window
) -> tuple[Sight, list[Point]]:
    async with database.begin(limit=READ_LIMIT, is_reading=True) as connection:
        sight = await resolve(connection, accounts, meant)
        # The same answer whether it is unknown, another's, or a part of an account.
        if sight.tenant is not None or sight.accounts == ():
            raise NotFound("There is no such account here; counts are kept by account.")
        names = ALWAYS.keys()
        points = await tallies.read(
            connection, window.times, step=window.step, names=names, accounts=sight.accounts
        )
    return sight, points


def _series(
    points: Sequence[Point], window: Window, *, sees_all: bool, now: datetime
) -> list[SeriesView]:
    place = {moment: number for number, moment in enumerate(window.times)}
    lines = {(n, label): [0] * len(place) for n, labels in ALWAYS.items() for label in labels}
    if sees_all:
        lines |= {(WEBHOOKS, label): [0] * len(place) for label in ALWAYS_OF_NOBODY}
    for point in points:
        line = lines.setdefault((point.name, point.label), [0] * len(place))
        line[place[point.at]] += point.count
    seconds = window.seconds(now)
    return [
        SeriesView(
            name=name,
            label=label,
            total=sum(line),
            rate=round(sum(line) / seconds, 4),
            points=line,
        )
        for (name, label), line in sorted(lines.items())
    ]


def _now(levels: Levels, sight: Sight) -> NowView:
    queues = [q for q in levels.queues if sight.accounts is None or q.account in sight.accounts]
    aside = {"dead", "parked"}
    return NowView(
        owed=sum(queue.count for queue in queues if queue.state not in aside),
        dead=sum(queue.count for queue in queues if queue.state == "dead"),
        parked=sum(queue.count for queue in queues if queue.state == "parked"),
        oldest_due_seconds=oldest(queues, levels),
        feed_lag_seconds=seconds_since(levels, levels.waiting_since),
    )
