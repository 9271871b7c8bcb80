"""Run the tests of a subject on its mutants: each in a process of its own, a copy of this one.

Libraries are loaded before the copies are made, so that a run costs little more than its
tests. A mutant exists in memory only: no file is changed, whatever happens here.
"""

import contextlib
import gc
import importlib
import importlib.machinery
import os
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import CodeType
from typing import Any, Final, NoReturn

import hypothesis
import pytest

from tests.mutants.modules import dependents_of, forget
from tests.mutants.operators import Mutant
from tests.mutants.subjects import ROOT, Subject

# Beyond that, and so many times what the tests take otherwise, a mutant runs for ever.
_LEAST, _TIMES = 20.0, 5.0
_PROFILE: Final = "mutants"
_PASSED, _FAILED = 0, 1
_PLUGINS: Final = ("pytest_asyncio.plugin", "pytest_timeout", "_hypothesis_pytestplugin")


class Fate(StrEnum):
    """What became of a mutant."""

    KILLED = "killed"
    HUNG = "hung"
    SURVIVED = "survived"


@dataclass(frozen=True)
class Verdict:
    """A mutant, and the test that noticed it."""

    mutant: Mutant
    fate: Fate
    test: str


class Workbench:
    """Tries mutants of one subject, a few at once."""

    def __init__(self, subject: Subject, *, jobs: int) -> None:
        self._subject = subject
        self._jobs = jobs
        # Tests that have noticed something run first: they are likely to notice the next.
        self._killers: list[str] = []
        self._running: dict[int, _Run] = {}
        self._patience = _LEAST
        self._dependents = dependents_of(subject.module)

    def check(self) -> float:
        """Run the tests on the module as it is; they must pass. Give how long they took."""
        mutant = Mutant("as it is", 0, self._subject.source)
        started = time.monotonic()
        run = self._start(mutant, patience=600.0)
        verdict = self._finish(run.process)
        if verdict.fate is not Fate.SURVIVED:
            tests = " ".join(self._subject.tests)
            raise RuntimeError(f"pytest {tests} fails without a change: {verdict.test}")
        took = time.monotonic() - started
        self._patience = max(_LEAST, _TIMES * took)
        return took

    def try_out(self, mutants: Iterable[Mutant]) -> Iterator[Verdict]:
        """Give the verdict on each mutant, as soon as it is known."""
        for mutant in mutants:
            while len(self._running) >= self._jobs:
                yield self._next()
            self._start(mutant, patience=self._patience)
        while self._running:
            yield self._next()

    def _start(self, mutant: Mutant, *, patience: float) -> "_Run":
        reader, writer = os.pipe()
        process = os.fork()
        if process == 0:
            os.close(reader)
            forget(self._subject.module, self._dependents)
            _be(mutant, self._subject, self._killers, writer)
        os.close(writer)
        run = _Run(mutant, process, reader, time.monotonic() + patience)
        self._running[process] = run
        return run

    def _next(self) -> Verdict:
        while True:
            for run in list(self._running.values()):
                if run.is_over():
                    return self._finish(run.process)
            time.sleep(0.02)

    def _finish(self, process: int) -> Verdict:
        run = self._running[process]
        while not run.is_over():
            time.sleep(0.02)
        del self._running[process]
        verdict = run.verdict()
        if verdict.test in self._killers:
            self._killers.remove(verdict.test)
        if verdict.test:
            self._killers.insert(0, verdict.test)
        return verdict


class _Run:
    def __init__(self, mutant: Mutant, process: int, reader: int, until: float) -> None:
        self.process = process
        self._mutant = mutant
        self._reader = reader
        self._until = until
        self._status: int | None = None

    def is_over(self) -> bool:
        if self._status is None:
            ended, status = os.waitpid(self.process, os.WNOHANG)
            if ended:
                self._status = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > self._until:
                os.kill(self.process, signal.SIGKILL)
                os.waitpid(self.process, 0)
                self._status = -signal.SIGKILL
        return self._status is not None

    def verdict(self) -> Verdict:
        with os.fdopen(self._reader) as told:
            test = told.read()
        if self._status == _PASSED:
            return Verdict(self._mutant, Fate.SURVIVED, "")
        fate = Fate.HUNG if self._status == -signal.SIGKILL else Fate.KILLED
        return Verdict(self._mutant, fate, test)


def load_libraries() -> None:
    """Load what the tests need; what depends on a mutant is loaded anew in each copy."""
    hypothesis.settings.register_profile(
        _PROFILE,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    for name in ("tests.conftest", "tests.integration.ledger", "app.wiring", "uvloop", *_PLUGINS):
        importlib.import_module(name)
    # What is there now is not looked through again by each copy.
    gc.freeze()


def _be(mutant: Mutant, subject: Subject, killers: list[str], writer: int) -> NoReturn:
    """Be the copy: load the mutant instead of its module, run the tests, and end."""
    status = _FAILED
    try:
        silence = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(silence, stream)
        _plant(mutant, ROOT / subject.path)
        status = _run_tests(subject, _Order(killers, writer))
    finally:
        os._exit(status)


def _run_tests(subject: Subject, order: "_Order") -> int:
    # Only the plug-ins that the tests use: to load all of them takes longer than many tests.
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    plugins = [f"-p{name}" for name in _PLUGINS]
    options = ["-x", "-q", "--assert=plain", "-pno:cacheprovider"]
    profile = f"--hypothesis-profile={_PROFILE}"
    return int(pytest.main([*plugins, *options, profile, *subject.tests], plugins=[order]))


def _plant(mutant: Mutant, path: Path) -> None:
    loader = importlib.machinery.SourceFileLoader
    original = loader.get_code

    def get_code(self: Any, fullname: str) -> CodeType | None:
        if Path(self.path) == path:
            return compile(mutant.source, str(path), "exec")
        return original(self, fullname)

    loader.get_code = get_code  # type: ignore[method-assign]


class _Order:
    """Puts the likeliest tests first, and tells which one failed."""

    def __init__(self, first: list[str], writer: int) -> None:
        self._first = {name: position for position, name in enumerate(first)}
        self._writer = writer

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        last = len(self._first)
        items.sort(key=lambda item: self._first.get(item.nodeid, last))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            with contextlib.suppress(OSError):
                os.write(self._writer, report.nodeid.encode()[:1000])
