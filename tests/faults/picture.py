"""The picture of a run: what was acknowledged, what struck, and how long answers took.

One SVG without scripts or fonts of its own, readable on light and on dark pages.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from tests.faults.ledger import Ledger, Mark, Second
from tests.faults.plan import Fault

WIDTH, HEIGHT = 960, 560
LEFT, RIGHT = 168, 944
# Top and bottom of the three parts.
RATES, LANES, TIMES = (64, 204), (244, 344), (392, 512)
# More points than these could not be told apart.
POINTS = 300
PROMISED = 8.0
FASTEST, SLOWEST = 0.001, 10.0
SCALE = {0.001: "1 ms", 0.01: "10 ms", 0.1: "100 ms", 1.0: "1 s", 10.0: "10 s"}

# Colours are chosen to differ in lightness, too.
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #1f2328; }
.title { font-size: 15px; font-weight: 600; }
.faint { fill: #59636e; }
.end { text-anchor: end; }
.middle { text-anchor: middle; }
.paper { fill: #ffffff; }
.grid { stroke: #d1d9e0; stroke-width: 1; }
.line { fill: none; stroke-width: 1.5; stroke-linejoin: round; }
.dash { stroke-dasharray: 5 4; }
.one { stroke: #0969da; }
.area { fill: #0969da; fill-opacity: 0.25; }
.two { stroke: #bc4c00; }
.three { stroke: #8250df; }
.limit { stroke: #cf222e; }
.mark { fill: #cf222e; }
.band { fill: #8250df; }
.stop { fill: #1f2328; }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc; }
  .faint { fill: #9198a1; }
  .paper { fill: #0d1117; }
  .grid { stroke: #3d444d; }
  .one { stroke: #4493f8; }
  .area { fill: #4493f8; fill-opacity: 0.3; }
  .two { stroke: #db6d28; }
  .three { stroke: #b78aff; }
  .limit { stroke: #f85149; }
  .mark { fill: #f85149; }
  .band { fill: #b78aff; }
  .stop { fill: #f0f6fc; }
}
"""
KINDS = {
    Fault.KILL_REPLICA: "mark",
    Fault.KILL_WORKER: "mark",
    Fault.FREEZE_REPLICA: "band",
    Fault.FREEZE_WORKER: "band",
    Fault.STOP_DATABASE: "stop",
}


@dataclass(frozen=True, slots=True)
class Point:
    """A few seconds of a run."""

    at: float
    acknowledged: float
    missed: float
    # Answer times: the median, the 99th percentile, the longest. None where nobody answered.
    times: tuple[float, float, float] | None


def points(seconds: Sequence[Second], *, most: int = POINTS) -> list[Point]:
    """Put seconds together until there are few enough of them for a picture."""
    width = max(1, math.ceil(len(seconds) / most))
    return [
        _point(start, seconds[start : start + width]) for start in range(0, len(seconds), width)
    ]


def _point(start: int, seconds: Sequence[Second]) -> Point:
    times = sorted(each for second in seconds for each in second.times)
    shown = (percentile(times, 0.5), percentile(times, 0.99), times[-1]) if times else None
    return Point(
        start,
        sum(second.acknowledged for second in seconds) / len(seconds),
        sum(second.refused + second.unanswered for second in seconds) / len(seconds),
        shown,
    )


def percentile(ordered: Sequence[float], share: float) -> float:
    """Give the smallest value that so large a share does not exceed."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def draw(ledger: Ledger, *, title: str) -> str:
    """Draw a run as SVG."""
    shown = points(ledger.seconds)
    end = max(1.0, ledger.ended - ledger.began)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}</style>",
        f'<rect class="paper" width="{WIDTH}" height="{HEIGHT}"/>',
        _text(16, 24, title, "title"),
        *_rates(shown, end),
        *_lanes(ledger.marks, end),
        *_times(shown, end),
        *_clock(end),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _rates(shown: Sequence[Point], end: float) -> Iterator[str]:
    top, bottom = RATES
    step = _step(max([1.0, *(max(p.acknowledged, p.missed) for p in shown)]))
    highest = 4 * step
    yield _text(16, top - 12, "requests per second", "faint")
    yield from _legend(top - 12, ("one", "events acknowledged"), ("two", "answers 503, or none"))
    for number in range(5):
        y = _on(number * step, highest, top, bottom)
        yield from _grid(y, f"{number * step:,.0f}")
    line = [(p.at, _on(p.acknowledged, highest, top, bottom)) for p in shown]
    closed = [(0.0, float(bottom)), *line, (line[-1][0], float(bottom))] if line else []
    yield f'<polygon class="area" points="{_path(closed, end)}"/>'
    yield _line("one", line, end)
    yield _line("two", [(p.at, _on(p.missed, highest, top, bottom)) for p in shown], end)


def _lanes(marks: Sequence[Mark], end: float) -> Iterator[str]:
    top, bottom = LANES
    height = (bottom - top) / len(KINDS)
    yield _text(16, top - 12, "what struck", "faint")
    for number, (fault, style) in enumerate(KINDS.items()):
        y = top + number * height
        struck = [mark for mark in marks if mark.kind == fault]
        yield from _grid(y + height, "")
        for mark in struck:
            x = _across(mark.at, end)
            width = max(2.0, _across(mark.until, end) - x)
            yield (
                f'<rect class="{style}" x="{x:.1f}" y="{y + 3:.1f}" '
                f'width="{width:.1f}" height="{height - 4:.1f}"/>'
            )
        yield _text(16, y + height - 5, fault)
        yield _text(LEFT - 8, y + height - 5, str(len(struck)), "faint end")


def _times(shown: Sequence[Point], end: float) -> Iterator[str]:
    top = TIMES[0]
    yield _text(16, top - 12, "answer time", "faint")
    yield from _legend(
        top - 12,
        ("one", "half within"),
        ("three", "99 % within"),
        ("two", "longest"),
        ("limit dash", "every answer within 8 s"),
    )
    for seconds, label in SCALE.items():
        yield from _grid(_log(seconds), label)
    yield f'<path class="line limit dash" d="M{LEFT} {_log(PROMISED):.1f}H{RIGHT}"/>'
    for place, style in ((2, "two"), (1, "three"), (0, "one")):
        yield from (
            _line(style, part, end)
            for part in _unbroken([(p.at, p.times and _log(p.times[place])) for p in shown])
        )


def _unbroken(line: Sequence[tuple[float, float | None]]) -> Iterator[list[tuple[float, float]]]:
    """Where nobody answered there is no line."""
    part: list[tuple[float, float]] = []
    for at, y in line:
        if y is not None:
            part.append((at, y))
        elif part:
            yield part
            part = []
    if part:
        yield part


def _clock(end: float) -> Iterator[str]:
    bottom = TIMES[1]
    step = next(each for each in (5, 10, 30, 60, 120, 300, 600, 1800, 7200) if end / each <= 12)
    for number in range(int(end / step) + 1):
        seconds = number * step
        label = f"{seconds / 60:g} min" if step >= 30 else f"{seconds} s"
        yield _text(_across(seconds, end), bottom + 20, label, "faint middle")


def _legend(y: float, *entries: tuple[str, str]) -> Iterator[str]:
    x = float(LEFT)
    for style, label in entries:
        yield f'<path class="line {style}" d="M{x:.0f} {y - 4:.0f}h24"/>'
        yield _text(x + 30, y, label)
        x += 60 + 7 * len(label)


def _grid(y: float, label: str) -> Iterator[str]:
    yield f'<path class="grid" d="M{LEFT} {y:.1f}H{RIGHT}"/>'
    yield _text(LEFT - 8, y + 4, label, "faint end")


def _line(style: str, line: Sequence[tuple[float, float]], end: float) -> str:
    return f'<polyline class="line {style}" points="{_path(line, end)}"/>'


def _path(line: Sequence[tuple[float, float]], end: float) -> str:
    return " ".join(f"{_across(at, end):.1f},{y:.1f}" for at, y in line)


def _text(x: float, y: float, text: str, style: str = "") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" class="{style}">{escape(text)}</text>'


def _across(seconds: float, end: float) -> float:
    return LEFT + (RIGHT - LEFT) * min(1.0, seconds / end)


def _on(value: float, highest: float, top: float, bottom: float) -> float:
    return bottom - (bottom - top) * min(1.0, value / highest)


def _log(seconds: float) -> float:
    top, bottom = TIMES
    share = math.log(max(FASTEST, seconds) / FASTEST) / math.log(SLOWEST / FASTEST)
    return bottom - (bottom - top) * min(1.0, share)


def _step(highest: float) -> float:
    """Give a round number of which four are enough."""
    size = 10.0 ** math.floor(math.log10(highest / 4))
    return next(size * n for n in (1, 2, 2.5, 5, 10) if size * n * 4 >= highest)
