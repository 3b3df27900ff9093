"""A plan speaks of the programs that a run executes and counts what they do; those that are kept hold."""

import json
import math

import jax
import jax.numpy as jnp
import pytest
import small_run
from flax.traverse_util import flatten_dict
from jax.sharding import SingleDeviceSharding

from rcgrpo_jax.cli.config_file import load_config
from rcgrpo_jax.errors import UsageError, UserError
from rcgrpo_jax.models.config import MMDiTConfig, VAEConfig
from rcgrpo_jax.models.lora import LoRAConfig
from rcgrpo_jax.options import read_options, with_changes
from rcgrpo_jax.parallel.mesh import AXES
from rcgrpo_jax.plan import flops, topology
from rcgrpo_jax.plan.chips import TPUS, Chip, chip_of
from rcgrpo_jax.plan.cost import Cost, Traffic
from rcgrpo_jax.plan.programs import FLUX_KONTEXT, NAMES, FluxKontextDev, Workload, open_flux, parse_refusal
from rcgrpo_jax.plan.roofline import roofline
from rcgrpo_jax.plan.topology import Topology, open_topology
from rcgrpo_jax.rl.config import validate
from rcgrpo_jax.rl.options import ACDOptions, Options

GIB = 2**30


def local(num_devices: int) -> Topology:
    return Topology("local", tuple(jax.devices()[:num_devices]), None, None)


def workload(num_devices: int = 1, **changes) -> Workload:
    config = small_run.make_config(**changes)
    validate(config, num_devices)
    return Workload(read_options(Options, config), open_flux(config.model.path), local(num_devices))


# FLOPs by formula


@pytest.mark.parametrize(("target", "tera"), [(1024, 37.6), (4096, 165.4)])
def test_a_forward_pass_of_flux_has_the_known_flops(target, tera):
    found = flops.mmdit(MMDiTConfig(), 512, target, LoRAConfig(rank=1), ACDOptions())
    assert found.forward / 1e12 == pytest.approx(tera, rel=0.005)


def test_recomputation_and_gradients_stay_below_a_forward_pass_each():
    one = flops.mmdit(MMDiTConfig(), 512, 1024, LoRAConfig(), ACDOptions())
    assert 0 == one.recomputed["none"] < one.recomputed["dots"] < one.recomputed["full"] < one.forward
    assert one.forward < one.backward < 2 * one.forward  # no gradients of frozen weights
    assert 0 < one.concentration < 0.005 * one.forward


def test_a_step_is_its_samples_and_units():
    options = Options()
    sizes = (MMDiTConfig(), VAEConfig(), 512, 1024)
    one = flops.mmdit(sizes[0], 512, 1024, options.lora, options.acd)
    unit = one.forward + one.recomputed["full"] + one.backward
    found = flops.step(options, *sizes)
    assert found["rollout"] == 4 * 12 * 8 * (one.forward + one.concentration)
    assert found["update"] == 4 * 4 * 4 * unit  # of 8 steps, the noisier half
    assert found["decode"] == 4 * 12 * flops.vae_decoder(sizes[1], 64 * 64)
    every = flops.step(with_changes(options, {"surrogate.steps": "all"}), *sizes)
    assert every["update"] == 2 * found["update"]
    integrate = {"surrogate.anchor_mode": "integrate"}
    for steps, count in (("early", 4), ("all", 8)):
        integrated = flops.step(with_changes(options, integrate | {"surrogate.steps": steps}), *sizes)
        assert integrated["update"] == 4 * 4 * count * (unit + one.forward)


@pytest.mark.parametrize(("solver", "whole", "early"), [("euler", 8, 4), ("heun", 15, 8), ("dpmpp_2m", 8, 4)])
def test_a_step_counts_its_solvers_evaluations(solver, whole, early):
    """ACD is of one evaluation a step, and a replayed anchor is a step of Euler's."""
    options, sizes = Options(), (MMDiTConfig(), VAEConfig(), 512, 1024)
    one, plain = flops.mmdit(sizes[0], 512, 1024, options.lora, options.acd), flops.step(options, *sizes)
    changed = {"rollout.solver": solver}
    found = flops.step(with_changes(options, changed), *sizes)
    assert found["rollout"] == 4 * 12 * (whole * one.forward + 8 * one.concentration)
    assert found["update"] == plain["update"]
    changed["surrogate.anchor_mode"] = "integrate"
    unit = 2 * one.forward + one.recomputed["full"] + one.backward
    for steps, count in (("early", early), ("all", whole)):
        found = flops.step(with_changes(options, changed | {"surrogate.steps": steps}), *sizes)
        assert found["update"] == 4 * 4 * count * unit


def test_shared_tokens_are_computed_once():
    """By hand: every kernel of a block and both products of attention, for the first candidate and the others' own."""
    base = Options()
    sizes = (MMDiTConfig(), VAEConfig(), 512, 1024)
    shared = with_changes(
        base, {"rollout.share": "region", "rollout.share_grow": 1, "rollout.share_grow_reference": -1}
    )
    one = flops.mmdit(sizes[0], 512, 1024, base.lora, base.acd)
    assert flops.size_of_region(shared, 1024, 0.12) == 256  # 14 x 14 tokens

    def of_group(others: int, size: int) -> float:
        return flops.shared(sizes[0], 512, 1024, base.lora, base.acd, others, size).forward

    none, all_own = of_group(0, 2048), of_group(1, 2048)
    assert none == pytest.approx(one.forward, rel=1e-3)  # but for the last layer, which takes all tokens
    assert 1.7 < all_own / one.forward < 2  # text tokens are the first candidate's
    exact, found = flops.step(base, *sizes), flops.step(shared, *sizes, region=0.12)
    assert 0.15 < found["rollout"] / exact["rollout"] < 0.2
    assert found["update"] == exact["update"]
    split = flops.step(shared, *sizes, region=0.12, devices=16)  # four prompts: groups in four parts
    passes = 16 * of_group(3, 256)
    assert split["rollout"] == pytest.approx(8 * (passes + 16 * 4 * one.concentration))
    parts = flops.step(with_changes(shared, {"rollout.micro_batch": 12}), *sizes, region=0.12, devices=4)
    assert parts["rollout"] == split["rollout"]
    full = flops.step(with_changes(shared, {"rollout.share_full_steps": 4}), *sizes, region=0.12)
    assert full["rollout"] == pytest.approx((exact["rollout"] + found["rollout"]) / 2)
    assert flops.step(shared, *sizes, region=0.7) == exact
    both = flops.step(with_changes(shared, {"surrogate.share": "region"}), *sizes, region=0.12)
    assert both["rollout"] == found["rollout"]
    assert 0.3 < both["update"] / exact["update"] < 0.4  # four anchors and the reference beside four anchors
    assert flops.step(with_changes(shared, {"surrogate.share": "region"}), *sizes, region=0.7) == exact


# Programs


@pytest.mark.parametrize(
    "changes",
    [
        {"model__remat": "full"},
        pytest.param({"model__remat": "none"}, marks=pytest.mark.slow),
        pytest.param({"surrogate__anchor_mode": "integrate"}, marks=pytest.mark.slow),
        pytest.param({"surrogate__anchor_mode": "integrate", "rollout__solver": "heun"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.slow
def test_compiled_flops_agree_with_the_formula(changes):
    planned = workload(**changes)
    rolled = "rollout__solver" in changes
    names = NAMES if changes == {"model__remat": "full"} else ("rollout", "update") if rolled else ("update",)
    ratios = {name: (plan := planned.compile(name)).cost.flops / plan.analytic for name in names}
    assert ratios.pop("rollout", 1.0) == pytest.approx(1, rel=0.05)
    assert ratios.pop("decode", 1.0) == pytest.approx(1, rel=0.05)
    # Three blocks show more of the first one, through whose inputs no gradient runs, than FLUX's 57.
    assert 0.85 < ratios["update"] < 1.05


@pytest.mark.slow
def test_compiled_flops_of_shared_rollouts_agree_with_the_formula():
    share = {"rollout__share": "region", "rollout__share_grow": 0, "explore__alpha_base": 0.0}
    planned = workload(**share)
    assert planned.own_tokens
    plan = planned.compile("rollout")
    assert plan.cost.flops / plan.analytic == pytest.approx(1, rel=0.05)
    assert plan.cost.flops < 0.7 * workload().compile("rollout").cost.flops


@pytest.mark.slow
def test_every_axis_of_a_mesh_takes_its_share_of_the_work():
    """Were activations not constrained, devices would repeat the products of others."""
    planned = workload(8, mesh__data=2, mesh__fsdp=2, mesh__tensor=2)
    for name in ("rollout", "update"):
        plan = planned.compile(name)
        assert 0.8 < plan.cost.flops / plan.analytic < 1.1, name


def test_the_arguments_are_those_of_a_run(monkeypatch):
    """Shapes, dtypes and shardings, on a mesh that splits samples and weights."""
    shape = (2, 2, 1)
    planned = workload(4, **{f"mesh__{axis}": size for axis, size in zip(AXES, shape, strict=True)})
    trainer = small_run.make_trainer(shape)
    programs, seen = trainer.programs, {}

    def stand_in(name):
        def program(*arguments):
            seen[name] = arguments
            if name == "update":
                return arguments[1], arguments[6], {"loss": 0.0}
            results = getattr(planned.programs, name).eval_shape(*planned.arguments(name))
            return jax.tree.map(lambda x: jax.device_put(jnp.zeros(x.shape, x.dtype), x.sharding), results)

        return program

    for name in NAMES:
        monkeypatch.setattr(programs, name, stand_in(name))
    small_run.take_step(trainer, small_run.make_state(trainer), small_run.make_batch(trainer))
    for name in NAMES:
        wanted, found = (jax.tree_util.tree_flatten_with_path(tree) for tree in (planned.arguments(name), seen[name]))
        assert wanted[1] == found[1]
        for (path, x), (_, y) in zip(wanted[0], found[0], strict=True):
            where = f"{name}{jax.tree_util.keystr(path)}"
            assert (x.shape, x.dtype) == (y.shape, y.dtype), where
            if not isinstance(y.sharding, SingleDeviceSharding):  # what no program placed goes wherever it is wanted
                assert y.sharding.is_equivalent_to(x.sharding, y.ndim), where


def total_bytes(tree) -> int:
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def test_what_a_run_keeps_counts_once_in_every_program():
    planned = workload(4, mesh__data=1, mesh__fsdp=4)
    kept = {name: planned.held(name) + total_bytes(planned.arguments(name)) for name in NAMES}
    trees = {name: total_bytes(tree) for name, tree in planned.trees.items()}
    assert kept["decode"] == kept["rollout"] - trees["candidates"] + trees["rollout"] + trees["images"]
    assert trees["upcoming"] == trees["prompts"]
    read = sum(trees[name] for name in ("rollout", "objective", "upcoming"))
    assert kept["update"] == kept["rollout"] - trees["candidates"] + read
    half = workload(4, mesh__data=1, mesh__fsdp=4, rollout__micro_batch=4)
    assert half.calls == {"rollout": 2, "decode": 2, "update": 1}
    earlier, pictures = half.trees["earlier"]
    assert total_bytes(earlier) == total_bytes(half.trees["part"]) == trees["rollout"] / 2
    assert half.held("decode") >= total_bytes(earlier) + total_bytes(pictures) + total_bytes(half.trees["part"])
    whole = workload(4, mesh__data=4)
    assert trees["params"] < 0.5 * total_bytes(whole.trees["params"])


def test_a_program_that_cannot_be_read_has_no_cost(caplog):
    assert workload().cost("update", "ENTRY %main { %loop = while(), condition=%nowhere }") is None
    assert "update: the compiled program could not be read" in caplog.text


def test_without_a_path_the_model_is_flux_kontext():
    model = open_flux("")
    assert isinstance(model, FluxKontextDev)
    assert model.config("transformer") == MMDiTConfig()
    assert model.config("vae") == VAEConfig()


@pytest.mark.parametrize(
    ("message", "refusal"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (400.00G) "
            "exceeds available HBM (15.75G).",
            (400 * GIB, int(15.75 * GIB)),
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
            "Used 20.45G of 15.75G hbm. Exceeded hbm capacity by 4.70G.",
            (int(20.45 * GIB), int(15.75 * GIB)),
        ),
        ("INVALID_ARGUMENT: something else", None),
    ],
)
def test_refusals_of_the_compiler_are_read(message, refusal):
    assert parse_refusal(message) == refusal


# Topologies and chips


def test_the_longest_name_wins():
    assert chip_of("TPU v5 lite").name == "v5e"
    assert chip_of("TPU v5").name == "v5p"
    assert chip_of("NVIDIA H100 80GB HBM3").name == "h100"
    assert chip_of("NVIDIA GH200 480GB") is None  # no h200
    assert chip_of("cpu") is None


@pytest.mark.parametrize(
    "name",
    ["v5e", "v9:4x4", "v5e:4x4x4", "v5p:4x4", "v5e:0x4", "0*v5e:4x4", "lokal", "v5e:4x", "h100", "h100:2x4", "h100:0"],
)
def test_names_that_are_no_topology(name):
    with pytest.raises(UsageError, match="--topology") as error:
        open_topology(name)
    assert "v5e:4x4" in error.value.remedy


def test_without_the_compiler_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="libtpu is not installed") as error:
        open_topology("v5e:4x4")
    assert "pip install libtpu" in error.value.remedy


def test_the_local_devices_are_a_topology_too():
    found = open_topology("local")
    assert found.devices == tuple(jax.devices())
    assert found.memory is None


@pytest.mark.parametrize(
    ("name", "devices", "chips", "slices"),
    [
        ("2*v5e:4x4", 32, 32, 2),
        ("v5p:2x2x2", 8, 8, 1),
        ("tpu7x:2x2x1", 8, 4, 1),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("v5e:1x1", 1, 1, 1),
                ("v5e:4x4", 16, 16, 1),
                ("v5p:4x4x4", 64, 64, 1),
                ("v6e:2x4", 8, 8, 1),
                ("v6e:16x16", 256, 256, 1),
                ("v4:2x2x1", 4, 4, 1),
            )
        ),
    ],
)
def test_tpus_that_are_not_there(name, devices, chips, slices):
    pytest.importorskip("libtpu")
    found = open_topology(name)
    assert (len(found.devices), found.chips, len(set(found.slices.tolist()))) == (devices, chips, slices)
    assert chip_of(found.devices[0].device_kind) == found.chip


@pytest.mark.parametrize(("name", "hosts"), [("v6e:2x4", 1), ("v5e:2x2", 1), ("v5e:4x4", 4), ("v5p:2x2x2", 2)])
def test_a_slice_has_the_machines_that_google_says(name, hosts):
    """Each is a process, which must have whole rows of a batch."""
    pytest.importorskip("libtpu")
    assert len({device.process_index for device in open_topology(name).devices}) == hosts


@pytest.mark.parametrize(
    "name", ["v5e", *(pytest.param(chip.name, marks=pytest.mark.slow) for chip in TPUS.values() if chip.name != "v5e")]
)
def test_the_stated_memory_is_the_compiler_s(name):
    pytest.importorskip("libtpu")
    found = open_topology(f"{name}:{'x'.join(['2', '2', '1'][: TPUS[name].axes])}")
    x = jax.ShapeDtypeStruct((2**18, 2**20), jnp.bfloat16, sharding=SingleDeviceSharding(found.devices[0]))
    with pytest.raises(jax.errors.JaxRuntimeError) as error:
        jax.jit(lambda x: 2 * x).lower(x).compile()
    assert parse_refusal(str(error.value))[1] == found.memory


def test_a_shape_that_the_compiler_refuses_is_a_user_error():
    pytest.importorskip("libtpu")
    with pytest.raises(UserError, match="--topology: v5e:3x5"):
        open_topology("v5e:3x5")


# Roofline


def test_the_slowest_kind_of_work_is_the_time():
    chip = Chip("", "", flops=10.0, hbm_bandwidth=5.0, ici=2.0, dcn=1.0)
    cost = Cost(flops=30.0, bytes=10.0, collectives={"a": Traffic(1, ici=4.0, dcn=1.0), "b": Traffic(1, ici=2.0)})
    time = roofline(cost, chip)
    assert tuple(time) == (3.0, 2.0, 4.0)
    assert (time.seconds, time.bound) == (4.0, "network")


# The plans that are kept

PLANS = small_run.ROOT / "docs" / "plans"  # of FILE:NAME in FILE/NAME.json, of FILE in FILE.json
KEPT = sorted(PLANS.rglob("*.json"))


@pytest.mark.parametrize("file", KEPT, ids=lambda file: str(file.relative_to(PLANS).with_suffix("")))
def test_a_kept_plan_is_of_its_configuration_and_the_configuration_says_what_it_says(file):
    """Sizes, FLOPs and time at full size, which takes minutes to compile."""
    plan, parts = json.loads(file.read_text()), file.relative_to(PLANS).with_suffix("").parts
    path, row = small_run.ROOT / "configs" / f"{parts[0]}.py", parts[1:]
    config = load_config(":".join([str(path), *row]), "")
    config.model.path, config.data.path = FLUX_KONTEXT, plan["config"]["data"]["path"]
    kept, now = (flatten_dict(x, sep=".") for x in (plan["config"], json.loads(json.dumps(config.to_dict()))))
    assert {name: now[name] for name in now if name in kept} == {name: kept[name] for name in kept if name in now}
    assert plan["fits"]
    programs = {program["name"]: program for program in plan["programs"]}
    ratios = {name: program["cost"]["flops"] / program["analytic"] for name, program in programs.items()}
    assert ratios["rollout"] <= 1.05
    assert ratios["update"] <= 1.10
    needed, available = (max(program[key] for program in programs.values()) for key in ("needed", "available"))
    if plan["topology"].startswith("v5e"):
        assert needed <= 15 * GIB
    header, step = path.read_text().split('"""')[1], plan["step"]
    samples = f"{float('{:.4g}'.format(step['samples_per_hour'])):,.0f}"
    memory, seconds = f"{needed / GIB:.1f} of {available / GIB:.2f}", f"{step['seconds']:.1f}"
    if row:
        (line,) = (line for line in header.splitlines() if line.startswith(f"| {row[0]} "))
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[2:6] == [plan["topology"], memory, seconds, samples]
    else:
        header = " ".join(header.split())
        assert f"--topology {plan['topology']}" in header
        assert f"{memory} GiB a chip, {seconds} s a step" in header
        assert f"{samples} samples an hour" in header
