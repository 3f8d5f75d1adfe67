import pytest

from mcp_lora.evaluate.stats import difference, proportion


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_a_rate_has_wilsons_interval(right: int, count: int, low: float, high: float) -> None:
    """The example of Newcombe (1998), method 3."""
    found = proportion(right, count)
    assert (found.right, found.count, found.rate) == (right, count, right / count)
    assert (round(found.low, 4), round(found.high, 4)) == (low, high)


def test_a_difference_is_of_the_same_questions() -> None:
    both, only_first, only_second, neither = 10, 2, 9, 4
    first = [True] * (both + only_first) + [False] * (only_second + neither)
    second = [True] * both + [False] * only_first + [True] * only_second + [False] * neither
    found = difference(first, second)
    assert (found.gained, found.lost, found.difference) == (9, 2, 7 / 25)
    # McNemar's exact test by hand: 2 (C(11,0) + C(11,1) + C(11,2)) / 2^11
    assert found.p == pytest.approx(2 * (1 + 11 + 55) / 2**11)
    # by hand: 7 / 27 ± 1.96 √(12 - 49 / 27) / 27
    assert (found.low, found.high) == (pytest.approx(0.0276, abs=1e-4), pytest.approx(0.4909, abs=1e-4))
    back = difference(second, first)
    assert (back.difference, back.low, back.p) == (-found.difference, pytest.approx(-found.high), found.p)


def test_models_that_agree_do_not_differ() -> None:
    found = difference([True, False], [True, False])
    assert (found.gained, found.lost, found.difference, found.p) == (0, 0, 0, 1)
    assert found.low < 0 < found.high
    assert -1 <= difference([False], [True]).low <= difference([False], [True]).high <= 1
