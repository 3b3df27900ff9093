"""Advantages, the clipped objective and its KL."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcgrpo_jax.method import grpo

combine = jax.jit(grpo.combine_rewards)
advantages_of = jax.jit(grpo.group_advantages, static_argnames=("quasi_norm", "over"))
objective_of = jax.jit(grpo.clipped_objective)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_rewards_are_standardised_over_the_whole_minibatch_and_not_in_their_group():
    # The prompts differ far more than the candidates of either: a z-score per group would give both rows +-1.
    task = jnp.array([[0.0, 2.0], [10.0, 12.0]])
    acd = jnp.array([[1.0, 1.0], [1.0, 5.0]])
    combined = combine({"task": task, "acd": acd}, {"acd": 0.5, "task": 2.0})
    expected = 2 * (np.asarray(task) - 6) / np.sqrt(26) + 0.5 * (np.asarray(acd) - 2) / np.sqrt(3)
    np.testing.assert_allclose(combined, expected, rtol=1e-6)


def test_the_scale_of_a_reward_does_not_count_but_its_weight_does():
    a, b = normal(0, 2, 3, 4)
    one = combine({"a": a, "b": b}, {"a": 1.0, "b": 0.3})
    np.testing.assert_allclose(combine({"a": 100 * a - 7, "b": b}, {"a": 1.0, "b": 0.3}), one, atol=1e-5)
    assert not np.allclose(combine({"a": a, "b": b}, {"a": 1.0, "b": 0.6}), one, atol=0.1)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_failed_reward_drops_its_group_from_the_statistics_of_all(bad):
    a, b = normal(1, 2, 3, 4)
    weights = {"a": 1.0, "b": 2.0}
    a[1, 2], b[1, 0] = bad, 1e6
    combined = np.asarray(combine({"a": a, "b": b}, weights))
    assert np.isnan(combined[1]).all()
    expected = combine({"a": a[[0, 2]], "b": b[[0, 2]]}, weights)
    np.testing.assert_allclose(combined[[0, 2]], expected, rtol=1e-5, atol=1e-6)


def test_a_group_goes_on_without_the_candidates_that_have_no_score():
    """As long as the share of the others is large enough, and the statistics are theirs."""
    a, b = normal(1, 3, 4), normal(2, 3, 4)
    a[0, 1] = b[1, 3] = a[2, 0] = b[2, 2] = np.nan
    combined = np.asarray(combine({"a": a, "b": b}, {"a": 1.0, "b": 2.0}, 0.75))
    kept = np.array([[1, 0, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0]], bool)
    np.testing.assert_array_equal(np.isfinite(combined), kept)
    expected = sum(w * (x[kept] - x[kept].mean()) / x[kept].std() for w, x in ((1.0, a), (2.0, b)))
    np.testing.assert_allclose(combined[kept], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("quasi_norm", [None, 0.8])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_candidate_without_a_reward_has_no_advantage_and_the_others_have_theirs(quasi_norm, bad):
    rewards = normal(3, 2, 5)
    rewards[0, 2] = bad
    advantages = np.asarray(advantages_of(rewards, quasi_norm=quasi_norm))
    assert advantages[0, 2] == 0
    others = np.delete(rewards[0], 2)[None]
    np.testing.assert_allclose(np.delete(advantages[0], 2), advantages_of(others, quasi_norm=quasi_norm)[0], rtol=1e-5)
    np.testing.assert_allclose(advantages[1:], advantages_of(rewards[1:], quasi_norm=quasi_norm), rtol=1e-6)


def test_without_a_single_valid_group_everything_is_nan():
    assert np.isnan(combine({"a": jnp.full((2, 3), jnp.nan)}, {"a": 1.0})).all()


@pytest.mark.parametrize("level", [0.0, 0.1, 7.3, 1234.567])
def test_a_constant_reward_contributes_zeros(level):
    a = normal(2, 3, 4)
    both = combine({"a": a, "b": jnp.full((3, 4), level)}, {"a": 1.0, "b": 1.0})
    np.testing.assert_allclose(both, (a - a.mean()) / a.std(), rtol=1e-5, atol=1e-6)


def test_weights_and_rewards_must_have_the_same_names():
    a = jnp.ones((2, 3))
    with pytest.raises(ValueError, match=r"without a weight \['acd'\]"):
        combine({"task": a, "acd": a}, {"task": 1.0})
    with pytest.raises(ValueError, match=r"without one \['adc'\]"):
        combine({"task": a}, {"task": 1.0, "adc": 1.0})


def test_advantages_are_z_scores_with_the_population_std():
    advantages = advantages_of(jnp.array([[1.0, 2.0, 3.0, 6.0], [0.0, 0.0, 0.0, 1e-3]]))
    np.testing.assert_allclose(advantages[0], np.array([-2, -1, 0, 3]) / np.sqrt(3.5), rtol=1e-6)
    np.testing.assert_allclose(advantages[1], np.array([-1, -1, -1, 3]) / np.sqrt(3), rtol=1e-4)


def test_advantages_are_clipped():
    rewards = jnp.zeros(12).at[0].set(1.0)  # z-scores: sqrt(11) and -1 / sqrt(11)
    np.testing.assert_allclose(advantages_of(rewards).max(), np.sqrt(11), rtol=1e-5)
    np.testing.assert_allclose(advantages_of(rewards, clip=2.0)[:2], [2, -1 / np.sqrt(11)], rtol=1e-5)
    np.testing.assert_allclose(advantages_of(-rewards, clip=2.0)[:2], [-2, 1 / np.sqrt(11)], rtol=1e-5)


def test_the_quasi_norm_of_the_advantages_is_one():
    rewards = jnp.array([1.0, 2.0, 3.0, 6.0])
    np.testing.assert_allclose(advantages_of(rewards, quasi_norm=1.0), np.array([-2, -1, 0, 3]) / 6, rtol=1e-6)
    advantages = advantages_of(rewards, quasi_norm=0.8)
    np.testing.assert_allclose((jnp.abs(advantages) ** 0.8).sum(), 1, rtol=1e-5)
    np.testing.assert_allclose(advantages[0] / advantages[3], -2 / 3, rtol=1e-5)


def test_the_spread_of_the_whole_batch_divides_all_groups_alike():
    """Flow-GRPO's: `(r - mean of the group) / (std of all + 1e-4)`."""
    rewards = np.float32([[0, 2, 4], [10, 10.2, 10.1], [7, 7, 7], [1, np.nan, 3]])
    found = np.asarray(advantages_of(rewards, over="batch"))
    std = np.nanstd(rewards) + 1e-4
    np.testing.assert_allclose(found[0], np.array([-2, 0, 2]) / std, rtol=1e-5)
    np.testing.assert_allclose(found[1], np.array([-0.1, 0.1, 0]) / std, atol=1e-5)
    np.testing.assert_array_equal(found[2], 0)  # and no rounding
    np.testing.assert_allclose(found[3], np.array([-1, 0, 1]) / std, rtol=1e-5)
    small = np.nanstd(rewards) * 1e-4 + 1e-4
    np.testing.assert_allclose(advantages_of(rewards * 1e-4, over="batch")[0, 2], 2e-4 / small, rtol=1e-3)


@pytest.mark.parametrize("quasi_norm", [None, 0.8])
def test_groups_without_signal_get_zeros(quasi_norm):
    rewards = jnp.stack(
        [
            jnp.full(12, 7.3),
            jnp.full(12, 1234.567),
            jnp.zeros(12).at[3].set(1e-8),
            jnp.full(12, jnp.nan),
            jnp.full(12, jnp.nan).at[5].set(2.0),
            jnp.arange(12.0),
        ]
    )
    advantages = advantages_of(rewards, quasi_norm=quasi_norm)
    np.testing.assert_array_equal(advantages[:5], 0)
    assert (advantages[5] != 0).all()
    np.testing.assert_array_equal(grpo.zero_std_groups(rewards), [True, True, True, False, True, False])


def test_the_clipped_objective_takes_the_worse_of_the_two_gains():
    ratio = jnp.array([[1.0, 1.5, 0.5], [1.5, 0.5, 1.1]])
    advantages = jnp.array([[2.0, 2.0, 2.0], [-1.0, -1.0, -1.0]])
    gains = np.array([[2.0, 2.4, 1.0], [-1.5, -0.8, -1.1]])
    objective = objective_of(jnp.log(ratio), advantages, 0.2)
    np.testing.assert_allclose(objective, gains.mean(), rtol=1e-6)
    weights = jnp.array([[0.5, 0.25, 0.25], [0.0, 1.0, 0.0]])
    weighted = objective_of(jnp.log(ratio), advantages, 0.2, weights=weights)
    np.testing.assert_allclose(weighted, (gains[0] @ [0.5, 0.25, 0.25] + gains[1, 1]) / 2, rtol=1e-6)


def test_uniform_weights_are_the_default():
    log_ratio, advantages = normal(3, 2, 4, 5)
    uniform = objective_of(log_ratio, advantages, 0.2, weights=jnp.full((4, 5), 0.2))
    np.testing.assert_allclose(uniform, objective_of(log_ratio, advantages, 0.2), rtol=1e-5)


@pytest.mark.parametrize(
    ("ratio", "advantage", "moves"),
    [(1.3, 1.0, False), (1.3, -1.0, True), (0.7, 1.0, True), (0.7, -1.0, False), (1.0, 1.0, True), (1.0, -1.0, True)],
)
def test_clipping_kills_the_gradient_only_where_the_gain_is_already_taken(ratio, advantage, moves):
    gradient = jax.grad(lambda r: objective_of(jnp.log(r)[None], jnp.array([advantage]), 0.2))(ratio)
    np.testing.assert_allclose(gradient, advantage if moves else 0.0, rtol=1e-6)


@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
def test_ratios_beyond_float32_give_no_nan(advantage):
    def objective(log_ratio):
        return objective_of(log_ratio, jnp.full(2, advantage), 0.2)

    value, gradient = jax.value_and_grad(objective)(jnp.array([200.0, -200.0]))
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_clip_fraction_counts_both_sides():
    ratio = jnp.array([[1.0, 1.19, 1.21], [0.81, 0.79, 5.0]])
    np.testing.assert_allclose(grpo.clip_fraction(jnp.log(ratio), 0.2), 0.5)
    np.testing.assert_allclose(grpo.clip_fraction(jnp.array([0.0, 0.9e-4, 1.1e-4, -1.1e-4]), 1e-4), 0.5)


def test_kl_is_zero_for_equal_policies_positive_otherwise_and_takes_the_old_policy_first():
    log_p, log_q = np.asarray(jax.nn.log_softmax(3 * normal(4, 2, 100, 6), axis=-1))
    np.testing.assert_array_equal(grpo.categorical_kl(log_p, log_p), 0)
    assert (np.asarray(grpo.categorical_kl(log_p, log_q)) > 0).all()
    p, q = 0.9, 0.3
    kl = grpo.categorical_kl(np.log([p, 1 - p]), np.log([q, 1 - q]))
    np.testing.assert_allclose(kl, p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)), rtol=1e-5)


def test_kl_and_its_gradient_are_finite_for_a_policy_on_one_candidate():
    log_old = jnp.array([0.0, -1e4, -1e4])
    value, gradient = jax.value_and_grad(lambda log_new: grpo.categorical_kl(log_old, log_new))(jnp.full(3, -np.log(3)))
    np.testing.assert_allclose(value, np.log(3), rtol=1e-6)
    np.testing.assert_allclose(gradient, [-1, 0, 0])


def test_jit_and_vmap_agree_with_one_minibatch_at_a_time():
    rewards, log_ratio = normal(5, 2, 3, 2, 4)
    rewards[1, 0, 0] = np.nan

    def everything(rewards, log_ratio):
        combined = grpo.combine_rewards({"a": rewards, "b": rewards**3}, {"a": 1.0, "b": 0.5})
        advantages = grpo.group_advantages(combined)
        kl = grpo.categorical_kl(log_ratio, 2 * log_ratio)
        objective = grpo.clipped_objective(log_ratio, advantages, 0.2)
        return combined, advantages, grpo.zero_std_groups(combined), kl, objective, grpo.clip_fraction(log_ratio, 0.2)

    mapped = jax.jit(jax.vmap(everything))(rewards, log_ratio)
    for result, expected in zip(mapped, everything(rewards[1], log_ratio[1]), strict=True):
        np.testing.assert_allclose(np.asarray(result)[1], expected, rtol=1e-5, atol=1e-6)
