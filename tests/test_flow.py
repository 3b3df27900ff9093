"""Schedule, solver, packing and positions: the closed forms, and diffusers' own."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import Reference, diffusers, torch, transformer_flux

from rcgrpo_jax.flow import latents, rollout, schedule
from rcgrpo_jax.flow.solvers.euler import euler_step
from rcgrpo_jax.models import rope
from rcgrpo_jax.weights.random_folder import SCHEDULER


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


@pytest.mark.parametrize("num_tokens", [1, 256, 1024, 4096])
@pytest.mark.parametrize("num_steps", [1, 2, 8, 28])
def test_sigmas_are_those_of_diffusers_scheduler(num_steps, num_tokens):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(SCHEDULER)
    mu = Reference("diffusers.pipelines.flux.pipeline_flux_kontext").calculate_shift(num_tokens)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / num_steps, num_steps), mu=mu)
    sigmas = schedule.sigmas(num_steps, num_tokens)
    assert sigmas.dtype == np.float32
    np.testing.assert_allclose(sigmas, scheduler.sigmas.numpy(), atol=1e-6)
    assert sigmas[0] == 1
    assert sigmas[-1] == 0
    assert np.all(np.diff(sigmas) < 0)


def test_shift_is_a_line_through_flux_two_points():
    assert schedule.shift(256) == pytest.approx(0.5)
    assert schedule.shift(1024) == pytest.approx(0.630)
    assert schedule.shift(4096) == pytest.approx(1.150)
    assert schedule.shift(30, base_tokens=10, max_tokens=50, base_shift=1.0, max_shift=2.0) == pytest.approx(1.5)


def test_a_rollout_needs_a_step():
    with pytest.raises(ValueError, match="num_steps is 0"):
        schedule.sigmas(0, 1024)


def test_euler_is_first_order():
    """v = cos(3 s) x has the solution x(s) = x(1) exp((sin(3 s) - sin(3)) / 3)."""
    steps = np.array([16, 32, 64, 128])
    start = jnp.asarray(random(5, 2))
    integrate = jax.jit(lambda sigmas: rollout.integrate(lambda x, sigma: jnp.cos(3 * sigma) * x, start, sigmas))
    errors = [
        np.abs(integrate(schedule.sigmas(k, 1024))[-1] - start * np.exp(-np.sin(3) / 3)).max() for k in steps.tolist()
    ]
    slope = np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert abs(slope + 1) < 0.1
    assert errors[-1] < 0.02


def test_euler_is_exact_for_a_constant_velocity():
    noise, data = random(2, 5, 2)
    sigmas = schedule.sigmas(7, 256)
    states = rollout.integrate(lambda x, sigma: jnp.asarray(noise - data), noise, sigmas)
    expected = sigmas[:, None, None] * noise[None] + (1 - sigmas[:, None, None]) * data[None]
    np.testing.assert_allclose(states, expected, atol=1e-6)


def curved(x: jax.Array, sigma: jax.Array) -> jax.Array:
    return jnp.tanh(x) * sigma - 0.3 * x


def test_integrate_returns_every_state_of_a_loop_over_steps():
    x, sigmas = random(3, 5, 2), schedule.sigmas(6, 1024)
    states = jax.jit(rollout.integrate, static_argnums=0)(curved, x, sigmas)
    assert states.shape == (7, 3, 5, 2)
    np.testing.assert_array_equal(states[0], x)
    expected = [jnp.asarray(x)]
    for sigma, sigma_next in pairwise(sigmas):
        expected.append(expected[-1] + (sigma_next - sigma) * curved(expected[-1], sigma))
    np.testing.assert_allclose(states, jnp.stack(expected), atol=1e-6)


def test_states_keep_their_dtype_under_a_velocity_of_another():
    def half(x, sigma):
        return curved(x, sigma).astype(jnp.bfloat16)

    assert euler_step(half, jnp.ones((5, 2)), jnp.float32(1), jnp.float32(0.5)).dtype == jnp.float32
    assert rollout.integrate(half, random(5, 2), schedule.sigmas(2, 256)).dtype == jnp.float32


def test_aux_is_stacked_over_the_steps():
    x, sigmas = jnp.asarray(random(5, 2)), schedule.sigmas(6, 1024)

    def with_aux(x, sigma):
        return curved(x, sigma), {"sigma": sigma, "x": x}

    states, aux = rollout.integrate_with_aux(with_aux, x, sigmas)
    np.testing.assert_array_equal(states, rollout.integrate(curved, x, sigmas))
    np.testing.assert_array_equal(aux["sigma"], sigmas[:-1])
    np.testing.assert_array_equal(aux["x"], states[:-1])


@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (5, 2)])
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_unpack_is_the_inverse_of_pack(grid, batch):
    cells = random(*batch, 2 * grid[0], 2 * grid[1], 3)
    tokens = latents.pack(jnp.asarray(cells))
    assert tokens.shape == (*batch, grid[0] * grid[1], 12)
    np.testing.assert_array_equal(latents.unpack(tokens, grid), cells)


@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (5, 2)])
def test_packing_is_that_of_diffusers(grid):
    rows, columns = grid
    cells = random(2, 2 * rows, 2 * columns, 16)
    theirs = diffusers.FluxKontextPipeline._pack_latents(
        torch.from_numpy(cells).permute(0, 3, 1, 2), 2, 16, 2 * rows, 2 * columns
    )
    np.testing.assert_array_equal(latents.pack(jnp.asarray(cells)), theirs.numpy())
    unpacked = diffusers.FluxKontextPipeline._unpack_latents(theirs, 16 * rows, 16 * columns, 8).permute(0, 2, 3, 1)
    np.testing.assert_array_equal(latents.unpack(jnp.asarray(theirs.numpy()), grid), unpacked.numpy())


def test_a_token_is_16_pixels_a_side():
    assert latents.token_grid(512, 768) == (32, 48)
    assert latents.token_grid(12, 8, downscale=2) == (3, 2)


@pytest.mark.parametrize(("height", "width"), [(100, 128), (128, 100), (0, 16), (16, 0), (-16, 16)])
def test_an_image_that_does_not_divide_into_tokens_is_refused(height, width):
    with pytest.raises(ValueError, match=f"{height} x {width} pixels does not divide into tokens of 16 x 16 pixels"):
        latents.token_grid(height, width)


@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (98, 42)])
def test_positions_are_those_of_diffusers(grid):
    target = diffusers.FluxKontextPipeline._prepare_latent_image_ids(1, *grid, "cpu", torch.float32)
    reference = target.clone()
    reference[:, 0] = 1  # as `prepare_latents` does
    np.testing.assert_array_equal(rope.token_ids(grid, 0), target.numpy())
    np.testing.assert_array_equal(rope.kontext_ids(7, grid), torch.cat([torch.zeros(7, 3), target, reference]).numpy())


@pytest.mark.parametrize("axes_dims", [(16, 56, 56), (2, 4, 6), (8, 4, 4)])
def test_rotary_embedding_is_that_of_diffusers(axes_dims):
    ids = rope.kontext_ids(3, (98, 5))
    x = random(2, len(ids), 3, sum(axes_dims))
    frequencies = transformer_flux.FluxPosEmbed(theta=10000, axes_dim=axes_dims)(torch.from_numpy(ids))
    theirs = transformer_flux.apply_rotary_emb(torch.from_numpy(x), frequencies, sequence_dim=1)
    angles = rope.angles(ids, axes_dims, 10000.0)
    np.testing.assert_allclose(rope.rotate(jnp.asarray(x), angles), theirs.numpy(), atol=2e-5)
    rotated = rope.rotate(jnp.asarray(x, jnp.bfloat16), angles)
    assert rotated.dtype == jnp.bfloat16
    np.testing.assert_allclose(rotated.astype(jnp.float32), theirs.numpy(), atol=0.05)
