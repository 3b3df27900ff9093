"""How processes find each other and share a mesh, told without starting any."""

from dataclasses import dataclass

import jax
import numpy as np
import pytest
import small_run
from jax.sharding import NamedSharding, PartitionSpec

from rcgrpo_jax.errors import UsageError, UserError, is_everywhere
from rcgrpo_jax.parallel import distributed
from rcgrpo_jax.parallel.mesh import AXES, SAMPLE_AXES, check_parts, make_mesh
from rcgrpo_jax.parallel.microbatch import join, split
from rcgrpo_jax.rl.setup import check_mesh

# How processes find each other

GIVEN = {"coordinator": "10.0.0.1:1234", "num_processes": "4", "process_id": "3"}
VARIABLES = {distributed.VARIABLES[name]: value for name, value in GIVEN.items()}
SLURM = {"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_STEP_NODELIST": "a[0-1]"}


@pytest.fixture
def joined(monkeypatch):
    """The options that JAX was called with, a dictionary a call."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **options: calls.append(options))
    monkeypatch.setattr(distributed.os.path, "exists", lambda path: False)  # no TPU here, whatever the machine
    return calls


EXPLICIT = {
    "coordinator_address": "10.0.0.1:1234", "num_processes": 4, "process_id": 3,
    "cluster_detection_method": "deactivate",
}  # fmt: skip


@pytest.mark.parametrize(
    ("given", "environ", "calls"),
    [
        ({}, {}, []),
        (GIVEN, {}, [EXPLICIT]),
        ({}, VARIABLES, [EXPLICIT]),
        ({"process_id": "0"}, VARIABLES | SLURM, [EXPLICIT | {"process_id": 0}]),
        ({}, SLURM, [{"cluster_detection_method": "slurm"}]),
        ({}, SLURM | {"SLURM_NTASKS": "1"}, []),
        ({}, SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, []),  # an interactive step keeps the allocation's number of tasks
        ({}, {name: value for name, value in SLURM.items() if "STEP" not in name}, []),
    ],
    ids=["alone", "flags", "variables", "flags-first", "slurm", "one-task", "interactive", "batch-script"],
)
def test_processes_find_each_other_as_they_are_told(joined, given, environ, calls):
    distributed.initialize(given, environ)
    assert joined == calls


def test_on_a_tpu_the_workers_find_each_other(joined, monkeypatch):
    monkeypatch.setattr(distributed.os.path, "exists", lambda path: path == "/dev/vfio/0")
    monkeypatch.setattr(distributed, "_has_libtpu", lambda: True)
    distributed.initialize({}, {})
    assert joined == [{}]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"process_id": None}, "--process_id not"),
        ({"process_id": "4"}, "number below the count"),
        ({"num_processes": "two"}, "number below the count"),
        ({"coordinator": "10.0.0.1"}, "HOST:PORT"),
    ],
)
def test_half_told_or_wrongly_told_is_refused(joined, change, message):
    with pytest.raises(UsageError, match=message):
        distributed.initialize(GIVEN | change, {})
    assert not joined


@pytest.mark.parametrize("error", [RuntimeError, ConnectionError])
def test_a_coordinator_that_does_not_answer_is_told(monkeypatch, error):
    def fail(**_):
        raise error("DEADLINE_EXCEEDED")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(UserError, match=r"10\.0\.0\.1:1234: DEADLINE_EXCEEDED"):
        distributed.initialize(GIVEN, {})


@dataclass(frozen=True)
class Device:
    """One of a machine that is not there."""

    id: int
    process_index: int


@pytest.mark.parametrize(
    ("processes", "shape", "message"),
    [
        ([0, 0, 1, 1, 2, 2], {"data": 6}, r"rollout\.prompts: 2; each of 3 processes"),
        ([0, 0, 1, 1], {"tensor": 4}, r"mesh\.tensor: 4; a process has 2 devices"),
        ([0, 0, 0, 0], {"tensor": 4}, r"mesh\.tensor: 4; the model has 2 heads"),
        ([0] * 6 + [1] * 6, {"data": 3, "fsdp": 4}, r"mesh\.fsdp: 4; a process has 6 devices"),
    ],
)
def test_a_mesh_that_splits_what_belongs_together_is_refused(processes, shape, message):
    mesh = make_mesh(shape, [Device(i, process) for i, process in enumerate(processes)])
    with pytest.raises(UsageError, match=message):
        check_mesh(small_run.make_options(), mesh, small_run.TINY["transformer"].num_attention_heads)


@pytest.mark.parametrize(
    ("count", "own", "shape", "near"),
    [
        (3, 8, (2, 12, 1), (3, 8)),
        (3, 8, (2, 6, 2), (3, 4)),
        (5, 4, (2, 10, 1), (1, 20)),
        (3, 8, (3, 8, 1), None),
        (3, 8, (1, 24, 1), None),
        (3, 8, (12, 2, 1), None),
        (1, 6, (2, 3, 1), None),
    ],
)
def test_a_process_has_a_block_of_the_mesh(count, own, shape, near):
    devices = [Device(i, i // own) for i in range(count * own)]
    mesh = make_mesh(dict(zip(AXES, shape, strict=True)), devices)
    if near is None:
        check_parts(mesh, heads=2)
        return
    with pytest.raises(UsageError, match=rf"mesh\.fsdp: {shape[1]}; a process has {own} devices") as refused:
        check_parts(mesh, heads=2)
    assert refused.value.remedy == f"Choose mesh.data={near[0]} and mesh.fsdp={near[1]}."
    check_parts(make_mesh(dict(zip(AXES, (*near, shape[2]), strict=True)), devices), heads=2)


def test_the_devices_of_a_process_follow_each_other_on_a_mesh():
    devices = [Device(i, process) for i, process in enumerate([0, 1, 0, 1])]
    mesh = make_mesh({"fsdp": 4}, devices)
    assert [device.id for device in mesh.devices.flat] == [0, 2, 1, 3]


# What stays where


@pytest.mark.parametrize("micro", [0, 8, 16])
def test_micro_batches_take_from_every_device_what_it_has(micro):
    mesh = make_mesh({"data": 2, "fsdp": 4})
    x = np.arange(32)
    placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec(SAMPLE_AXES)))
    chunks = jax.jit(lambda x: split(x, micro, mesh))(placed)
    assert chunks.shape == (32 // (micro or 32), micro or 32)
    for shard in chunks.addressable_shards:
        own = next(s.data for s in placed.addressable_shards if s.device == shard.device)
        np.testing.assert_array_equal(np.asarray(shard.data).ravel(), own)
    np.testing.assert_array_equal(jax.jit(lambda x: join(x, mesh))(chunks), x)
    program = jax.jit(lambda x: join(split(x, micro, mesh), mesh)).lower(placed).compile().as_text()
    assert not any(word in program for word in ("all-to-all", "all-gather", "collective-permute"))


def test_an_error_in_a_block_that_all_share_is_raised_as_it_is():
    with pytest.raises(KeyError) as caught, distributed.raise_together():
        raise KeyError("own")
    assert is_everywhere(caught.value)
    with pytest.raises(KeyError), distributed.raise_together():
        raise KeyError("caf\udce9.png")  # a file name that is not UTF-8
    with distributed.raise_together():
        pass


def test_alone_all_rows_are_ones_own():
    assert distributed.local_row_range(6) == distributed.local_job_range(6) == range(6)
    assert not distributed.any_process(False)
    assert distributed.any_process(True)
    np.testing.assert_array_equal(distributed.sum_over_processes(np.array([1, 2])), [1, 2])
