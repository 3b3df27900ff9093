"""Several processes are one run: the same losses, one checkpoint, one set of records, and none waits for the dead."""

import contextlib
import os
import re
import signal
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import pytest
import small_run
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file

from rcgrpo_jax.cli.export import export
from rcgrpo_jax.errors import UsageError, UserError
from rcgrpo_jax.models.config import VAEConfig
from rcgrpo_jax.parallel import distributed
from rcgrpo_jax.parallel.mesh import AXES, SAMPLE_AXES, check_parts, make_mesh
from rcgrpo_jax.parallel.microbatch import join, split
from rcgrpo_jax.training import pretrain_config
from rcgrpo_jax.training.loop import check_mesh, train
from rcgrpo_jax.weights import random_folder

pytestmark = pytest.mark.usefixtures("quick_compilation")

# Metrics are those of a step's last update; of the first, the loss is zero up to rounding.
SETTINGS = {
    "rollout__prompts": 4, "mesh__fsdp": 2, "objective__updates": 2, "optimizer__learning_rate": 1e-3,
    "train__num_steps": 4, "train__save_every": 1,
}  # fmt: skip
ROUNDING = 2e-6  # of the loss, a difference of logarithms
FIRST_PORT, WORKER_PORTS, WORKERS = 12_000, 1_000, 20  # below 32768, from where on the kernel gives ports away
offset = os.getpid()  # of this worker's next port: another test session starts elsewhere


def free_port() -> int:
    """A port that nobody listens to, out of this worker's own; another one each time."""
    global offset
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % WORKERS
    for _ in range(WORKER_PORTS):
        offset += 1
        port = FIRST_PORT + worker * WORKER_PORTS + offset % WORKER_PORTS
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    raise OSError("no port is free")


def start(config: Path, workdir: Path, count: int, command: str = "train", **variables: str) -> list[subprocess.Popen]:
    """`rcgrpo train`, or another command, on `count` processes that share eight devices."""
    port, log = free_port(), config.parent
    environment = small_run.environment() | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={8 // count}",
    }
    return [
        subprocess.Popen(
            small_run.command(
                command, f"--config={config}", f"--workdir={workdir}", f"--coordinator=127.0.0.1:{port}",
                f"--num_processes={count}", f"--process_id={index}",
            ),
            env=environment | variables, text=True,
            stdout=(log / f"{index}.out").open("w"), stderr=(log / f"{index}.err").open("w"),
        )
        for index in range(count)
    ]  # fmt: skip


def finish(processes: list[subprocess.Popen], log: Path, timeout: float = 600) -> list[tuple[int, str, str]]:
    """Exit code, standard output and standard error of each."""
    try:
        codes = [process.wait(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(code, *((log / f"{i}.{kind}").read_text() for kind in ("out", "err"))) for i, code in enumerate(codes)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The state and the directory of the run on one process with eight devices."""
    workdir = tmp_path_factory.mktemp("alone")
    return train(small_run.make_config(**SETTINGS), workdir), workdir


def assert_same_losses(workdir: Path, alone: Path) -> None:
    found, wanted = (small_run.metrics_without_times(path) for path in (workdir, alone))
    assert [line["step"] for line in found] == [1, 2, 3, 4]
    for line, expected in zip(found, wanted, strict=True):
        assert abs(expected["loss"]) > 5 * ROUNDING
        assert line == pytest.approx(expected, rel=2e-3, abs=ROUNDING)


# Each process tells what it opens to write; checkpoints, of which all write a part, are left out.
OPENED = """
import sys
def tell(event, args):
    if event == "open" and set(args[1] or "") & set("wax+"):
        if str(args[0]).startswith({workdir!r}) and not str(args[0]).startswith({checkpoints!r}):
            print("opened", args[0])
sys.addaudithook(tell)
"""


def assert_written_once(ended: list[tuple[int, str, str]], workdir: Path) -> None:
    """Every process ended well, and the first has written and told."""
    once = [True] + [False] * (len(ended) - 1)
    assert [code for code, _, _ in ended] == [0] * len(ended), ended
    assert ["checkpoint" in output for _, output, _ in ended] == once
    for name in ("metrics.jsonl", "tensorboard/", "images/"):
        assert [f"opened {workdir / name}" in output for _, output, _ in ended] == once


def test_several_processes_have_the_losses_of_one(alone, tmp_path):
    workdir = tmp_path / "run"
    body = OPENED.format(workdir=str(workdir), checkpoints=str(workdir / "checkpoints"))
    config = small_run.config_file(tmp_path / "config.py", body, **SETTINGS, data__cache=str(tmp_path / "cache"))
    assert_written_once(finish(start(config, workdir, 4), tmp_path), workdir)
    assert_same_losses(workdir, alone[1])
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["3", "4"]
    assert len(list((workdir / "tensorboard").iterdir())) == 1


def test_a_signal_to_one_process_stops_all_after_the_same_step_and_the_command_goes_on(alone, tmp_path):
    """Rolled out and scored in parts, besides: the losses are still those of one process that takes all at once."""
    workdir = tmp_path / "run"
    body = OPENED.format(workdir=str(workdir), checkpoints=str(workdir / "checkpoints"))
    body += small_run.signal_after(2, "SIGTERM", process=1)  # a preemption may reach one alone
    changes = {"data__cache": str(tmp_path / "cache"), "rollout__micro_batch": 8}
    config = small_run.config_file(tmp_path / "config.py", body, **SETTINGS, **changes)
    ended = finish(start(config, workdir, 2), tmp_path)
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert all("stopped at step 2 on request" in error for _, _, error in ended)
    ended = finish(start(config, workdir, 2), tmp_path)
    assert_written_once(ended, workdir)
    for _, _, error in ended:
        assert f"resuming from step 2 of {workdir / 'checkpoints'}" in error
        assert re.findall(r"train: step (\d+)/4", error) == ["3", "4"]
    assert_same_losses(workdir, alone[1])
    found, wanted = (load_file(export(run, tmp_path / name)) for name, run in (("2", workdir), ("1", alone[1])))
    assert found.keys() == wanted.keys()
    learned = [name for name in wanted if "lora_B" in name]  # which starts at zero
    difference, size = (
        np.sqrt(sum(np.square(x[name]).sum() for name in learned))
        for x in ({name: found[name] - wanted[name] for name in learned}, wanted)
    )
    assert difference < 1e-2 * size


@pytest.mark.parametrize(("count", "victim", "then"), [(2, 1, 1), (4, 0, 2)])
def test_when_a_process_is_killed_the_others_say_so_and_another_number_can_go_on(alone, tmp_path, count, victim, then):
    """Process 0 is also the one at which the others meet."""
    workdir = tmp_path / "run"
    settings = SETTINGS | {"data__cache": str(tmp_path / "cache")}
    body = small_run.signal_after(3, "SIGKILL", workdir / "checkpoints" / "2", victim)
    config = small_run.config_file(tmp_path / "config.py", body, **settings)
    ended = finish(start(config, workdir, count), tmp_path)
    assert ended.pop(victim)[0] == -signal.SIGKILL
    for code, _, error in ended:
        if victim == 0 and code == -signal.SIGABRT:  # JAX ends the others too, and may be the first to do so
            assert "another task died" in error
            continue
        assert code == 1
        assert "another process is gone" in error
        assert "Traceback" not in error
    config = small_run.config_file(tmp_path / "again.py", **settings)
    ended = finish(start(config, workdir, then), tmp_path)
    assert [code for code, _, _ in ended] == [0] * then, ended
    for _, _, error in ended:
        assert f"resuming from step 2 of {workdir / 'checkpoints'}" in error
        assert re.findall(r"train: step (\d+)/4", error) == ["3", "4"]
    assert_same_losses(workdir, alone[1])


# The judge of one process is not to be had; the configuration file is run more than once.
FAILURE = """
import sys
from rcgrpo_jax.rewards.colour import Colour
def fail(self, inputs):
    raise ConnectionError("the judge hung up")
if "--process_id=1" in sys.argv:
    Colour.__call__ = fail
"""


def test_a_reward_that_fails_on_one_process_ends_all_with_its_cause(tmp_path):
    config = small_run.config_file(tmp_path / "config.py", FAILURE, data__cache=str(tmp_path / "cache"), **SETTINGS)
    ended = finish(start(config, tmp_path / "run", 2), tmp_path)
    cause = "reward 'colour' failed: ConnectionError: the judge hung up"
    for (code, _, error), first in zip(ended, ("process 1 failed, so this one stops: ", "process 1: "), strict=True):
        assert code == 1
        assert f"rcgrpo train: error: {first}{cause}" in error
        assert "Traceback" not in error
    assert not (tmp_path / "run" / "checkpoints").exists()


# The pictures of a supervised run take longer to compile than its update.
NO_PICTURES = """
from rcgrpo_jax.editor import to_unit
from rcgrpo_jax.training.stages import FlowStage
FlowStage.picture = lambda self, trained, frozen, example: to_unit(example.source)
"""


def test_supervised_training_on_two_processes_is_that_of_one(tmp_path):
    shallow = {"vae": VAEConfig(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)}
    before = random_folder.build(tmp_path / "before", configs=small_run.TINY | shallow)
    config = pretrain_config.default_config()
    config.stage = "flow"  # which trains weights that are spread over the devices of both
    config.model.update(path=str(before), dtype="float32", max_text_tokens=24, remat="none")
    config.data.update(path="scenes:train:16", size=(32, 32))
    config.batch.update(size=16, micro_batch=8)
    config.train.update(num_steps=3, save_every=2, image_every=3)
    config.mesh.fsdp = 2
    file = small_run.config_file(tmp_path / "config.py", NO_PICTURES, config)

    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled")}
    one, two = tmp_path / "one", tmp_path / "two"
    for count, workdir in ((1, one), (2, two)):
        ended = finish(start(file, workdir, count, "pretrain", **cache), tmp_path)
        assert [code for code, _, _ in ended] == [0] * count, ended
        assert [f"{workdir / 'model'}" in output for _, output, _ in ended] == [True] + [False] * (count - 1)
        assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["2", "3"]
        assert len(list((workdir / "tensorboard").iterdir())) == 1

    found, wanted = (small_run.metrics_without_times(path) for path in (two, one))
    assert [line["step"] for line in found] == [1, 2, 3]
    for line, expected in zip(found, wanted, strict=True):
        assert line == pytest.approx(expected, rel=1e-4)
    first, found, wanted = (small_run.tensors(path) for path in (before, two / "model", one / "model"))
    assert found.keys() == wanted.keys() == first.keys()
    difference, change = (
        np.sqrt(sum(np.square(x - other[name]).sum() for name, x in wanted.items())) for other in (found, first)
    )
    assert difference < 1e-3 * change


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
        ({}, {name: value for name, value in SLURM.items() if "STEP" not in name}, []),
    ],
    ids=["alone", "flags", "variables", "flags-first", "slurm", "one-task", "batch-script"],
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
        check_mesh(small_run.make_config(), mesh, small_run.TINY["transformer"])


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
    with pytest.raises(KeyError), distributed.together():
        raise KeyError("own")
    with distributed.together():
        pass


def test_alone_all_rows_are_ones_own():
    assert distributed.own_rows(6) == distributed.own_share(6) == range(6)
    assert not distributed.anyone(False)
    assert distributed.anyone(True)
    np.testing.assert_array_equal(distributed.total(np.array([1, 2])), [1, 2])
