"""The verbs of an operator, against a running service and the database behind it.

The service is a process of its own. The verbs run in this one, in a thread: there are many,
and the start of an interpreter costs more than all that they do.
"""

import json
import os
import re
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from app.cli import main
from tests.acceptance.service import (
    BETA_KEY,
    KEY,
    OLD_KEY,
    ROOT,
    SECRETS,
    START_DEADLINE,
    TOKEN,
    Service,
    environment,
    run,
    wait_for,
)
from tests.factories import make_body, new_envelope_id
from tests.postgres import free_port

STRANGE_KEY = "atlas_live_fedcba9876543210fedcba9876543210"
NOBODY = "00000000-0000-7000-8000-000000000000"
CALLBACKS = '''
"""One callback that succeeds, one that never will, and one that will once it is mended."""

from pathlib import Path

from app.callbacks import Callbacks, Event, GiveUp

MENDED = Path(__file__).with_name("mended")

callbacks = Callbacks()


@callbacks.on("envelope.*")
async def onboarding(event: Event) -> None: ...


@callbacks.on("contract.extracted")
def filing(event: Event) -> None:
    raise GiveUp("the cabinet is full")


@callbacks.on("survey.mended")
async def mending(event: Event) -> None:
    if not MENDED.exists():
        raise GiveUp("broken")
'''


@dataclass(frozen=True, slots=True)
class Said:
    """How a verb ended, and what it printed."""

    code: int
    out: str
    err: str

    @property
    def is_readable(self) -> bool:
        """Whether it is for a person; a traceback is for nobody."""
        return "Traceback" not in self.out + self.err and not any(
            secret in self.out + self.err for secret in SECRETS
        )


class Operator:
    """Somebody at a terminal that has the settings of the service."""

    def __init__(
        self,
        service: Service,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        self.service = service
        self._capsys = capsys
        self._monkeypatch = monkeypatch

    def say(self, *arguments: str, **settings: str) -> Said:
        """Run a verb to its end."""
        given = environment({**self.service.settings, **settings})
        with self._monkeypatch.context() as patch, ThreadPoolExecutor(1) as thread:
            for name in os.environ.keys() - given.keys():
                patch.delenv(name)
            for name, value in given.items():
                patch.setenv(name, value)
            patch.setattr(sys, "argv", ["app", *arguments])
            patch.setattr(sys, "path", [*given["PYTHONPATH"].split(os.pathsep), *sys.path])
            patch.setattr("app.telemetry._adopt_standard_logging", lambda _: None)
            code = thread.submit(_exit_code).result()
        printed = self._capsys.readouterr()
        return Said(code, printed.out, printed.err)

    def trigger(self, *arguments: str, **settings: str) -> Said:
        door = f"http://127.0.0.1:{self.service.port}/webhooks/atlas"
        return self.say("trigger", "--url", door, *arguments, **settings)

    def listed(self, what: str, *filters: str) -> list[dict[str, Any]]:
        said = self.say(what, "list", "--json", *filters)
        assert said.code == 0, said.err
        listed: list[dict[str, Any]] = json.loads(said.out)
        return listed

    def delivery_of(self, envelope: str, state: str) -> dict[str, Any]:
        """Wait for the one delivery of an envelope to reach `state`."""
        filters = ("--envelope", envelope, "--state", state)
        wait_for(lambda: bool(self.listed("deliveries", *filters)), f"{envelope} is {state}")
        (delivery,) = self.listed("deliveries", *filters)
        return delivery


def _exit_code() -> int:
    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    return 0


EARLIER, NOW, LATER = (f"strftime('%Y-%m-%d %H:%M:%f000', 'now', '{n} hours')" for n in (-1, 0, 1))


def register(path: Path, **times: str) -> None:
    """Write down, as a process of another time would have, that it serves `filing`."""
    values = {"first_seen_at": EARLIER, "swept_at": EARLIER, **times}
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(
            f"INSERT INTO callbacks (name, patterns, {', '.join(values)}) "  # noqa: S608
            f"VALUES ('filing', '[\"*\"]', {', '.join(values.values())})"
        )


@pytest.fixture(name="callbacks", scope="module")
def _callbacks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("callbacks")
    (folder / "cli_callbacks.py").write_text(CALLBACKS)
    return {"CALLBACKS": "cli_callbacks:callbacks", "PYTHONPATH": str(folder)}


@pytest.fixture(name="service", scope="module")
def _service(
    database: str, callbacks: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    home = tmp_path_factory.mktemp("service")
    with Service("serve", home=home, DATABASE_URL=database, **callbacks) as service:
        yield service.wait_until_known("filing", "mending", "onboarding")


@pytest.fixture(name="operator")
def _operator(
    service: Service, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Operator:
    return Operator(service, capsys, monkeypatch)


@pytest.fixture(name="idle")
def _idle(
    sqlite_url: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Operator:
    """An operator of a service that was never started."""
    service = Service("serve", home=tmp_path, DATABASE_URL=sqlite_url)
    return Operator(service, capsys, monkeypatch)


@pytest.fixture(name="envelope")
def _envelope() -> str:
    return new_envelope_id()


class TestProcess:
    def test_ends_with_one_line_and_a_status(self, idle: Operator) -> None:
        """The one that is really started: everything else in here calls what it calls."""
        said = run("events", "show", NOBODY, seconds=START_DEADLINE, **idle.service.settings)

        assert (2, "") == (said.returncode, said.stdout)
        assert f"error: there is no event {NOBODY} here\n" == said.stderr


class TestTrigger:
    def test_sends_what_the_service_records(self, operator: Operator, envelope: str) -> None:
        said = operator.trigger(
            "envelope.signed", "--envelope", envelope, "--set", "metadata.external_id=crm-7"
        )

        assert 0 == said.code, said.err
        assert "recorded" in said.out
        answer = operator.service.ask(f"/api/envelope/{envelope}", TOKEN).json()
        assert ("signed", "crm-7", True) == (
            answer["status"],
            answer["external_id"],
            answer["is_test"],
        )

    def test_says_where_to_look_next(self, operator: Operator, envelope: str) -> None:
        said = operator.trigger("envelope.sent", "--envelope", envelope)

        (event,) = operator.listed("events", "--envelope", envelope)
        port = operator.service.port
        assert f"python -m app events show {event['id']}" in said.err
        assert f"http://127.0.0.1:{port}/api/envelope/{envelope}/status" in said.err
        assert said.is_readable

    def test_sends_the_same_bytes_twice(self, operator: Operator, envelope: str) -> None:
        said = operator.trigger("envelope.viewed", "--envelope", envelope, "--duplicate")

        (event,) = operator.listed("events", "--envelope", envelope)
        assert ["recorded", "duplicate"] == [line.split()[1] for line in said.out.splitlines()]
        assert 1 == event["copies"]

    def test_sends_many_different_events(self, operator: Operator) -> None:
        said = operator.trigger("survey.answered", "--times", "25")

        assert "200 recorded: 25" in said.out
        events = operator.listed("events", "--type", "survey.answered")
        assert 25 == len({event["envelope_id"] for event in events})

    def test_goes_through_the_door_of_an_account(self, operator: Operator, envelope: str) -> None:
        said = operator.trigger("envelope.sent", "--account", "beta", "--envelope", envelope)

        assert 0 == said.code, said.err
        assert ["beta"] == [e["account"] for e in operator.listed("events", "--envelope", envelope)]

    def test_explains_a_refusal(self, operator: Operator) -> None:
        keys = json.dumps({"default": [STRANGE_KEY]})

        said = operator.trigger("envelope.signed", ATLAS_API_KEYS=keys)

        assert 1 == said.code
        assert "answered 401: the service does not know the key" in said.err
        assert STRANGE_KEY not in said.out + said.err

    def test_says_that_nobody_is_there(self, idle: Operator) -> None:
        said = idle.trigger("envelope.signed")

        assert 1 == said.code
        assert said.err.startswith("error: ")
        assert "make run" in said.err

    def test_prints_what_it_would_send(self, idle: Operator) -> None:
        said = idle.trigger("contract.extracted", "--print", "--envelope", "env_1")

        request, _, body = said.out.partition("\n\n")
        assert 0 == said.code
        assert "X-Atlas-Signature: sha256=" in request
        assert "env_1" == json.loads(body)["envelope_id"]

    def test_leaves_other_machines_alone(self, idle: Operator) -> None:
        said = idle.say("trigger", "envelope.signed", "--url", "http://192.0.2.1/webhooks/atlas")

        assert 2 == said.code
        assert "--yes" in said.err

    def test_sends_no_real_id_to_other_machines(self, idle: Operator) -> None:
        door = "http://192.0.2.1/webhooks/atlas"

        said = idle.say("trigger", "envelope.signed", "--url", door, "--yes", "--envelope", "env_1")

        assert 2 == said.code
        assert ["error"] == [line.split(":")[0] for line in said.err.splitlines()]
        assert "envelope_id is 'env_1'" in said.err


class TestEvents:
    def test_are_shown_with_all_that_came_of_them(self, operator: Operator, envelope: str) -> None:
        operator.trigger("contract.extracted", "--envelope", envelope, "--duplicate")
        delivery = operator.delivery_of(envelope, "dead")
        filters = ("--envelope", envelope, "--type", "contract.extracted")
        (event,) = operator.listed("events", *filters)

        said = operator.say("events", "show", event["id"])

        assert 0 == said.code, said.err
        for expected in ("contract.extracted", "milestone", delivery["id"], "the cabinet is full"):
            assert expected in said.out
        assert "copies          1, the last at " in said.out

    def test_give_their_bytes_only_if_asked(self, operator: Operator, envelope: str) -> None:
        body = make_body(envelope_id=envelope, sign_url="https://atlaswork.ai/sign/x?t=hidden-word")
        answer = operator.service.deliver(body, KEY).json()

        shown = operator.say("events", "show", answer["event_id"])
        raw = operator.say("events", "show", answer["event_id"], "--body")

        assert "hidden-word" not in shown.out
        assert f"{len(body)} bytes kept" in shown.out
        assert body.decode() == raw.out
        assert "may hold links that sign" in raw.err

    def test_that_were_not_understood_say_why(self, operator: Operator) -> None:
        answer = operator.service.deliver(b"[]", KEY).json()

        (event,) = operator.listed("events", "--effect", "quarantined")

        assert (answer["event_id"], "not_an_object") == (event["id"], event["reason"])
        assert "owed to no callback" in operator.say("events", "show", event["id"]).out

    def test_are_none_at_first(self, idle: Operator) -> None:
        assert "python -m app trigger" in idle.say("events", "list").err
        assert "leave out a filter" in idle.say("events", "list", "--type", "x").err
        assert "[]\n" == idle.say("events", "list", "--json").out

    def test_have_ids_that_can_be_read(self, idle: Operator) -> None:
        said = idle.say("events", "show", "first")

        assert 2 == said.code
        assert "no id of an event" in said.err

    def test_that_are_not_all_listed_say_so(self, operator: Operator) -> None:
        operator.trigger("envelope.sent", "--times", "3")

        some, one = (operator.say("events", "list", "--limit", n) for n in ("1000", "1"))

        assert 1 == len(one.out.splitlines()) - 1
        assert "there are more" in one.err
        assert "there are more" not in some.err
        assert 1 == len(operator.listed("events", "--limit", "1"))


class TestDeliveries:
    def test_that_are_dead_are_retried_and_discarded(
        self, operator: Operator, envelope: str
    ) -> None:
        operator.trigger("contract.extracted", "--envelope", envelope)
        dead = operator.delivery_of(envelope, "dead")

        retried = operator.say("deliveries", "retry", dead["id"])

        assert 0 == retried.code, retried.err
        wait_for(lambda: operator.delivery_of(envelope, "dead")["attempts"] == 2, "another attempt")
        discarded = operator.say("deliveries", "discard", dead["id"], "--reason", "filed by hand")
        assert 0 == discarded.code, discarded.err
        assert dead["id"] == operator.delivery_of(envelope, "discarded")["id"]
        shown = operator.say("deliveries", "show", dead["id"]).out.splitlines()
        acts = [line.split("\t") for line in shown[-2:]]
        assert [("delivery.retried", ""), ("delivery.discarded", "filed by hand")] == [
            (act[0], act[-1]) for act in acts
        ]

    def test_that_are_done_are_not_tried_again(self, operator: Operator, envelope: str) -> None:
        operator.trigger("envelope.sent", "--envelope", envelope)
        done = operator.delivery_of(envelope, "done")

        said = operator.say("deliveries", "retry", done["id"])

        assert "onboarding" == done["callback"]
        assert 1 == said.code
        assert "is done" in said.err

    def test_are_shown_with_every_attempt(self, operator: Operator, envelope: str) -> None:
        operator.trigger("contract.extracted", "--envelope", envelope)
        dead = operator.delivery_of(envelope, "dead")

        said = operator.say("deliveries", "show", dead["id"])
        as_json = json.loads(operator.say("deliveries", "show", dead["id"], "--json").out)

        assert 0 == said.code, said.err
        assert ["TRY", "1"] == [line.split("\t")[0] for line in said.out.splitlines()[-2:]]
        assert "the cabinet is full" in said.out
        assert (dead["id"], ["dead"]) == (
            as_json["id"],
            [each["verdict"] for each in as_json["tries"]],
        )

    def test_that_wait_are_shown_without_attempts(self, operator: Operator, envelope: str) -> None:
        operator.say("callbacks", "pause", "onboarding", "--reason", "a test")
        operator.trigger("envelope.sent", "--envelope", envelope)
        waiting = operator.delivery_of(envelope, "pending")

        said = operator.say("deliveries", "show", waiting["id"])

        operator.say("callbacks", "resume", "onboarding")
        assert "TRY" not in said.out
        assert "pending" in said.out

    def test_are_discarded_for_a_reason(self, idle: Operator) -> None:
        assert 2 == idle.say("deliveries", "discard", NOBODY).code
        assert "say why" in idle.say("deliveries", "discard", NOBODY, "--reason", " ").err

    def test_of_a_callback_that_is_misspelt_are_not_merely_none(self, operator: Operator) -> None:
        for verb in ("list", "failures"):
            said = operator.say("deliveries", verb, "--callback", "fling")

            assert 2 == said.code
            assert "registered: filing, mending, onboarding" in said.err

    def test_are_none_at_first(self, idle: Operator) -> None:
        assert "CALLBACKS" in idle.say("deliveries", "list").err
        assert "leave out a filter" in idle.say("deliveries", "list", "--state", "dead").err

    def test_have_ids_that_exist(self, idle: Operator) -> None:
        said = idle.say("deliveries", "retry", NOBODY)

        assert 2 == said.code
        assert f"there is no delivery {NOBODY}" in said.err


class TestDeadLetters:
    """What died of one cause, treated as one."""

    @pytest.fixture(name="mended")
    def _mended(self, callbacks: dict[str, str]) -> Iterator[Path]:
        mended = Path(callbacks["PYTHONPATH"]) / "mended"
        yield mended
        mended.unlink(missing_ok=True)

    def died(self, operator: Operator, count: int) -> str:
        """Let some deliveries die of one cause; give its fingerprint."""
        operator.trigger("survey.mended", "--times", str(count))
        wait_for(lambda: self.counts(operator).get("dead") == count, "all are dead")
        said = operator.say("deliveries", "failures", "--callback", "mending", "--json")
        (group,) = json.loads(said.out)
        assert (count, "survey.mended", "GiveUp: broken") == (
            group["count"],
            group["event_type"],
            group["error"],
        )
        return str(group["fingerprint"])

    def counts(self, operator: Operator) -> dict[str, int]:
        listed = operator.listed("deliveries", "--callback", "mending", "--limit", "1000")
        return dict(Counter(each["state"] for each in listed if each["state"] != "discarded"))

    def test_are_listed_by_their_cause(self, operator: Operator, envelope: str) -> None:
        operator.trigger("contract.extracted", "--envelope", envelope)
        operator.delivery_of(envelope, "dead")

        said = operator.say("deliveries", "failures", "--callback", "filing")

        header, line = said.out.splitlines()
        assert header.startswith("FINGERPRINT\tCALLBACK\tEVENT\tCOUNT")
        assert ["filing", "contract.extracted"] == line.split("\t")[1:3]
        assert "the cabinet is full" in line

    def test_are_tried_again_and_stop_if_the_failures_return(
        self, operator: Operator, mended: Path
    ) -> None:
        fingerprint = self.died(operator, 12)
        group = ("--group", fingerprint)

        again = operator.say("deliveries", "retry", *group, "--rate", "4")
        # Those that were due when it stopped are tried, too, and nothing is mended before.
        wait_for(lambda: self.counts(operator).get("dead") == 12, "all are dead again")
        mended.touch()
        mend = operator.say("deliveries", "retry", *group, "--rate", "100")
        over = operator.say("deliveries", "retry", *group)

        assert 1 == again.code
        assert "error: stopped: " in again.err
        assert "failed again: the cause is still there" in again.err
        assert 0 == mend.code, mend.err
        assert "12 of 12 tried again: 12 done, 0 failed again, 0 due; 0 still dead\n" == mend.out
        assert "/12 " in mend.err
        assert 2 == over.code
        assert "there are no dead letters" in over.err
        operator.say("deliveries", "discard", *group, "--reason", "over")

    def test_are_tried_once_though_the_operator_is_killed(
        self, operator: Operator, mended: Path
    ) -> None:
        fingerprint = self.died(operator, 30)
        done = self.counts(operator).get("done", 0)
        mended.touch()
        arguments = ("deliveries", "retry", "--group", fingerprint, "--rate")
        # So slowly that somebody who looks now and then sees some done and many dead.
        with subprocess.Popen(
            [sys.executable, "-m", "app", *arguments, "2"],
            cwd=ROOT,
            env=environment(operator.service.settings),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as killed:
            try:
                wait_for(
                    lambda: self.counts(operator).get("done", 0) > done + 2,
                    "some are done",
                    seconds=START_DEADLINE,
                )
            finally:
                killed.kill()

        assert self.counts(operator)["dead"] > 0
        finished = operator.say(*arguments, "500")

        assert 0 == finished.code, finished.err
        wait_for(lambda: self.counts(operator) == {"done": done + 30}, "all are done")
        listed = operator.listed("deliveries", "--callback", "mending", "--limit", "30")
        assert {2} == {each["attempts"] for each in listed}

    def test_are_given_up_for_a_reason(self, operator: Operator) -> None:
        group = ("--group", self.died(operator, 3))

        said = operator.say("deliveries", "discard", *group, "--reason", "test data")

        assert (0, "3 are discarded\n") == (said.code, said.out)
        assert (
            "nothing is dead" in operator.say("deliveries", "failures", "--callback", "mending").err
        )

    @pytest.mark.parametrize(
        "arguments, words",
        [
            ((), "name one delivery, or a whole cause"),
            ((NOBODY, "--group", "0123"), "name one delivery, or a whole cause"),
            (("--group", "-"), "--callback goes with --group -"),
            ((NOBODY, "--callback", "filing"), "--callback goes with --group -"),
        ],
    )
    def test_are_named_in_one_way(
        self, idle: Operator, arguments: tuple[str, ...], words: str
    ) -> None:
        said = idle.say("deliveries", "retry", *arguments)

        assert 2 == said.code
        assert words in " ".join(said.err.replace("│", " ").split())

    def test_without_a_fingerprint_are_those_of_a_callback(self, idle: Operator) -> None:
        said = idle.say("deliveries", "retry", "--group", "-", "--callback", "filing")

        assert 2 == said.code
        assert "no dead letters of callback 'filing' without a fingerprint" in said.err


class TestReplay:
    def test_owes_an_event_once_more(self, operator: Operator, envelope: str) -> None:
        operator.trigger("envelope.sent", "--envelope", envelope)
        operator.delivery_of(envelope, "done")
        (event,) = operator.listed("events", "--envelope", envelope)

        said = operator.say("events", "redispatch", event["id"], "--callback", "onboarding")

        assert 0 == said.code, said.err
        header, line = said.out.splitlines()
        assert "DELIVERY\tCALLBACK\tGENERATION" == header
        assert ["onboarding", "2"] == line.split("\t")[1:]
        listed = ("deliveries", "--envelope", envelope, "--state", "done")
        wait_for(lambda: len(operator.listed(*listed)) == 2, "it is delivered again")

    def test_to_whom_does_not_ask_is_refused(self, operator: Operator, envelope: str) -> None:
        operator.trigger("envelope.sent", "--envelope", envelope)
        (event,) = operator.listed("events", "--envelope", envelope)

        said = operator.say("events", "redispatch", event["id"], "--callback", "filing")

        assert 1 == said.code
        assert "filing asks for contract.extracted" in said.err

    def test_applies_an_event_again(self, operator: Operator, envelope: str) -> None:
        operator.trigger("envelope.sent", "--envelope", envelope)
        (event,) = operator.listed("events", "--envelope", envelope)

        said = operator.say("events", "reproject", event["id"])

        assert 0 == said.code, said.err
        assert f"{event['id']}: applied again; its envelope says all of it already" in said.out
        assert "owed to      nobody new" in said.out

    def test_accepts_a_contradiction(self, operator: Operator, envelope: str) -> None:
        said = {"envelope_id": envelope, "event_id": f"e-{envelope}"}
        operator.service.deliver(make_body(**said), KEY)
        body = make_body(**said, event="envelope.declined")
        conflict = operator.service.deliver(body, KEY).json()["event_id"]

        refused = operator.say("events", "reproject", conflict)
        accepted = operator.say("events", "reproject", conflict, "--accept")

        assert 1 == refused.code
        assert "--accept takes its word" in refused.err
        assert 0 == accepted.code, accepted.err
        assert "accepted; it overrules" in accepted.out
        assert "conflict → applied" in accepted.out
        answer = operator.service.ask(f"/api/envelope/{envelope}", TOKEN).json()
        assert "declined" == answer["status"]

    def test_owes_the_past_to_a_new_callback(self, operator: Operator, envelope: str) -> None:
        operator.trigger("contract.extracted", "--envelope", envelope)
        operator.delivery_of(envelope, "dead")
        backfill = ("deliveries", "backfill", "filing", "--since", "1h")

        counted = operator.say(*backfill, "--dry-run")
        said = operator.say(*backfill)

        assert "EVENT\tCOUNT\nall\t0\n" == counted.out
        assert (0, "0 of 0 are owed to filing now\n") == (said.code, said.out)

    def test_names_the_callbacks_there_are(self, operator: Operator) -> None:
        said = operator.say("deliveries", "backfill", "fling", "--since", "1h", "--until", "1m")

        assert 2 == said.code
        assert "registered: filing, mending, onboarding" in said.err
        assert "once a process that has it was started" in said.err

    def test_begins_at_a_time(self, idle: Operator) -> None:
        said = idle.say("deliveries", "backfill", "filing", "--since", "long ago")

        assert 2 == said.code
        assert "is no time" in said.err


class TestCallbacks:
    def test_are_listed_with_what_is_owed(self, operator: Operator) -> None:
        lines = [line.split("\t") for line in operator.say("callbacks", "list").out.splitlines()]
        listed = json.loads(operator.say("callbacks", "list", "--json").out)

        assert ["NAME", "WANTS", "SERVED"] == lines[0][:3]
        assert ["filing", "contract.extracted", "yes"] == lines[1][:3]
        assert ["FLOW", "flows"] == [line[-1] for line in lines[:2]]
        assert ["filing", "mending", "onboarding"] == [each["name"] for each in listed]
        assert [True] * 3 == [each["is_served"] for each in listed]

    def test_are_paused_and_resumed(self, operator: Operator, envelope: str) -> None:
        pause = ("callbacks", "pause", "onboarding", "--reason", "CRM is moving")
        paused = [operator.say(*pause).out for _ in range(2)]
        operator.trigger("envelope.sent", "--envelope", envelope)

        assert ["onboarding is paused\n", "onboarding was paused already\n"] == paused
        assert re.search(r"paused since \S+: CRM is moving", operator.say("callbacks", "list").out)
        assert operator.delivery_of(envelope, "pending")

        resumed = [operator.say("callbacks", "resume", "onboarding").out for _ in range(2)]

        assert ["onboarding is given its events\n", "nothing held onboarding\n"] == resumed
        assert operator.delivery_of(envelope, "done")

    def test_are_paused_and_forgotten_for_a_reason(self, idle: Operator) -> None:
        for verb in ("pause", "forget"):
            assert "say why" in idle.say("callbacks", verb, "filing", "--reason", " ").err

    def test_that_are_served_are_not_forgotten(self, operator: Operator) -> None:
        said = operator.say("callbacks", "forget", "filing", "--reason", "a test")

        assert 1 == said.code
        assert "take it out of CALLBACKS everywhere" in said.err

    def test_that_nobody_serves_are_forgotten(self, operator: Operator, tmp_path: Path) -> None:
        past = {"DATABASE_URL": f"sqlite:///{tmp_path}/past.db"}
        operator.say("migrate", **past)
        register(tmp_path / "past.db", last_seen_at=EARLIER)

        said = operator.say("callbacks", "forget", "filing", "--reason", "a test", **past)

        assert "filing is forgotten, and 0 deliveries to it are discarded\n" == said.out
        assert "no callbacks" in operator.say("callbacks", "list", **past).err

    def test_are_none_at_first(self, idle: Operator) -> None:
        assert "name a module in CALLBACKS" in idle.say("callbacks", "list").err
        assert 2 == idle.say("callbacks", "resume", "filing").code


class TestKeys:
    def test_show_which_one_can_be_withdrawn(self, operator: Operator) -> None:
        operator.trigger("envelope.sent", "--key-label", "new")

        def verdicts() -> dict[str, str]:
            lines = [line.split("\t") for line in operator.say("keys").out.splitlines()[1:]]
            return {line[0]: line[-1] for line in lines}

        wait_for(lambda: verdicts()["new"] == "still in use", "a match")
        assert "never matched" == verdicts()["old"]
        assert operator.say("keys").is_readable

    def test_move_to_an_account_of_another_name(
        self, database_url: str, callbacks: dict[str, str], tmp_path: Path
    ) -> None:
        """What stops the start names a command, and the command lets it start."""
        settings = {"DATABASE_URL": database_url, **callbacks}
        body = make_body(envelope_id="env_1")
        with Service("serve", home=tmp_path, **settings) as service:
            service.deliver(body, KEY)
        settings["ATLAS_API_KEYS"] = json.dumps({"acme": [KEY, OLD_KEY], "beta": [BETA_KEY]})
        settings["API_TOKENS"] = json.dumps({"office": TOKEN})
        port = str(free_port())
        refused = run("serve", "--port", port, seconds=START_DEADLINE, **settings)
        assert 2 == refused.returncode
        assert "keys rename default acme" in " ".join(refused.stderr.split())

        renamed = run("keys", "rename", "default", "acme", seconds=START_DEADLINE, **settings)

        assert 0 == renamed.returncode, renamed.stderr
        assert "default is acme now" in renamed.stdout
        with Service("serve", home=tmp_path, **settings) as service:
            assert "duplicate" == service.deliver(body, KEY).json()["outcome"]
            assert "acme" == service.ask("/api/envelope/env_1", TOKEN).json()["account"]

    def test_are_not_renamed_to_what_no_url_can_hold(self, idle: Operator) -> None:
        said = idle.say("keys", "rename", "default", "a/b")

        assert 2 == said.code
        assert "cannot stand in a URL" in said.err

    def test_may_be_none(self, idle: Operator) -> None:
        assert "ATLAS_API_KEY" in idle.say("keys", ATLAS_API_KEYS="{}").err


class TestCheck:
    def test_finds_nothing_wrong_with_a_running_service(self, operator: Operator) -> None:
        said = operator.say("check")

        lines = said.out.splitlines()
        failed = [line for line in lines if not line.startswith(("ok   ", "warn "))]
        # The server of the tests may lose what it committed: that is what makes it quick.
        assert all(line.startswith(("fail fsync", "fail full_page_writes")) for line in failed)
        assert bool(failed) == said.code
        assert "ok   callback 'filing' wants contract.extracted" in said.out
        unknown = "warn callback 'mending' wants survey.mended: Atlas is not known to send survey"
        assert unknown in said.out
        assert said.is_readable

    def test_notices_an_open_breaker(self, operator: Operator, tmp_path: Path) -> None:
        past = {"DATABASE_URL": f"sqlite:///{tmp_path}/past.db"}
        operator.say("migrate", **past)
        register(tmp_path / "past.db", last_seen_at=NOW, open_until=LATER)

        said = operator.say("check", **past)

        assert "warn deliveries to 'filing': too many fail: its breaker is open until" in said.out

    @pytest.mark.parametrize(
        "settings, text",
        [
            pytest.param({"ATLAS_API_KEY": "short"}, "fail settings: ATLAS_API_KEY", id="key"),
            pytest.param({"MAX_BODY_BYTES": "many"}, "fail settings: MAX_BODY", id="setting"),
            pytest.param({"CALLBACKS": "nowhere:callbacks"}, "fail callbacks: ", id="callbacks"),
            pytest.param({"DATABASE_URL": "mysql://x"}, "fail database: ", id="database"),
            pytest.param(
                {"DATABASE_URL": "sqlite:////no/such/folder/r.db"}, "fail database: ", id="folder"
            ),
            pytest.param(
                {"DATABASE_URL": "postgresql://u:hunter22@127.0.0.1:{port}/x"},
                "does not answer (",
                id="nobody-answers",
            ),
            pytest.param({"DATABASE_URL": "sqlite:///{home}/new.db"}, "app migrate", id="schema"),
        ],
    )
    def test_says_what_is_wrong_and_what_to_do(
        self, idle: Operator, tmp_path: Path, settings: dict[str, str], text: str
    ) -> None:
        given = {
            name: value.format(port=free_port(), home=tmp_path) for name, value in settings.items()
        }

        said = idle.say("check", **given)

        assert 1 == said.code
        assert text in said.out
        assert said.is_readable
        assert "hunter22" not in said.out + said.err

    def test_looks_at_the_address_for_migrations_too(self, idle: Operator, tmp_path: Path) -> None:
        nobody = f"postgresql://u:hunter22@127.0.0.1:{free_port()}/x"

        said = [
            idle.say("check", MIGRATE_DATABASE_URL=url)
            for url in (f"sqlite:///{tmp_path}/receiver.db", nobody, "mysql://x")
        ]

        assert "ok   MIGRATE_DATABASE_URL answers" in said[0].out
        assert "is MIGRATE_DATABASE_URL right?" in said[1].out
        assert "fail MIGRATE_DATABASE_URL: " in said[2].out
        assert [0, 1, 1] == [each.code for each in said]
        assert "hunter22" not in said[1].out + said[1].err

    def test_notices_a_key_that_is_known_by_another_account(self, operator: Operator) -> None:
        said = operator.say("check", ATLAS_API_KEYS=json.dumps({"acme": [KEY]}))

        assert 1 == said.code
        assert "keys rename default acme" in said.out


class TestHelp:
    @pytest.mark.parametrize(
        "verb",
        [
            "",
            "trigger",
            "check",
            "keys",
            "keys rename",
            "events list",
            "events show",
            "deliveries list",
            "deliveries retry",
            "deliveries discard",
        ],
    )
    def test_is_there_without_any_settings(self, idle: Operator, verb: str) -> None:
        said = idle.say(*verb.split(), "--help", ATLAS_API_KEYS="broken")

        assert 0 == said.code, said.err
        assert "Usage: " in said.out
