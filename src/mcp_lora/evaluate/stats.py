"""Accuracy with 95 % intervals, and whether two models differ significantly on the same questions."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

_Z = 1.959964  # of the normal distribution, for 95 %


@dataclass(frozen=True)
class Proportion:
    """`right` of `count` answers as a proportion: `rate`, from 0 to 1, with its 95 % interval."""

    right: int
    count: int
    rate: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """What the second of two models gains over the first on the same questions.

    `gained` and `lost` count the questions that only the second, or only the first, answers right;
    `difference` is that of the proportions, from -1 to 1, with its 95 % interval `low` to `high`; `p` is the
    two-sided p-value of McNemar's exact test, of the null hypothesis that both models are equally accurate.
    """

    gained: int
    lost: int
    difference: float
    low: float
    high: float
    p: float


def proportion(right: int, count: int) -> Proportion:
    """Return a proportion with Wilson's score interval (Wilson 1927); `count` is at least 1."""
    from scipy.stats import binomtest

    interval = binomtest(right, count).proportion_ci(method="wilson")
    return Proportion(right, count, right / count, float(interval.low), float(interval.high))


def difference(first: Sequence[bool], second: Sequence[bool]) -> Difference:
    """Compare two models' answers to the same questions, at least one.

    The interval is Agresti and Min's for matched pairs (Statistics in Medicine 24, 2005): Wald's after
    adding half a question to each of the four cells.
    """
    from scipy.stats import binomtest

    pairs = Counter(zip(first, second, strict=True))
    gained, lost = pairs[False, True], pairs[True, False]
    padded = len(first) + 2
    middle = (gained - lost) / padded
    reach = _Z * sqrt(gained + lost + 1 - (gained - lost) ** 2 / padded) / padded
    low, high = max(-1.0, middle - reach), min(1.0, middle + reach)
    p = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    return Difference(gained, lost, (gained - lost) / len(first), low, high, float(p))
