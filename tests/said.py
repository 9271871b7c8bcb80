"""What was written to the log, as tests ask for it."""

from collections.abc import Iterable, Mapping
from typing import Any


def said(lines: Iterable[Mapping[str, Any]], subject: str) -> list[str]:
    """Name the lines about `subject`; what a loop of another test says meanwhile is not meant."""
    return [line["event"] for line in lines if line["event"].startswith(f"{subject}.")]
