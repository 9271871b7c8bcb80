"""`.env.example` says the truth about every default."""

import re
from pathlib import Path

import pytest

from app.settings import SECRETS, Settings

EXAMPLE = Path(__file__).resolve().parents[3] / ".env.example"


class TestExample:
    def test_taken_as_it_is_changes_nothing(self, tmp_path: Path) -> None:
        named = re.findall(r"^#([A-Z_]+=.+)$", EXAMPLE.read_text(), re.MULTILINE)
        path = tmp_path / ".env"
        path.write_text("\n".join(named))

        taken = Settings(_env_file=path)  # type: ignore[call-arg]

        assert len(named) > 10
        assert Settings(_env_file=None) == taken  # type: ignore[call-arg]

    @pytest.mark.parametrize("name", sorted(set(SECRETS) - {"DATABASE_URL"}))
    def test_holds_no_secret(self, name: str) -> None:
        assert re.search(rf"^#{name}=$", EXAMPLE.read_text(), re.MULTILINE)
