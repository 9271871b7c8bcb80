"""Try every mutant, and say which ones no test noticed: `make mutants ARGS="signature"`."""

import argparse
import os
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tests.mutants.operators import mutants_of
from tests.mutants.subjects import SUBJECTS, Subject
from tests.mutants.workbench import Fate, Verdict, Workbench, load_libraries
from tests.postgres import Postgres

GOAL: Final = 0.85
ARGUED: Final = Path(__file__).with_name("argued.toml")
# Why a report names a mutant; one that took too long may have been slow and not killed.
_SURVIVED, _TOOK_TOO_LONG = _WHYS = ("survived", "took too long")

console = Console(highlight=False, markup=False, soft_wrap=True)


@dataclass(frozen=True)
class Result:
    """What became of the mutants of one subject."""

    subject: Subject
    verdicts: Sequence[Verdict]

    @property
    def killed(self) -> int:
        return sum(each.fate is not Fate.SURVIVED for each in self.verdicts)

    @property
    def survivors(self) -> list[str]:
        return self.names(Fate.SURVIVED)

    def names(self, fate: Fate) -> list[str]:
        """Name those that met this fate, in the order of their lines."""
        met = (each for each in self.verdicts if each.fate is fate)
        return [each.mutant.name for each in sorted(met, key=lambda each: each.mutant.line)]


def main() -> None:
    arguments = _parser().parse_args()
    os.nice(arguments.nice)
    chosen = [s for s in SUBJECTS if not arguments.subjects or _is_meant(s, arguments.subjects)]
    if not chosen:
        sys.exit("no such subject; there are " + ", ".join(each.name for each in SUBJECTS))
    load_libraries()
    results = [_try_out(subject, arguments) for subject in chosen]
    _report(results, _argued())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="make mutants ARGS=...", description=__doc__)
    parser.add_argument("subjects", nargs="*", help="parts of their names; without any, all")
    parser.add_argument("--again", type=Path, help="only what an earlier report names")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at once (2)")
    parser.add_argument("--step", type=int, default=1, help="try every so many-th mutant only")
    parser.add_argument("--nice", type=int, default=10, help="leave the processor to others (10)")
    return parser


def _is_meant(subject: Subject, names: Sequence[str]) -> bool:
    return any(name in subject.name for name in names)


def _try_out(subject: Subject, arguments: argparse.Namespace) -> Result:
    mutants = mutants_of(subject.source)[:: arguments.step]
    if arguments.again is not None:
        named = set(arguments.again.read_text("utf-8").splitlines())
        mutants = [
            m for m in mutants if named & {f"{why}: {subject.path}: {m.name}" for why in _WHYS}
        ]
    with _database(subject):
        bench = Workbench(subject, jobs=arguments.jobs)
        took = bench.check()
        title = f"{subject.name} ({took:.1f} s a run)"
        verdicts = []
        # Refreshed by hand: a thread that draws must not be copied while it holds a lock.
        with _bar() as bar:
            task = bar.add_task(title, total=len(mutants))
            for verdict in bench.try_out(mutants):
                verdicts.append(verdict)
                bar.update(task, advance=1, refresh=console.is_terminal)
    result = Result(subject, verdicts)
    hung = sum(each.fate is Fate.HUNG for each in verdicts)
    killed = f"{result.killed} of {len(verdicts)} killed"
    console.print(f"{title}: {killed}, {hung} of them because they took too long")
    return result


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        auto_refresh=False,
        transient=True,
        disable=not console.is_terminal,
    )


@contextmanager
def _database(subject: Subject) -> Iterator[None]:
    """A server that the runs share; each makes databases of its own on it."""
    if not subject.needs_postgres or "TEST_DATABASE_URL" in os.environ:
        yield
        return
    with Postgres() as postgres:
        os.environ["TEST_DATABASE_URL"] = postgres.url()
        try:
            yield
        finally:
            del os.environ["TEST_DATABASE_URL"]


def _argued() -> Mapping[str, Mapping[str, str]]:
    """Why a survivor may live, by subject and mutant."""
    argued: dict[str, dict[str, str]] = {}
    for group in tomllib.loads(ARGUED.read_text("utf-8")).get("group", []):
        for name in group["mutants"]:
            argued.setdefault(group["subject"], {})[name] = group["why"]
    return argued


def _report(results: Sequence[Result], argued: Mapping[str, Mapping[str, str]]) -> None:
    console.print("\n| Module | Mutants | Killed | Share | Argued | Open |")
    console.print("| --- | ---: | ---: | ---: | ---: | ---: |")
    still_open = []
    for result in results:
        reasons = argued.get(result.subject.name, {})
        unargued = [name for name in result.survivors if name not in reasons]
        still_open += [f"{result.subject.path}: {name}" for name in unargued]
        _print_row(result.subject.name, result, len(result.survivors) - len(unargued))
    total = sum(len(result.verdicts) for result in results)
    killed = sum(result.killed for result in results)
    console.print(
        f"\n{killed} of {total} killed: {killed / total:.1%}; at least {GOAL:.0%} must be"
    )
    for result in results:
        for name in result.names(Fate.HUNG):
            console.print(f"{_TOOK_TOO_LONG}: {result.subject.path}: {name}")
    for line in still_open:
        console.print(f"{_SURVIVED}: {line}")
    stale = [line for result in results for line in _stale(result.subject, argued)]
    for line in stale:
        console.print(f"argued, and not there any more: {line}")
    sys.exit(1 if still_open or stale or killed < GOAL * total else 0)


def _stale(subject: Subject, argued: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Name what is argued of a line that has been written anew."""
    there = {mutant.name for mutant in mutants_of(subject.source)}
    return [f"{subject.path}: {name}" for name in argued.get(subject.name, {}) if name not in there]


def _print_row(name: str, result: Result, argued: int) -> None:
    count = len(result.verdicts)
    open_ = count - result.killed - argued
    share = result.killed / max(count, 1)
    console.print(f"| {name} | {count} | {result.killed} | {share:.0%} | {argued} | {open_} |")


if __name__ == "__main__":
    main()
