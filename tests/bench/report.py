"""The table, the ratios, and how they stand beside the goals."""

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from tests.bench.measurement import Asked, Measurement, Reads, Result, Started, Told, Worked

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
WORKED_HEADINGS = (
    "contender",
    "waiting",
    "finished before",
    "jobs/s",
    "µs CPU per job",
    "+ database",
    "MB",
)
SCENE_HEADINGS = (
    "scene",
    "events/s",
    "to callback: p50 ms",
    "p95 ms",
    "p99 ms",
    "highest",
    "to 200: p50 ms",
    "p99 ms",
    "still owed",
)
ASKED_HEADINGS = (
    "route",
    "connections",
    "answers/s",
    "p50 ms",
    "p99 ms",
    "µs CPU per answer",
    "+ database",
    "+ load",
    "not 200",
)
TOLD_HEADINGS = (
    "streams",
    "long-polls",
    "events/s meanwhile",
    "without",
    "KB per stream",
    "KB per long-poll",
    "to each reader: p50 ms",
    "p99 ms",
    "to the last: p50 ms",
    "highest",
    "to who waits for it: p50 ms",
    "p99 ms",
)
# Of tests/bench/reads.py.
EMPTY, STATUS = "an empty route", "envelope/{id}/status"
# By what was sent at a fixed rate: p99 and p99.9 in milliseconds, asked and wanted.
PACED: Mapping[str, tuple[tuple[float, float], tuple[float | None, float | None]]] = {
    "service at 1,000/s": ((25, 100), (5, 20)),
    "two replicas at 300/s": ((100, 500), (None, None)),
}
CORES_FOR_TWO = 4
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

    def __init__(self, measured: Iterable[Result]) -> None:
        results = list(measured)
        self.asked = [each for one in results if isinstance(one, Reads) for each in one.asked]
        self.told = [one for one in results if isinstance(one, Told)]
        self.all = [*self.asked, *(one for one in results if not isinstance(one, Reads))]
        sent = [one for one in self.all if isinstance(one, Measurement)]
        self.taken = [one for one in sent if not one.is_scene]
        self.scenes = {one.contender: one for one in sent if one.is_scene}
        self.worked = [one for one in self.all if isinstance(one, Worked)]
        self._started = [one for one in self.all if isinstance(one, Started)]
        self._by_key = {(one.contender, one.connections): one for one in self.taken}

    def ratio(
        self, mine: str, theirs: str, connections: int, *, their_connections: int | None = None
    ) -> float:
        """Return how many times `theirs` the rate of `mine` is; NaN if one was left out."""
        one = self._by_key.get((mine, connections))
        other = self._by_key.get((theirs, their_connections or connections))
        return one.rate / other.rate if one and other and other.rate else math.nan

    def goals(self) -> list[Goal]:
        """Compare with the goals what was measured, and leave out what was not."""
        goals = [
            *self._goals_of_intake(),
            *self._goals_of_variants(),
            *self._goals_of_queues(),
            *self._goals_of_scenes(),
            *self._goals_of_reads(),
            *self._goals_of_readers(),
        ]
        return [goal for goal in goals if not math.isnan(goal.value)]

    def _goals_of_intake(self) -> Iterator[Goal]:
        ratio = self.ratio
        lone = self._by_key.get(("service", 1))
        memory = [one.memory for one in self.taken if one.contender == "service"]
        yield _against("reference", ratio("service", "reference", 32), 32, 0.8, 1.0)
        yield _against("one-statement", ratio("service", "one-statement", 32), 32, None, None)
        yield _against("reference", ratio("service", "reference", 128), 128, 1.0, None)
        yield _against("one-statement", ratio("service", "one-statement", 128), 128, None, 1.0)
        yield _against("textbook", ratio("service", "textbook", 32), 32, 20, 30)
        yield _against("textbook", ratio("service", "textbook", 128), 128, 20, 30)
        both = ratio("service", "textbook-async", 32), ratio("service", "textbook-async", 128)
        yield _against("textbook-async", both[0], 32, None, None)
        yield _against("textbook-async", both[1], 128, None, None)
        for one in self.taken:
            if one.is_paced:
                asked, wanted = PACED[one.contender]
                yield Goal(f"p99 of {one.contender}", one.p99, "≤", asked[0], wanted[0], "ms")
                yield Goal(f"p99.9 of {one.contender}", one.p999, "≤", asked[1], wanted[1], "ms")
        if lone is not None:
            yield Goal("p50 of service at 1 connection", lone.p50, "≤", 2, 1, "ms")
        if memory:
            yield Goal("memory of service, highest", max(memory), "≤", 150, 100, "MB")

    def _goals_of_variants(self) -> Iterator[Goal]:
        ratio = self.ratio
        at_work = ratio("callbacks at work", "service", 32)
        yield Goal("service, callbacks at work / without, at 32", at_work, "≥", 0.6, 0.8)
        grown = ratio("10 million known", "service", 32)
        yield Goal("service, 10 million known / none, at 32", grown, "≥", 0.8, 0.95)
        # On fewer, the load and the database have to share them with one process already.
        asked = 1.2 if (os.cpu_count() or 1) >= CORES_FOR_TWO else None
        two = ratio("two replicas", "service", 128)
        yield Goal("two replicas / one, at 128", two, "≥", asked, None)
        for busy in (32, 128):
            file = ratio("service on SQLite", "SQLite, one by one", busy, their_connections=1)
            yield Goal(f"service on SQLite at {busy} / one by one", file, "≥", 1, 3)
            three = ratio("service on SQLite", "SQLite, three writes", busy, their_connections=1)
            yield Goal(f"service on SQLite at {busy} / three writes", three, "≥", None, None)
        for one in self._started:
            yield Goal(f"{one.contender}, to the first 200", one.seconds, "≤", 2, 1, "s")

    def _goals_of_queues(self) -> Iterator[Goal]:
        # Of several queues of one contender, the shortest is what others are compared with.
        shortest = {one.contender: one for one in sorted(self.worked, key=lambda w: -w.waiting)}
        ours = shortest.get("deliveries")
        for theirs, asked, wanted in (("procrastinate", 5, None), ("pgqueuer", 0.5, 1.0)):
            yield from _compared(
                f"deliveries / {theirs}", ours, shortest.get(theirs), asked, wanted
            )
        longest = max((one.waiting for one in self.worked), default=0)
        full = {one.finished > 0: one for one in self.worked if one.waiting == longest}
        name = "deliveries beside finished ones / without"
        yield from _compared(name, full.get(True), full.get(False), 0.8, None)

    def _goals_of_scenes(self) -> Iterator[Goal]:
        for name, asked, wanted in (("one process", 5, 2), ("two processes", 60, 20)):
            if name in self.scenes:
                p50 = quantile(self.scenes[name].lags, 0.5)
                yield Goal(f"p50 to callback, {name}", p50, "≤", asked, wanted, "ms")
        idle = self.scenes.get("one process, nothing owed")
        busy = self.scenes.get("one process, 100,000 owed")
        if idle and busy:
            yield Goal(
                "p50 to 200, 100,000 owed / nothing owed", busy.p50 / idle.p50, "≤", None, None
            )
            yield Goal("p99 to 200, 100,000 owed", busy.p99, "≤", None, None, "ms")
        if crowd := self.scenes.get("one process, 50,000 owed to another"):
            highest = max(crowd.lags, default=math.nan)
            yield Goal(
                "highest to callback, 50,000 owed to another", highest, "≤", 5000, None, "ms"
            )

    def _goals_of_reads(self) -> Iterator[Goal]:
        routes = {one.route: one for one in self.asked}
        empty = routes.pop(EMPTY, None)
        for name, one in routes.items():
            asked, wanted = (0.35, 0.6) if name == STATUS else (None, None)
            if empty is not None:
                title = f"{name} / {EMPTY} at {one.connections}"
                yield Goal(title, one.rate / empty.rate, "≥", asked, wanted)
        if empty is not None and STATUS in routes:
            cost = _cost(empty) / _cost(routes[STATUS])
            yield Goal(f"{STATUS} / {EMPTY}, by processor time", cost, "≥", None, None)

    def _goals_of_readers(self) -> Iterator[Goal]:
        for one in self.told:
            name = f"events taken, {one.streams + one.polls:,} waiting / none"
            yield Goal(name, one.rate / one.rate_alone, "≥", 0.8, None)
            yield Goal(f"{name}, by processor time", one.cpu_alone / one.cpu, "≥", None, None)
            p99 = quantile(one.reach, 0.99)
            yield Goal("p99 from 200 to each reader of the feed", p99, "≤", None, None, "ms")
            yield Goal("memory per stream", one.stream_memory, "≤", None, None, "KB")
            yield Goal("memory per long-poll", one.poll_memory, "≤", None, None, "KB")

    def faults(self) -> list[str]:
        return [fault for one in self.all for fault in one.faults]

    def crowd(self) -> str | None:
        """Warn if the machine was busy with something else: then figures say little."""
        return crowd_warning([one.crowd for one in self.all])

    def kept(self) -> str:
        """Say what the audit found: the promise that the figures would be worthless without."""
        senders: list[Measurement | Told] = [*self.taken, *self.scenes.values(), *self.told]
        promised = sum(one.acknowledged for one in senders)
        done = sum(one.done for one in self.worked)
        answered = sum(one.answered for one in self.asked)
        told = (
            f"{promised:,} events acknowledged, {done:,} jobs done, {answered:,} questions answered"
        )
        if faults := self.faults():
            return f"{told}, and not all promises kept: " + "; ".join(faults)
        return (
            f"{told}; every event is in the database byte for byte, with its envelope and its "
            "delivery, and every job with its history; the answers that were looked at agree "
            "with it."
        )


def crowd_warning(crowds: Iterable[float]) -> str | None:
    """Say what share of the processors others took, if it is worth a word."""
    shares = [share for share in crowds if not math.isnan(share)]
    if not shares or max(shares) < QUIET:
        return None
    return (
        f"Other programs took {min(shares):.0%} to {max(shares):.0%} of the processors "
        "meanwhile: these are figures of a busy machine. Repeat the run on a quiet one."
    )


def quantile(ordered: Sequence[float], part: float) -> float:
    """Return the value below which so great a part lies; NaN if there is none."""
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))] if ordered else math.nan


def _against(
    theirs: str, ratio: float, connections: int, asked: float | None, wanted: float | None
) -> Goal:
    return Goal(f"service / {theirs} at {connections}", ratio, "≥", asked, wanted)


def _compared(
    name: str, ours: Worked | None, theirs: Worked | None, asked: float, wanted: float | None
) -> Iterator[Goal]:
    if ours is not None and theirs is not None:
        yield Goal(name, ours.rate / theirs.rate, "≥", asked, wanted)
        # It survives a busy machine better than a rate does.
        cost = (theirs.cpu + theirs.database_cpu) / (ours.cpu + ours.database_cpu)
        yield Goal(f"{name}, by processor time", cost, "≥", None, None)


def _cost(one: Asked) -> float:
    return one.cpu + one.database_cpu


Rows = Iterable[Sequence[str]]


def _tables(results: Results) -> Iterator[tuple[str, Sequence[str], Rows]]:
    if results.taken:
        yield "Events taken", HEADINGS, map(_cells, results.taken)
    if results.worked:
        yield "Queues worked off", WORKED_HEADINGS, map(_worked_cells, results.worked)
    if results.scenes:
        scenes = map(_scene_cells, results.scenes.values())
        yield "Callbacks at work while events arrive", SCENE_HEADINGS, scenes
    if results.asked:
        yield "Questions answered", ASKED_HEADINGS, map(_asked_cells, results.asked)
    if results.told:
        yield "Many who wait", TOLD_HEADINGS, map(_told_cells, results.told)
    yield "Ratios, and the goals beside them", GOAL_HEADINGS, map(_judged, results.goals())


def render(results: Results) -> RenderableType:
    """Lay the results out for a terminal."""
    tables = [table(*each) for each in _tables(results)]
    style = "bold red" if results.faults() else "green"
    notes = [Text(results.kept(), style=style)]
    if (crowd := results.crowd()) is not None:
        notes.append(Text(crowd, style="yellow"))
    return Group(*tables, *notes)


def markdown(results: Results, *, about: Sequence[str]) -> str:
    """Lay the results out for a document."""
    tables = [markdown_table(headings, rows) for _, headings, rows in _tables(results)]
    blocks = ["\n".join(about), *tables, results.kept(), results.crowd() or ""]
    return "\n\n".join(filter(None, blocks)) + "\n"


def width_of(console: Console) -> int:
    """Return a width that the table fits into when the output is a file."""
    return console.width if console.is_terminal else 140


def table(title: str, headings: Sequence[str], rows: Rows) -> Table:
    """Lay one table out for a terminal."""
    drawn = Table(title=title, title_justify="left")
    for position, heading in enumerate(headings):
        drawn.add_column(heading, justify="right" if position else "left")
    for row in rows:
        drawn.add_row(*row)
    return drawn


def markdown_table(headings: Sequence[str], rows: Rows) -> str:
    """Lay one table out for a document."""
    rules = ["---", *["---:"] * (len(headings) - 1)]
    lines = [headings, rules, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(one: Measurement) -> list[str]:
    failures = _failures(one.failures)
    return [
        one.contender,
        str(one.connections),
        f"{one.rate:,.0f}",
        *(number(value, 1) for value in (one.p50, one.p99, one.p999)),
        *(number(value, 0) for value in (one.cpu, one.database_cpu, one.load_cpu, one.memory)),
        "-" if math.isnan(one.p50) else failures,
    ]


def _worked_cells(one: Worked) -> list[str]:
    return [
        one.contender,
        f"{one.waiting:,}",
        f"{one.finished:,}",
        f"{one.rate:,.0f}",
        *(number(value, 0) for value in (one.cpu, one.database_cpu, one.memory)),
    ]


def _scene_cells(one: Measurement) -> list[str]:
    lags = [quantile(one.lags, part) for part in (0.5, 0.95, 0.99, 1.0)]
    return [
        one.contender,
        f"{one.rate:,.0f}",
        *(number(value, 1) for value in (*lags, one.p50, one.p99)),
        f"{one.left:,}",
    ]


def _asked_cells(one: Asked) -> list[str]:
    return [
        one.route,
        str(one.connections),
        f"{one.rate:,.0f}",
        *(number(value, 1) for value in (one.p50, one.p99)),
        *(number(value, 0) for value in (one.cpu, one.database_cpu, one.load_cpu)),
        _failures(one.failures),
    ]


def _told_cells(one: Told) -> list[str]:
    reach = [quantile(one.reach, part) for part in (0.5, 0.99)]
    last = [quantile(one.reach_last, part) for part in (0.5, 1.0)]
    answer = [quantile(one.answer, part) for part in (0.5, 0.99)]
    return [
        f"{one.streams:,}",
        f"{one.polls:,}",
        *(f"{rate:,.0f}" for rate in (one.rate, one.rate_alone)),
        *(number(value, 1) for value in (one.stream_memory, one.poll_memory)),
        *(number(value, 1) for value in (*reach, *last, *answer)),
    ]


def _failures(failures: Mapping[str, int]) -> str:
    return ", ".join(f"{name}: {count}" for name, count in sorted(failures.items())) or "0"


def _judged(goal: Goal) -> list[str]:
    digits = 2 if goal.value < 10 else 1
    measured = f"{goal.value:.{digits}f} {goal.unit}"
    return [goal.name, measured, goal.verdict(goal.asked), goal.verdict(goal.wanted)]


def number(value: float, digits: int) -> str:
    """Write a number; one that was not measured is a dash."""
    return "-" if math.isnan(value) else f"{value:,.{digits}f}"
