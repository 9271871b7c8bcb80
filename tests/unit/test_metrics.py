"""Metrics say what happened, and a stranger can make no series of them."""

import re

import pytest

from app.metrics import (
    MOST_CALLBACKS,
    MOST_KEYS,
    OTHER,
    Buckets,
    Metrics,
    Names,
    labelled,
    one,
)

STATES = ("pending", "running", "dead", "parked")
VERDICTS = ("done", "failed", "dead", "skipped")


@pytest.fixture(name="metrics")
def _metrics() -> Metrics:
    return Metrics(version="1.2.3")


def series(metrics: Metrics) -> dict[str, float]:
    """Every series as it is written, and its value."""
    lines = [line for line in metrics.write().decode().splitlines() if line[:1] != "#"]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


class TestNames:
    def test_beyond_the_most_are_one(self) -> None:
        names = Names(2)

        assert ["a", "b", OTHER, "a", OTHER] == [names(name) for name in "abcad"]


class TestBuckets:
    def test_hold_what_lies_in_them_or_below(self) -> None:
        buckets = Buckets("waits", "Waits", (1, 2))

        buckets.observe([0.5, 1.0, 1.5])
        buckets.observe([9.0])

        [family] = buckets.collect()
        counted = {sample.labels.get("le", sample.name): sample.value for sample in family.samples}
        assert {
            "1.0": 2,
            "2.0": 3,
            "+Inf": 4,
            "waits_count": 4,
            "waits_sum": 12,
        } == counted


class TestBatch:
    def test_is_counted_by_outcome_and_reason(self, metrics: Metrics) -> None:
        metrics.count_batch(
            {("recorded", ""): 2, ("quarantined", "not_json"): 1}, waits=[0.002, 0.002, 7.0]
        )
        metrics.count_refusal("rejected", "mismatch")

        found = series(metrics)
        assert 2 == found['atlas_webhooks_total{outcome="recorded",reason=""}']
        assert 1 == found['atlas_webhooks_total{outcome="quarantined",reason="not_json"}']
        assert 1 == found['atlas_webhooks_total{outcome="rejected",reason="mismatch"}']
        assert 2 == found['atlas_webhook_acknowledgement_seconds_bucket{le="5.0"}']
        assert 3 == found["atlas_webhook_acknowledgement_seconds_count"]
        assert 1 == found['atlas_webhook_batch_events_bucket{le="5.0"}']


class TestAttempts:
    def test_are_counted_by_callback_and_verdict(self, metrics: Metrics) -> None:
        metrics.count_attempts({("crm", "done"): 3, ("crm", "dead"): 1}, took={"crm": [0.5, 1.5]})

        found = series(metrics)
        assert 3 == found['atlas_attempts_total{callback="crm",verdict="done"}']
        assert 2.0 == found['atlas_attempt_seconds_total{callback="crm"}']
        assert 2 == found["atlas_attempt_duration_seconds_count"]


class TestGauge:
    def test_is_asked_at_each_look(self, metrics: Metrics) -> None:
        levels = {"a": 1.0}
        metrics.gauge("atlas_level", "A level", ["name"], lambda: labelled(levels))
        metrics.gauge("atlas_depth", "A depth", [], lambda: one(3))

        before, levels["a"] = series(metrics), 2.0

        assert 1.0 == before['atlas_level{name="a"}']
        assert 2.0 == series(metrics)['atlas_level{name="a"}']
        assert 3.0 == before["atlas_depth"]


class TestTotal:
    def test_is_a_counter_that_somebody_else_counts(self, metrics: Metrics) -> None:
        metrics.total("atlas_drift", "News", ["kind"], lambda: labelled({"field": 2}))

        assert 2.0 == series(metrics)['atlas_drift_total{kind="field"}']


class TestRegistry:
    def test_is_of_its_own_for_each_process(self) -> None:
        """A test may build several; a registry of the whole interpreter would refuse it."""
        one_, other = Metrics(version="1"), Metrics(version="1")

        one_.count_refusal("rejected", "absent")

        name = 'atlas_webhooks_total{outcome="rejected",reason="absent"}'
        assert name in series(one_)
        assert name not in series(other)

    def test_names_every_metric_as_prometheus_wants_it(self, metrics: Metrics) -> None:
        names = re.findall(r"^# TYPE (\S+) (\w+)$", metrics.write().decode(), re.MULTILINE)

        for name, kind in names:
            assert name.startswith(("atlas_", "process_"))
            assert name.endswith("_total") == (kind == "counter"), name

    def test_tells_the_release(self, metrics: Metrics) -> None:
        assert 1.0 == series(metrics)['atlas_build{version="1.2.3"}']


class TestSeries:
    def test_stay_few_whatever_is_counted(self, metrics: Metrics) -> None:
        """Ten thousand names of each kind: a label that anybody chooses fills the memory."""
        for number in range(10_000):
            name = f"name-{number}"
            metrics.count_batch({("quarantined", name): 1}, waits=[0.1])
            metrics.count_refusal("rejected", name)
            metrics.count_attempts({(name, verdict): 1 for verdict in VERDICTS}, took={name: [0.1]})
            metrics.count_answer(200 + number % 20)
            metrics.shown_callback(name)
        shown = [metrics.shown_callback(f"name-{n}") for n in range(10_000)]
        metrics.gauge(
            "atlas_deliveries",
            "As the database has them",
            ["callback", "state"],
            lambda: {(name, state): 1.0 for name in shown for state in STATES},
        )
        metrics.gauge(
            "atlas_breaker_state", "", ["callback"], lambda: labelled(dict.fromkeys(shown, 0.0))
        )

        assert MOST_CALLBACKS + 1 == len(set(shown))
        # Others are gauges without labels, and keys.
        assert len(series(metrics)) + MOST_KEYS + 15 <= 500
