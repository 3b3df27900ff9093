"""Steps with noise, their likelihood and their window, on a flow that is known: x_0 ~ N(0.7, 0.4^2) element by element.

On this target every step is affine in x, so that mean and variance of a rollout follow without sampling. The values
to the digit are those of the published formulas, computed in float64.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from rcgrpo_jax.flow import sde
from rcgrpo_jax.flow.solvers.euler import EULER
from rcgrpo_jax.method import gaussian, window

X, Z = np.array([[-1.3, 0.2, 1.9]]), np.array([[0.5, -1.0, 0.25]])
TIMES = np.array([1.0, 0.8, 0.65, 0.0])  # of which the second step is looked at


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def schedule(num_steps, mu):
    linear = np.linspace(1.0, 1.0 / num_steps, num_steps)
    return np.append(np.exp(mu) / (np.exp(mu) + 1 / linear - 1), 0.0)


def slope(q):
    """Of the velocity in x."""
    return (q - 0.16 * (1 - q)) / (0.16 * (1 - q) ** 2 + q**2)


def velocity(x, q):
    return slope(q) * (x - 0.7 * (1 - q)) - 0.7


def numbers(kind, level, times=TIMES, k=1):
    """(sigma, sigma_next, kappa), S of a step."""
    kappa, std = sde.coefficients(kind, times, level)
    return tuple(jnp.asarray(x[k]) for x in (times[:-1], times[1:], kappa)), jnp.asarray(std[k])


def log_prob(of_mean, std):
    """Of the state `mean + S Z`."""
    return gaussian.log_prob(of_mean + std * Z, of_mean, std)


@pytest.mark.parametrize(
    ("kind", "level", "std", "mean", "log_p"),
    [
        ("flow_grpo", 0.7, 0.54221767, [-0.61089109, 0.28066213, 1.29108911], -0.52560078),
        ("flow_grpo", 0.9, 0.69713700, [-0.39702970, 0.27175124, 1.02970297], -0.77691521),
        ("cps", 0.8, 0.61818674, [-0.13792068, 0.26095503, 0.71301416], -0.65672383),
        ("cps", 0.7, 0.57915424, [-0.30586028, 0.26795251, 0.91827368], None),
    ],
)
def test_one_step_is_that_of_the_published_formulas(kind, level, std, mean, log_p):
    step, found_std = numbers(kind, level)
    found = sde.mean(velocity(X, 0.8), jnp.asarray(X), *step)
    np.testing.assert_allclose(found_std, std, atol=1e-8)
    np.testing.assert_allclose(found, [mean], atol=1e-8)
    np.testing.assert_array_equal(
        sde.step(velocity(X, 0.8), jnp.asarray(X), *step, found_std, Z), found + found_std * Z
    )
    if log_p is not None:
        np.testing.assert_allclose(log_prob(found, found_std), log_p, atol=1e-8)


def test_the_coefficients_of_the_sde():
    (sigma, sigma_next, kappa), std = numbers("flow_grpo", 0.7)
    of_v = jax.jacobian(lambda v: sde.mean(v, jnp.asarray(X), sigma, sigma_next, kappa))(jnp.zeros_like(X))
    np.testing.assert_allclose(kappa, -0.18375, atol=1e-12)
    np.testing.assert_allclose(of_v[0, :, 0], np.eye(3) * -0.18675, atol=1e-12)
    np.testing.assert_allclose(gaussian.log_prob(X + 0.1, X, std), -0.32385758, atol=1e-8)


@pytest.mark.parametrize("level", [0.0, 0.3, 0.8, 1.0])
def test_a_step_of_cps_has_the_noise_of_its_time(level):
    kappa, std = sde.coefficients("cps", schedule(8, 0.8), level)
    np.testing.assert_allclose((schedule(8, 0.8)[1:] + kappa) ** 2 + std**2, schedule(8, 0.8)[1:] ** 2, atol=1e-15)


@pytest.mark.parametrize("rounded", [0.0, -2e-16, 2e-16])
def test_the_first_step_at_sigma_1_is_finite_and_has_the_noise_of_the_level(rounded):
    times = schedule(8, 0.8)
    times[0] += rounded
    step, std = numbers("flow_grpo", 0.7, times, 0)
    mean = sde.mean(velocity(X, 1.0), jnp.asarray(X), *step)
    np.testing.assert_allclose([std, step[2]], [0.7, -0.245], atol=1e-12)
    np.testing.assert_allclose(mean, [[-0.86086391, 0.18115902, 1.36211835]], atol=1e-8)
    np.testing.assert_allclose(log_prob(mean, std), -0.78101359, atol=1e-8)


def test_the_published_log_probability_of_cps_and_what_its_ratio_is():
    step, std = numbers("cps", 0.8)
    mean = sde.mean(velocity(X, 0.8), jnp.asarray(X), *step)
    after, moved = mean + std * Z, mean + jnp.array([[0.01, -0.02, 0.03]])
    np.testing.assert_allclose(gaussian.published_cps_log_prob(after, mean, std), -0.16719274, atol=1e-8)
    density, published = (
        log_p(after, moved, std) - log_p(after, mean, std)
        for log_p in (gaussian.log_prob, gaussian.published_cps_log_prob)
    )
    np.testing.assert_allclose(published, 2 * std**2 * density, rtol=1e-10)


def test_ratio_and_kl_of_two_velocities():
    step, std = numbers("flow_grpo", 0.7)
    old, new = (
        sde.mean(velocity(X, 0.8) + 0.02 * move, jnp.asarray(X), *step) for move in (0.0, np.array([[1.0, -2.0, 3.0]]))
    )
    log_ratio = gaussian.log_prob(old + std * Z, new, std) - gaussian.log_prob(old + std * Z, old, std)
    np.testing.assert_allclose(log_ratio, -0.00757313, atol=1e-8)
    np.testing.assert_allclose(gaussian.kl(new, old, std), 0.00011072, atol=1e-8)
    np.testing.assert_allclose(0.15 * gaussian.kl(new, old, std), 0.00001661, atol=1e-8)  # as the code has it


def test_the_log_probability_is_scipys_mean():
    rng = np.random.default_rng(0)
    after, mean = rng.normal(size=(2, 4, 5, 3))
    std = np.array([0.1, 0.5, 1.0, 3.0])
    wanted = stats.norm.logpdf(after, mean, std[:, None, None]).mean((-2, -1))
    np.testing.assert_allclose(gaussian.log_prob(after, mean, std), wanted, rtol=1e-12)


def test_the_gradient_of_a_log_probability_is_its_noise_and_not_through_the_state():
    step, std = numbers("flow_grpo", 0.7)

    def log_pi(v):
        mean = sde.mean(v, jnp.asarray(X), *step)
        return gaussian.log_prob(sde.step(v, jnp.asarray(X), *step, std, Z), mean, std)

    _, _, kappa = step
    wanted = Z / std * (-0.15 + kappa * 0.2) / Z.size
    np.testing.assert_allclose(jax.grad(log_pi)(velocity(X, 0.8)), wanted, rtol=1e-10)


def moments(kind, level, num_steps, mu=0.63):
    """Mean and standard deviation at sigma = 0, from N(0, 1)."""
    times = schedule(num_steps, mu)
    mean, variance = 0.0, 1.0
    for s, t, kappa, std in zip(times, times[1:], *sde.coefficients(kind, times, level), strict=False):
        mean, at_one = (float(sde.mean(velocity(x, s), x, s, t, kappa)) for x in jnp.array([mean, mean + 1.0]))
        variance = (at_one - mean) ** 2 * variance + std**2
    return mean, np.sqrt(variance)


@pytest.mark.parametrize(
    ("kind", "level", "stds"),
    [
        ("flow_grpo", 0.0, [0.292254, 0.366708, 0.395175]),  # the ODE
        ("flow_grpo", 0.7, [0.343296, 0.383531, 0.398492]),  # the marginals of the ODE, 0.4, in the limit
        ("flow_grpo", 0.9, [0.362271, 0.387316, 0.398347]),
        ("cps", 0.8, [0.249637, 0.293705, 0.316079]),  # and not these
    ],
)
def test_the_marginals_of_a_rollout(kind, level, stds):
    found = [moments(kind, level, num_steps) for num_steps in (8, 28, 200)]
    np.testing.assert_allclose(found, [(0.7, std) for std in stds], atol=1e-6)


def test_dance_has_the_marginals_of_the_ode_in_the_limit():
    errors = [abs(moments("dance", 0.3, num_steps)[1] - 0.4) for num_steps in (50, 200, 800)]
    assert errors[0] > 3 * errors[1] > 9 * errors[2]


@pytest.mark.parametrize(("level", "noise"), [(0.7, 0.978907), (0.9, 1.041578)])
def test_the_first_step_leaves_more_noise_than_its_time_says(level, noise):
    (_, sigma_next, kappa), std = numbers("flow_grpo", level, schedule(8, 0.63), 0)
    np.testing.assert_allclose(sigma_next, 0.929295, atol=1e-6)
    np.testing.assert_allclose(np.hypot(sigma_next + kappa, std), noise, atol=1e-6)


@pytest.mark.parametrize("kind", sde.KINDS)
def test_paths_have_the_marginals_that_the_recursion_has(kind):
    """20 000 elements, each a path."""
    times, key = schedule(30, 0.63), jax.random.key(0)
    kappa, std = sde.coefficients(kind, times, 0.7)

    def step(x, of_step):
        k, *numbers = of_step
        z = jax.random.normal(jax.random.fold_in(key, k), x.shape)
        return sde.step(velocity(x, numbers[0]), x, *numbers, z), None

    start = jax.random.normal(jax.random.key(1), (200, 100))
    of_steps = jnp.arange(30), times[:-1], times[1:], kappa, std
    ended, _ = jax.jit(lambda x: jax.lax.scan(step, x, jax.tree.map(jnp.asarray, of_steps)))(start)
    mean, wanted = moments(kind, 0.7, 30)
    assert ended.mean() == pytest.approx(mean, abs=4 * wanted / np.sqrt(20_000))
    assert ended.std() == pytest.approx(wanted, abs=0.006)


@pytest.mark.parametrize(
    ("kind", "first", "end", "wanted"),
    [
        ("flow_grpo", 0, 5, [0.68902744, 0.85106755, 0.89453158]),
        ("flow_grpo", 1, 3, [0.52997831, 0.74700370, 0.96891714]),
        ("cps", 0, 5, [0.72451917, 0.79332923, 0.77933754]),
        ("cps", 1, 3, [0.69669488, 0.83376048, 0.86906975]),
    ],
)
def test_a_rollout_with_a_window(kind, first, end, wanted):
    times, x = schedule(6, 0.63), jnp.asarray(X)
    kappa, std = sde.coefficients(kind, times, 0.7)
    for k in range(6):
        z = np.sin(1 + 3 * k + np.arange(3))[None]
        covered = window.covers(jnp.asarray(k), jnp.asarray(first), end - first)
        step = (jnp.asarray(n[k]) for n in (times[:-1], times[1:], kappa * covered, std * covered))
        x = sde.step(velocity(x, times[k]), x, *step, z)
    np.testing.assert_allclose(x, [wanted], atol=1e-8)


@pytest.mark.parametrize("kind", sde.KINDS)
def test_level_0_and_the_last_step_are_eulers_bit_for_bit(kind):
    times = schedule(6, 0.63)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 3)))

    def v(x, sigma):
        return jnp.tanh(x) * (1 + sigma)

    states, _ = jax.jit(lambda x: EULER.integrate(lambda *at: (v(*at), None), x, times))(x)
    z = jnp.asarray(np.random.default_rng(1).normal(size=(16, 3)))

    @jax.jit
    def take(x, *numbers):
        return sde.step(v(x, numbers[0]), x, *numbers, z)

    for level, steps in ((0.0, range(6)), (0.7, [5])):
        kappa, std = sde.coefficients(kind, times, level)
        for k in steps:
            step = (jnp.asarray(n[k]) for n in (times[:-1], times[1:], kappa, std))
            np.testing.assert_array_equal(take(states[k], *step), states[k + 1])


@pytest.mark.parametrize("kind", sde.KINDS)
def test_a_rollout_of_one_step_is_eulers(kind):
    np.testing.assert_array_equal(sde.coefficients(kind, np.array([1.0, 0.0]), 0.7), [[0.0], [0.0]])


def starts(steps, *arguments):
    return [int(window.progressive_start(jnp.asarray(step), *arguments)) for step in steps]


def test_a_progressive_window_moves_towards_data_and_stays_before_the_last_step():
    assert starts([0, 24, 25, 49, 50, 500, 10**7], 4, 25, 25, 1) == [0, 0, 1, 1, 2, 20, 20]  # MixGRPO's
    assert starts(range(8), 2, 6, 2, 2) == [0, 0, 2, 2, 3, 3, 3, 3]
    assert starts([0, 10**7], 2, 6, 1, 0) == [0, 0]  # frozen
    assert starts([0, 2**31 - 1], 2, 6, 1, 10_000) == [0, 3]  # without an overflow
    assert starts([0, 100], 5, 6, 1, 1) == [0, 0]  # all but the last


def test_a_random_window_is_anywhere_within_its_range():
    draw = jax.jit(jax.vmap(lambda key: window.random_start(key, 2, 1, 5)))
    found = np.asarray(draw(jax.random.split(jax.random.key(0), 3000)))
    assert np.bincount(found)[1:] == pytest.approx([1000] * 3, rel=0.1)
    only = [int(window.random_start(jax.random.key(seed), 3, 0, 3)) for seed in range(5)]  # of Flow-GRPO-Fast on FLUX
    assert only == [0] * 5


def test_a_window_covers_so_many_steps_from_its_first():
    covered = jax.jit(lambda start: window.covers(jnp.arange(6), start, 2))(jnp.asarray(3))
    np.testing.assert_array_equal(covered, [0, 0, 0, 1, 1, 0])
