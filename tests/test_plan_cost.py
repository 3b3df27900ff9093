"""What is read off a compiled program: FLOPs, traffic and collectives, with loops counted as often as they run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from rcgrpo_jax.parallel.mesh import make_mesh
from rcgrpo_jax.plan.cost import count, trip_count
from rcgrpo_jax.plan.hlo import parse, replica_groups, shapes
from rcgrpo_jax.plan.topology import open_topology

ONE = np.zeros(1, int)
TWO_SLICES = np.repeat([0, 1], 4)
RING = [(i, (i + 1) % 8) for i in range(8)]


def compiled_text(function, *arguments, **options) -> str:
    return jax.jit(function, **options).lower(*arguments).compile().as_text()


def array(*shape: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


# FLOPs


def test_a_product_in_nested_loops_counts_as_often_as_it_runs():
    def function(x, w):
        def inner(x, _):
            return jnp.tanh(x @ w), None

        def outer(x, _):
            return jax.lax.scan(inner, x, None, length=3)[0], None

        return jax.lax.scan(outer, x, None, length=5)[0]

    cost = count(compiled_text(function, array(8, 16), array(16, 16)), ONE)
    assert cost.flops == 15 * 2 * 8 * 16 * 16
    assert cost.uncounted == {}


def test_of_a_conditional_the_dearer_branch_counts():
    def function(i, x, w):
        return jax.lax.cond(i > 3, lambda: x @ w @ w, lambda: x @ w)

    assert count(compiled_text(function, array(dtype=jnp.int32), array(8, 16), array(16, 16)), ONE).flops == (
        2 * 2 * 8 * 16 * 16
    )


@pytest.mark.parametrize(
    ("image", "kernel", "options"),
    [
        ((2, 9, 7, 4), (3, 3, 4, 8), {"padding": "SAME"}),
        ((2, 9, 7, 4), (3, 3, 4, 8), {"padding": "VALID", "window_strides": (2, 3)}),
        ((1, 9, 7, 4), (3, 2, 4, 8), {"padding": ((2, 0), (1, 4)), "rhs_dilation": (2, 1)}),
        ((1, 5, 6, 4), (3, 3, 4, 8), {"padding": ((1, 2), (2, 2)), "lhs_dilation": (3, 2)}),
        ((2, 9, 7, 8), (3, 3, 2, 8), {"padding": "SAME", "feature_group_count": 4}),
    ],
)
def test_a_convolution_counts_what_meets_data(image, kernel, options):
    options = {"window_strides": (1, 1), "dimension_numbers": ("NHWC", "HWIO", "NHWC")} | options

    def convolve(x, k):
        return jax.lax.conv_general_dilated(x, k, **options)

    text = compiled_text(convolve, array(*image), array(*kernel))
    assert " convolution(" in text
    # On ones, a result is the number of its multiply-adds.
    assert count(text, ONE).flops == 2 * convolve(jnp.ones(image), jnp.ones(kernel)).sum()


def test_a_batched_product_in_the_tpu_compiler_s_form_counts_once_a_batch():
    """24 heads of `[2560, 128] x [128, 2560]`, as a convolution over a window of 24 that is mostly holes."""
    text = """
ENTRY %main (a: f32[24,2560,128], b: f32[24,128,2560]) -> f32[24,2560,2560] {
  %a = f32[24,2560,128]{2,1,0:T(8,128)S(1)} parameter(0)
  %b = f32[24,128,2560]{2,1,0:T(8,128)} parameter(1)
  ROOT %c = f32[24,2560,2560]{2,1,0:T(8,128)} convolution(%a, %b), window={size=24 stride=23 lhs_dilate=24}, \
dim_labels=0bf_0io->0bf
}
"""
    assert count(text, ONE).flops == 24 * 2 * 2560 * 128 * 2560


@pytest.mark.parametrize(
    ("call", "flops", "uncounted"),
    [
        (
            'custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":'
            '{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}',
            2 * 8 * 16 * 32,
            {},
        ),
        (
            'custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"body":"x",'
            '"cost_estimate":{"flops":"700","transcendentals":"0"}}}',
            700,
            {},
        ),
        ('custom_call_target="__onednn$matmul"', 0, {"__onednn$matmul": 1}),
        ('custom_call_target="AllocateBuffer"', 0, {}),
    ],
)
def test_custom_calls_count_or_are_named(call, flops, uncounted):
    text = f"""
ENTRY %main (a: f32[8,16], b: f32[16,32]) -> (f32[8,32], s8[64]) {{
  %a = f32[8,16]{{1,0}} parameter(0)
  %b = f32[16,32]{{1,0}} parameter(1)
  ROOT %c = (f32[8,32]{{1,0}}, s8[64]{{0}}) custom-call(%a, %b), {call}
}}
"""
    cost = count(text, ONE)
    assert (cost.flops, cost.uncounted) == (flops, uncounted)


@pytest.mark.parametrize(("target", "products"), [("fmhaSoftmax", 2), ("fmhaSoftmaxBackward", 5)])
def test_cudnn_s_attention_counts_its_products(target, products):
    text = f"""
ENTRY %main (q: bf16[3,640,24,128], k: bf16[3,512,24,128]) -> (bf16[3,640,24,128], u8[0]) {{
  %q = bf16[3,640,24,128]{{3,2,1,0}} parameter(0)
  %k = bf16[3,512,24,128]{{3,2,1,0}} parameter(1)
  ROOT %c = (bf16[3,640,24,128]{{3,1,2,0}}, u8[0]{{0}}) custom-call(%q, %k, %k), custom_call_target="__cudnn${target}"
}}
"""
    cost = count(text, ONE)
    assert (cost.flops, cost.uncounted) == (products * 2 * 3 * 24 * 640 * 128 * 512, {})


@pytest.mark.parametrize(
    ("kernel", "results", "products"),
    [
        ("fwd_no_residuals", 1, 2),
        ("fwd_segmented_residuals", 5, 2),
        ("dq_no_residuals", 2, 3),
        ("dkv_segmented_no_residuals", 4, 4),
        ("dkv_no_residuals", 5, 5),  # with dq
        ("dkv_no_residuals", 6, 5),  # and its scratch array
    ],
)
def test_jax_s_attention_kernel_counts_its_products(kernel, results, products):
    """Two samples, 3 heads, 256 queries and 128 keys of 64; tables of tiles come first."""
    result = ", ".join(["f32[2,3,256,64]{3,2,1,0}"] * results)
    text = f"""
ENTRY %main (m: s8[1,2,1], q: bf16[2,3,256,64], k: bf16[2,3,128,64], v: bf16[2,3,128,64]) -> ({result}) {{
  %m = s8[1,2,1]{{2,1,0}} parameter(0)
  %q = bf16[2,3,256,64]{{3,2,1,0}} parameter(1)
  %k = bf16[2,3,128,64]{{3,2,1,0}} parameter(2)
  %v = bf16[2,3,128,64]{{3,2,1,0}} parameter(3)
  ROOT %c = ({result}) custom-call(%m, %q, %k, %v), custom_call_target="tpu_custom_call", \
metadata={{op_name="jit(f)/transpose(jvp(attn))/splash_mha_{kernel}/splash_mha_{kernel}/pallas_call"}}
}}
"""
    cost = count(text, ONE)
    assert (cost.flops, cost.uncounted) == (products * 2 * 2 * 3 * 256 * 128 * 64, {})


LOOP = """
%body (p: (u32[], f32[4])) -> (u32[], f32[4]) {
  %p = (u32[]{:T(128)}, f32[4]{0}) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%p), index=0
  %step = u32[]{:T(128)} constant(STEP)
  %next = u32[]{:T(128)} add(%i, %step)
  %x = f32[4]{0} get-tuple-element(%p), index=1
  ROOT %t = (u32[]{:T(128)}, f32[4]{0}) tuple(%next, %x)
}

%condition (p: (u32[], f32[4])) -> pred[] {
  %p.1 = (u32[]{:T(128)}, f32[4]{0}) parameter(0)
  %j = u32[]{:T(128)} get-tuple-element(%p.1), index=0
  %bound = u32[]{:T(128)} constant(BOUND)
  ROOT %test = pred[]{:T(512)} compare(%j, %bound), direction=DIRECTION
}

ENTRY %main (x: f32[4]) -> (u32[], f32[4]) {
  %start = u32[]{:T(128)} constant(START)
  %y = f32[4]{0} parameter(0)
  %state = (u32[]{:T(128)}, f32[4]{0}) tuple(%start, %y)
  ROOT %loop = (u32[]{:T(128)}, f32[4]{0}) while(%state), condition=%condition, body=%body
}
"""


def loop_trips(**values) -> int:
    text = LOOP
    for name, value in values.items():
        text = text.replace(name, str(value))
    computations, entry = parse(text)
    return trip_count(computations[entry].root, computations[entry], computations)


@pytest.mark.parametrize(
    ("start", "step", "bound", "direction", "trips"),
    [(0, 1, 8, "LT", 8), (0, 2, 8, "LT", 4), (1, 2, 8, "LT", 4), (3, 1, 8, "LE", 6)],
)
def test_trips_follow_the_counter_where_xla_does_not_state_them(start, step, bound, direction, trips):
    assert loop_trips(START=start, STEP=step, BOUND=bound, DIRECTION=direction) == trips


def test_a_loop_without_a_bound_is_refused():
    with pytest.raises(ValueError, match="does not count up to a constant"):
        loop_trips(START=0, STEP=1, BOUND=8, DIRECTION="NE")


# HBM


def test_stacked_weights_are_read_a_layer_at_a_time():
    layers, width = 16, 64

    def function(x, stack):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)[0]

    cost = count(compiled_text(function, array(4, width), array(layers, width, width)), ONE)
    once = 4 * layers * width**2
    assert once <= cost.bytes < 4 * once  # and not `layers` times all


def test_on_chip_memory_is_free():
    text = """
ENTRY %main (a: bf16[8,128]) -> bf16[8,128] {
  %a = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %near = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} copy(%a)
  %again = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} negate(%near)
  ROOT %out = bf16[8,128]{1,0:T(8,128)(2,1)} copy(%again)
}
"""
    assert count(text, ONE).bytes == 2 * (2 * 8 * 128)


def test_types_are_read_with_their_layouts():
    text = "(s32[]{:T(128)}, bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, /*index=2*/pred[7], f8e4m3fn[5], token[])"
    assert [(s.dtype, s.dims, s.on_chip, s.bytes) for s in shapes(text)] == [
        ("s32", (), False, 4), ("bf16", (2, 3), True, 12), ("pred", (7,), False, 7), ("f8e4m3fn", (5,), False, 5),
        ("token", (), False, 0),
    ]  # fmt: skip


# Collectives


@pytest.mark.parametrize(
    ("kind", "function", "spec_out", "per_byte"),
    [
        ("all-reduce", lambda x: jax.lax.psum(x, "data"), P(), 2 * 7 / 8),
        ("all-gather", lambda x: jax.lax.all_gather(x, "data"), P(), 7),
        ("reduce-scatter", lambda x: jax.lax.psum_scatter(x, "data", tiled=True), P("data"), 7 / 8),
        ("all-to-all", lambda x: jax.lax.all_to_all(x, "data", 0, 0, tiled=True), P("data"), 7 / 8),
        ("collective-permute", lambda x: jax.lax.ppermute(x, "data", RING), P("data"), 1),
    ],
)  # fmt: skip
def test_collectives_send_what_a_ring_sends(kind, function, spec_out, per_byte):
    mesh = make_mesh({"data": 8})
    mapped = jax.shard_map(function, mesh=mesh, in_specs=P("data"), out_specs=spec_out, check_vma=False)
    x = jax.ShapeDtypeStruct((512,), jnp.float32, sharding=NamedSharding(mesh, P("data")))

    def repeated(x):  # in a loop, so that the count shows it
        return jax.lax.scan(lambda total, s: (total + mapped(s * x), None), jnp.zeros_like(mapped(x)), jnp.arange(3.0))[
            0
        ]

    text = compiled_text(repeated, x)
    traffic = count(text, np.zeros(8, int)).collectives[kind]
    assert traffic.count == 3
    assert traffic.ici == pytest.approx(3 * per_byte * 4 * 512 / 8)
    assert traffic.dcn == 0
    across = count(text, TWO_SLICES).collectives[kind]
    assert (across.ici, across.dcn) == (0, traffic.ici)


def test_a_collective_inside_each_slice_does_not_cross():
    mesh = make_mesh({"data": 2, "fsdp": 4})
    mapped = jax.shard_map(
        lambda x: jax.lax.psum(x, "fsdp"), mesh=mesh, in_specs=P(("data", "fsdp")), out_specs=P("data"), check_vma=False
    )
    cost = count(compiled_text(mapped, array(512)), TWO_SLICES)
    assert cost.ici > 0
    assert cost.dcn == 0


@pytest.mark.parametrize(("axis", "between"), [("data", True), pytest.param("fsdp", False, marks=pytest.mark.slow)])
def test_a_sum_over_tpu_slices_is_between_them(axis, between):
    pytest.importorskip("libtpu")
    topology = open_topology("2*v5e:2x2")
    mesh = make_mesh({"data": 2, "fsdp": 4}, topology.devices)
    x = jax.ShapeDtypeStruct((8, 128, 512), jnp.float32, sharding=NamedSharding(mesh, P(axis)))
    cost = count(compiled_text(lambda x: jnp.sin(x).sum(0), x, out_shardings=NamedSharding(mesh, P())), topology.slices)
    assert (cost.dcn > 0) == between
    assert (cost.ici > 0) == (not between)
    assert cost.dcn in (0, 2 * (1 / 2) * 128 * 512 * 4)  # each device sums its own part first


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}, x={}", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0), to_apply=%add", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}, dimensions={0}", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}, dimensions={0}", [[0, 1], [2, 3]]),
        ("replica_groups={}, channel_id=1", [[0, 1, 2, 3]]),
    ],
)
def test_replica_groups_in_all_their_forms(text, groups):
    np.testing.assert_array_equal(replica_groups(text, 4), groups)


def test_a_gather_that_runs_beside_other_work_counts_where_it_starts():
    """The TPU compiler writes such a gather into the fusions that start, carry and end it."""
    gather = "all-gather(%q), channel_id=7, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}"
    body = "%q = f32[8]{0} parameter(0)\n  %g = f32[64]{0} " + gather
    text = f"""
%starts (q: f32[8]) -> f32[64] {{
  {body}
  ROOT %r = f32[64]{{0}} custom-call(%g), custom_call_target="AsyncCollectiveStart"
}}

%carries (q: f32[8]) -> f32[64] {{
  {body}
  ROOT %r = f32[64]{{0}} custom-call(%g), custom_call_target="AsyncCollectiveDone"
}}

ENTRY %main (x: f32[8]) -> f32[64] {{
  %x = f32[8]{{0}} parameter(0)
  %a = f32[64]{{0}} fusion(%x), kind=kCustom, calls=%starts
  ROOT %b = f32[64]{{0}} fusion(%x), kind=kCustom, calls=%carries
}}
"""
    traffic = count(text, np.zeros(8, int)).collectives["all-gather"]
    assert (traffic.count, traffic.ici) == (1, 7 * 32)


def test_attributes_of_a_kernel_that_go_over_several_lines_do_not_end_a_computation():
    program = """HloModule m

ENTRY %main (p: f32[4,8]) -> f32[4,4] {
  %p = f32[4,8]{1,0} parameter(0)
  %kernel = f32[8,4]{1,0} custom-call(%p), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"block_q": 128
}}, metadata={op_name="attention"}
  ROOT %dot = f32[4,4]{1,0} dot(%p, %kernel), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""
    found = count(program, np.zeros(1, int))
    assert found.flops == 2 * 4 * 4 * 8
    assert found.uncounted == {"tpu_custom_call": 1}
