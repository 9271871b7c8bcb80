"""What a soak has shown: a table for the terminal, and a page with a picture for the documents."""

from datetime import UTC, datetime
from pathlib import Path

from tests.bench import machine
from tests.faults.drill import Pace
from tests.faults.oracle import Count
from tests.faults.picture import draw, percentile
from tests.faults.plan import Fault
from tests.faults.soak import Result

PAGE = """\
# A soak

{headline}

![Events acknowledged, faults and answer times over the time of the run]({picture})

Written by

```sh
{command}
```

on {date}, on {machine}.
The seed makes the same traffic and the same faults after the same numbers of acknowledged events;
what falls between two of them is up to the machine, and so is the pace: no more than {in_flight:,}
requests were under way at once. [tests/faults](../tests/faults/README.md) explains what is
sent, what strikes, and how it is judged.

Two replicas (`serve --only webhooks`) take events from a sender that signs, waits and tries again
as Atlas does, its waits {compress:g} times as short. Two workers (`work`) run three callbacks: one
writes a line for each call, one fails and gives up on purpose, one writes in the transaction that
settles its delivery. All of them are killed with SIGKILL and frozen with SIGSTOP while they work,
and their PostgreSQL ({postgresql}) is stopped with `immediate`, a crash of all its backends.
Kills of processes prove nothing about the loss of power: that is up to the disk, and to `fsync`.

| | Found | Allowed | Invariant |
|---|--:|--:|---|
{rows}

Of {answers:,} answers half came within {p50:.0f} ms, 99 % within {p99:,.0f} ms,
99.9 % within {p999:,.0f} ms, and all of them within {longest:,.0f} ms. These are no figures of
speed, which are in [performance.md](performance.md): replicas, workers, database and sender share
one machine with processes that start again and again.
"""


def headline(result: Result) -> str:
    """Say in one sentence what matters most."""
    made = result.ledger.made
    kills = made(Fault.KILL_REPLICA, Fault.KILL_WORKER)
    verdict = "; ".join(f"{count.name}: {count.number:,}" for count in result.wrong) or (
        "lost 0, altered 0, recorded twice 0, status regressions 0, 5xx other than 503: 0, "
        f"slowest answer {result.ledger.slowest:.1f} s"
    )
    return (
        f"{result.ledger.acknowledged:,} acknowledged events, {kills} × `kill -9`, "  # noqa: RUF001
        f"{made(Fault.STOP_DATABASE)} immediate stops of the database, "
        f"{made(Fault.FREEZE_REPLICA, Fault.FREEZE_WORKER)} frozen processes: {verdict}."
    )


def table(result: Result) -> str:
    """Lay the counts out for a terminal; what is wrong is marked."""
    return "\n".join(
        f"{count.name:<62}{count.number:>10,}{_limit(count)}" for count in result.counts
    )


def _limit(count: Count) -> str:
    if count.limit is None:
        return ""
    return f"   ≤ {count.limit:<6,} {'WRONG ' if count.is_wrong else ''}{count.invariant}"


def write(result: Result, stem: Path, *, pace: Pace, command: str, postgresql: str) -> None:
    """Write `stem`.md and `stem`.svg."""
    picture = stem.with_suffix(".svg")
    times = sorted(each * 1000 for second in result.ledger.seconds for each in second.times)
    page = PAGE.format(
        headline=headline(result),
        picture=picture.name,
        command=command,
        date=datetime.now(UTC).date(),
        machine=machine.describe(),
        compress=pace.compress,
        in_flight=pace.in_flight,
        postgresql=postgresql,
        rows="\n".join(map(_row, result.counts)),
        answers=len(times),
        p50=percentile(times, 0.5),
        p99=percentile(times, 0.99),
        p999=percentile(times, 0.999),
        longest=times[-1],
    )
    stem.with_suffix(".md").write_text(page)
    picture.write_text(draw(result.ledger, title=_title(result)))


def _title(result: Result) -> str:
    return (
        f"{result.ledger.acknowledged:,} acknowledged events under faults, seed {result.plan.seed}"
    )


def _row(count: Count) -> str:
    limit = "" if count.limit is None else f"{count.limit:,}"
    number = f"**{count.number:,}**" if count.is_wrong else f"{count.number:,}"
    return f"| {count.name} | {number} | {limit} | {count.invariant} |"
