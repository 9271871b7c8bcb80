"""`.env` is made once, for one reader, and then belongs to that reader."""

import json
import os
import stat
import subprocess
from pathlib import Path

import pytest
from dotenv import dotenv_values

from scripts.make_env import is_open_to_others, make_env, next_steps


@pytest.fixture(name="env")
def _env(tmp_path: Path) -> Path:
    return tmp_path / ".env"


class TestNewFile:
    def test_has_what_the_service_needs(self, env: Path) -> None:
        added = make_env(env, {})

        values = dotenv_values(env)
        assert ["ATLAS_API_KEY", "API_TOKENS", "CALLBACKS"] == added
        assert added == list(values)
        assert len("local_") + 64 == len(values["ATLAS_API_KEY"] or "")
        assert (values["ATLAS_API_KEY"] or "").startswith("local_")
        tokens = json.loads(values["API_TOKENS"] or "")
        assert 32 <= len(tokens["local"])
        assert 32 <= len(tokens["operator"]["tokens"][0])
        assert ["read", "operate", "raw"] == tokens["operator"]["scopes"]

    def test_can_be_read_by_its_owner_only(self, env: Path) -> None:
        """Whatever the umask is."""
        before = os.umask(0)
        try:
            make_env(env, {})
        finally:
            os.umask(before)

        assert 0o600 == stat.S_IMODE(env.stat().st_mode)
        assert not is_open_to_others(env)

    def test_has_keys_of_its_own(self, env: Path, tmp_path: Path) -> None:
        other = tmp_path / "other"

        make_env(env, {})
        make_env(other, {})

        mine, theirs = dotenv_values(env), dotenv_values(other)
        for secret in ("ATLAS_API_KEY", "API_TOKENS"):
            assert mine[secret] != theirs[secret]


class TestFileThatIsThere:
    def test_is_left_alone_if_nothing_is_missing(self, env: Path) -> None:
        make_env(env, {})
        before = env.read_bytes()

        added = make_env(env, {})

        assert [] == added
        assert before == env.read_bytes()

    def test_gets_new_names_at_its_end(self, env: Path) -> None:
        mine = "# mine\nATLAS_API_KEY = 'a key of my own'\nOTHER=1"
        env.write_text(mine)

        added = make_env(env, {})

        assert ["API_TOKENS", "CALLBACKS"] == added
        assert env.read_text().startswith(mine + "\n")
        assert "a key of my own" == dotenv_values(env)["ATLAS_API_KEY"]

    def test_keeps_even_an_empty_value(self, env: Path) -> None:
        """The service refuses it by name, which helps more than a key from nowhere."""
        env.write_text("export ATLAS_API_KEY=\n")

        make_env(env, {})

        assert not dotenv_values(env)["ATLAS_API_KEY"]

    def test_keeps_its_mode_and_is_reported(self, env: Path) -> None:
        env.write_text("ATLAS_API_KEY=given\n")
        env.chmod(0o644)

        make_env(env, {})

        assert 0o644 == stat.S_IMODE(env.stat().st_mode)
        assert is_open_to_others(env)


class TestGivenOtherwise:
    @pytest.mark.parametrize(
        "name", ["ATLAS_API_KEY", "ATLAS_API_KEYS", "ATLAS_API_KEY_FILE", "ATLAS_API_KEYS_FILE"]
    )
    def test_a_key_in_the_environment_needs_no_line(self, env: Path, name: str) -> None:
        added = make_env(env, {name: "given"})

        assert ["API_TOKENS", "CALLBACKS"] == added
        assert "ATLAS_API_KEY" not in dotenv_values(env)

    def test_several_keys_in_the_file_need_no_single_one(self, env: Path) -> None:
        """One more account would appear out of nothing."""
        env.write_text('ATLAS_API_KEYS=\'{"acme": ["a-key-that-is-long-enough"]}\'\n')

        assert ["API_TOKENS", "CALLBACKS"] == make_env(env, {})

    def test_without_anything_missing_there_is_no_file(self, env: Path) -> None:
        make_env(env, {"ATLAS_API_KEY": "given", "API_TOKENS": "{}", "CALLBACKS": ""})

        assert not env.exists()


class TestNextSteps:
    @pytest.mark.parametrize("port", ["8000", "9000"])
    def test_name_the_port(self, port: str) -> None:
        assert f"http://127.0.0.1:{port}/api/envelope/first" in next_steps(port)

    def test_take_the_token_out_of_the_file(self, env: Path) -> None:
        make_env(env, {})
        command = next(
            line.strip() for line in next_steps("8000").splitlines() if "TOKEN=$(" in line
        )

        said = subprocess.run(
            ["/bin/sh", "-c", f'{command}; printf %s "$TOKEN"'],
            cwd=env.parent,
            capture_output=True,
            text=True,
            check=True,
        )

        assert json.loads(dotenv_values(env)["API_TOKENS"] or "")["local"] == said.stdout
