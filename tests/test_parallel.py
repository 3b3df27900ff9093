"""Meshes come out as asked or not at all, and the weights really lie on them in parts."""

import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from rcgrpo_jax.errors import UsageError
from rcgrpo_jax.method import concentration
from rcgrpo_jax.models.config import MMDiTConfig
from rcgrpo_jax.models.mmdit import Condition, MMDiT
from rcgrpo_jax.parallel.mesh import AXES, SAMPLE_AXES, make_mesh, mesh_shape
from rcgrpo_jax.parallel.microbatch import map_samples, split
from rcgrpo_jax.parallel.sharding import parameter_sharding, parameter_spec, replicated
from rcgrpo_jax.plan.cost import count
from rcgrpo_jax.plan.programs import place
from rcgrpo_jax.weights.load import ModelFolder
from rcgrpo_jax.weights.networks import NETWORKS, abstract_params
from rcgrpo_jax.weights.random_folder import SMALL

FULL = {name: network.config() for name, network in NETWORKS.items()}


@pytest.mark.parametrize(
    ("sizes", "devices", "shape"),
    [
        ({}, 1, (1, 1, 1)),
        ({"fsdp": -1}, 8, (1, 8, 1)),
        ({"data": -1, "fsdp": 2, "tensor": 2}, 16, (4, 2, 2)),
        ({"tensor": 2, "data": 4}, 8, (4, 1, 2)),
        ({"data": -1, "tensor": 8}, 8, (1, 1, 8)),
    ],
)
def test_mesh_sizes_are_as_given_and_one_takes_the_rest(sizes, devices, shape):
    assert mesh_shape(sizes, devices) == shape


@pytest.mark.parametrize(
    ("sizes", "devices", "named"),
    [
        ({}, 8, ["data=1, fsdp=1, tensor=1", "8 devices"]),
        ({"fsdp": 3}, 8, ["fsdp=3", "8 devices"]),
        ({"fsdp": -1, "tensor": 3}, 8, ["tensor=3", "8 devices"]),
        ({"fsdp": -1, "tensor": 16}, 8, ["tensor=16", "8 devices"]),
        ({"data": -1, "fsdp": -1}, 8, ["data=-1, fsdp=-1", "at most one"]),
        ({"data": 0, "fsdp": 8}, 8, ["data=0", "positive"]),
        ({"data": -2, "fsdp": -4}, 8, ["data=-2", "positive"]),
    ],
)
def test_a_mesh_that_does_not_fill_the_devices_is_refused(sizes, devices, named):
    with pytest.raises(UsageError) as error:
        mesh_shape(sizes, devices)
    assert all(words in error.value.problem for words in named), error.value.problem


def test_a_mesh_holds_the_devices_it_is_given_under_auto_axes():
    devices = jax.devices()[2:6]
    mesh = make_mesh({"fsdp": 2, "tensor": -1}, devices)
    assert mesh.axis_names == AXES == ("data", "fsdp", "tensor")
    assert mesh.axis_types == (AxisType.Auto,) * 3
    assert mesh.devices.flatten().tolist() == devices
    assert make_mesh({"data": -1}).devices.shape == (8, 1, 1)


@pytest.mark.parametrize(
    ("name", "path", "spec"),
    [
        ("transformer", "transformer_blocks/attn/to_q/kernel", P(None, "fsdp", "tensor")),
        ("transformer", "transformer_blocks/attn/add_v_proj/kernel", P(None, "fsdp", "tensor")),
        ("transformer", "transformer_blocks/attn/to_add_out/kernel", P(None, "tensor", "fsdp")),
        ("transformer", "transformer_blocks/ff_context/net_0/proj/kernel", P(None, "fsdp", "tensor")),
        ("transformer", "transformer_blocks/ff/net_2/kernel", P(None, "tensor", "fsdp")),
        ("transformer", "transformer_blocks/norm1_context/linear/kernel", P(None, "fsdp", "tensor")),
        ("transformer", "single_transformer_blocks/attn/to_k/kernel", P(None, "fsdp", "tensor")),
        ("transformer", "single_transformer_blocks/proj_mlp/kernel", P(None, "fsdp", "tensor")),
        ("transformer", "single_transformer_blocks/proj_out/kernel", P(None, "tensor", "fsdp")),
        ("transformer", "single_transformer_blocks/norm/linear/kernel", P(None, "fsdp", "tensor")),
        ("transformer", "time_text_embed/guidance_embedder/linear_2/kernel", P("fsdp", "tensor")),
        ("transformer", "context_embedder/kernel", P("fsdp", "tensor")),
        ("transformer", "norm_out/linear/kernel", P("fsdp", "tensor")),
        ("transformer", "transformer_blocks/attn/to_q/bias", P(None, None)),
        ("transformer", "transformer_blocks/attn/norm_q/scale", P(None, None)),
        ("text_encoder_2", "encoder/block/layer_1/DenseReluDense/wo/kernel", P(None, "tensor", "fsdp")),
        ("text_encoder_2", "shared/embedding", P(None, "fsdp")),
        ("vae", "decoder/conv_in/kernel", P(None, None, None, None)),
    ],
)
def test_parameters_lie_where_the_table_says(name, path, spec):
    leaf = flatten_dict(abstract_params(name, FULL[name]))[tuple(path.split("/"))]
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    assert parameter_spec(tuple(path.split("/")), leaf.shape, mesh) == spec


def test_an_axis_that_does_not_divide_stays_whole():
    path = ("transformer_blocks", "attn", "to_q", "kernel")
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    assert parameter_spec(path, (3, 6, 6), mesh) == P(None, None, "tensor")
    assert parameter_spec(path, (4, 8, 7), mesh) == P(None, "fsdp", None)
    assert parameter_spec(path, (4, 7, 7), mesh) == P(None, None, None)


def large_leaves(name: str) -> Iterator[tuple[tuple[str, ...], tuple[int, ...]]]:
    for path, leaf in flatten_dict(abstract_params(name, FULL[name])).items():
        if leaf.size >= 2**20:
            yield path, leaf.shape


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 4}])
@pytest.mark.parametrize("name", ["transformer", "text_encoder_2"])
def test_no_large_weight_of_the_full_model_is_held_whole(name, sizes):
    mesh = make_mesh(sizes)
    sharding_of = parameter_sharding(mesh)
    for path, shape in large_leaves(name):
        parts = np.prod(shape) // np.prod(sharding_of(path, shape).shard_shape(shape))
        assert parts >= mesh.shape["fsdp"], "/".join(path)


@pytest.mark.parametrize(
    ("sizes", "shards"),
    [
        pytest.param(
            {"fsdp": 8},
            {"to_q": (4, 16, 128), "proj_mlp": (4, 16, 512), "proj_out": (4, 640, 16)},
            marks=pytest.mark.slow,
        ),
        ({"fsdp": 4, "tensor": 2}, {"to_q": (4, 32, 64), "proj_mlp": (4, 32, 256), "proj_out": (4, 320, 32)}),
    ],
)
def test_weights_are_loaded_in_parts(folder, sizes, shards):
    folder = ModelFolder(folder)
    assert SMALL["transformer"].num_single_layers == 4
    assert SMALL["transformer"].width == 128
    params = folder.load("transformer", sharding_of=parameter_sharding(make_mesh(sizes)))
    whole = flatten_dict(folder.load("transformer"))
    block = params["single_transformer_blocks"]
    kernels = {name: block[name]["kernel"] for name in ("proj_mlp", "proj_out")} | {
        "to_q": block["attn"]["to_q"]["kernel"]
    }
    for name, shape in shards.items():
        assert {shard.data.shape for shard in kernels[name].addressable_shards} == {shape}, name
        assert len({str(shard.index) for shard in kernels[name].addressable_shards}) == 8, name
    for path, array in flatten_dict(params).items():
        np.testing.assert_array_equal(np.asarray(array), np.asarray(whole[path]), err_msg="/".join(path))
    bias = block["proj_mlp"]["bias"]
    assert bias.is_fully_replicated
    assert len(bias.sharding.device_set) == 8


def test_samples_spread_over_data_and_fsdp():
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    chunks = jax.jit(lambda x: split(x, 4, mesh))(jnp.zeros((8, 5)))
    assert chunks.shape == (2, 4, 5)
    assert chunks.sharding.shard_shape(chunks.shape) == (2, 1, 5)
    assert replicated(mesh).shard_shape((8, 5)) == (8, 5)


@pytest.mark.parametrize(
    ("sizes", "logits"),
    [
        pytest.param({"fsdp": 8}, (1, 4), marks=pytest.mark.slow),
        pytest.param({"data": 2, "fsdp": 4}, (1, 4), marks=pytest.mark.slow),
        ({"data": 2, "fsdp": 2, "tensor": 2}, (2, 2)),
    ],
    ids=["fsdp", "data-fsdp", "data-fsdp-tensor"],
)
def test_samples_and_heads_are_spread_in_the_compiled_program(sizes, logits):
    """Eight samples of four heads: each device holds its own attention logits, whatever the weights' sharding."""
    config = MMDiTConfig(
        num_layers=1, num_single_layers=1, num_attention_heads=4, attention_head_dim=32, joint_attention_dim=16,
        pooled_projection_dim=16, axes_dims_rope=(8, 12, 12),
    )  # fmt: skip
    model, mesh = MMDiT(config), make_mesh(sizes)

    def velocity(params, x, reference, text):
        def one(x, reference, text):
            condition = Condition(text, jnp.zeros(16), reference, jnp.zeros(()))
            return model.apply({"params": params}, x, jnp.zeros(()), condition, (4, 4))

        return map_samples(one, (x, reference, text), 0, mesh)

    def samples(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(SAMPLE_AXES)))

    params = place(abstract_params("transformer", config), mesh, jnp.float32)
    with jax.set_mesh(mesh):
        lowered = jax.jit(velocity).lower(params, samples(8, 16, 64), samples(8, 16, 64), samples(8, 9, 16))
        program = lowered.compile().as_text()
    found = set(re.findall(r"f32\[(\d+),(\d+),41,41\]", program))  # 9 text, 16 target and 16 reference tokens
    # One sample a device may drop its axis of length one; no device may hold more.
    assert all(int(n) <= logits[0] and int(h) <= logits[1] for n, h in found), found
    assert found or f"f32[{logits[1]},41,41]" in program


def test_the_masses_of_split_heads_come_from_each_device_s_own():
    """Heads over `tensor`: no query or key moves, two numbers a text token are added up."""
    rng = np.random.default_rng(0)
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    heads, spread = NamedSharding(mesh, P(SAMPLE_AXES, None, "tensor")), NamedSharding(mesh, P(SAMPLE_AXES))
    q, k = (jnp.asarray(rng.normal(size=(4, n, 6, 8)), jnp.float32) for n in (2 * concentration.TILE, 50))
    mask = jnp.asarray(rng.random((4, 50)), jnp.float32)
    masses = jax.vmap(lambda *arrays: concentration.masses(*arrays, 0.5), spmd_axis_name=SAMPLE_AXES)
    split_masses = jax.jit(masses, in_shardings=(heads, heads, spread), out_shardings=spread)
    for found, wanted in zip(split_masses(q, k, mask), masses(q, k, mask), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5)
    moved = count(split_masses.lower(q, k, mask).compile().as_text(), np.zeros(8, int)).collectives
    assert moved.keys() == {"all-reduce"}
    assert moved["all-reduce"].ici <= 2 * 4 * q.shape[1]  # bytes; of one sample, on a ring of two


def test_what_the_model_reports_of_split_heads_moves_no_queries_or_keys():
    config = MMDiTConfig(
        num_layers=1, num_single_layers=1, num_attention_heads=4, attention_head_dim=32, joint_attention_dim=16,
        pooled_projection_dim=16, axes_dims_rope=(8, 12, 12),
    )  # fmt: skip
    model, mesh = MMDiT(config), make_mesh({"data": 4, "tensor": 2})
    params = place(abstract_params("transformer", config), mesh, jnp.float32)

    num_text = 2 * concentration.TILE

    def sent(reports: bool) -> float:
        def velocity(params, x, text):
            def one(x, text):
                condition = Condition(text, jnp.zeros(16), x, jnp.zeros(()))
                region = jnp.ones(16) if reports else None
                return model.apply(
                    {"params": params}, x, jnp.zeros(()), condition, (4, 4), region, mutable=["intermediates"]
                )

            return map_samples(one, (x, text), 0, mesh)

        def samples(*shape):
            return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(SAMPLE_AXES)))

        with jax.set_mesh(mesh):
            lowered = jax.jit(velocity).lower(params, samples(4, 16, 64), samples(4, num_text, 16))
            return count(lowered.compile().as_text(), np.zeros(8, int)).ici

    assert 0 < sent(True) - sent(False) <= 2 * (2 * 4 * num_text)  # bytes of a sample, in each kind of block
