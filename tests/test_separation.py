"""Areas under the curve are what they are by definition, and their intervals hold the truth."""

import numpy as np
import pytest
from scipy import stats

from rcgrpo_jax.evaluation.separation import (
    Separation,
    between_rollouts,
    concordance,
    interval,
    within_prompts,
)

NAN = float("nan")
DRAWS = 300


def both(values, success) -> tuple[float, float]:
    """The area over all rollouts, and that within prompts."""
    values, success = np.array(values, float), np.array(success)
    within = within_prompts(concordance(values, success.astype(float)))
    return between_rollouts(values, success).area, within.area


@pytest.mark.parametrize(
    ("values", "area"),
    [([[1, 5, 2, 6], [0, 7, 3, 8]], 1), ([[5, 1, 6, 2], [7, 0, 8, 3]], 0), ([[4, 4, 4, 4], [4, 4, 4, 4]], 0.5)],
    ids=["perfect", "reversed", "ties"],
)
def test_areas_in_closed_form(values, area):
    assert both(values, [[False, True, False, True]] * 2) == (area, area)


def test_the_area_over_all_rollouts_is_that_of_mann_and_whitney():
    rng = np.random.default_rng(0)
    values, success = rng.integers(0, 6, (7, 5)).astype(float), rng.random((7, 5)) < 0.4
    wanted = stats.mannwhitneyu(values[success], values[~success]).statistic / success.sum() / (~success).sum()
    found = between_rollouts(values, success)
    assert found.area == pytest.approx(wanted)
    assert found.parts.shape == (7,)
    assert found.parts.sum() == pytest.approx(0, abs=1e-12)


def test_prompts_that_differ_count_over_all_rollouts_and_not_within():
    values, success = [[1, 2], [11, 12]], [[True, False], [True, True]]
    assert both(values, success) == (pytest.approx(2 / 3), 0)  # the second prompt has no pair


def test_every_prompt_with_pairs_has_the_same_weight():
    values, scores = np.array([[1, 2, NAN], [3, 2, 1.0], [1, 2, 3]]), np.array([[1, 2, 3], [1, 2, NAN], [5, 5, 5.0]])
    shares = concordance(values, scores)
    assert shares.tolist() == [1, 0, pytest.approx(NAN, nan_ok=True)]
    assert within_prompts(shares).area == 0.5


def test_the_order_of_scores_counts_without_a_threshold():
    assert concordance(np.array([[1.0, 2, 3]]), np.array([[0.1, 0.3, 0.2]])) == pytest.approx([2 / 3])


def test_rollouts_without_a_value_are_as_if_they_were_not_there():
    rng = np.random.default_rng(1)
    values, success = rng.standard_normal((6, 4)), rng.random((6, 4)) < 0.5
    torn = np.concatenate([values, np.full((6, 2), NAN)], axis=1)
    found = between_rollouts(torn, np.concatenate([success, np.ones((6, 2), bool)], axis=1))
    wanted = between_rollouts(values, success)
    assert found.area == wanted.area
    np.testing.assert_array_equal(found.parts, wanted.parts)


@pytest.mark.parametrize(
    ("prompts", "rollouts", "effect", "apart"), [(12, 8, 0.5, 1), (40, 4, 0.5, 1), (40, 4, 2, 0.3)]
)
def test_intervals_hold_the_truth_as_often_as_they_say(prompts, rollouts, effect, apart):
    rng = np.random.default_rng(2)

    def draw(n: int) -> tuple[np.ndarray, np.ndarray]:
        """Values and scores; prompts differ in both, and rollouts have a common part."""
        of_values, of_scores = apart * rng.standard_normal((2, n, 1))
        common, rest = rng.standard_normal((2, n, rollouts))
        return effect * common + rest + of_values, common + of_scores

    def areas(values: np.ndarray, scores: np.ndarray) -> list[Separation]:
        return [between_rollouts(values, scores > 0), within_prompts(concordance(values, scores))]

    truth = [x.area for x in areas(*draw(20_000))]
    held = np.zeros(2)
    for _ in range(DRAWS):
        found = [interval(x) for x in areas(*draw(prompts))]
        held += [x.low <= true <= x.high for x, true in zip(found, truth, strict=True)]
    assert (held / DRAWS).min() >= 0.91
    assert (held / DRAWS).max() <= 0.985


def test_rollouts_of_one_prompt_that_agree_count_as_one():
    """Else the interval would narrow with every copy."""
    rng = np.random.default_rng(3)
    values, success = rng.standard_normal((20, 1)), rng.random((20, 1)) < 0.5
    one, copies = (interval(between_rollouts(np.tile(values, n), np.tile(success, n))) for n in (1, 8))
    assert one == pytest.approx(copies)


def test_a_higher_level_widens_the_interval():
    found = within_prompts(np.array([0.4, 0.9, 0.6, 0.7]))
    narrow, wide = interval(found), interval(found, 0.99)
    assert wide.low < narrow.low < narrow.mean < narrow.high < wide.high


@pytest.mark.parametrize("area", [0.0, 1.0])
def test_pairs_that_are_all_won_leave_room_for_doubt(area):
    few, many = (interval(within_prompts(np.full(n, area))) for n in (4, 40))
    assert 0.4 < few.high - few.low < 0.6
    assert 0.05 < many.high - many.low < 0.12
    assert few.mean == many.mean == area


def test_prompts_that_are_alike_by_luck_leave_room_for_doubt():
    """Two prompts add the same to the error of this area, which is none."""
    values = np.array([[3.0, 1], [2, 4]])
    found = between_rollouts(values, np.array([[True, False], [True, False]]))
    assert found.area == 0.5
    assert interval(found).high - interval(found).low > 0.8
    assert interval(within_prompts(np.full(4, 0.25))).low < 0.1


def test_what_cannot_be_known_is_nan():
    assert np.isnan(interval(between_rollouts(np.ones((3, 2)), np.ones((3, 2), bool)))).all()
    assert np.isnan(interval(within_prompts(np.full(3, NAN)))).all()
    assert np.isnan(interval(within_prompts(np.array([0.5, NAN])))[1:]).all()
