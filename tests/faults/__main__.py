"""`python -m tests.faults`: break a deployment of our own under load, and count."""

import argparse
import asyncio
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tests.acceptance.tables import rows
from tests.faults import report
from tests.faults.drill import Pace
from tests.faults.ledger import Ledger
from tests.faults.plan import Fault, Plan
from tests.faults.proxy import Address, Cut, Proxy
from tests.faults.rolling import BalancerMissing, Rolling, roll
from tests.faults.site import Site
from tests.faults.soak import own_site, soak
from tests.postgres import PostgresUnavailableError

DESCRIPTION = """\
Break a deployment of this service under load, and count what went wrong.

Everything is started on the loopback, on free ports, with a database of its own, and is
gone at the end. Exit code 1 means that something was lost, altered, done twice or too
late; the table says what.
"""
EXAMPLES = """\
examples:
  python -m tests.faults soak --events 2000 --kills 8 --database-stops 2
      a first impression, in about a minute
  python -m tests.faults soak
      100,000 events, 100 x kill -9, 20 database stops, 10 frozen processes
  python -m tests.faults soak --seed 7 --events 5000
      the same traffic and the same faults each time; a failure prints its seed
  python -m tests.faults soak --events 1000000 --kills 500 --database-stops 100 --rate 400
      a night of it
  python -m tests.faults soak --sqlite --events 20000 --kills 40 --database-stops 0
      one process on one file
  python -m tests.faults soak --report docs/soak
      writes docs/soak.md and docs/soak.svg, too
  python -m tests.faults rolling --requests 10000
      replicas behind HAProxy are replaced one by one, and no request may fail
  python -m tests.faults proxy 127.0.0.1:5432 --port 6432
      a wire to a server that fails on command: "stall", "reset", "delay 0.1", ...
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; give its exit code."""
    options = _parser().parse_args(arguments)
    # A plain kill has to end the children, too, and `finally` does that.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    # Whatever a developer has set for the service itself must not reach this one.
    os.environ["ENV_FILE"] = ""
    verb: Callable[[argparse.Namespace], int] = options.verb
    try:
        return verb(options)
    except KeyboardInterrupt:
        print("interrupted; everything that was started has been ended", file=sys.stderr)
        return 130
    except PostgresUnavailableError as error:
        print(error, file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    _add_soak(verbs.add_parser("soak", help="kill, freeze and stop under load, and count"))
    _add_rolling(verbs.add_parser("rolling", help="replace replicas behind a balancer"))
    _add_proxy(verbs.add_parser("proxy", help="a wire that fails on command"))
    return parser


def _add_soak(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    add("--events", type=int, default=100_000, help="different events; a fifth comes once more")
    add("--kills", type=int, default=100, help="kill -9, of replicas and workers in turn")
    add("--database-stops", type=int, default=20, help="immediate stops of PostgreSQL")
    add("--freezes", type=int, default=10, help="SIGSTOP, and SIGCONT a few seconds later")
    add("--rate", type=float, default=200.0, help="requests per second")
    add("--in-flight", type=int, default=1000, help="fewer requests at once if it is too slow")
    add("--compress", type=float, default=60.0, help="shorten Atlas' waits for a retry by this")
    add("--seed", type=int, help="repeats a run; without it, another one each time")
    add("--sqlite", action="store_true", help="one process on a file, instead of PostgreSQL")
    add("--report", type=Path, metavar="STEM", help="write STEM.md and STEM.svg")
    parser.set_defaults(verb=_soak)


def _add_rolling(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    add("--requests", type=int, default=10_000, help="more are sent if replacing takes longer")
    add("--restarts", type=int, default=8, help="replicas that are replaced, one after the other")
    add("--rate", type=float, default=200.0, help="requests per second")
    add("--seed", type=int, help="repeats the traffic")
    parser.set_defaults(verb=_rolling)


def _add_proxy(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("upstream", type=_address, metavar="HOST:PORT", help="the server")
    add("--port", type=int, default=0, help="where to listen on the loopback; 0 takes a free one")
    parser.set_defaults(verb=_proxy)


def _address(text: str) -> Address:
    host, _, port = text.rpartition(":")
    return host, int(port)


def _seed(options: argparse.Namespace) -> int:
    seed = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
    print(f"seed {seed}: the same one repeats this run")
    return int(seed)


def _rolling(options: argparse.Namespace) -> int:
    seed = _seed(options)
    try:
        with own_site(workers=0) as site:
            rolled = roll(site, Rolling(options.requests, options.restarts, options.rate, seed))
    except BalancerMissing as missing:
        print(missing, file=sys.stderr)
        return 1
    print(f"{rolled.requests:,} requests, {rolled.restarts} replicas replaced")
    print(f"failed: {rolled.failed or 0}; slowest answer {rolled.slowest * 1000:,.0f} ms")
    return 1 if rolled.failed else 0


def _proxy(options: argparse.Namespace) -> int:
    return asyncio.run(_obey(Proxy(options.upstream, port=options.port)))


async def _obey(wire: Proxy) -> int:
    """Do what each line of the standard input says, until it ends."""
    async with wire:
        print(f"listening on 127.0.0.1:{wire.port}; {', '.join(WORDS)}", flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            word, *values = line.split() or [""]
            try:
                WORDS[word](wire, *values)
            except (KeyError, TypeError, ValueError):
                print(f"say one of: {', '.join(WORDS)}")
    return 0


def _delay(wire: Proxy, seconds: str) -> None:
    wire.delay = float(seconds)


# What may be said to a proxy by hand.
WORDS: Mapping[str, Callable[..., None]] = {
    "delay": _delay,
    "stall": Proxy.stall,
    "resume": Proxy.resume,
    "reset": lambda wire: wire.cut(Cut.RESET),
    "silence": lambda wire: wire.cut(Cut.SILENCE),
    "half-close": Proxy.half_close,
    "swallow": lambda wire, text="COMMIT;": wire.swallow_reply(to=text.encode()),
    "forget": lambda wire, seconds: wire.forget_idle(after=float(seconds)),
    "switch": lambda wire, address: wire.switch_to(_address(address)),
}


def _soak(options: argparse.Namespace) -> int:
    seed = _seed(options)
    plan = Plan(
        seed,
        options.events,
        kills=options.kills,
        database_stops=0 if options.sqlite else options.database_stops,
        freezes=options.freezes,
        replicas=1 if options.sqlite else 2,
        workers=0 if options.sqlite else 2,
    )
    pace = Pace(options.rate, options.compress, options.in_flight)
    with own_site(sqlite=options.sqlite) as site:
        ledger = Ledger()
        with _progress(plan, ledger) as on_sent:
            result = soak(site, plan, pace=pace, ledger=ledger, on_sent=on_sent)
        if options.report is not None:
            command = _command(options, seed)
            version = _postgresql(site)
            report.write(result, options.report, pace=pace, command=command, postgresql=version)
    print(report.table(result))
    print(report.headline(result))
    return 1 if result.wrong else 0


def _command(options: argparse.Namespace, seed: int) -> str:
    names = ("events", "kills", "database_stops", "freezes", "rate", "compress", "in_flight")
    flags = [f"--{name.replace('_', '-')} {getattr(options, name):g}" for name in names]
    flags = [flag.replace("e+06", "000000").replace("e+05", "00000") for flag in flags]
    return " ".join(["python -m tests.faults soak", f"--seed {seed}", *flags])


def _postgresql(site: Site) -> str:
    if not site.is_postgresql:
        return "none"
    return str(rows(site.database_url, "SHOW server_version")[0][0])


@contextmanager
def _progress(plan: Plan, ledger: Ledger) -> Iterator[Callable[[], None]]:
    """Show how far a run has come, on a terminal as a bar, elsewhere as a line now and then."""
    columns = (
        TextColumn("acknowledged"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=plan.events)
        last = [0.0]

        def show() -> None:
            if ledger.elapsed - last[0] < 0.5:
                return
            last[0] = ledger.elapsed
            progress.update(task, completed=ledger.acknowledged, description=_struck(ledger))

        yield show
        progress.update(task, completed=ledger.acknowledged, description=_struck(ledger))


def _struck(ledger: Ledger) -> str:
    kills = ledger.made(Fault.KILL_REPLICA, Fault.KILL_WORKER)
    stops = ledger.made(Fault.STOP_DATABASE)
    return f"{kills} kills, {stops} database stops, slowest answer {ledger.slowest:.1f} s"


if __name__ == "__main__":
    sys.exit(main())
