"""Intervals hold the truth as often as they say, whatever it is that varies."""

import numpy as np
import pytest
from scipy import stats

from rcgrpo_jax.evaluation.statistics import mean_interval, paired_interval

DRAWS, EXAMPLES = 400, 120


def draw(rng, seeds, of_seeds, of_examples=0.5, rest=0.3, examples=EXAMPLES):
    """`[S, N]` values whose true mean is 0."""
    return (
        of_seeds * rng.standard_normal((seeds, 1))
        + of_examples * rng.standard_normal((1, examples))
        + rest * rng.standard_normal((seeds, examples))
    )


@pytest.mark.parametrize(("seeds", "of_seeds"), [(2, 0.03), (3, 0.0), (3, 0.05), (3, 0.2), (5, 0.2)])
def test_covers_the_mean_over_all_seeds_and_examples(seeds, of_seeds):
    rng = np.random.default_rng(0)
    intervals = [mean_interval(draw(rng, seeds, of_seeds)) for _ in range(DRAWS)]
    assert 0.91 <= np.mean([x.low < 0 < x.high for x in intervals]) <= 0.99


@pytest.mark.parametrize("seeds", [(3, 1), (3, 3)])
@pytest.mark.parametrize("of_seeds", [0.0, 0.06])
def test_covers_a_difference_of_pairs(seeds, of_seeds):
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(DRAWS):
        hard = 0.5 * rng.standard_normal(EXAMPLES)  # for both models
        a, b = (draw(rng, n, of_seeds if n > 1 else 0.0, 0.2) + hard for n in seeds)
        interval = paired_interval(a, b)
        hits += interval.low < 0 < interval.high
    assert 0.91 <= hits / DRAWS <= 0.995


@pytest.mark.parametrize("shared", [0.0, 0.1])
def test_covers_a_difference_of_pairs_of_seeds(shared):
    """Also where a seed does the same to both, and then more closely than seed by seed alone."""
    rng = np.random.default_rng(7)
    hits, widths = 0, []
    for _ in range(DRAWS):
        common = shared * rng.standard_normal((5, 1)) + 0.5 * rng.standard_normal(EXAMPLES)
        a, b = (draw(rng, 5, 0.03, 0.2) + common for _ in range(2))
        interval = paired_interval(a, b)
        hits += interval.low < 0 < interval.high
        widths.append(interval.high - interval.low)
    assert 0.91 <= hits / DRAWS <= 0.985
    assert np.mean(widths) < 0.18


@pytest.mark.parametrize("seeds", [2, 3])
def test_covers_a_difference_of_few_pairs_whose_examples_cancel(seeds):
    rng = np.random.default_rng(8)
    hard = rng.standard_normal(60)
    hits = 0
    for _ in range(1000):
        a, b = (draw(rng, seeds, 0.08, 0, examples=60) + hard for _ in range(2))
        interval = paired_interval(a, b)
        hits += interval.low < 0 < interval.high
    assert 0.935 <= hits / 1000 <= 0.995


def test_noise_is_not_counted_as_that_of_seeds_and_of_examples_both():
    rng = np.random.default_rng(9)
    intervals = [mean_interval(draw(rng, 5, 0, 0, rest=1)) for _ in range(DRAWS)]
    deviation = 1 / np.sqrt(5 * EXAMPLES)
    assert np.mean([x.high - x.low for x in intervals]) / 2 < 3 * deviation  # of one seed: 2


def test_seeds_that_agree_by_luck_do_not_narrow_the_interval():
    values = draw(np.random.default_rng(10), 2, 0, 0)
    values -= values.mean(axis=1, keepdims=True)
    of_examples = mean_interval(values.mean(axis=0, keepdims=True))
    assert mean_interval(values) == pytest.approx(of_examples)


def test_pairs_are_compared_more_closely_than_means():
    rng = np.random.default_rng(2)
    hard = rng.standard_normal(EXAMPLES)
    a, b = (hard + draw(rng, 3, 0.01, 0.1, 0.1) for _ in range(2))
    paired, one, two = paired_interval(a, b), mean_interval(a), mean_interval(b)
    unpaired = np.hypot(one.high - one.low, two.high - two.low)
    assert paired.high - paired.low < 0.3 * unpaired
    assert paired.mean == pytest.approx(one.mean - two.mean)


def test_one_seed_is_the_t_interval_of_the_textbook():
    values = np.random.default_rng(3).standard_normal((1, 20)) + 1
    low, high = stats.t.interval(0.95, 19, values.mean(), stats.sem(values[0]))
    assert mean_interval(values) == pytest.approx((values.mean(), low, high))
    other = np.random.default_rng(4).standard_normal((1, 20))
    low, high = stats.ttest_rel(values[0], other[0]).confidence_interval(0.95)
    assert paired_interval(values, other)[1:] == pytest.approx((low, high))


def test_seeds_that_differ_widen_the_interval():
    same = np.tile(np.random.default_rng(5).standard_normal(EXAMPLES), (3, 1))
    apart = same + np.array([[-1.0], [0.0], [1.0]])
    narrow, wide = mean_interval(same), mean_interval(apart)
    assert wide.mean == pytest.approx(narrow.mean)
    assert wide.high - wide.low == pytest.approx(2 * stats.t.ppf(0.975, 2) * np.sqrt(1 / 3), rel=0.05)
    assert wide.high - wide.low > 5 * (narrow.high - narrow.low)


def test_what_could_not_be_measured_is_left_out_of_both():
    rng = np.random.default_rng(6)
    a, b = rng.standard_normal((2, 10)), rng.standard_normal((1, 10))
    a[1, 3], b[0, 7] = np.nan, np.inf
    kept = np.delete(np.arange(10), [3, 7])
    assert paired_interval(a, b) == paired_interval(a[:, kept], b[:, kept])
    assert mean_interval(a) == mean_interval(np.delete(a, 3, axis=1))


def test_too_few_examples_have_no_bounds():
    mean, low, high = mean_interval(np.array([[1.0], [3.0]]))
    assert mean == 2
    assert np.isnan([low, high]).all()
    assert np.isnan(mean_interval(np.full((2, 3), np.nan))).all()
    assert np.isnan(mean_interval(np.ones((1, 0)))).all()
    assert not mean_interval(np.ones((1, 1))).excludes_zero


def test_values_that_do_not_vary_have_no_width():
    assert mean_interval(np.ones((3, 5))) == (1, 1, 1)
    assert paired_interval(np.ones((3, 5)), np.ones((1, 5))) == (0, 0, 0)
    assert not paired_interval(np.ones((3, 5)), np.ones((1, 5))).excludes_zero


def test_different_numbers_of_examples_are_no_pairs():
    with pytest.raises(ValueError, match="5 and 6 examples"):
        paired_interval(np.ones((1, 5)), np.ones((1, 6)))
