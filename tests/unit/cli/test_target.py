"""`trigger` goes to the right door, with the right key, and not astray."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from app.cli.sample import read_assignment
from app.cli.target import Target, choose_target
from app.cli.trigger import Recipe, explain, make_body
from app.errors import ConfigError
from app.settings import Settings

DOOR = "http://127.0.0.1:8000/webhooks/atlas"
REMOTE = "https://hooks.example.com/webhooks/atlas"
OLD = "old-0123456789abcdef-0123456789abcdef"
NEW = "new-0123456789abcdef-0123456789abcdef"
OTHER = "other-0123456789abcdef-0123456789abcdef"


def settings_with(*acme: dict[str, Any], **fields: Any) -> Settings:
    keys: Any = {"acme": list(acme) or [{"key": NEW, "label": "new"}], "other": [OTHER]}
    return Settings(_env_file=None, atlas_api_keys=keys, **fields)  # type: ignore[call-arg]


def target_of(
    url: str = DOOR,
    *,
    settings: Settings | None = None,
    account: str | None = None,
    key_label: str | None = None,
) -> Target:
    return choose_target(settings or settings_with(), url=url, account=account, key_label=key_label)


class TestDoor:
    def test_is_that_of_the_account(self) -> None:
        target = target_of(account="other")

        assert f"{DOOR}/other" == target.url
        assert OTHER.encode() == target.key.secret

    def test_is_named_once(self) -> None:
        assert f"{DOOR}/other" == target_of(f"{DOOR}/other/", account="other").url

    @pytest.mark.parametrize(
        "url",
        ["127.0.0.1:8000", "ftp://127.0.0.1/", "http://", "http://[", "http://x:99999/", ""],
    )
    def test_must_be_an_address(self, url: str) -> None:
        with pytest.raises(ConfigError, match="--url"):
            target_of(url)

    @pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "127.9.9.9"])
    def test_on_this_machine_has_the_api_beside_it(self, host: str) -> None:
        target = target_of(f"http://{host}:8000/webhooks/atlas")

        assert not target.is_remote
        assert f"http://{host}:8000" == target.api

    def test_may_have_the_api_on_another_port(self) -> None:
        assert "http://127.0.0.1:9000" == target_of(settings=settings_with(api_port=9000)).api

    @pytest.mark.parametrize("host", ["hooks.example.com", "10.0.0.1", "127.0.0.1.example.com"])
    def test_elsewhere_is_another_machine(self, host: str) -> None:
        assert target_of(f"https://{host}/webhooks/atlas").is_remote


class TestKey:
    def test_is_the_first_that_has_not_expired(self) -> None:
        past = datetime.now(UTC) - timedelta(days=1)
        settings = settings_with({"key": OLD, "not_after": past}, {"key": NEW, "label": "new"})

        assert "new" == target_of(settings=settings).key.label

    def test_may_be_an_expired_one_if_it_is_asked_for(self) -> None:
        past = datetime.now(UTC) - timedelta(days=1)
        settings = settings_with({"key": OLD, "label": "old", "not_after": past}, {"key": NEW})

        assert OLD.encode() == target_of(settings=settings, key_label="old").key.secret

    def test_that_does_not_exist_is_answered_with_those_that_do(self) -> None:
        with pytest.raises(ConfigError, match=r"new \(account acme\)") as caught:
            target_of(key_label="nobody")

        assert NEW not in str(caught.value)

    def test_has_to_be_there(self) -> None:
        with pytest.raises(ConfigError, match="ATLAS_API_KEY"):
            target_of(settings=Settings(_env_file=None))  # type: ignore[call-arg]

    def test_is_not_shown(self) -> None:
        assert NEW not in repr(target_of())


class TestBody:
    def body_of(
        self, *assignments: str, is_remote: bool = False, envelope: str | None = None
    ) -> Any:
        recipe = Recipe(
            "envelope.signed", envelope, [read_assignment(text) for text in assignments]
        )
        return json.loads(make_body(recipe, is_remote=is_remote))

    def test_may_say_on_this_machine_that_it_is_no_test(self) -> None:
        assert self.body_of("metadata.is_test=false")["metadata"]["is_test"] is False

    @pytest.mark.parametrize(
        "assignment",
        [
            "metadata.is_test=false",
            "metadata=null",
            "is_test=false",
            "isTest=false",
            "data.is_test=false",
            'data={"metadata": {"isTest": false}}',
        ],
    )
    def test_is_always_a_test_elsewhere(self, assignment: str) -> None:
        body = self.body_of(assignment, is_remote=True)

        assert body["is_test"] is True
        assert body["metadata"]["is_test"] is True
        assert "false" not in json.dumps(body)

    @pytest.mark.parametrize(
        "assignment",
        [
            "event_id=evt_1",
            "event_id=null",
            "event_id=7",
            "eventId=evt_1",
            "envelope_id=env_1",
            "id=env_1",
            "data.envelope_id=env_1",
            "data.envelope.id=env_1",
            'payload=[{"envelopeId": "env_1"}]',
        ],
    )
    def test_may_not_look_like_a_real_event_elsewhere(self, assignment: str) -> None:
        with pytest.raises(ConfigError, match="every id must begin with 'trigger-'"):
            self.body_of(assignment, is_remote=True)

    def test_may_not_be_about_a_real_envelope_elsewhere(self) -> None:
        with pytest.raises(ConfigError, match="envelope_id is 'env_1'"):
            self.body_of(envelope="env_1", is_remote=True)

    def test_may_have_ids_of_its_own_elsewhere(self) -> None:
        body = self.body_of("data.event_id=trigger-8", envelope="trigger-7", is_remote=True)

        assert ("trigger-7", "trigger-8") == (body["envelope_id"], body["data"]["event_id"])

    def test_is_another_one_each_time(self) -> None:
        assert self.body_of()["event_id"] != self.body_of()["event_id"]


class TestExplanation:
    @pytest.mark.parametrize("status", [301, 400, 401, 404, 405, 413, 500, 503])
    def test_names_status_and_place(self, status: int) -> None:
        text = explain(status, target_of(REMOTE))

        assert text.startswith(f"https://hooks.example.com answered {status}: ")
        assert "{" not in text

    def test_of_a_refused_signature_names_the_key_by_its_label(self) -> None:
        text = explain(401, target_of())

        assert "'new'" in text
        assert NEW not in text
