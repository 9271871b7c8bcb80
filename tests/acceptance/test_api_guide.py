"""docs/api.md does as it is printed: every command of it, in order, as a reader would run it."""

import json
import re
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from tests.acceptance.conftest import with_password
from tests.acceptance.service import KEY, ROOT, Service, wait_for
from tests.factories import make_body

GUIDE = ROOT / "docs/api.md"
BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Where the guide says that the service is.
PRINTED = "http://127.0.0.1:8000"
# A refusal ends the script, and says which command it answered.
STRICT = """\
set -euo pipefail
trap 'echo "refused: $BASH_COMMAND" >&2' ERR
curl() { command curl --silent --show-error --fail --max-time 25 "$@"; }
"""
LONGEST = 300


@dataclass(frozen=True, slots=True)
class Reader:
    """Somebody with a shell in a checkout, who reads the guide from top to bottom."""

    home: Path
    service: Service

    def run(self, script: str) -> "subprocess.CompletedProcess[str]":
        at = f"http://127.0.0.1:{self.service.port}"
        return subprocess.run(
            ["bash", "-c", STRICT + script.replace(PRINTED, at)],
            cwd=self.home,
            capture_output=True,
            text=True,
            timeout=LONGEST,
            check=False,
        )


@pytest.fixture(name="reader", scope="module")
def _reader(database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    if shutil.which("curl") is None or shutil.which("bash") is None:
        pytest.skip("the commands of docs/api.md want bash and curl, which are not installed")
    home = tmp_path_factory.mktemp("checkout")
    # As scripts/make_env.py writes it.
    operator = {"tokens": [secrets.token_urlsafe(32)], "scopes": ["read", "operate", "raw"]}
    local = secrets.token_urlsafe(32)
    tokens = json.dumps({"local": local, "operator": operator})
    (home / ".env").write_text(f"# Who may ask\nAPI_TOKENS='{tokens}'\n")
    settings = {
        "DATABASE_URL": with_password(database),
        "ATLAS_API_KEYS": json.dumps({"default": [KEY]}),
        "API_TOKENS": tokens,
        "CALLBACKS": "app.callbacks.audit_log:callbacks",
    }
    with Service("serve", home=home, **settings) as service:
        _trigger(service, local)
        yield Reader(home, service)


def _trigger(service: Service, token: str) -> None:
    """Send what the first steps of the README send, and see that everybody was told."""
    for event in ("envelope.sent", "envelope.signed", "envelope.signed"):
        body = make_body(event=event, envelope_id="first")
        assert 200 == service.deliver(body, KEY).status
    done = "/api/deliveries?envelope_id=first&state=done"
    for target in (done, "/api/events", "/api/envelopes?q=first"):
        wait_for(partial(_has_items, service, target, token), target)


def _has_items(service: Service, target: str, token: str) -> bool:
    return bool(service.ask(target, token).json()["items"])


def blocks() -> list[str]:
    return BLOCK.findall(GUIDE.read_text("utf-8"))


@pytest.mark.timeout(400)
class TestTheGuide:
    def test_has_commands_that_do_what_they_say(self, reader: Reader) -> None:
        done = reader.run("\n".join(blocks()))

        assert 0 == done.returncode, f"{done.stderr}\n{done.stdout}"

    def test_would_be_found_wrong(self, reader: Reader) -> None:
        """A refusal anywhere ends the script: else the test above would prove nothing."""
        done = reader.run(f'{blocks()[0]}\ncurl "$API/api/events" | cat\necho went on')

        assert 0 != done.returncode
        assert "refused" in done.stderr
        assert "went on" not in done.stdout
