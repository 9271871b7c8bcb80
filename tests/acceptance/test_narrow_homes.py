"""A poor place to run in: no locale, few descriptors, little memory, nothing to write to."""

import os
import resource
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.acceptance.conftest import with_password
from tests.acceptance.service import KEY, ROOT, TOKEN, Service, environment, free_port, wait_for
from tests.acceptance.tables import bodies_of
from tests.factories import make_body, new_envelope_id

POOR = {
    "LC_ALL": "C",
    "LANG": "C",
    "PYTHONUTF8": "0",
    "PYTHONCOERCECLOCALE": "0",
    "TZ": "Antarctica/Troll",
}
MEGABYTE = 1024 * 1024


class TestPoorPlace:
    def test_is_enough_to_serve(self, database_url: str, tmp_path: Path) -> None:
        """Text of any kind is logged and answered, whatever the locale says can be written."""
        service = Service("serve", home=tmp_path, DATABASE_URL=with_password(database_url), **POOR)
        service.start()
        limits = {resource.RLIMIT_NOFILE: 256, resource.RLIMIT_DATA: 256 * MEGABYTE}
        for kind, limit in limits.items():
            resource.prlimit(service.process.pid, kind, (limit, limit))
        envelope_id = f"{new_envelope_id()} ünï ✍"
        with ExitStack() as stack:
            stack.callback(service.check_secrecy)
            stack.callback(service.terminate)
            service.wait_until_ready()
            body = make_body(envelope_id=envelope_id, metadata={"name": "Ødegård ✍"})
            service.wait_until(lambda: service.deliver(body, KEY).status == 200, "an event")
            answer = service.ask("/api/envelopes", TOKEN)

        assert [body] == bodies_of(database_url, envelope_id)
        assert [envelope_id] == [item["envelope_id"] for item in answer.json()["items"]]
        assert envelope_id in {line["envelope_id"] for line in service.lines("webhook.received")}
        assert [] == service.errors()

    def test_may_be_read_only(self, postgres_url: str, tmp_path: Path) -> None:
        port = free_port()
        script = f'mount --bind "{ROOT}" "{ROOT}" && mount -o remount,ro,bind "{ROOT}" && exec "$@"'
        inside = ["unshare", "--mount", "sh", "-c", script, "sh"]
        probe = f'touch "{ROOT}/.probe" 2>/dev/null && rm "{ROOT}/.probe" && exit 3; true'
        if shutil.which("unshare") is None or os.geteuid() != 0:
            pytest.skip("mounting needs root and unshare")
        if subprocess.run(
            [*inside, "sh", "-c", probe], capture_output=True, check=False
        ).returncode:
            pytest.skip("nothing can be mounted here")
        service = Service("serve", home=tmp_path)
        service.port = port
        command = [sys.executable, "-m", "app", "serve", "--port", str(port)]
        settings = environment({"DATABASE_URL": postgres_url})
        with (tmp_path / "log").open("wb") as log, ExitStack() as stack:
            process = subprocess.Popen([*inside, *command], cwd=ROOT, env=settings, stdout=log)
            stack.callback(process.wait, 60)
            stack.callback(process.terminate)
            wait_for(service.is_ready, "ready without anything to write to", seconds=90)
            status = service.deliver(make_body(), KEY).status

        assert 200 == status
        lines = (tmp_path / "log").read_bytes().splitlines()
        errors = [line for line in lines if b'"level":"error"' in line]
        # Where much else runs, the database may be too late for whoever asks at the start.
        assert not [line for line in errors if b'"service.not_ready"' not in line]
