"""How a schema and a release relate."""

import pytest
from alembic.config import Config
from alembic.script import ScriptDirectory

from app import __version__
from app.store.schema import ROOT, Fit, _fit, _revisions


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


def test_the_revisions_are_those_that_alembic_knows() -> None:
    config = Config()
    config.set_main_option("script_location", str(ROOT / "migrations"))
    scripts = ScriptDirectory.from_config(config)

    known = frozenset(script.revision for script in scripts.walk_revisions())

    assert (scripts.get_current_head(), known) == _revisions()
