"""The picture of a run is well-formed, and shows what happened where it happened."""

from array import array
from xml.etree import ElementTree as ET

import pytest

from tests.faults.ledger import Ledger, Mark, Second
from tests.faults.picture import draw, percentile, points
from tests.faults.plan import Fault

SVG = "{http://www.w3.org/2000/svg}"


def second(acknowledged: int, *times: float) -> Second:
    return Second(acknowledged, times=array("f", times))


def make_ledger(seconds: int = 20) -> Ledger:
    ledger = Ledger()
    ledger.ended = ledger.began + seconds
    ledger.seconds = [second(100, 0.002, 0.01, 0.5) for _ in range(seconds)]
    return ledger


class TestPicture:
    def test_every_fault_is_a_mark(self) -> None:
        ledger = make_ledger()
        quiet = len(drawn(ledger).findall(f"{SVG}rect"))
        ledger.marks += [Mark(fault, 0, 5.0, 6.0) for fault in Fault]

        assert quiet + len(Fault) == len(drawn(ledger).findall(f"{SVG}rect"))

    def test_a_second_without_answers_is_a_gap_and_not_a_zero(self) -> None:
        ledger = make_ledger()
        whole = len(drawn(ledger).findall(f"{SVG}polyline"))
        ledger.seconds[10] = second(0)

        assert whole + 3 == len(drawn(ledger).findall(f"{SVG}polyline"))

    def test_a_run_without_anything_can_be_drawn(self) -> None:
        assert drawn(make_ledger(0)) is not None

    def test_it_has_a_title_for_those_who_cannot_see_it(self) -> None:
        title = drawn(make_ledger()).find(f"{SVG}title")

        assert title is not None
        assert "a < b" == title.text


def drawn(ledger: Ledger) -> ET.Element:
    return ET.fromstring(draw(ledger, title="a < b"))  # noqa: S314  # our own picture


class TestPoints:
    def test_a_short_run_has_one_for_each_second(self) -> None:
        [first, last] = points([second(10, 0.25), second(30)])

        assert (0, 10, (0.25, 0.25, 0.25)) == (first.at, first.acknowledged, first.times)
        assert (1, 30, None) == (last.at, last.acknowledged, last.times)

    def test_of_a_long_one_seconds_are_put_together(self) -> None:
        shown = points([second(number) for number in range(100)], most=10)

        assert [4.5, 14.5] == [point.acknowledged for point in shown[:2]]
        assert 10 == len(shown)


@pytest.mark.parametrize(
    "share, value",
    [
        pytest.param(0.5, 2, id="half"),
        pytest.param(0.75, 3, id="three quarters"),
        pytest.param(0.99, 4, id="nearly all"),
        pytest.param(0.0, 1, id="none"),
    ],
)
def test_percentile(share: float, value: int) -> None:
    assert value == percentile([1, 2, 3, 4], share)
