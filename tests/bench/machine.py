"""What the figures were measured on, and what a process has used of it."""

import os
import platform
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

PACKAGES = ("fastapi", "starlette", "uvicorn", "uvloop", "httptools", "sqlalchemy", "asyncpg")


def describe() -> str:
    """Name the processor, its cores, the memory and the system."""
    memory = psutil.virtual_memory().total / 2**30
    return (
        f"{_processor()}, {os.cpu_count()} cores, {memory:.0f} GB, "
        f"{platform.system()} {platform.release()}"
    )


def versions(postgresql: str) -> str:
    """Name the versions of everything that takes part."""
    named = [f"CPython {platform.python_version()}", f"PostgreSQL {postgresql}"]
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            named.append(f"{package} {version(package)}")
    return ", ".join(named)


def cpu_seconds(processes: Iterable[psutil.Process]) -> float:
    """Add up the processor time of `processes` and of their children that have ended."""
    total = 0.0
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            total += sum(process.cpu_times()[:4])
    return total


class Crowd:
    """How much of the machine went to programs that have no part in a window."""

    def __init__(self) -> None:
        self._since = time.monotonic()
        self._busy = _busy_seconds()

    def share(self, ours: float) -> float:
        """Return the share of all processors, given the seconds that were ours."""
        available = (time.monotonic() - self._since) * (os.cpu_count() or 1)
        return max(0.0, (_busy_seconds() - self._busy - ours) / available)


def _busy_seconds() -> float:
    times = psutil.cpu_times()
    return sum(times[:8]) - times.idle - times.iowait


def peak_memory(pid: int) -> float:
    """Return the most memory that the process ever had, in MB."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return float("nan")


def require_linux() -> None:
    """Say early that the load generator needs Linux' epoll."""
    if sys.platform != "linux":
        raise SystemExit("The bench needs Linux: its load generator waits with epoll.")


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
