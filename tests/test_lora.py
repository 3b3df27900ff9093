"""Adapters: where they sit, what they compute, and that diffusers reads ours and we read diffusers'."""

import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import FluxKontextPipeline
from diffusers.training_utils import _collate_lora_metadata
from flax.traverse_util import flatten_dict, unflatten_dict
from peft import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from torch_parity import relative_error

from rcgrpo_jax.errors import UsageError, UserError
from rcgrpo_jax.models.config import MMDiTConfig
from rcgrpo_jax.models.lora import TARGETS, LoRAConfig, init_adapter, scale_adapter, target_kernels
from rcgrpo_jax.models.mmdit import Condition, MMDiT
from rcgrpo_jax.weights import random_folder
from rcgrpo_jax.weights.export import LORA_FILE, load_lora, save_lora
from rcgrpo_jax.weights.load import ModelFolder
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


pytestmark = pytest.mark.usefixtures("quick_compilation")


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


@pytest.fixture(scope="module")
def params(folder) -> dict:
    return ModelFolder(folder).load("transformer")


@pytest.fixture(scope="module")
def pipeline(folder) -> FluxKontextPipeline:
    return FluxKontextPipeline.from_pretrained(folder, dtype=torch.float32)


def torch_velocity(pipeline: FluxKontextPipeline, lora: Path) -> torch.Tensor:
    """The velocity of diffusers' transformer under a LoRA file, which is unloaded again."""
    x, sigma, condition = jax.tree.map(torch.from_numpy, inputs(SMALL))
    target_ids = pipeline._prepare_latent_image_ids(1, *GRID, "cpu", torch.float32)
    pipeline.load_lora_weights(lora)
    try:
        with torch.no_grad():
            out = pipeline.transformer(
                hidden_states=torch.cat([x, condition.reference], dim=1),
                encoder_hidden_states=condition.text,
                pooled_projections=condition.pooled,
                timestep=sigma,
                img_ids=torch.cat([target_ids, target_ids + torch.tensor([1, 0, 0])]),
                txt_ids=torch.zeros(N_TXT, 3),
                guidance=condition.guidance,
            ).sample
    finally:
        pipeline.unload_lora_weights()
    return out[:, : x.shape[1]]


@pytest.mark.parametrize("targets", SETS)
def test_diffusers_computes_the_same_with_an_exported_adapter(tmp_path, params, pipeline, targets):
    config = LoRAConfig(rank=4, alpha=10.0, targets=targets)
    adapter = random_adapter(params, config)
    theirs = torch_velocity(pipeline, save_lora(tmp_path, adapter, config).parent)
    assert relative_error(small_velocity(params, scale_adapter(adapter, config.scale)), theirs) < 1e-4
    assert relative_error(small_velocity(params, {}), theirs) > 0.01


@pytest.mark.parametrize("targets", SETS)
def test_an_exported_adapter_comes_back_exactly(tmp_path, params, targets):
    adapter = random_adapter(params, LoRAConfig(4, 10.0, targets))
    loaded, config = load_lora(save_lora(tmp_path, adapter, LoRAConfig(4, 10.0, targets)), params)
    assert shapes(loaded) == shapes(adapter)
    jax.tree.map(np.testing.assert_array_equal, loaded, adapter)
    assert (config.rank, config.alpha) == (4, 10.0)
    assert target_kernels(params, config.targets).keys() == target_kernels(params, targets).keys()


def test_without_metadata_alpha_is_the_rank_for_diffusers_and_for_us(tmp_path, params, pipeline):
    adapter = random_adapter(params, RANK4)
    file = save_lora(tmp_path, adapter, RANK4)
    save_file(load_file(file), file, metadata={"format": "pt"})
    theirs = torch_velocity(pipeline, tmp_path)
    assert relative_error(small_velocity(params, scale_adapter(adapter, RANK4.scale)), theirs) > 0.01
    loaded, config = load_lora(tmp_path, params)
    assert (config.rank, config.alpha, config.scale) == (4, 4.0, 1.0)
    assert relative_error(small_velocity(params, scale_adapter(loaded, config.scale)), theirs) < 1e-4


def test_a_file_that_diffusers_saved_is_read(tmp_path, params, pipeline):
    adapter = random_adapter(params, RANK4)
    pipeline.load_lora_weights(save_lora(tmp_path / "ours", adapter, RANK4).parent, adapter_name="default")
    pipeline.save_lora_weights(
        tmp_path / "theirs",
        transformer_lora_layers=get_peft_model_state_dict(pipeline.transformer, adapter_name="default"),
        **_collate_lora_metadata({"transformer": pipeline.transformer}),
    )
    pipeline.unload_lora_weights()
    loaded, config = load_lora(tmp_path / "theirs", params)
    jax.tree.map(np.testing.assert_array_equal, loaded, adapter)
    assert (config.rank, config.alpha) == (4, 10.0)


Tensors = dict[str, np.ndarray]
Q0 = "transformer.transformer_blocks.0.attn.to_q"


def without(*keys: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: value for key, value in tensors.items() if key not in keys}


def replaced(**tensors: np.ndarray) -> Callable[[Tensors], Tensors]:
    return lambda others: others | {f"{Q0}.lora_{factor}.weight": value for factor, value in tensors.items()}


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key.replace(old, new): value for key, value in tensors.items()}


ONES = np.ones((4, 128), np.float32)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (renamed("lora_A", "lora_down"), "lora_down.weight', which is no low-rank factor"),
        (renamed("transformer.", ""), "which is no low-rank factor"),
        (renamed("transformer_blocks.1.", "transformer_blocks.7."), "which is no low-rank factor"),
        (renamed(".attn.to_q", ".attn.norm_q"), "norm_q.lora_A.weight', which is no low-rank factor"),
        (
            without(f"{Q0}.lora_A.weight", f"{Q0}.lora_B.weight"),
            "adapts 1 of the 2 layers of transformer_blocks/attn/to_q",
        ),
        (without(f"{Q0}.lora_B.weight"), "transformer_blocks/attn/to_q, or misses A or B"),
        (replaced(A=ONES[:, 1:]), r"to_q.A in .* has shape \[127, 4\]; \[128, 4\] was wanted"),
        (replaced(A=ONES[0]), r"has ranks \[4, 128\]|to_q.A in .* has shape \[128\]"),
        (replaced(A=ONES[:3], B=ONES[:3].T), r"has ranks \[3, 4\]; one rank is supported"),
        (replaced(B=ONES[:3].T), r"to_q.B in .* has shape \[3, 128\]; \[4, 128\] was wanted"),
        (replaced(A=ONES * np.nan), "to_q.A in .* holds NaN or inf"),
        (lambda tensors: {}, r"has ranks \[\]"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path, params, spoil, message):
    file = save_lora(tmp_path, random_adapter(params, LoRAConfig(rank=4)), LoRAConfig(rank=4))
    tensors = {key: np.ascontiguousarray(value) for key, value in spoil(load_file(file)).items()}
    save_file(tensors, file)
    with pytest.raises(UserError, match=message):
        load_lora(file, params)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("{", "the metadata of .* is damaged"),
        ("[]", "the metadata of .* is damaged"),
        (json.dumps({"transformer.alpha_pattern": {"attn.to_q": 3}}), "one scale alpha / r is supported"),
        (json.dumps({"transformer.use_rslora": True}), "one scale alpha / r is supported"),
    ],
)
def test_metadata_that_we_would_misread_is_refused(tmp_path, params, metadata, message):
    file = save_lora(tmp_path, random_adapter(params, RANK4), RANK4)
    save_file(load_file(file), file, metadata={"lora_adapter_metadata": metadata})
    with pytest.raises(UserError, match=message):
        load_lora(file, params)


def test_the_file_says_what_it_holds(tmp_path, params):
    file = save_lora(tmp_path, random_adapter(params, RANK4), RANK4)
    assert [path.name for path in tmp_path.iterdir()] == [LORA_FILE]
    with safe_open(file, framework="np") as handle:
        metadata = json.loads(handle.metadata()["lora_adapter_metadata"])
        modules = {key.removeprefix("transformer.").rsplit(".lora_", 1)[0] for key in handle.keys()}  # noqa: SIM118
    assert (metadata["transformer.r"], metadata["transformer.lora_alpha"]) == (4, 10.0)
    assert set(metadata["transformer.target_modules"]) == modules


def test_a_file_that_is_not_there_or_not_whole_is_refused(tmp_path, params):
    with pytest.raises(UserError, match=f"{LORA_FILE} does not exist"):
        load_lora(tmp_path, params)
    file = save_lora(tmp_path, random_adapter(params, LoRAConfig(rank=4)), LoRAConfig(rank=4))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="cut short"):
        load_lora(file, params)
    pickle = tmp_path / "pytorch_lora_weights.bin"
    pickle.write_bytes(b"")
    with pytest.raises(UserError, match="pickle"):
        load_lora(pickle, params)
