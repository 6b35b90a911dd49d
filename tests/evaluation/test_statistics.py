"""Intervals and tests against values worked out by hand or by brute force."""

import itertools
import math

import numpy as np
import pytest

from vllm_heterocache.evaluation.report import statistics


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_gives_the_published_intervals(successes, trials, low, high):
    got = statistics.wilson(successes, trials)
    assert got == pytest.approx((low, high), abs=5e-5)
    mirrored = statistics.wilson(trials - successes, trials)
    assert mirrored == pytest.approx((1 - got[1], 1 - got[0]))


def test_wilson_ends_at_its_borders():
    assert statistics.wilson(0, 64)[0] == 0 and statistics.wilson(64, 64)[1] == 1
    assert statistics.wilson(64, 64)[0] == pytest.approx(0.9434, abs=1e-4)
    assert statistics.wilson(0, 0) == (0, 1)
    with pytest.raises(ValueError, match="3 successes of 2 trials"):
        statistics.wilson(3, 2)


@pytest.mark.parametrize(("wins", "losses"), itertools.product(range(5), range(5)))
def test_mcnemar_counts_the_coin_tosses_that_are_as_uneven(wins, losses):
    tosses = list(itertools.product([0, 1], repeat=wins + losses))
    far = [t for t in tosses if abs(2 * sum(t) - wins - losses) >= abs(wins - losses)]
    assert statistics.mcnemar(wins, losses) == pytest.approx(min(1, len(far) / len(tosses)))


def test_mcnemar_of_the_quality_study():
    """Two rows of its table: wins 13:0, p 0.000244; wins 20:0, p 1.91e-06."""
    assert statistics.mcnemar(0, 13) == pytest.approx(0.000244, rel=1e-3)
    assert statistics.mcnemar(20, 0) == pytest.approx(1.91e-06, rel=2e-3)


def test_bootstrap_interval_is_that_of_the_mean():
    values = np.random.default_rng(3).normal(5, 2, 400)
    low, high = statistics.bootstrap_interval(values)
    half = 1.96 * values.std() / math.sqrt(400)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)
    assert statistics.bootstrap_interval([0.25]) == (0.25, 0.25)
    assert statistics.bootstrap_interval(values) == (low, high), "no other numbers tomorrow"


def test_bootstrap_p_finds_differences_and_none():
    rng = np.random.default_rng(4)
    assert statistics.bootstrap_p(rng.normal(1, 1, 50)) < 0.001
    assert statistics.bootstrap_p([1, -1] * 20) > 0.9
    assert statistics.bootstrap_p([0.0] * 8) == 1
    ps = [statistics.bootstrap_p(rng.normal(0, 1, 30)) for _ in range(200)]
    assert 2 <= sum(p < 0.05 for p in ps) <= 22, "about one in twenty"


@pytest.mark.parametrize(("pairs", "p"), [(1, 1), (2, 0.5), (3, 0.25), (6, 1 / 32)])
def test_few_pairs_prove_little_however_equal_they_are(pairs, p):
    assert statistics.bootstrap_p([-0.14] * pairs) == p


def test_binary_values_are_tested_by_mcnemar_and_others_by_bootstrap():
    binary = statistics.compare([1, 0, 0, 1, 0], [1, 1, 1, 1, 0], binary=True)
    assert binary == statistics.Comparison(0, 2, 5, 0.5, "mcnemar")
    other = statistics.compare([1, 0.5, 0], [1, 1, 0], binary=False)
    assert (other.test, other.wins, other.losses, other.pairs) == ("bootstrap", 0, 1, 3)
    assert statistics.interval([1, 1, 0, 1], binary=True) == statistics.wilson(3, 4)
    interval = statistics.interval([1, 0.5], binary=False)
    assert interval == statistics.bootstrap_interval([1, 0.5]) == (0.5, 1)


def test_pairs_are_pairs():
    with pytest.raises(ValueError, match="shorter than"):
        statistics.compare([1, 0], [1], binary=True)
    with pytest.raises(ValueError, match="at least one pair"):
        statistics.compare([], [], binary=True)
