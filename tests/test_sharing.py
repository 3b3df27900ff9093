"""Candidates that share the tokens outside a set."""

from __future__ import annotations

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_mmdit import CONFIGS, GRID, N_TXT, pair

from rcgrpo_jax.method.sharing import Own
from rcgrpo_jax.models import rope
from rcgrpo_jax.models.lora import Linear, LoRAConfig, init_adapter
from rcgrpo_jax.models.mmdit import (
    AttentionOptions,
    Condition,
    DoubleBlock,
    MMDiT,
    SingleBlock,
    Surroundings,
    TimeTextEmbed,
    sown_masses,
)
from rcgrpo_jax.models.mmdit_parts import Modulation, modulate
from rcgrpo_jax.models.sharing import layout

N = GRID[0] * GRID[1]
SIGMA = jnp.float32(0.7)


def group_inputs(name: str, group: int) -> tuple[jax.Array, Condition, jax.Array]:
    """A group's noises, its condition, and a soft region."""
    config, rng = CONFIGS[name], np.random.default_rng(3)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32))

    text, pooled = draw(N_TXT, config.joint_attention_dim), draw(config.pooled_projection_dim)
    condition = Condition(text, pooled, draw(N, config.in_channels), jnp.float32(2.5))
    return draw(group, N, config.in_channels), condition, jnp.asarray(rng.random(N, np.float32))


def token_set(*tokens: int) -> jax.Array:
    return jnp.zeros(N, bool).at[jnp.array(tokens, int)].set(True)


@cache
def adapted(name: str) -> dict:
    """Parameters, and a LoRA that does something."""
    params = pair(name)[1]
    lora = init_adapter(jax.random.key(0), params, LoRAConfig(rank=2, alpha=2.0))
    lora = jax.tree.map(lambda x: x + 0.05 * jnp.cos(jnp.arange(x.size).reshape(x.shape)), lora)
    return {"params": params, "lora": lora}


@partial(jax.jit, static_argnums=0)
def plain_definition(name: str, x: jax.Array, condition: Condition, own: Own, region: jax.Array) -> tuple:
    """Every candidate in full; at the start and after each block its other tokens become the first candidate's."""
    config, variables = CONFIGS[name], adapted(name)
    shared = (config, jnp.float32, jnp.float32)

    def part(module: type, part_name: str, *args, at: int | None = None):
        chosen = {key: tree.get(part_name, {}) for key, tree in variables.items()}
        chosen = chosen if at is None else jax.tree.map(lambda leaf: leaf[at], chosen)
        return lambda *inputs: module(*args).apply(chosen, *inputs, mutable=["intermediates"])

    angles = rope.angles(rope.kontext_ids(N_TXT, GRID), config.axes_dims_rope, config.rope_theta)
    vec, _ = part(TimeTextEmbed, "time_text_embed", *shared)(SIGMA, condition)
    around = Surroundings(vec, angles, region)
    of_image = jnp.concatenate([own.target, own.reference])[:, None]
    of_all = jnp.concatenate([jnp.zeros((N_TXT, 1), bool), of_image])
    embed = part(Linear, "x_embedder", config.width)
    streams = [
        (
            part(Linear, "context_embedder", config.width)(condition.text)[0],
            embed(jnp.concatenate([jnp.where(own.target[:, None], candidate, x[0]), condition.reference]))[0],
        )
        for candidate in x
    ]
    masses = []
    options = AttentionOptions(acd_layers=config.num_blocks)
    for at in range(config.num_layers):
        block = part(DoubleBlock, "transformer_blocks", *shared, options, at=at)
        found = [block(stream, jnp.int32(at), around) for stream in streams]
        masses.append([sown["intermediates"]["attn"] for _, sown in found])
        (text, image), _ = found[0][0]
        streams = [(text, jnp.where(of_image, mine, image)) for ((_, mine), _), _ in found]
    streams = [jnp.concatenate(stream) for stream in streams]
    for at in range(config.num_single_layers):
        block = part(SingleBlock, "single_transformer_blocks", *shared, options, at=at)
        found = [block(stream, jnp.int32(config.num_layers + at), around) for stream in streams]
        masses.append([sown["intermediates"]["attn"] for _, sown in found])
        streams = [jnp.where(of_all, mine, found[0][0][0]) for (mine, _), _ in found]
    (scale, shift), _ = part(Modulation, "norm_out", *shared, 2)(vec)
    head = part(Linear, "proj_out", config.in_channels)
    velocity = jnp.stack([head(modulate(stream[N_TXT : N_TXT + N], shift, scale))[0] for stream in streams])
    inside = jnp.stack([jnp.stack([of["acd_inside"] for of in block]) for block in masses])
    return velocity, inside


@pytest.mark.parametrize(
    ("name", "target", "reference", "size"),
    [
        ("guided", (4, 5, 9), (4, 5), 5),
        ("guided", (4, 5, 9), (), 6),  # with room to spare
        pytest.param("double", (0, 14), (1, 2, 3), 5, marks=pytest.mark.slow),
        pytest.param("single", (7,), (7,), 4, marks=pytest.mark.slow),
        pytest.param("unguided", (), (), 1, marks=pytest.mark.slow),  # nothing of its own
    ],
)
def test_shared_candidates_are_those_of_the_plain_definition(name, target, reference, size):
    config = CONFIGS[name]
    x, condition, region = group_inputs(name, group=3)
    own = Own(token_set(*target), token_set(*reference), size)
    model = MMDiT(config, attention=AttentionOptions(acd_layers=config.num_blocks))

    @jax.jit
    def shared(variables: dict, x: jax.Array) -> tuple:
        return model.apply(variables, x, SIGMA, condition, GRID, region, own, mutable=["intermediates"])

    velocity, sown = shared(adapted(name), x)
    wanted, inside = plain_definition(name, x, condition, own, region)
    np.testing.assert_allclose(velocity, wanted, atol=2e-5)
    found = sown_masses(sown["intermediates"], "acd_inside", config.num_blocks)
    np.testing.assert_allclose(found, inside, atol=2e-6)
    exact = model.apply(adapted(name), x[0], SIGMA, condition, GRID)
    np.testing.assert_allclose(velocity[0], exact, atol=2e-5)
    outside = np.flatnonzero(~own.target)
    np.testing.assert_array_equal(velocity[1:, outside], jnp.broadcast_to(velocity[0, outside], (2, len(outside), 8)))


def test_two_candidates_may_differ_in_one_token():
    x, condition, _ = group_inputs("guided", group=2)
    x = x.at[1].set(x[0].at[6].add(0.5))
    own = Own(token_set(6), token_set(), 1)
    velocity = MMDiT(CONFIGS["guided"]).apply(adapted("guided"), x, SIGMA, condition, GRID, None, own)
    moved = np.abs(np.asarray(velocity[1] - velocity[0])).max(-1)
    assert moved[6] > 1e-3
    assert not np.delete(moved, 6).any()


@pytest.mark.parametrize("implementation", ["xla", "flash"])
@pytest.mark.parametrize("remat", ["none", "dots"])
def test_groups_may_be_mapped_over_and_have_sets_of_their_own(implementation, remat):
    x, condition, region = group_inputs("guided", group=3)
    model = MMDiT(CONFIGS["guided"], remat=remat, attention=AttentionOptions(implementation))
    targets = jnp.stack([token_set(4, 5), token_set(9)])

    def velocity(x: jax.Array, target: jax.Array) -> jax.Array:
        own = Own(target, target, 4)
        return model.apply(adapted("guided"), x, SIGMA, condition, GRID, region, own, mutable=["intermediates"])[0]

    groups = jnp.stack([x, 2 * x])
    mapped = jax.jit(jax.vmap(velocity))(groups, targets)
    for group, target, found in zip(groups, targets, mapped, strict=True):
        wanted, _ = plain_definition("guided", group, condition, Own(target, target, 4), region)
        np.testing.assert_allclose(found, wanted, atol=5e-5)


def test_a_layout_finds_every_token_again():
    own = jnp.array([False, True, False, True, True])
    of = layout(own, group=3, size=4)
    assert of.others == (2, 4)
    tokens = jnp.arange(15).reshape(3, 5)
    packed = tokens[of.candidate, of.position]
    np.testing.assert_array_equal(packed[of.row], jnp.where(own, tokens, tokens[0]))
