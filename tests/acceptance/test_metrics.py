"""What a scraper is told: everything that matters, to those with a token, in few series."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.raw import Answer, Connection, exchange, request
from tests.acceptance.service import (
    BETA_KEY,
    BETA_TOKEN,
    DOOR,
    KEY,
    OPERATOR_TOKEN,
    ROOT,
    TOKEN,
    Service,
)
from tests.factories import make_body, new_envelope_id, signed

SAMPLE = re.compile(r"^([a-z_]+)(?:\{(.*)\})? (\S+)$")
CALLBACKS = "app.callbacks.audit_log:callbacks"


def scrape(service: Service, token: str = TOKEN) -> dict[str, float]:
    """Every series, by its name and labels as they are written."""
    answer = service.ask("/metrics", token)
    assert 200 == answer.status
    lines = [line for line in answer.body.decode().splitlines() if not line.startswith("#")]
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


class TestMetrics:
    def test_want_a_token_that_may_read(self, service: Service) -> None:
        assert 401 == service.get("/metrics").status
        assert 401 == service.ask("/metrics", "nobody").status
        assert 403 == service.ask("/metrics", OPERATOR_TOKEN).status

    def test_are_not_for_a_token_of_some_accounts(self, service: Service) -> None:
        """They name the callbacks and the keys of all accounts, and count for all together."""
        answer = service.ask("/metrics", BETA_TOKEN)

        assert (403, True) == (answer.status, answer.is_problem)
        assert "accounts" in answer.json()["detail"]

    def test_are_in_the_text_format(self, service: Service) -> None:
        answer = service.ask("/metrics", TOKEN)

        assert "text/plain; version=0.0.4; charset=utf-8" == answer.headers["content-type"]
        assert "no-store" == answer.headers["cache-control"]
        for line in answer.body.decode().splitlines():
            assert line.startswith("# ") or SAMPLE.match(line), line

    def test_count_webhooks_by_outcome_and_reason(self, service: Service) -> None:
        before = scrape(service)
        body = make_body(envelope_id=new_envelope_id())
        for _ in range(2):
            service.deliver(body, KEY)
        service.deliver(b"no JSON", KEY)
        service.deliver(body, "a key that nobody was given")
        service.get(DOOR)
        exchange(service.port, b"this is no HTTP\r\n\r\n")
        after = scrape(service)

        for labels in (
            'outcome="recorded",reason=""',
            'outcome="duplicate",reason=""',
            'outcome="quarantined",reason="not_json"',
            'outcome="rejected",reason="mismatch"',
            'outcome="rejected",reason="method_not_allowed"',
            'outcome="rejected",reason="request_malformed"',
        ):
            name = f"atlas_webhooks_total{{{labels}}}"
            assert 1 == after[name] - before.get(name, 0), name
        waits = "atlas_webhook_acknowledgement_seconds_count"
        assert 3 == after[waits] - before[waits]

    def test_have_every_level(self, service: Service) -> None:
        levels = {
            "atlas_build",
            "atlas_calls",
            "atlas_database_pool_in_use",
            "atlas_database_pool_size",
            "atlas_delivery_oldest_due_seconds",
            "atlas_event_loop_lag_seconds",
            "atlas_feed_lag_seconds",
            "atlas_feed_position",
            "atlas_levels_age_seconds",
            "atlas_pending_bytes",
            "atlas_pending_events",
            "atlas_waiters",
            "process_resident_memory_bytes",
        }

        # Those of the database come once it has answered.
        service.wait_until(
            lambda: levels <= {name.partition("{")[0] for name in scrape(service)}, "all of them"
        )

    def test_stay_few_whatever_strangers_send(self, service: Service) -> None:
        """Case 179: types, paths and methods that nobody has heard of.

        What ten thousand do, the unit tests show.
        """
        with Connection(service.port) as connection:
            for number in range(300):
                event = f"envelope.odd_{number}"
                body = make_body(event=event, envelope_id=f"env_odd_{number % 10}")
                connection.send(request("POST", DOOR, [signed(body, KEY)], body))
                # Where the disk is busy it may be too late, and is counted as that.
                assert connection.read().status in {200, 503}
            for number in range(400):
                connection.send(request("GET", f"/odd/{number}?x={number}"))
                assert 404 == connection.read().status
            for number in range(400):
                account = f"{DOOR}/odd{number}"
                connection.send(request("PURGE" if number % 2 else "PUT", account))
                assert 405 == connection.read().status

        found = scrape(service)

        assert len(found) <= 500
        assert not [name for name in found if "odd" in name]


class TestGuide:
    def test_has_every_metric_and_no_other(self, service: Service) -> None:
        text = service.ask("/metrics", TOKEN).body.decode()
        names = set(re.findall(r"^# TYPE (atlas_\S+)", text, re.MULTILINE))

        guide = (ROOT / "docs" / "metrics.md").read_text()
        described = set(re.findall(r"`(atlas_\w+)`", guide))

        assert names == described


class TestAttempts:
    def test_are_counted_by_the_process_that_works(self, sqlite_url: str, tmp_path: Path) -> None:
        with (
            Service("serve", "--no-work", home=tmp_path, DATABASE_URL=sqlite_url) as door,
            Service("work", home=tmp_path, DATABASE_URL=sqlite_url, CALLBACKS=CALLBACKS) as worker,
        ):
            expected = {
                'atlas_attempts_total{callback="audit_log",verdict="done"}': 1,
                # Of the database, which may have been asked before there was a callback.
                'atlas_breaker_state{callback="audit_log"}': 0,
            }
            door.deliver(make_body(), KEY)
            worker.wait_until(
                lambda: expected.items() <= scrape(worker).items(), "an attempt in the metrics"
            )
            found = scrape(worker)

        assert 1 == found["atlas_attempt_duration_seconds_count"]


class TestStats:
    def test_have_a_line_for_everything_from_the_beginning(self, service: Service) -> None:
        def told() -> Any:
            return service.ask("/api/stats?step=hour", TOKEN).json()

        # There are levels once the database has answered.
        service.wait_until(lambda: told().get("now") is not None, "levels")
        found = told()

        lines = {(line["name"], line["label"]): line for line in found["series"]}
        assert 60 == len(found["times"])
        assert {60} == {len(line["points"]) for line in lines.values()}
        for label in ("recorded", "duplicate", "conflict", "quarantined", "rejected", "refused"):
            assert ("webhooks", label) in lines
        assert ("attempts", "failed") in lines
        assert {
            "owed",
            "dead",
            "parked",
            "oldest_due_seconds",
            "feed_lag_seconds",
        } == found["now"].keys()

    def test_count_what_happened_to_the_accounts_of_the_token(self, service: Service) -> None:
        for key in (KEY, BETA_KEY, "a key that nobody was given"):
            service.deliver(make_body(event="envelope.viewed"), key)
        # Counts are written down now and then, perhaps between the second and the third.
        service.wait_until(lambda: totals(service, BETA_TOKEN)["recorded"] > 0, "counts")
        service.wait_until(lambda: totals(service, TOKEN)["rejected"] > 0, "what was refused")

        of_beta, of_all = totals(service, BETA_TOKEN), totals(service, TOKEN)

        assert "rejected" not in of_beta
        assert of_all["recorded"] > of_beta["recorded"] == 1

    def test_may_be_narrowed_to_an_account(self, service: Service) -> None:
        narrowed = totals(service, TOKEN, account="beta")

        assert "rejected" not in narrowed
        assert 404 == stats(service, BETA_TOKEN, account="default").status
        assert 404 == stats(service, TOKEN, account="nobody").status

    @pytest.mark.parametrize(
        "query",
        [
            "step=second",
            "from=2026-01-01T00:00:00Z&to=2026-01-03T00:00:00Z",
            "from=2026-01-01T00:00:00Z&to=2026-01-01T00:00:00Z",
            "from=2026-01-02T00:00:00Z&to=2026-01-01T00:00:00Z",
            "from=2026-01-01T00:00:00",
            "from=0001-01-01T00:00:00Z",
            "to=9999-12-31T23:59:59Z",
            "to=0001-01-01T00:00:00%2B14:00",
            "from=yesterday",
            f"from={'9' * 5000}",
        ],
    )
    def test_of_times_that_make_no_sense_are_refused(self, service: Service, query: str) -> None:
        answer = service.ask(f"/api/stats?{query}", TOKEN)

        assert 422 == answer.status
        assert answer.is_problem

    def test_may_have_as_many_steps_as_fit_a_picture(self, service: Service) -> None:
        query = "step=minute&from=2026-01-01T00:00:00Z&to=2026-01-02T01:00:00Z"

        found = service.ask(f"/api/stats?{query}", TOKEN).json()

        assert 1500 == len(found["times"])
        assert "2026-01-01T00:00:00Z" == found["from"] == found["times"][0]
        assert "2026-01-02T01:00:00Z" == found["to"]

    def test_outlive_the_process(self, sqlite_url: str, tmp_path: Path) -> None:
        with Service("serve", home=tmp_path, DATABASE_URL=sqlite_url) as first:
            first.deliver(make_body(), KEY)
            assert 0 == first.terminate()
        with Service("serve", home=tmp_path, DATABASE_URL=sqlite_url) as second:
            assert 1 == totals(second, TOKEN)["recorded"]


def stats(service: Service, token: str, *, account: str | None = None) -> Answer:
    headers = [(b"Atlas-Account", account.encode())] if account else []
    return service.ask("/api/stats?step=day", token, *headers)


def totals(service: Service, token: str, *, account: str | None = None) -> dict[str, int]:
    found = stats(service, token, account=account)
    assert 200 == found.status, json.dumps(found.json())
    lines = found.json()["series"]
    return {line["label"]: line["total"] for line in lines if line["name"] == "webhooks"}
