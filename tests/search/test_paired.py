"""Confidence limits hold as often as they say, and budgets read amounts as written."""

import math

import numpy as np
import pytest

from keras_precision.search.budget import Budget
from keras_precision.search.paired import Paired, t_quantile


def test_statistics_are_those_of_the_samples():
    before, after = np.array([1.0, 2.0, 4.0, 3.0]), np.array([1.5, 2.0, 3.0, 5.5])
    found = Paired.of(after, before)
    assert (found.samples, found.base, found.increase, found.value) == (4, 2.5, 0.5, 3.0)
    assert found.increase_variance == pytest.approx(np.var(after - before, ddof=1))
    assert found.base_variance == pytest.approx(np.var(before, ddof=1))
    assert found.covariance == pytest.approx(np.cov(after - before, before)[0, 1])
    assert found.standard_error == pytest.approx(np.std(after - before, ddof=1) / 2)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_exceeds_every_bound(bad):
    found = Paired.of(np.array([1.0, bad]), np.array([1.0, 1.0]))
    assert found.increase == math.inf
    assert found.excess(0.95) == math.inf


@pytest.mark.parametrize(
    ("confidence", "degrees", "expected"),
    [(0.95, 9, 1.8331), (0.95, 193, 1.6528), (0.9975, 9, 3.6897), (0.9975, 30, 3.0298)],  # tables of Student's t
)
def test_quantiles_are_students(confidence, degrees, expected):
    assert t_quantile(confidence, degrees) == pytest.approx(expected, rel=0.01)


def covered(draw, limit_of, truth, trials=2000):
    """The share of trials whose confidence limit is not below the truth."""
    generator = np.random.default_rng(0)
    return np.mean([limit_of(Paired.of(*draw(generator))) >= truth for _ in range(trials)])


# The share of 2,000 trials has a standard error of sqrt(0.95 * 0.05 / 2000) = 0.005; means of 100 are about normal.
@pytest.mark.parametrize("relative", [0.0, 0.3])
def test_limits_on_losses_cover_the_mean_increase_as_often_as_they_say(relative):
    def draw(generator):
        before = generator.exponential(size=100)
        return before + generator.normal(0.1, 0.2, size=100), before

    found = covered(draw, lambda paired: paired.excess(0.95, relative), 0.1 - relative * 1.0)
    assert 0.93 <= found <= 0.98


@pytest.mark.parametrize("worse, better", [(0.002, 0.0), (0.02, 0.0), (0.2, 0.0), (0.05, 0.05)])
def test_limits_on_errors_cover_the_drop_at_least_as_often_as_they_say(worse, better):
    def draw(generator):
        outcome = generator.choice(3, size=200, p=[worse, better, 1 - worse - better])
        return (outcome == 0).astype(float), (outcome == 1).astype(float)

    found = covered(draw, lambda paired: paired.excess(0.95, is_share=True), worse - better)
    assert found >= 0.935


def test_equal_answers_are_no_proof():
    same = Paired.of(np.zeros(20), np.zeros(20))
    assert same.excess(0.95) == 0
    assert 0.05 < same.excess(0.95, is_share=True) < 0.2  # of 20 samples, one may be a twentieth


@pytest.mark.parametrize(
    ("budget", "base", "expected"),
    [
        (0.02, 5.0, 0.02),
        ("1%", 5.0, 0.05),
        ({"max_loss_increase": "0.1"}, 5.0, 0.1),
        ({"max_accuracy_drop": 0.01}, 0.9, 0.01),
        ({"max_bytes": 1000}, 5000, 1000),
        ({"max_bytes": " 40% "}, 5000, 2000),
        (Budget(max_seconds="50%"), 0.2, 0.1),
    ],
)
def test_amounts_are_numbers_or_shares(budget, base, expected):
    assert Budget.of(budget).resolved(base) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("budget", "error", "message"),
    [
        ({}, ValueError, "exactly one of max_loss_increase"),
        ({"max_bytes": 1, "max_loss_increase": 1}, ValueError, "exactly one"),
        ({"max_byte": 1}, ValueError, "max_byte'"),
        (-1, ValueError, "max_loss_increase >= 0"),
        ("-1%", ValueError, "max_loss_increase >= 0"),
        ({"max_bytes": 0}, ValueError, "max_bytes > 0"),
        ("little", ValueError, "'little'"),
        (math.nan, ValueError, ">= 0"),
        (True, TypeError, "a number or a string"),
        ([1], TypeError, "a number or a string"),
    ],
)
def test_other_budgets_are_refused(budget, error, message):
    with pytest.raises(error, match=message):
        Budget.of(budget)


def test_a_relative_bound_allows_for_the_error_of_its_base():
    generator = np.random.default_rng(0)
    before = generator.exponential(size=50)
    worse_in_proportion = Paired.of(before * 1.01, before)
    # Every sample grew by exactly 1%: 2% holds with certainty, 0.5% does not, whatever the spread of the losses.
    assert Budget.of("2%").excess(worse_in_proportion, 0.95) < 0
    assert Budget.of("0.5%").excess(worse_in_proportion, 0.95) > 0
