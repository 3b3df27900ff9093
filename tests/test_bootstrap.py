"""The bootstrap over tasks: its mean, its width in closed form, how often it covers, and what it makes of gaps."""

import numpy as np
import pytest

from rcgrpo_jax.evaluation.statistics import Interval, stratified_intervals

SIZES = (60, 150, 40)


def draw(seed: int, scale: float = 1) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(mean, scale * spread, n) for mean, spread, n in zip((0, 1, 5), (1, 2, 0.5), SIZES, strict=True)]


def test_the_mean_is_that_of_the_tasks_and_the_width_that_of_the_closed_form():
    strata = draw(0)
    overall, *tasks = stratified_intervals(strata)
    assert overall.mean == pytest.approx(np.mean([x.mean() for x in strata]))
    assert [task.mean for task in tasks] == pytest.approx([x.mean() for x in strata])
    errors = np.array([x.std() / np.sqrt(len(x)) for x in strata])  # of the means that are resampled
    widths = [x.high - x.low for x in (overall, *tasks)]
    wanted = 2 * 1.96 * np.array([np.sqrt(np.sum(errors**2)) / 3, *errors])
    np.testing.assert_allclose(widths, wanted, rtol=0.05)


def test_it_covers_the_mean_as_often_as_it_says():
    found = [stratified_intervals(draw(seed), seed, resamples=499)[0] for seed in range(400)]
    covered = np.mean([x.low < 2 < x.high for x in found])
    assert 0.92 < covered < 0.975  # 95 % less what percentiles lack, and three standard errors


def test_pairs_take_out_what_is_common_to_both():
    strata, other = draw(0, scale=10), draw(1, scale=0.01)
    apart = [x + 0.1 * y for x, y in zip(strata, other, strict=True)]
    paired, *_ = stratified_intervals([x - y for x, y in zip(apart, strata, strict=True)])
    assert paired.high - paired.low < 1e-3 < stratified_intervals(strata)[0].high - stratified_intervals(strata)[0].low
    same = stratified_intervals([x - x for x in strata])
    assert all(interval == Interval(0, 0, 0) for interval in same)


def test_one_seed_gives_one_interval():
    assert stratified_intervals(draw(0), 3) == stratified_intervals(draw(0), 3)
    assert stratified_intervals(draw(0), 3) != stratified_intervals(draw(0), 4)


def test_what_was_not_measured_is_left_out_and_a_task_without_error_has_no_bounds():
    gaps = np.array([1.0, np.nan, 3.0])
    assert stratified_intervals([gaps])[0].mean == 2
    overall, first, second = stratified_intervals([gaps, np.array([5.0])])
    assert (overall.mean, first.mean, second.mean) == (3.5, 2, 5)
    assert first.low == 1
    assert np.isnan([overall.low, second.low]).all()
    overall, first, second = stratified_intervals([gaps, np.array([np.nan])])
    assert np.isnan([overall.mean, second.mean]).all()
    assert first.mean == 2
