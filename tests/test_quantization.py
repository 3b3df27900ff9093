"""A base in few bits: how near it is to the float one, that a LoRA trains on it as on what it stands for, its size."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_run
from flax.traverse_util import flatten_dict, unflatten_dict

from rcgrpo_jax.errors import UsageError
from rcgrpo_jax.models.config import MMDiTConfig
from rcgrpo_jax.models.lora import LoRAConfig, init_adapter
from rcgrpo_jax.models.mmdit import Condition, MMDiT
from rcgrpo_jax.models.quantization import NF4, QuantizedKernel, dequantize, is_quantized, quantize
from rcgrpo_jax.options import read_options
from rcgrpo_jax.parallel.mesh import AXES, make_mesh
from rcgrpo_jax.parallel.sharding import parameter_sharding
from rcgrpo_jax.plan.programs import Workload, open_flux, place
from rcgrpo_jax.plan.topology import Topology
from rcgrpo_jax.rl.config import validate
from rcgrpo_jax.rl.options import Options
from rcgrpo_jax.rl.setup import make_rewards
from rcgrpo_jax.rl.trainer import Trainer, train
from rcgrpo_jax.runs.model import load_editor
from rcgrpo_jax.weights import load
from rcgrpo_jax.weights.convert import convert
from rcgrpo_jax.weights.load import SMALL_EDITOR, ModelFolder
from rcgrpo_jax.weights.lora import load_lora
from rcgrpo_jax.weights.networks import abstract_params

BOTH = pytest.mark.parametrize("quantization", ["int8", "nf4"])
# QLoRA, Appendix E.
PUBLISHED = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def random_kernel(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def float_of(params: dict) -> dict:
    """The float32 base that a quantised one stands for."""
    return unflatten_dict(
        {
            path: dequantize(x, jnp.float32) if isinstance(x, QuantizedKernel) else x
            for path, x in flatten_dict(params).items()
        }
    )


def num_bytes(tree: dict) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


# Codes


def test_the_values_of_nf4_are_the_published_ones():
    np.testing.assert_allclose(NF4, PUBLISHED, atol=2e-7)


def test_int8_is_the_nearest_step_of_an_output_channel():
    kernel = random_kernel(3, 40, 5) * np.float32([1e-4, 1, 1, 1, 300])
    kernel[1, :, 2] = 0
    found = quantize(kernel, "int8")
    assert found.codes.dtype == jnp.int8
    assert found.shape == found.codes.shape == kernel.shape
    assert found.scale.shape == (3, 1, 5)
    steps = np.abs(kernel).max(axis=1, keepdims=True) / 127
    np.testing.assert_array_equal(found.codes, np.round(kernel / np.maximum(steps, 1e-30)))
    error = np.abs(dequantize(found, jnp.float32) - kernel)
    assert (error <= 0.5001 * steps).all()
    assert error.max() > 0.4 * steps.max()
    assert np.abs(found.codes).max(axis=1).tolist() == [[127] * 5, [127, 127, 0, 127, 127], [127] * 5]


def test_nf4_is_the_nearest_value_in_each_group_of_64_inputs():
    kernel = random_kernel(2, 192, 5) * np.repeat(np.float32([1e-3, 1, 20]), 64)[None, :, None]
    kernel[0, 64:128, 3] = 0
    found = quantize(kernel, "nf4")
    assert (found.codes.dtype, found.codes.shape) == (jnp.uint8, (2, 96, 5))  # two codes a byte
    assert (found.scale.dtype, found.scale.shape) == (jnp.bfloat16, (2, 3, 5))
    assert found.shape == kernel.shape
    groups = kernel.reshape(2, 3, 64, 5)
    scale = np.asarray(found.scale, np.float32)[:, :, None]
    np.testing.assert_allclose(scale, np.maximum(np.abs(groups).max(2, keepdims=True), 1e-30), rtol=2**-8)
    values = np.float32(PUBLISHED) * scale[..., None]
    nearest = np.take_along_axis(values, np.abs(groups[..., None] - values).argmin(-1, keepdims=True), -1)
    np.testing.assert_allclose(dequantize(found, jnp.float32), nearest.reshape(kernel.shape), rtol=1e-6)


@BOTH
def test_the_kernel_is_rounded_to_the_compute_dtype_once(quantization):
    found = quantize(random_kernel(64, 7), quantization)
    wanted = dequantize(found, jnp.float32).astype(jnp.bfloat16)
    np.testing.assert_array_equal(dequantize(found, jnp.bfloat16), wanted)


# Networks


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_gradients_of_a_lora_are_those_on_the_float_base_that_the_codes_stand_for(quantization):
    config = small_run.TINY["transformer"]
    shapes = flatten_dict(abstract_params("transformer", config))
    params = unflatten_dict(
        {
            path: quantize(random_kernel(*x.shape) / 4, quantization)
            if is_quantized(path, quantization)
            else jnp.asarray(random_kernel(*x.shape)) / 4
            for path, x in shapes.items()
        }
    )
    adapter = init_adapter(jax.random.key(0), params, LoRAConfig(rank=2, targets="all-linear"))
    adapter = jax.tree.map(lambda x: jnp.asarray(random_kernel(*x.shape)) / 4, adapter)
    condition = Condition(random_kernel(3, 32), random_kernel(32), random_kernel(4, 64), jnp.ones(()))

    @jax.jit
    def loss(params: dict, adapter: dict, x: jax.Array) -> jax.Array:
        variables = {"params": params, "lora": adapter}
        return jnp.sin(MMDiT(config, remat="full").apply(variables, x, jnp.float32(0.7), condition, (2, 2))).sum()

    inputs = adapter, random_kernel(4, 64)
    wanted, found = (
        jax.value_and_grad(loss, argnums=(1, 2))(base, *inputs) for base in (float_of(params), params)
    )  # fmt: skip
    for a, b in zip(jax.tree.leaves(wanted), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5 * np.abs(a).max())


@pytest.mark.parametrize(
    ("quantization", "tolerance"), [("int8", 0.02), pytest.param("nf4", 0.2, marks=pytest.mark.slow)]
)
def test_the_small_editor_keeps_its_velocity(quantization, tolerance):
    folder = ModelFolder(SMALL_EDITOR)
    config = folder.config("transformer")
    condition = Condition(random_kernel(8, 128), random_kernel(64), random_kernel(64, 64), jnp.float32(2.5))

    @jax.jit
    def velocity(params: dict) -> jax.Array:
        return MMDiT(config).apply({"params": params}, random_kernel(64, 64), jnp.float32(0.6), condition, (8, 8))

    wanted, found = (velocity(folder.load("transformer", jnp.float32, quantization=q)) for q in ("none", quantization))
    error = jnp.linalg.norm(found - wanted) / jnp.linalg.norm(wanted)
    assert tolerance / 10 < error < tolerance


# Loading


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("converted") / "model"
    convert(str(small_run.model_folder()), target)
    return target


@BOTH
@pytest.mark.parametrize("source", ["diffusers", pytest.param("converted", marks=pytest.mark.slow)])
def test_kernels_of_the_blocks_are_loaded_in_few_bits(source, quantization, converted):
    folder = ModelFolder(converted if source == "converted" else small_run.model_folder())
    wanted = flatten_dict(folder.load("transformer"))
    found = flatten_dict(folder.load("transformer", jnp.bfloat16, quantization=quantization))
    assert found.keys() == wanted.keys()
    for path, x in found.items():
        if path[-1] == "kernel" and path[0].endswith("transformer_blocks"):
            np.testing.assert_array_equal(x.codes, quantize(wanted[path], quantization).codes, err_msg="/".join(path))
            np.testing.assert_array_equal(x.scale, quantize(wanted[path], quantization).scale, err_msg="/".join(path))
        else:
            assert x.dtype == jnp.bfloat16, path
    assert num_bytes(found) < num_bytes(wanted) * {"int8": 0.4, "nf4": 0.3}[quantization]


@pytest.mark.parametrize("source", ["diffusers", pytest.param("converted", marks=pytest.mark.slow)])
def test_one_kernel_at_a_time_is_there_in_full(source, monkeypatch, converted):
    found = []

    def kernels() -> int:
        live = (x for x in jax.live_arrays() if len(x.devices()) == 1 and x.ndim == 3 and x.shape[1] > 1)
        return len({x.unsafe_buffer_pointer() for x in live if x.dtype == jnp.float32})  # two arrays may be one memory

    def watched(*arguments):
        found.append(kernels())
        return quantize_one(*arguments)

    before, quantize_one = kernels(), load._quantize
    monkeypatch.setattr(load, "_quantize", watched)
    folder = ModelFolder(converted if source == "converted" else small_run.model_folder())
    folder.load("transformer", jnp.float32, quantization="int8")
    assert found == [before + 1] * 20


# Training


@BOTH
def test_codes_and_scales_lie_on_the_mesh_as_a_plan_says(quantization):
    folder, mesh = ModelFolder(small_run.model_folder()), make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    whole = folder.load("transformer", jnp.float32, quantization=quantization)
    split = folder.load("transformer", jnp.float32, parameter_sharding(mesh), quantization)
    to_q = split["transformer_blocks"]["attn"]["to_q"]["kernel"]
    fan_in = {"int8": 32, "nf4": 16}[quantization]
    assert to_q.codes.sharding.shard_shape(to_q.codes.shape) == (1, fan_in // 2, 16)
    assert to_q.scale.sharding.shard_shape(to_q.scale.shape) == (1, 1, 16)
    planned = place(abstract_params("transformer", folder.config("transformer")), mesh, jnp.float32, quantization)
    assert jax.tree.structure(planned) == jax.tree.structure(split)
    for x, y, z in zip(*map(jax.tree.leaves, (whole, split, planned)), strict=True):
        np.testing.assert_array_equal(y, x)
        assert (y.shape, y.dtype, y.sharding) == (z.shape, z.dtype, z.sharding)


def make_trainer(shape: tuple[int, ...]) -> Trainer:
    """A trainer on an int8 base and the first devices, as `train` makes it."""
    sizes = dict(zip(AXES, shape, strict=True))
    config = small_run.make_config(
        model__quantization="int8", **{f"mesh__{axis}": size for axis, size in sizes.items()}
    )
    mesh = make_mesh(sizes, jax.devices()[: math.prod(shape)])
    validate(config, mesh.size)
    options = read_options(Options, config)
    with jax.set_mesh(mesh):
        editor = load_editor(options.model, open_flux(options.model.path), mesh)
        return Trainer(options, editor, mesh, make_rewards(options))


@pytest.mark.slow
def test_eight_devices_take_the_step_of_one():
    states, metrics = [], []
    for trainer in (make_trainer((1, 1, 1)), make_trainer((2, 2, 2))):
        assert trainer.params["transformer_blocks"]["attn"]["to_q"]["kernel"].codes.dtype == jnp.int8
        state, found, _ = small_run.take_step(trainer, small_run.make_state(trainer), small_run.make_batch(trainer))
        states.append(state.params)
        metrics.append({name: x for name, x in found.items() if "second" not in name})
    assert metrics[1] == pytest.approx(metrics[0], rel=1e-3, abs=1e-5)
    for a, b in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_a_run_on_int8_leaves_a_lora_of_the_same_form(tmp_path, capsys):
    config = small_run.make_config(model__quantization="int8", train__num_steps=1)
    state = train(config, tmp_path / "run", jax.devices()[:1])
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.float32)}
    code, _, error = small_run.run_command(
        capsys, "export", f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'lora'}", "--dtype=float32"
    )
    assert code == 0, error
    folder = ModelFolder(small_run.model_folder())
    adapter, _ = load_lora(tmp_path / "lora", abstract_params("transformer", folder.config("transformer")))
    found, wanted = flatten_dict(adapter), flatten_dict(state.params)
    assert found.keys() == wanted.keys()
    for path, x in wanted.items():
        np.testing.assert_array_equal(found[path], x)
    assert any(np.any(x) for path, x in wanted.items() if path[-1] == "B")


def test_an_unknown_quantization_is_refused():
    with pytest.raises(UsageError, match=r"model\.quantization: 'int4' found; one of none, int8, nf4 was wanted"):
        validate(small_run.make_config(model__quantization="int4"), 1)


# Plans


@pytest.mark.parametrize(("quantization", "gib"), [("none", 22.17), ("int8", 11.16), ("nf4", 5.98)])
def test_the_base_of_flux_takes_what_its_bits_say(quantization, gib):
    mesh = make_mesh({"fsdp": 1}, jax.devices()[:1])
    params = place(abstract_params("transformer", MMDiTConfig()), mesh, jnp.bfloat16, quantization)
    assert num_bytes(params) / 2**30 == pytest.approx(gib, abs=0.01)


def test_a_plan_is_of_the_quantised_base():
    config = small_run.make_config(model__quantization="int8")
    model, devices = open_flux("flux-kontext"), tuple(jax.devices()[:1])
    planned = Workload(read_options(Options, config), model, Topology("local", devices, None, None))
    base = abstract_params("transformer", model.config("transformer"))
    assert planned.arguments("rollout")[0] == place(base, planned.mesh, jnp.float32, "int8")
