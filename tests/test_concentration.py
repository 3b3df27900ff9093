"""Attention concentration density, fused against the explicit attention map."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rcgrpo_jax.method import concentration
from rcgrpo_jax.models.config import MMDiTConfig
from rcgrpo_jax.options import read_options
from rcgrpo_jax.plan.programs import FluxKontextDev, Plan, Workload
from rcgrpo_jax.plan.topology import open_topology
from rcgrpo_jax.rl.config import default_config
from rcgrpo_jax.rl.options import Options

N_TXT, N_IMG, H, D = 5, 7, 3, 4
SCALE = D**-0.5
MASK = jnp.array([1.0, 0.0, 1.0, 0.25, 0.0, 0.0, 1.0])

masses_of = jax.jit(concentration.masses)
map_of = jax.jit(concentration.attention_map)


def queries_and_keys(seed=0, *front, n_txt=N_TXT):
    rng = np.random.default_rng(seed)
    q_txt, k_img = 3 * rng.normal(size=(*front, n_txt, H, D)), rng.normal(size=(*front, N_IMG, H, D))
    return jnp.asarray(q_txt, jnp.float32), jnp.asarray(k_img, jnp.float32)


def explicit_map(q_txt, k_img):
    """A [N_txt, N_img]: the whole H x N_txt x N_img softmax in float64, averaged over heads."""
    scores = SCALE * np.einsum("vhd,uhd->hvu", np.float64(q_txt), np.float64(k_img))
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return (weights / weights.sum(-1, keepdims=True)).mean(0)


def explicit_acd(q_txt, k_img, mask):
    a, mask = explicit_map(q_txt, k_img).sum(0), np.float64(mask)
    return (a @ mask / mask.sum()) / (a.sum() / N_IMG)


@pytest.mark.parametrize("n_txt", [N_TXT, 2 * concentration.TILE, 2 * concentration.TILE + 3])
def test_masses_and_map_are_those_of_the_explicit_attention(n_txt):
    q_txt, k_img = queries_and_keys(n_txt=n_txt)
    attention = explicit_map(q_txt, k_img)
    inside, total = masses_of(q_txt, k_img, MASK, SCALE)
    np.testing.assert_allclose(inside, attention @ np.asarray(MASK), rtol=1e-5)
    np.testing.assert_allclose(total, 1, rtol=1e-5)
    np.testing.assert_allclose(map_of(q_txt, k_img, SCALE), attention.sum(0), rtol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_the_density_is_the_same_from_the_map_and_from_the_masses(seed):
    q_txt, k_img = queries_and_keys(seed)
    expected = explicit_acd(q_txt, k_img, MASK)
    assert abs(expected - 1) > 0.02  # a case that tells
    from_map = concentration.density(map_of(q_txt, k_img, SCALE), MASK)
    from_masses = concentration.density_from_masses(*masses_of(q_txt, k_img, MASK, SCALE), MASK)
    np.testing.assert_allclose(from_map, expected, rtol=1e-5)
    np.testing.assert_allclose(from_masses, expected, rtol=1e-5)


def test_bfloat16_queries_and_keys_get_a_float32_softmax():
    q_txt, k_img = (x.astype(jnp.bfloat16) for x in queries_and_keys())
    inside, total = masses_of(q_txt, k_img, MASK, SCALE)
    assert inside.dtype == total.dtype == map_of(q_txt, k_img, SCALE).dtype == jnp.float32
    np.testing.assert_allclose(inside, explicit_map(q_txt, k_img) @ np.asarray(MASK), rtol=1e-5)


def test_large_scores_do_not_overflow():
    q_txt, k_img = queries_and_keys()
    inside, total = masses_of(100 * q_txt, 100 * k_img, MASK, SCALE)
    np.testing.assert_allclose(total, 1, rtol=1e-5)
    np.testing.assert_allclose(inside, explicit_map(100 * q_txt, 100 * k_img) @ np.asarray(MASK), atol=1e-5)


@pytest.mark.parametrize("function", [concentration.masses, concentration.attention_map])
def test_no_more_than_a_tile_of_the_map_ever_exists(function):
    q_txt, k_img = queries_and_keys(n_txt=3 * concentration.TILE)
    k_img = jnp.tile(k_img, (8, 1, 1))  # more keys than a head has channels: scores are the largest arrays
    mask = (jnp.tile(MASK, 8),) if function is concentration.masses else ()
    program = str(jax.make_jaxpr(lambda *arrays: function(*arrays, SCALE))(q_txt, k_img, *mask))
    sizes = [math.prod(map(int, shape.split(","))) for shape in re.findall(r"f32\[([\d,]+)\]", program)]
    assert max(sizes) == concentration.TILE * H * len(k_img)


def test_even_attention_has_density_one_and_attention_inside_only_the_inverse_share_of_the_mask():
    q_txt, k_img = queries_and_keys()
    binary = jnp.array([1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    even = masses_of(jnp.zeros_like(q_txt), k_img, binary, SCALE)
    np.testing.assert_allclose(concentration.density_from_masses(*even, binary), 1, rtol=1e-5)
    np.testing.assert_allclose(concentration.density(jnp.full((4, N_IMG), 0.3), MASK), np.ones(4), rtol=1e-5)
    pointed = masses_of(jnp.ones_like(q_txt), jnp.broadcast_to(50 * binary[:, None, None], k_img.shape), binary, SCALE)
    np.testing.assert_allclose(concentration.density_from_masses(*pointed, binary), N_IMG / 2, rtol=1e-5)


def test_an_empty_mask_has_density_zero_and_a_full_one_density_one():
    q_txt, k_img = queries_and_keys()
    a = map_of(q_txt, k_img, SCALE)
    for fill in (0.0, 1.0):
        mask = jnp.full(N_IMG, fill)
        np.testing.assert_allclose(concentration.density(a, mask), fill, rtol=1e-5)
        masses = masses_of(q_txt, k_img, mask, SCALE)
        np.testing.assert_allclose(concentration.density_from_masses(*masses, mask), fill, rtol=1e-5)


def test_text_weights_leave_padding_out():
    q_txt, k_img = queries_and_keys()
    masses = masses_of(q_txt, k_img, MASK, SCALE)
    real = jnp.array([1.0, 1.0, 0.0, 1.0, 0.0])
    density = concentration.density_from_masses(*masses, MASK, text_weights=real)
    np.testing.assert_allclose(density, explicit_acd(q_txt[real > 0], k_img, MASK), rtol=1e-5)


def test_no_gradient_runs_through_the_attention():
    def acd(q_txt, k_img):
        from_masses = concentration.density_from_masses(*masses_of(q_txt, k_img, MASK, SCALE), MASK)
        return from_masses + concentration.density(map_of(q_txt, k_img, SCALE), MASK)

    for gradient in jax.grad(acd, argnums=(0, 1))(*queries_and_keys()):
        np.testing.assert_array_equal(gradient, 0)


def test_the_reward_is_the_mean_over_steps_and_layers():
    densities = jnp.array([[1.0, 2.0, 3.0], [4.0, 5.0, 9.0]])
    np.testing.assert_allclose(concentration.reward(densities), 4)
    np.testing.assert_allclose(concentration.reward(jnp.stack([densities, 2 * densities])), [4, 8])


def test_jit_and_vmap_agree_with_one_sample_at_a_time():
    q_txt, k_img = (np.asarray(x) for x in queries_and_keys(0, 3))
    masks, weights = np.random.default_rng(1).random((3, N_IMG), np.float32), np.arange(N_TXT, dtype=np.float32)

    def everything(q, k, mask):
        a, (inside, total) = concentration.attention_map(q, k, SCALE), concentration.masses(q, k, mask, SCALE)
        densities = concentration.density_from_masses(inside, total, mask, weights), concentration.density(a, mask)
        return a, inside, total, *densities

    mapped = jax.jit(jax.vmap(everything))(q_txt, k_img, masks)
    for result, expected in zip(mapped, everything(q_txt[1], k_img[1], masks[1]), strict=True):
        np.testing.assert_allclose(np.asarray(result)[1], expected, rtol=1e-5)


class ShallowFlux(FluxKontextDev):
    """FLUX.1-Kontext-dev by its sizes, with two of its 57 blocks: single ones, the kind that reports."""

    def config(self, name):
        return MMDiTConfig(num_layers=0, num_single_layers=2) if name == "transformer" else super().config(name)


@pytest.mark.slow
def test_acd_costs_little_beside_the_model():
    """The rollout at 1024 x 1024 on a TPU: at most 2 % more FLOPs and 64 MiB more temporary memory, by the compiler.

    One block of two reports, where FLUX has 10 of 57, and the count takes both for reporting: a block's share of either
    cost is larger here than there.
    """
    pytest.importorskip("libtpu")

    def compiled_rollout(weight: float) -> Plan:
        config = default_config()
        config.data.size = (1024, 1024)
        config.acd.update(weight=weight, layers=1)
        config.rollout.update(prompts=1, num_steps=1, micro_batch=1)
        with jax.default_matmul_precision("default"):  # tests ask for what bfloat16 does not have
            return Workload(read_options(Options, config), ShallowFlux(), open_topology("v5e:1x1")).compile("rollout")

    without, with_acd = compiled_rollout(0.0), compiled_rollout(1.0)
    assert 1 < with_acd.cost.flops / without.cost.flops <= 1.02
    assert with_acd.memory.temporaries - without.memory.temporaries <= 64 * 2**20
