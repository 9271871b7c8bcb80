"""The table, the ratios, and how they stand beside the goals."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from tests.bench.measurement import Measurement

TIMES = "\N{MULTIPLICATION SIGN}"
# Below this share of the processors, other programs are no more than noise.
QUIET = 0.1
HEADINGS = (
    "contender",
    "connections",
    "events/s",
    "p50 ms",
    "p99 ms",
    "p99.9 ms",
    "µs CPU per event",
    "+ database",
    "+ load",
    "MB",
    "not 200",
)
GOAL_HEADINGS = ("ratio or figure", "measured", "asked", "wanted")


@dataclass(frozen=True, slots=True)
class Goal:
    """A figure that the project has an opinion about; `asked` and `wanted` may be absent."""

    name: str
    value: float
    compare: Literal["≥", "≤"]
    asked: float | None
    wanted: float | None
    unit: str = TIMES

    def verdict(self, limit: float | None) -> str:
        if limit is None:
            return "-"
        is_met = self.value >= limit if self.compare == "≥" else self.value <= limit
        return f"{self.compare} {limit:g} {self.unit}: {'met' if is_met else 'not met'}"


class Results:
    """Every combined measurement of one run, found by contender and connections."""

    def __init__(self, measurements: Iterable[Measurement], *, open_loop: str) -> None:
        self.all = list(measurements)
        self._open_loop = open_loop
        self._by_key = {(one.contender, one.connections): one for one in self.all}

    def ratio(self, mine: str, theirs: str, connections: int) -> float:
        """Return how many times `theirs` the rate of `mine` is; NaN if one was left out."""
        one = self._by_key.get((mine, connections))
        other = self._by_key.get((theirs, connections))
        return one.rate / other.rate if one and other and other.rate else math.nan

    def goals(self) -> list[Goal]:
        """Compare with the goals what was measured, and leave out what was not."""
        ratio = self.ratio
        lone = self._by_key.get(("service", 1))
        paced = next((one for one in self.all if one.contender == self._open_loop), None)
        memory = [one.memory for one in self.all if one.contender == "service"]
        goals = [
            *_against("reference", ratio("service", "reference", 32), 32, 0.8, 1.0),
            *_against("one-statement", ratio("service", "one-statement", 32), 32, None, None),
            *_against("reference", ratio("service", "reference", 128), 128, 1.0, None),
            *_against("one-statement", ratio("service", "one-statement", 128), 128, None, 1.0),
            *_against("textbook", ratio("service", "textbook", 32), 32, 20, 30),
            *_against("textbook", ratio("service", "textbook", 128), 128, 20, 30),
        ]
        if paced is not None:
            name = f"p99 of {self._open_loop}"
            goals.append(Goal(name, paced.p99, "≤", 25, 5, "ms"))
            goals.append(Goal(name.replace("p99", "p99.9"), paced.p999, "≤", 100, 20, "ms"))
        if lone is not None:
            goals.append(Goal("p50 of service at 1 connection", lone.p50, "≤", 2, 1, "ms"))
        if memory:
            goals.append(Goal("memory of service, highest", max(memory), "≤", 150, 100, "MB"))
        return [goal for goal in goals if not math.isnan(goal.value)]

    def faults(self) -> list[str]:
        return [fault for one in self.all for fault in one.faults]

    def crowd(self) -> str | None:
        """Warn if the machine was busy with something else: then figures say little."""
        shares = [one.crowd for one in self.all if not math.isnan(one.crowd)]
        if not shares or max(shares) < QUIET:
            return None
        return (
            f"Other programs took {min(shares):.0%} to {max(shares):.0%} of the processors "
            "meanwhile: these are figures of a busy machine. Repeat the run on a quiet one."
        )

    def kept(self) -> str:
        """Say what the audit found: the promise that the figures would be worthless without."""
        promised = sum(one.acknowledged for one in self.all)
        if faults := self.faults():
            return f"{promised:,} events acknowledged, and not all promises kept: " + "; ".join(
                faults
            )
        return (
            f"{promised:,} events acknowledged; every one is in the database byte for byte, "
            "with its envelope and its delivery."
        )


def _against(
    theirs: str, ratio: float, connections: int, asked: float | None, wanted: float | None
) -> list[Goal]:
    return [Goal(f"service / {theirs} at {connections}", ratio, "≥", asked, wanted)]


def render(results: Results) -> RenderableType:
    """Lay the results out for a terminal."""
    figures = _table("Events taken", HEADINGS, (_cells(one) for one in results.all))
    goals = _table(
        "Ratios, and the goals beside them", GOAL_HEADINGS, map(_judged, results.goals())
    )
    style = "bold red" if results.faults() else "green"
    notes = [Text(results.kept(), style=style)]
    if (crowd := results.crowd()) is not None:
        notes.append(Text(crowd, style="yellow"))
    return Group(figures, goals, *notes)


def markdown(results: Results, *, about: Sequence[str]) -> str:
    """Lay the results out for a document."""
    blocks = [
        "\n".join(about),
        _markdown_table(HEADINGS, (_cells(one) for one in results.all)),
        _markdown_table(GOAL_HEADINGS, map(_judged, results.goals())),
        results.kept(),
        results.crowd() or "",
    ]
    return "\n\n".join(filter(None, blocks)) + "\n"


def width_of(console: Console) -> int:
    """Return a width that the table fits into when the output is a file."""
    return console.width if console.is_terminal else 140


def _table(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for position, heading in enumerate(headings):
        table.add_column(heading, justify="right" if position else "left")
    for row in rows:
        table.add_row(*row)
    return table


def _markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rules = ["---", *["---:"] * (len(headings) - 1)]
    lines = [headings, rules, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(one: Measurement) -> list[str]:
    failures = ", ".join(f"{name}: {count}" for name, count in sorted(one.failures.items()))
    return [
        one.contender,
        str(one.connections),
        f"{one.rate:,.0f}",
        *(_number(value, 1) for value in (one.p50, one.p99, one.p999)),
        *(_number(value, 0) for value in (one.cpu, one.database_cpu, one.load_cpu, one.memory)),
        failures or ("-" if math.isnan(one.p50) else "0"),
    ]


def _judged(goal: Goal) -> list[str]:
    digits = 2 if goal.value < 10 else 1
    measured = f"{goal.value:.{digits}f} {goal.unit}"
    return [goal.name, measured, goal.verdict(goal.asked), goal.verdict(goal.wanted)]


def _number(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:,.{digits}f}"
