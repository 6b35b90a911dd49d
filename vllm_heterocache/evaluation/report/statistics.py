"""Intervals and paired tests for scores."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

RESAMPLES = 10_000
Z95 = 1.959963984540054


@dataclass(frozen=True)
class Comparison:
    """A paired test against stock: pairs in which one side is better, and the two-sided p."""

    wins: int
    losses: int
    pairs: int
    p: float
    test: str  # "mcnemar" or "bootstrap"


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion; (0, 1) without trials."""
    if not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes of {trials} trials")
    if trials == 0:
        return 0.0, 1.0
    share, z2 = successes / trials, Z95**2
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    spread = math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    half = Z95 * spread / (1 + z2 / trials)
    # The interval of 0 or of all trials begins or ends there, whatever the rounding says.
    low = 0.0 if successes == 0 else centre - half
    return low, 1.0 if successes == trials else centre + half


def mcnemar(wins: int, losses: int) -> float:
    """Exact two-sided p of `wins` against `losses` among pairs that differ: a fair coin."""
    n = wins + losses
    tail = sum(math.comb(n, k) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2**n)


def bootstrap_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mean; of one value, the value itself."""
    low, high = np.quantile(_resampled_means(np.asarray(values, float), seed), (0.025, 0.975))
    return float(low), float(high)


def bootstrap_p(differences: Sequence[float], seed: int = 0) -> float:
    """Two-sided p of a mean difference of 0: how often centred resamples go as far.

    A bootstrap of few pairs promises too much, so that p is at least what the exact test of
    flipped signs can reach with as many: 1 for one pair, 0.5 for two, 0.25 for three.
    """
    values = np.asarray(differences, float)
    means = _resampled_means(values - values.mean(), seed)
    # One resample is the observed one; the margin forgives rounding of equal sums.
    reached = np.abs(means) >= abs(values.mean()) - 1e-12
    return max(float((1 + reached.sum()) / (1 + RESAMPLES)), 2.0 ** (1 - len(values)))


def interval(values: Sequence[float], binary: bool) -> tuple[float, float]:
    """Wilson's where the values can only be 0 or 1, else the bootstrap's, of at least one value."""
    if binary:
        return wilson(round(sum(values)), len(values))
    return bootstrap_interval(values)


def compare(values: Sequence[float], stock: Sequence[float], binary: bool) -> Comparison:
    """Paired test of `values` against stock's values of the same samples, in the same order.

    Args:
        binary: values can only be 0 or 1: exact McNemar, else a paired bootstrap of the mean.

    Raises:
        ValueError: different numbers of values, or none.
    """
    differences = [value - other for value, other in zip(values, stock, strict=True)]
    if not differences:
        raise ValueError("a comparison needs at least one pair")
    wins = sum(difference > 0 for difference in differences)
    losses = sum(difference < 0 for difference in differences)
    p = mcnemar(wins, losses) if binary else bootstrap_p(differences)
    return Comparison(wins, losses, len(differences), p, "mcnemar" if binary else "bootstrap")


def _resampled_means(values: np.ndarray, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    picks = rng.integers(len(values), size=(RESAMPLES, len(values)))
    return values[picks].mean(axis=1)
