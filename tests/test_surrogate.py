"""The four distances, the softmax over them, and its gradient at the first update."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcgrpo_jax.method import grpo, surrogate

NAMES = ["l2", "mean", "region", "tau"]
TAUS = (0.9, 1.1)
N, C, G = 5, 3, 6
MASK = jnp.array([1.0, 1.0, 0.0, 0.5, 0.0])


def token_weights(name, mask=MASK, channels=C):
    """W of each distance, sum_n W_n |x_n - y_n|^2, from its definition."""
    m = np.asarray(mask, np.float64)
    edit, base = m / TAUS[0] ** 2, (1 - m) / TAUS[1] ** 2
    return {
        "l2": np.ones_like(m),
        "mean": np.ones_like(m) / (m.size * channels),
        "region": edit / (m.sum() * channels) + base / ((1 - m).sum() * channels),
        "tau": edit + base,
    }[name]


def states(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def distance_between(name, x, y, mask=MASK):
    return jax.jit(surrogate.distance_function(name, jnp.asarray(mask), *TAUS))(x, y)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("l2", 30.0), ("mean", 7.5), ("region", 2.5 / 0.81 + 12.5 / 1.21), ("tau", 5 / 0.81 + 25 / 1.21)],
)
def test_distances_on_a_tiny_array(name, expected):
    x, y = (
        jnp.array([[1.0, 2.0], [0.0, 4.0]]),
        jnp.array([[0.0, 0.0], [3.0, 0.0]]),
    )  # squares: 1 + 4 inside, 9 + 16 outside
    np.testing.assert_allclose(distance_between(name, x, y, [1.0, 0.0]), expected, rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_distances_are_weighted_sums_over_tokens_with_any_axes_in_front(name):
    x, y = states(0, 2, G, N, C), states(1, 2, 1, N, C)
    expected = (token_weights(name) * np.square(np.float64(x) - np.float64(y)).sum(-1)).sum(-1)
    np.testing.assert_allclose(distance_between(name, x, y), expected, rtol=1e-5)


def test_with_a_mask_of_one_half_and_unit_bandwidths_the_region_distance_is_twice_the_mean():
    x, y = states(0, G, 4, C), states(1, G, 4, C)
    mask = jnp.array([1.0, 0.0, 1.0, 0.0])
    np.testing.assert_allclose(
        surrogate.region_distance(x, y, mask, 1.0, 1.0), 2 * surrogate.mean_distance(x, y), rtol=1e-6
    )
    np.testing.assert_allclose(
        surrogate.tau_distance(x, y, mask, 1.0, 1.0), surrogate.squared_distance(x, y), rtol=1e-6
    )


def test_the_region_distance_does_not_depend_on_the_regions_sizes():
    difference = jnp.full((10, C), 2.0)
    for inside in (1, 5, 9):
        mask = (jnp.arange(10) < inside).astype(jnp.float32)
        distance = surrogate.region_distance(difference, jnp.zeros((10, C)), mask, *TAUS)
        np.testing.assert_allclose(distance, 4 / 0.81 + 4 / 1.21, rtol=1e-6)


@pytest.mark.parametrize(("fill", "tau"), [(0.0, TAUS[1]), (1.0, TAUS[0])])
def test_an_empty_or_full_mask_leaves_one_region_and_finite_gradients(fill, tau):
    x, y, mask = states(0, N, C), states(1, N, C), jnp.full(N, fill)
    value, gradient = jax.value_and_grad(surrogate.region_distance)(x, y, mask, *TAUS)
    np.testing.assert_allclose(value, surrogate.mean_distance(x, y) / tau**2, rtol=1e-6)
    np.testing.assert_allclose(gradient, 2 * (x - y) / (N * C * tau**2), rtol=1e-5)


def test_distances_of_bfloat16_states_are_summed_in_float32():
    x, y = jnp.ones((1000, 4), jnp.bfloat16), jnp.zeros((1000, 4), jnp.bfloat16)
    for name, expected in (("l2", 4000), ("mean", 1), ("region", 1 / 1.21), ("tau", 4000 / 1.21)):
        distance = distance_between(name, x, y, np.zeros(1000, np.float32))
        assert distance.dtype == jnp.float32
        np.testing.assert_allclose(distance, expected, rtol=1e-5)


def test_an_unknown_distance_is_refused_with_the_names():
    with pytest.raises(ValueError, match=r"'cosine' is not one of 'l2', 'mean', 'region', 'tau'"):
        surrogate.distance_function("cosine", MASK, *TAUS)


def test_the_policy_sums_to_one_and_odds_follow_the_distances():
    distances = 10 * np.abs(states(0, 4, G))
    log_pi = np.asarray(surrogate.log_policy(distances))
    np.testing.assert_allclose(np.exp(log_pi).sum(-1), 1, rtol=1e-6)
    np.testing.assert_allclose(log_pi[:, 1] - log_pi[:, 2], (distances[:, 2] - distances[:, 1]) / 2, rtol=1e-4)
    np.testing.assert_allclose(surrogate.log_policy(distances, 4.0), surrogate.log_policy(distances / 4), rtol=1e-6)
    by_group = surrogate.log_policy(distances, jnp.array([1.0, 2.0, 4.0, 8.0]))
    np.testing.assert_allclose(np.asarray(by_group)[2], surrogate.log_policy(distances[2], 4.0), rtol=1e-6)


def test_distances_in_the_thousands_do_not_overflow():
    log_pi = surrogate.log_policy(jnp.array([0.0, 4e3, 1e5]))
    np.testing.assert_allclose(log_pi, [0, -2e3, -5e4])


def first_update(name, temperature, weighted_by_old=False):
    """(candidates, advantages, log pi_old, log rho, gradient by the anchor, by the candidates) at theta = theta_old."""
    candidates = states(2, G, N, C)
    distance = surrogate.distance_function(name, MASK, *TAUS)
    advantages = np.asarray(grpo.group_advantages(states(3, G)))
    np.testing.assert_allclose(advantages.sum(), 0, atol=1e-5)

    @jax.jit
    def log_policies_and_gradients(anchor):
        log_old = jax.lax.stop_gradient(surrogate.anchor_log_policy(anchor, candidates, distance, temperature))

        def objective(anchor, candidates):
            log_pi = surrogate.anchor_log_policy(anchor, candidates, distance, temperature)
            log_ratio = surrogate.log_ratio_to_itself(log_pi)
            weights = jnp.exp(log_old) if weighted_by_old else None
            return grpo.clipped_objective(log_ratio, advantages, 1e-4, weights), log_ratio

        gradients, log_ratio = jax.grad(objective, argnums=(0, 1), has_aux=True)(anchor, candidates)
        return log_old, log_ratio, *gradients

    return (candidates, advantages, *log_policies_and_gradients(candidates[2]))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("temperature", [1.0, 7.0])
def test_at_the_first_update_the_ratio_is_one_and_the_gradient_that_of_a_linear_form(name, temperature):
    candidates, advantages, _, log_ratio, by_anchor, by_candidates = first_update(name, temperature)
    np.testing.assert_array_equal(log_ratio, 0)  # bit for bit: the clip may be 1e-4
    weighted = token_weights(name)[:, None] * np.einsum("g,gnc->nc", advantages, candidates)
    # J's gradient is that of <sum_i A_i W x_i, xbar> / G: the advantages sum to zero and cancel the normaliser.
    np.testing.assert_allclose(by_anchor, weighted / G / temperature, rtol=1e-4, atol=1e-6 * np.abs(weighted).max())
    np.testing.assert_array_equal(by_candidates, 0)


@pytest.mark.parametrize("name", NAMES)
def test_weighted_by_the_old_policy_the_first_gradient_is_a_covariance(name):
    candidates, advantages, log_old, _, by_anchor, _ = first_update(name, 7.0, weighted_by_old=True)
    pi = np.exp(np.float64(log_old))
    centred = advantages - pi @ advantages
    expected = token_weights(name)[:, None] * np.einsum("g,gnc->nc", pi * centred, candidates) / 7
    np.testing.assert_allclose(by_anchor, expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max())


def test_the_anchor_policy_has_one_distribution_for_each_anchor():
    anchors, candidates = states(4, 2, 3, N, C), states(5, 2, 3, G, N, C)
    temperatures = np.full((2, 3), 2.0, np.float32)
    log_pi = surrogate.anchor_log_policy(anchors, candidates, surrogate.mean_distance, temperatures)
    assert log_pi.shape == (2, 3, G)
    logits = -np.square(candidates - anchors[:, :, None]).mean((-2, -1)) / 2 / 2
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(log_pi, expected, rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e5])
def test_the_calibrated_temperature_reaches_the_entropy(scale):
    distances = scale * np.random.default_rng(6).random((4, G), np.float32)
    distances[:, 0] = 0  # the anchor's own candidate
    calibrate = jax.jit(surrogate.calibrated_temperature)
    for target in (0.1, 1.0, 1.7):  # log G = 1.79
        temperature = calibrate(distances, target)
        assert temperature.shape == (4,)
        log_pi = np.float64(surrogate.log_policy(distances, temperature))
        np.testing.assert_allclose(-(np.exp(log_pi) * log_pi).sum(-1), target, atol=1e-4)


def test_the_calibrated_temperature_is_a_constant_and_finite_for_equal_distances():
    gradient = jax.grad(lambda d: surrogate.calibrated_temperature(d, 1.0))(jnp.arange(6.0))
    np.testing.assert_array_equal(gradient, 0)
    tied = surrogate.calibrated_temperature(jnp.zeros(G), 1.0)
    assert np.isfinite(tied)
    assert tied > 0


@pytest.mark.parametrize("name", NAMES)
def test_jit_and_vmap_agree_with_one_group_at_a_time(name):
    anchors, candidates = states(7, 3, N, C), states(8, 3, G, N, C)
    masks = (states(9, 3, N) > 0.3).astype(np.float32)

    def log_pi(anchor, candidates, mask):
        distance = surrogate.distance_function(name, mask, *TAUS)
        temperature = surrogate.calibrated_temperature(distance(candidates, anchor[None]), 1.0)
        return surrogate.anchor_log_policy(anchor, candidates, distance, temperature)

    mapped = jax.jit(jax.vmap(log_pi))(anchors, candidates, masks)
    np.testing.assert_allclose(mapped[1], log_pi(anchors[1], candidates[1], masks[1]), rtol=1e-4)


def test_the_source_is_a_candidate_on_the_straight_line_outside_the_mask():
    before, anchor, source = states(4, 2, N, C), states(5, 2, N, C), states(6, N, C)
    shrink = jnp.array([0.8, 0.0])  # the last step ends at the source itself
    found = surrogate.source_candidate(before, anchor, shrink, source, MASK)
    straight = source + np.array([0.8, 0.0])[:, None, None] * (before - source)
    inside = np.asarray(MASK)[:, None]
    np.testing.assert_allclose(found, inside * anchor + (1 - inside) * straight, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found[:, 0], anchor[:, 0])
    np.testing.assert_allclose(found[1, 2], source[2], atol=1e-6)
    still = jax.grad(lambda x: surrogate.source_candidate(before, x, shrink, source, MASK).sum())(jnp.asarray(anchor))
    assert not np.any(still)
