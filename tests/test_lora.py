"""Adapters: where they sit, what they compute, and that diffusers reads ours and we read diffusers'."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from rcgrpo_jax.errors import UsageError
from rcgrpo_jax.models.config import MMDiTConfig
from rcgrpo_jax.models.lora import TARGETS, LoRAConfig, init_adapter, scale_adapter, target_kernels
from rcgrpo_jax.models.mmdit import Condition, MMDiT
from rcgrpo_jax.weights import random_folder
from rcgrpo_jax.weights.networks import abstract_params

TINY = MMDiTConfig(
    num_layers=2, num_single_layers=3, num_attention_heads=2, attention_head_dim=4, axes_dims_rope=(0, 2, 2),
    in_channels=4, joint_attention_dim=6, pooled_projection_dim=5,
)  # fmt: skip
SMALL = random_folder.SMALL["transformer"]
CUSTOM = r"x_embedder|.*/norm1_context/linear|single_transformer_blocks/norm/linear|.*/attn/to_[qk]"
SETS = [*TARGETS, CUSTOM]
RANK4 = LoRAConfig(rank=4, alpha=10.0, targets="all-linear")
GRID, N_TXT = (2, 3), 5


def random_params(config: MMDiTConfig) -> dict:
    leaves, tree = jax.tree.flatten(abstract_params("transformer", config))
    rng = np.random.default_rng(0)
    return tree.unflatten([jnp.asarray(0.3 * rng.standard_normal(leaf.shape, np.float32)) for leaf in leaves])


def random_adapter(params: dict, config: LoRAConfig) -> dict:
    """An adapter with a `B` that is nowhere 0."""
    rng, adapter = np.random.default_rng(1), flatten_dict(init_adapter(jax.random.key(0), params, config))
    return unflatten_dict(
        {
            p: 0.1 * rng.standard_normal(x.shape, np.float32) if p[-1] == "B" else np.asarray(x)
            for p, x in adapter.items()
        }
    )


def inputs(config: MMDiTConfig) -> tuple[np.ndarray, np.ndarray, Condition]:
    rng, num_img = np.random.default_rng(2), GRID[0] * GRID[1]

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal((1, *shape), np.float32)

    condition = Condition(
        normal(N_TXT, config.joint_attention_dim),
        normal(config.pooled_projection_dim),
        normal(num_img, config.in_channels),
        np.float32([2.5]),
    )
    return normal(num_img, config.in_channels), np.float32([0.7]), condition


@jax.jit
def tiny_velocity(params: dict, lora: dict) -> jax.Array:
    return MMDiT(TINY).apply({"params": params, "lora": lora}, *inputs(TINY), GRID)


@jax.jit
def small_velocity(params: dict, lora: dict) -> jax.Array:
    return MMDiT(SMALL).apply({"params": params, "lora": lora}, *inputs(SMALL), GRID)


def shapes(tree: dict) -> dict[str, tuple[int, ...]]:
    return {path: leaf.shape for path, leaf in flatten_dict(tree, sep="/").items()}


ATTENTION = {
    "transformer_blocks/attn/to_q/A": (2, 8, 3),
    "transformer_blocks/attn/to_q/B": (2, 3, 8),
    "transformer_blocks/attn/to_k/A": (2, 8, 3),
    "transformer_blocks/attn/to_k/B": (2, 3, 8),
    "transformer_blocks/attn/to_v/A": (2, 8, 3),
    "transformer_blocks/attn/to_v/B": (2, 3, 8),
    "transformer_blocks/attn/to_out_0/A": (2, 8, 3),
    "transformer_blocks/attn/to_out_0/B": (2, 3, 8),
    "transformer_blocks/attn/add_q_proj/A": (2, 8, 3),
    "transformer_blocks/attn/add_q_proj/B": (2, 3, 8),
    "transformer_blocks/attn/add_k_proj/A": (2, 8, 3),
    "transformer_blocks/attn/add_k_proj/B": (2, 3, 8),
    "transformer_blocks/attn/add_v_proj/A": (2, 8, 3),
    "transformer_blocks/attn/add_v_proj/B": (2, 3, 8),
    "transformer_blocks/attn/to_add_out/A": (2, 8, 3),
    "transformer_blocks/attn/to_add_out/B": (2, 3, 8),
    "single_transformer_blocks/attn/to_q/A": (3, 8, 3),
    "single_transformer_blocks/attn/to_q/B": (3, 3, 8),
    "single_transformer_blocks/attn/to_k/A": (3, 8, 3),
    "single_transformer_blocks/attn/to_k/B": (3, 3, 8),
    "single_transformer_blocks/attn/to_v/A": (3, 8, 3),
    "single_transformer_blocks/attn/to_v/B": (3, 3, 8),
}
MLP = {
    "transformer_blocks/ff/net_0/proj/A": (2, 8, 3),
    "transformer_blocks/ff/net_0/proj/B": (2, 3, 32),
    "transformer_blocks/ff/net_2/A": (2, 32, 3),
    "transformer_blocks/ff/net_2/B": (2, 3, 8),
    "transformer_blocks/ff_context/net_0/proj/A": (2, 8, 3),
    "transformer_blocks/ff_context/net_0/proj/B": (2, 3, 32),
    "transformer_blocks/ff_context/net_2/A": (2, 32, 3),
    "transformer_blocks/ff_context/net_2/B": (2, 3, 8),
    "single_transformer_blocks/proj_mlp/A": (3, 8, 3),
    "single_transformer_blocks/proj_mlp/B": (3, 3, 32),
}
OUT = {
    "single_transformer_blocks/proj_out/A": (3, 40, 3),
    "single_transformer_blocks/proj_out/B": (3, 3, 8),
}
EXPRESSION = {
    "x_embedder/A": (4, 3),
    "x_embedder/B": (3, 8),
    "transformer_blocks/attn/to_v/A": (2, 8, 3),
    "transformer_blocks/attn/to_v/B": (2, 3, 8),
}


@pytest.mark.parametrize(
    ("targets", "tree"),
    [
        ("attention", ATTENTION),
        ("attention+mlp", ATTENTION | MLP),
        ("all-linear", ATTENTION | MLP | OUT),
        ("x_embedder|transformer_blocks/attn/to_v", EXPRESSION),
    ],
)
def test_the_tree_of_each_target_set(targets, tree):
    adapter = init_adapter(jax.random.key(0), abstract_params("transformer", TINY), LoRAConfig(rank=3, targets=targets))
    assert shapes(adapter) == tree
    assert {leaf.dtype for leaf in jax.tree.leaves(adapter)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("targets", ["attn/to_q", "atention", "to_("])
def test_targets_that_match_nothing_or_do_not_compile_are_refused(targets):
    with pytest.raises(UsageError, match=r"^lora.targets: .*(matches no linear layer|is not a regular expression)"):
        target_kernels(abstract_params("transformer", TINY), targets)


def test_a_is_drawn_uniformly_as_peft_draws_it():
    adapter = init_adapter(jax.random.key(0), abstract_params("transformer", SMALL), LoRAConfig(rank=8))
    for path, leaf in flatten_dict(adapter).items():
        if path[-1] == "A":
            bound = leaf.shape[-2] ** -0.5
            assert 0.95 * bound < np.abs(leaf).max() <= bound
            assert abs(np.std(leaf) / bound - 3**-0.5) < 0.05
        else:
            assert not np.any(leaf)
    blocks = adapter["transformer_blocks"]["attn"]
    assert not np.array_equal(blocks["to_q"]["A"][0], blocks["to_q"]["A"][1])
    assert not np.array_equal(blocks["to_q"]["A"], blocks["to_k"]["A"])


def test_a_fresh_adapter_leaves_the_network_as_it_was_bit_for_bit():
    params = random_params(TINY)
    base = tiny_velocity(params, {})
    fresh = init_adapter(jax.random.key(0), params, RANK4)
    np.testing.assert_array_equal(tiny_velocity(params, fresh), base)
    assert set(jax.eval_shape(lambda: MMDiT(TINY).init(jax.random.key(0), *inputs(TINY), GRID))) == {"params"}


def test_an_adapter_adds_alpha_over_r_times_a_b_to_the_kernel():
    params = random_params(TINY)
    adapter = random_adapter(params, RANK4)
    merged = flatten_dict(params)
    for path in target_kernels(params, RANK4.targets):
        a, b = (flatten_dict(adapter)[(*path, factor)] for factor in "AB")
        merged[(*path, "kernel")] = merged[(*path, "kernel")] + 2.5 * a @ b
    assert RANK4.scale == 2.5
    adapted = tiny_velocity(params, scale_adapter(adapter, RANK4.scale))
    expected = tiny_velocity(unflatten_dict(merged), {})
    assert np.abs(expected - tiny_velocity(params, {})).max() > 0.1
    np.testing.assert_allclose(adapted, expected, atol=1e-4 * np.abs(expected).max())


def test_scaling_touches_b_alone():
    adapter = random_adapter(random_params(TINY), RANK4)
    scaled = flatten_dict(scale_adapter(adapter, 2.5))
    for path, leaf in flatten_dict(adapter).items():
        np.testing.assert_array_equal(scaled[path], leaf * (2.5 if path[-1] == "B" else 1))


def test_the_first_gradient_moves_b_and_not_a():
    params = random_params(TINY)
    fresh = init_adapter(jax.random.key(0), params, RANK4)
    gradient = jax.grad(lambda lora: jnp.sum(tiny_velocity(params, scale_adapter(lora, 2.5)) ** 2))(fresh)
    for path, leaf in flatten_dict(gradient).items():
        layers = leaf.reshape(leaf.shape[0], -1)
        assert np.all(np.any(layers, axis=1)) if path[-1] == "B" else not np.any(layers), path
