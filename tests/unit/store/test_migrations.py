"""How a schema and a release relate."""

import pytest

from app import __version__
from app.store.migrations import Fit, _fit


@pytest.mark.parametrize(
    "found, floor, fit",
    [
        (None, "0", Fit.ABSENT),
        ("a", "0", Fit.OLDER),
        ("b", __version__, Fit.EQUAL),
        ("b", "99", Fit.TOO_NEW),
        ("a", "99", Fit.TOO_NEW),
        ("c", __version__, Fit.COMPATIBLE),
        ("c", "0", Fit.COMPATIBLE),
        ("c", "99.0", Fit.TOO_NEW),
    ],
)
def test_the_floor_counts_whatever_the_revision_is(found: str | None, floor: str, fit: Fit) -> None:
    assert fit is _fit(found, floor, needed="b", known=frozenset({"a", "b"}))
