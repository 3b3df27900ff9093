"""All implementations of attention compute the same, and each compiles for its target, split over its mesh."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_run
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from rcgrpo_jax.errors import UsageError
from rcgrpo_jax.models import attention
from rcgrpo_jax.models.config import MMDiTConfig
from rcgrpo_jax.models.mmdit import AttentionOptions, Condition, MMDiT
from rcgrpo_jax.parallel.mesh import SAMPLE_AXES, make_mesh
from rcgrpo_jax.parallel.microbatch import map_samples
from rcgrpo_jax.plan.programs import Workload, open_flux, place
from rcgrpo_jax.plan.topology import open_topology
from rcgrpo_jax.weights.networks import abstract_params


@pytest.mark.parametrize(
    ("tokens", "keys", "tile", "tiles"),
    [
        pytest.param(256, 256, 1280, 1, marks=pytest.mark.slow),
        pytest.param(150, 150, 1280, 1, marks=pytest.mark.slow),
        pytest.param(130, 256, 1280, 1, marks=pytest.mark.slow),
        (150, 700, 384, 2),  # padded to 768
        pytest.param(256, 640, 128, None, marks=pytest.mark.slow),  # five would be too many: two kernels
    ],
    ids=str,
)
def test_the_tpu_kernel_computes_what_xla_does(monkeypatch, tokens, keys, tile, tiles):
    """Values and gradients under `vmap`, with and without padding, in one and two kernels of the backward pass."""
    monkeypatch.setattr(attention, "KEYS_TILE", tile * 128 * 4)
    padded = jnp.zeros((1, 1, keys + -keys % 128, 64))
    sizes = attention._backward_tiles(padded, padded)
    assert (padded.shape[2] / sizes["block_kv_dkv"] if "use_fused_bwd_kernel" in sizes else None) == tiles
    monkeypatch.setitem(
        attention.IMPLEMENTATIONS, "interpreted", lambda q, k, v: attention._splash_local(q, k, v, interpret=True)
    )
    rng = np.random.default_rng(0)
    q, k, v, w = (jnp.asarray(rng.normal(size=(2, n, 2, 64)), jnp.float32) for n in (tokens, keys, keys, tokens))

    def value_and_gradients(implementation):
        def weighted(q, k, v):
            return (w * jax.vmap(lambda *x: attention.attend(*x, implementation))(q, k, v)).sum()

        return jax.jit(jax.value_and_grad(weighted, argnums=(0, 1, 2)))(q, k, v)

    for found, wanted in zip(*map(jax.tree.leaves, map(value_and_gradients, ("interpreted", "xla"))), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize(
    ("dtype", "tolerance", "name"),
    [
        ("float32", 1e-5, "interpreted"),
        pytest.param("float32", 1e-5, "flash", marks=pytest.mark.slow),
        pytest.param("bfloat16", 5e-3, "interpreted", marks=pytest.mark.slow),
        ("bfloat16", 5e-3, "flash"),
    ],
)
def test_the_kernels_compute_what_xla_does_split_over_a_mesh(monkeypatch, dtype, tolerance, name):
    """Four samples over `data` and `fsdp`, two heads over `tensor`: values and gradients, against XLA's in float32."""
    monkeypatch.setitem(
        attention.IMPLEMENTATIONS, "interpreted", lambda q, k, v: attention._splash(q, k, v, interpret=True)
    )
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    rng = np.random.default_rng(0)
    q, k, v, w = (jnp.asarray(rng.normal(size=(4, n, 2, 128)), dtype) for n in (150, 256, 256, 150))

    def values_and_gradients(implementation, *arrays):
        def attend(q, k, v):
            return jax.vmap(lambda *x: attention.attend(*x, implementation), spmd_axis_name=SAMPLE_AXES)(q, k, v)

        def both(q, k, v, w):
            out, transposed = jax.vjp(attend, q, k, v)
            return out, *transposed(w)

        with jax.set_mesh(mesh):
            heads = NamedSharding(mesh, P(SAMPLE_AXES, None, "tensor"))
            return jax.jit(both, in_shardings=heads)(*arrays)

    wanted = values_and_gradients("xla", *(x.astype(jnp.float32) for x in (q, k, v, w)))
    for found, exact in zip(values_and_gradients(name, q, k, v, w), wanted, strict=True):
        assert found.dtype == dtype
        error = np.asarray(found, np.float32) - np.asarray(exact)
        assert np.linalg.norm(error) < tolerance * np.linalg.norm(exact)
        assert np.abs(error).max() < 2 * tolerance * np.abs(exact).max()


@pytest.mark.parametrize("name", ["rollout", "update"])
def test_programs_map_every_operand_of_attention_and_differentiate_outside(monkeypatch, name):
    """JAX's batching rule for cuDNN needs both (jax <= 0.11), and so does this one."""
    mapped = []

    @jax.custom_batching.custom_vmap
    def recorded(q, k, v):
        return attention._xla(q, k, v)

    @recorded.def_vmap
    def rule(size, is_mapped, *operands):
        mapped.append(is_mapped)
        return jax.vmap(attention._xla)(*operands), True

    monkeypatch.setitem(attention.IMPLEMENTATIONS, "xla", recorded)
    options, topology = small_run.make_options(model__attention="xla"), open_topology("local")
    one_device = topology._replace(devices=topology.devices[:1])
    planned = Workload(options, open_flux(options.model.path), one_device)
    with jax.set_mesh(planned.mesh):
        getattr(planned.programs, name).eval_shape(*planned.arguments(name))
    assert mapped
    assert all(flag == [True] * 3 for flag in mapped)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs JAX_PLATFORMS=cuda and a CUDA device")
@pytest.mark.parametrize(("tokens", "keys"), [(2560, 2560), (8704, 8704), (150, 278)], ids=str)
def test_cudnn_computes_what_xla_does(tokens, keys):
    """Values and gradients under `vmap`, in bfloat16 at FLUX's head width; against XLA's in float32."""
    rng = np.random.default_rng(0)
    q, k, v, w = (jnp.asarray(rng.normal(size=(2, n, 4, 128)), jnp.bfloat16) for n in (tokens, keys, keys, tokens))

    def value_and_gradients(implementation, dtype):
        def weighted(q, k, v):
            return (w * jax.vmap(lambda *x: attention.attend(*x, implementation))(q, k, v)).sum(dtype=jnp.float32)

        found = jax.jit(jax.grad(weighted, argnums=(0, 1, 2)))(*(x.astype(dtype) for x in (q, k, v)))
        return attention.attend(q.astype(dtype), k.astype(dtype), v.astype(dtype), implementation), *found

    for found, wanted in zip(
        value_and_gradients("cudnn", jnp.bfloat16), value_and_gradients("xla", jnp.float32), strict=True
    ):
        wanted = np.asarray(wanted, np.float32)
        assert np.linalg.norm(np.float32(found) - wanted) < 0.02 * np.linalg.norm(wanted)


@pytest.mark.parametrize(
    ("platform", "dtype", "name"),
    [
        ("tpu", "bfloat16", "splash"),
        ("gpu", "bfloat16", "cudnn"),
        ("gpu", "float32", "xla"),
        ("cpu", "bfloat16", "flash"),
    ],
)
def test_auto_is_the_fastest_of_the_platform_and_a_name_is_itself(platform, dtype, name):
    assert attention.choose("auto", platform, dtype) == name
    assert attention.choose("xla", platform, dtype) == "xla"


@pytest.mark.parametrize(
    ("name", "platform", "dtype"),
    [
        ("splash", "gpu", "bfloat16"),
        ("splash", "cpu", "float32"),
        ("flash", "gpu", "float32"),
        ("cudnn", "tpu", "bfloat16"),
        ("cudnn", "gpu", "float32"),
    ],
)
def test_what_a_platform_cannot_serve_is_told(name, platform, dtype):
    with pytest.raises(UsageError, match=f"model.attention: '{name}' needs .*; found {platform} and {dtype}"):
        attention.choose(name, platform, dtype)


@pytest.mark.slow
def test_the_tpu_kernel_compiles_split_over_samples_and_heads():
    """Four samples of four heads on four chips, rollout and gradient: each kernel sees a chip's part alone."""
    pytest.importorskip("libtpu")
    config = MMDiTConfig(
        num_layers=1, num_single_layers=1, num_attention_heads=4, attention_head_dim=128, joint_attention_dim=64,
        pooled_projection_dim=64,
    )  # fmt: skip
    mesh = make_mesh({"fsdp": 2, "tensor": 2}, open_topology("v5e:2x2").devices)
    model = MMDiT(config, jnp.bfloat16, attention=AttentionOptions("splash"))

    def loss(x, params, reference, text):
        def one(x, reference, text):
            condition = Condition(text, jnp.zeros(64, jnp.bfloat16), reference, jnp.zeros(()))
            return model.apply({"params": params}, x, jnp.zeros(()), condition, (16, 16))

        return jnp.square(map_samples(one, (x, reference, text), 0, mesh)).sum()

    def samples(*shape):
        return jax.ShapeDtypeStruct((4, *shape), jnp.bfloat16, sharding=NamedSharding(mesh, P(SAMPLE_AXES)))

    params = place(abstract_params("transformer", config), mesh, jnp.bfloat16)
    with jax.set_mesh(mesh), jax.default_matmul_precision("default"):  # tests ask for what bfloat16 does not have
        lowered = jax.jit(jax.grad(loss)).lower(samples(256, 64), params, samples(256, 64), samples(128, 64))
        program = lowered.compile().as_text()
    kernels = [line for line in program.splitlines() if "tpu_custom_call" in line and " custom-call(" in line]
    assert len(kernels) >= 4  # forward and backward, in each kind of block
    assert not any("splash_mha_dq" in line for line in kernels)  # one kernel has the whole backward pass
    samples_of_a_chip, heads_of_a_chip = 4 // mesh.shape["fsdp"], 4 // mesh.shape["tensor"]
    shapes = {tuple(map(int, found.split(","))) for line in kernels for found in re.findall(r"bf16\[([\d,]+)\]", line)}
    full = {shape for shape in shapes if shape[-2:] == (640, 128)}
    assert full
    for shape in full:
        assert np.prod(shape[:-2]) == samples_of_a_chip * heads_of_a_chip, shape
