"""How rounds become one figure, and figures become verdicts."""

from dataclasses import replace

from tests.bench.measurement import Asked, Reads, Told, combine
from tests.bench.pairs import Comparison, Pair
from tests.bench.report import EMPTY, STATUS, TIMES, Results


def make_asked(route: str = STATUS, *, rate: float = 100.0, p50: float = 2.0) -> Asked:
    return Asked(
        route=route,
        connections=32,
        rate=rate,
        p50=p50,
        p99=9.0,
        cpu=100.0,
        database_cpu=50.0,
        load_cpu=10.0,
        crowd=0.0,
        answered=1_000,
    )


def make_told() -> Told:
    return Told(
        streams=10,
        polls=10,
        rate=80.0,
        rate_alone=100.0,
        cpu=500.0,
        cpu_alone=400.0,
        stream_memory=30.0,
        poll_memory=30.0,
        crowd=0.0,
        acknowledged=7,
        reach=[5.0],
    )


class TestCombine:
    def test_routes_that_took_turns_are_combined_one_by_one(self) -> None:
        rounds = [Reads([make_asked(EMPTY), make_asked(rate=rate)]) for rate in (10, 20, 90)]

        combined = combine(rounds)

        assert isinstance(combined, Reads)
        assert [(EMPTY, 100), (STATUS, 20)] == [(one.route, one.rate) for one in combined.asked]
        assert 3_000 == combined.asked[1].answered

    def test_the_times_of_all_rounds_are_kept_in_order(self) -> None:
        combined = combine([replace(make_told(), reach=[3.0, 9.0]), make_told()])

        assert isinstance(combined, Told)
        assert [3.0, 5.0, 9.0] == combined.reach
        assert 14 == combined.acknowledged


class TestResults:
    def test_a_hot_read_is_compared_with_the_empty_route(self) -> None:
        reads = Reads([make_asked(EMPTY, rate=200), make_asked(rate=80)])

        goals = Results([reads, make_told()]).goals()

        ratio, waiting = (next(g for g in goals if name in g.name) for name in (STATUS, "waiting"))
        assert 0.4 == ratio.value
        assert f"≥ 0.35 {TIMES}: met" == ratio.verdict(ratio.asked)
        assert f"≥ 0.6 {TIMES}: not met" == ratio.verdict(ratio.wanted)
        assert 0.8 == waiting.value

    def test_a_wrong_answer_is_a_fault(self) -> None:
        wrong = replace(make_asked(), faults=["it says otherwise"])

        assert ["it says otherwise"] == Results([Reads([wrong])]).faults()


class TestComparison:
    def test_a_route_that_got_slower_is_named_and_is_no_fault(self) -> None:
        slower = Pair((make_asked(), make_asked(p50=3.1)))

        compared = Comparison([slower, Pair((make_asked("stats"), make_asked("stats")))], [])

        assert "1 of 2" in compared.notes()[0]
        assert f"not: {STATUS} at 32" in compared.notes()[0]
        assert [] == compared.faults

    def test_a_route_that_gave_no_answer_does_not_meet_its_goal(self) -> None:
        silent = Pair((make_asked(), make_asked(p50=float("nan"))))

        assert silent.is_slow
