"""The faults of a run: as many as asked for, spread over it, the same for the same seed."""

from collections import Counter

from tests.faults.plan import AWAY, FIRST, LAST, Fault, Plan

PLAN = Plan(seed=1, events=10_000, kills=10, database_stops=3, freezes=4)


class TestPlan:
    def test_is_the_same_for_the_same_seed(self) -> None:
        assert PLAN.strikes() == PLAN.strikes()
        assert PLAN.strikes() != Plan(2, 10_000, kills=10, database_stops=3, freezes=4).strikes()

    def test_kills_and_freezes_are_shared_out_among_all_processes(self) -> None:
        struck = Counter((strike.fault, strike.target) for strike in PLAN.strikes())

        assert {
            (Fault.KILL_REPLICA, 0): 3,
            (Fault.KILL_WORKER, 0): 3,
            (Fault.KILL_REPLICA, 1): 2,
            (Fault.KILL_WORKER, 1): 2,
            (Fault.FREEZE_REPLICA, 0): 1,
            (Fault.FREEZE_WORKER, 0): 1,
            (Fault.FREEZE_REPLICA, 1): 1,
            (Fault.FREEZE_WORKER, 1): 1,
            (Fault.STOP_DATABASE, 0): 3,
        } == struck

    def test_a_single_process_gets_them_all(self) -> None:
        alone = Plan(1, 1000, kills=5, freezes=2, replicas=1, workers=0)

        assert {0} == {strike.target for strike in alone.strikes()}
        assert {Fault.KILL_REPLICA, Fault.FREEZE_REPLICA} == {s.fault for s in alone.strikes()}

    def test_they_are_in_order_and_leave_time_to_recover(self) -> None:
        moments = [strike.moment for strike in PLAN.strikes()]

        assert sorted(moments) == moments
        assert all(FIRST * 10_000 <= moment <= LAST * 10_000 for moment in moments)

    def test_what_is_struck_stays_away_for_as_long_as_its_kind_may(self) -> None:
        assert all(
            AWAY[strike.fault][0] <= strike.seconds <= AWAY[strike.fault][1]
            for strike in PLAN.strikes()
        )
