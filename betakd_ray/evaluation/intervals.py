"""How sure a score is: bootstrap intervals, and paired comparisons of two models on the same questions.

The unit is a question, or a group of questions that is right or wrong as a whole. Units are drawn within their stratum.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Metrics = Callable[[Mapping[str, Any]], Mapping[str, Any]]
Array = NDArray[np.float64]
Intervals = dict[str, tuple[float, float]]
"""Metric → ends of its 95% interval."""

RESAMPLES = 2000
"""Number of bootstrap resamples for an interval."""
PERMUTATIONS = 10_000
"""Number of random exchanges of two models' answers for a p-value."""
_AT_ONCE = 250


@dataclass(frozen=True)
class Tally:
    """Counts of each unit, from whose sums the metrics follow."""

    units: tuple[str, ...]
    names: tuple[str, ...]
    values: Array
    """Counts, [units, names]."""
    strata: NDArray[np.int64]
    """Number of each unit's stratum, [units]."""

    @classmethod
    def of(cls, units: Sequence[str], counts: Sequence[Mapping[str, float]], strata: Sequence[str]) -> "Tally":
        """Return the tally of units with their counts; a count that a unit lacks is 0."""
        names = tuple(dict.fromkeys(name for each in counts for name in each))
        column = {name: position for position, name in enumerate(names)}
        values = np.zeros((len(units), len(names)))
        for row, each in enumerate(counts):
            for name, value in each.items():
                values[row, column[name]] = value
        numbers = {name: position for position, name in enumerate(dict.fromkeys(strata))}
        return cls(tuple(units), names, values, np.array([numbers[name] for name in strata], dtype=np.int64))

    def metrics(self, formula: Metrics, weights: Array | None = None) -> dict[str, Any]:
        """Return the metrics of the sums; with weights [resamples, units], arrays of one number for each resample."""
        sums = self.values.sum(axis=0) if weights is None else (weights @ self.values).T
        return dict(formula(dict(zip(self.names, sums, strict=True))))


@dataclass(frozen=True)
class Comparison:
    """Difference of a metric between two models on the same questions."""

    metric: str
    difference: float
    """Second model minus first."""
    low: float
    high: float
    """Ends of the 95% interval of the difference, by a paired bootstrap."""
    p: float
    """Chance of a difference at least as large if the two models did not differ, by exchanging their answers."""


@dataclass(frozen=True)
class Compared:
    """Two models on the same questions."""

    benchmark: str
    """Name of the benchmark; empty for a packed question set."""
    metric: str
    model: str
    compared_with: str
    difference: float
    """Score of `model` minus that of `compared_with`."""
    low: float
    high: float
    """Ends of the 95% interval of the difference."""
    p: float
    """Chance of a difference at least as large if the two models did not differ."""

    @classmethod
    def of(cls, benchmark: str, model: str, compared_with: str, found: Comparison) -> "Compared":
        return cls(benchmark, found.metric, model, compared_with, found.difference, found.low, found.high, found.p)


def resampled(tally: Tally, formula: Metrics, *, seed: int, resamples: int = RESAMPLES) -> dict[str, Array]:
    """Return each metric's value in every bootstrap resample of the units."""
    parts = [tally.metrics(formula, weights) for weights in _weights(tally.strata, resamples, seed)]
    return {name: np.concatenate([np.atleast_1d(part[name]) for part in parts]) for name in parts[0]}


def interval(values: Array) -> tuple[float, float] | None:
    """Return the middle 95% of resampled values; None if the metric is defined in none of them."""
    defined = values[np.isfinite(values)]
    if not len(defined):
        return None
    low, high = np.quantile(defined, (0.025, 0.975))
    return float(low), float(high)


def compare(
    one: Tally, other: Tally, formula: Metrics, metric: str, *, seed: int, permutations: int = PERMUTATIONS
) -> Comparison:
    """Compare two models on the same units, by the metric."""
    one, other = _aligned(one, other)
    difference = float(other.metrics(formula)[metric] - one.metrics(formula)[metric])
    first, second = (resampled(each, formula, seed=seed)[metric] for each in (one, other))
    low, high = interval(second - first) or (difference, difference)
    exchanged = np.concatenate(list(_exchanged(one, other, formula, metric, permutations, seed)))
    # The margin keeps equal differences equal in spite of rounding.
    as_large = np.sum(np.abs(exchanged) >= abs(difference) - 1e-9)
    return Comparison(metric, difference, low, high, float((1 + as_large) / (1 + permutations)))


def _weights(strata: NDArray[np.int64], resamples: int, seed: int) -> Iterator[Array]:
    """Yield how often each unit is drawn, [some resamples, units], until there are `resamples`."""
    generator = np.random.default_rng(seed)
    members = [np.flatnonzero(strata == number) for number in np.unique(strata)]
    for start in range(0, resamples, _AT_ONCE):
        rows = min(_AT_ONCE, resamples - start)
        weights = np.zeros((rows, len(strata)))
        for units in members:
            drawn = generator.integers(len(units), size=(rows, len(units)))
            flat = drawn + len(units) * np.arange(rows)[:, None]
            weights[:, units] = np.bincount(flat.ravel(), minlength=rows * len(units)).reshape(rows, len(units))
        yield weights


def _exchanged(
    one: Tally, other: Tally, formula: Metrics, metric: str, permutations: int, seed: int
) -> Iterator[Array]:
    """Yield the differences after the two models' answers are exchanged in a random half of the units."""
    generator = np.random.default_rng(seed)
    differing = np.flatnonzero((one.values != other.values).any(axis=1))
    change = (other.values - one.values)[differing]
    names, sums = one.names, (one.values.sum(axis=0), other.values.sum(axis=0))
    for start in range(0, permutations, _AT_ONCE):
        rows = min(_AT_ONCE, permutations - start)
        moved = generator.integers(2, size=(rows, len(differing))).astype(np.float64) @ change
        first, second = (
            np.asarray(formula(dict(zip(names, total.T, strict=True)))[metric])
            for total in (sums[0] + moved, sums[1] - moved)
        )
        yield np.atleast_1d(second - first)


def _aligned(one: Tally, other: Tally) -> tuple[Tally, Tally]:
    """Return both with the same counts in the same order: a count that no answer gave is 0."""
    if one.units != other.units:
        raise ValueError("a paired comparison is of the same questions")
    names = tuple(dict.fromkeys((*one.names, *other.names)))

    def wide(tally: Tally) -> Tally:
        values = np.zeros((len(tally.units), len(names)))
        values[:, [names.index(name) for name in tally.names]] = tally.values
        return Tally(tally.units, names, values, tally.strata)

    return wide(one), wide(other)
