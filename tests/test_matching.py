"""Flow matching: a straight path, times shifted like the schedule's, and a loss that weighs tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcgrpo_jax.flow import matching, schedule
from rcgrpo_jax.flow.rollout import integrate
from rcgrpo_jax.parallel.mesh import make_mesh
from rcgrpo_jax.parallel.microbatch import accumulate


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


DATA, NOISE = normal(0, 3, 5, 4), normal(1, 3, 5, 4)


def test_the_path_goes_from_data_to_noise():
    for sigma, end in ((0.0, DATA), (1.0, NOISE)):
        x, velocity = matching.interpolate(DATA, NOISE, jnp.full(3, sigma))
        np.testing.assert_array_equal(x, end)
        np.testing.assert_array_equal(velocity, NOISE - DATA)


def test_the_velocity_is_the_paths_derivative():
    sigma = jnp.array([0.1, 0.5, 0.8])
    path = lambda s: matching.interpolate(DATA, NOISE, s)[0]  # noqa: E731
    _, derivative = jax.jvp(path, (sigma,), (jnp.ones(3),))
    np.testing.assert_allclose(derivative, matching.interpolate(DATA, NOISE, sigma)[1], atol=1e-6)


@pytest.mark.parametrize("num_steps", [1, 7])
def test_a_model_with_this_velocity_samples_the_data(num_steps):
    """Data of one point: the conditional velocity is the marginal one, and the solver is exact on straight paths."""
    _, velocity = matching.interpolate(DATA[0], NOISE[0], jnp.float32(0.5))
    states = integrate(lambda x, sigma: velocity, NOISE[0], schedule.sigmas(num_steps, 5))
    np.testing.assert_allclose(states[-1], DATA[0], atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"base_shift": 0.1, "max_shift": 3.0}])
@pytest.mark.parametrize("tokens", [64, 1024, 4096])
def test_times_are_logit_normal_around_the_shift(tokens, options):
    sigmas = matching.sample_sigmas(jax.random.key(2), (20_000,), tokens, **options)
    mu = schedule.shift(tokens, **options)
    assert sigmas.dtype == jnp.float32
    assert 0 < sigmas.min() < sigmas.max() < 1
    assert np.median(sigmas) == pytest.approx(1 / (1 + np.exp(-mu)), abs=0.01)
    assert np.median(sigmas) == pytest.approx(schedule.sigmas(2, tokens, **options)[1], abs=0.01)
    logits = np.log(sigmas / (1 - sigmas))
    assert (logits.mean(), logits.std()) == pytest.approx((mu, 1), abs=0.03)


def test_an_extra_shift_moves_times_towards_noise():
    plain, noisier = (matching.sample_sigmas(jax.random.key(2), (1000,), 64, extra) for extra in (0.0, 1.5))
    np.testing.assert_allclose(np.log(noisier / (1 - noisier)), np.log(plain / (1 - plain)) + 1.5, atol=1e-3)


def test_the_loss_is_a_weighted_mean_over_tokens():
    predicted, velocity = normal(3, 5, 4), normal(4, 5, 4)
    errors = np.square(np.asarray(predicted - velocity)).mean(-1)
    for weights in (np.ones(5), np.eye(5)[3], np.array([0, 0.5, 1, 0, 0.25])):
        loss = matching.matching_loss(predicted, velocity, jnp.asarray(weights, jnp.float32))
        assert loss == pytest.approx((errors * weights).sum() / weights.sum(), rel=1e-6)
    assert matching.matching_loss(velocity, velocity, jnp.ones(5)) == 0


def test_a_token_without_weight_gets_no_gradient_and_an_empty_region_no_nan():
    predicted, velocity = normal(3, 5, 4), normal(4, 5, 4)
    value_and_grad = jax.value_and_grad(matching.matching_loss)
    _, gradient = value_and_grad(predicted, velocity, jnp.array([1.0, 0, 0, 1, 0]))
    assert np.any(gradient[0])
    assert not np.any(gradient[jnp.array([1, 2, 4])])
    loss, gradient = value_and_grad(predicted, velocity, jnp.zeros(5))
    assert loss == 0
    assert not np.any(gradient)


def test_predictions_in_bfloat16_are_compared_in_float32():
    predicted, velocity = normal(3, 5, 4).astype(jnp.bfloat16), normal(4, 5, 4)
    loss = matching.matching_loss(predicted, velocity, jnp.ones(5))
    assert loss.dtype == jnp.float32
    assert loss == matching.matching_loss(predicted.astype(jnp.float32), velocity, jnp.ones(5))


@pytest.mark.parametrize(("micro_batch", "devices"), [(0, 1), (2, 1), (8, 1), (0, 8), (4, 4)])
def test_gradients_in_micro_batches_are_those_of_the_whole(micro_batch, devices):
    samples, weights = (normal(5, 8, 3), normal(6, 8)), {"a": normal(7, 3)}

    def loss(weights, x, y):
        errors = jnp.square(x @ weights["a"] - y)
        return errors.mean(), errors

    mesh = make_mesh({"data": -1}, jax.devices()[:devices])
    with jax.set_mesh(mesh):
        found, errors = jax.jit(
            lambda *samples: accumulate(
                lambda x, y: jax.grad(loss, has_aux=True)(weights, x, y), samples, micro_batch, mesh
            )
        )(*samples)
    wanted, wanted_errors = jax.grad(loss, has_aux=True)(weights, *samples)
    np.testing.assert_allclose(found["a"], wanted["a"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(errors, wanted_errors, rtol=1e-6)
