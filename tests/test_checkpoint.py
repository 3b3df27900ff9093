"""A checkpoint comes back bit for bit, or the user is told why not."""

import logging
import math
import os
import resource
import signal
import subprocess
import sys
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rcgrpo_jax.errors import UserError, mark_everywhere
from rcgrpo_jax.orbax import ocp
from rcgrpo_jax.runs.checkpoint import Checkpointer
from rcgrpo_jax.runs.differences import check_same_config, config_differences

CONFIG = {"explore": {"alpha_edit": 0.3, "steps": (1, 2)}, "seed": 0}


@flax.struct.dataclass
class State:
    lora: Any
    optimizer: Any
    ema: Any
    key: Any
    step: Any


def make_state(step: int = 0, rank: int = 4, size: int = 16) -> State:
    a, b = jax.random.split(jax.random.key(step))
    lora = {
        "blocks": {"lora_A": jax.random.normal(a, (8, rank, size)), "lora_B": jax.random.normal(b, (8, size, rank))}
    }
    return State(
        lora=lora,
        optimizer=optax.adamw(1e-3).init(lora),
        ema=jax.tree.map(lambda x: x.astype(jnp.bfloat16), lora),
        key={"data": jax.random.split(a, 8), "policy": jax.random.key(step, impl="rbg")},
        step=jnp.int32(step),
    )


def nbytes(state: State) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(state))


def assert_bit_equal(found, wanted):
    def data(x):
        return np.asarray(jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x)

    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        assert x.dtype == y.dtype, path
        assert data(x).tobytes() == data(y).tobytes(), path


@pytest.fixture
def checkpointer(tmp_path):
    with Checkpointer(tmp_path / "checkpoints", save_every=1, keep=3) as opened:
        yield opened


def save(checkpointer, step, state=None):
    assert checkpointer.save(step, make_state(step) if state is None else state, CONFIG)
    checkpointer.wait()


def test_every_dtype_comes_back_bit_for_bit(checkpointer):
    state = make_state(7)
    odd = jnp.array([np.nan, -0.0, np.inf, 1e-45], jnp.float32)  # the bits that arithmetic would lose
    state = state.replace(
        ema={**state.ema, "odd": odd, "flag": jnp.array([True, False]), "half": odd.astype(jnp.float16)}
    )
    save(checkpointer, 7, state)
    assert_bit_equal(checkpointer.restore(jax.eval_shape(lambda: state)), state)


def test_restored_keys_draw_the_same_numbers(checkpointer):
    state = make_state(3)
    save(checkpointer, 3, state)
    restored = checkpointer.restore(jax.eval_shape(lambda: state))
    assert jax.random.key_impl(restored.key["policy"]) == jax.random.key_impl(state.key["policy"])
    for name in ("data", "policy"):
        draw = jax.vmap(jax.random.normal) if name == "data" else jax.random.normal
        np.testing.assert_array_equal(draw(restored.key[name]), draw(state.key[name]))


def make_mesh(*shape: int) -> Mesh:
    devices = jax.devices()[: math.prod(shape)]
    return jax.make_mesh(shape, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=devices)


def placed(x: jax.Array, mesh: Mesh, axis: str | None) -> NamedSharding:
    """A leading axis of 8 over a mesh axis; replicated without one."""
    return NamedSharding(mesh, P(axis) if x.ndim and x.shape[0] == 8 else P())


@pytest.mark.parametrize(
    ("shape", "axis", "slice_bytes"),
    [((1, 1), None, 2**20), ((8, 1), None, 2**20), ((8, 1), None, 1), ((1, 8), "fsdp", 2**20)],
    ids=["one device", "replicated", "in slices", "spread"],
)
def test_arrays_may_be_donated_while_they_are_being_saved(checkpointer, monkeypatch, shape, axis, slice_bytes):
    """Orbax writes from the memory of CPU arrays, which XLA then must not give to the update that donates them."""
    monkeypatch.setattr("rcgrpo_jax.orbax._SLICE_BYTES", slice_bytes)
    mesh = make_mesh(*shape)
    state = jax.tree.map(lambda x: jax.device_put(x, placed(x, mesh, axis)), make_state(1, size=4096))
    wanted = jax.tree.map(jnp.copy, state)
    overwrite = jax.jit(lambda lora: jax.tree.map(lambda x: x * 0 - 1, lora), donate_argnums=0)
    overwrite = overwrite.lower(state.lora).compile()  # now: it takes longer than the save
    assert checkpointer.save(1, state, CONFIG)
    jax.block_until_ready(overwrite(state.lora))
    checkpointer.wait()
    assert_bit_equal(checkpointer.restore(jax.eval_shape(lambda: wanted)), wanted)


def test_small_replicated_arrays_are_saved_without_a_program_for_each_replica(checkpointer, caplog):
    state = jax.tree.map(lambda x: jax.device_put(x, placed(x, make_mesh(8, 1), None)), make_state(1, size=24))
    caplog.set_level(logging.WARNING, "jax")
    with jax.log_compiles():
        save(checkpointer, 1, state)
    assert [text for text in caplog.messages if text.startswith("Compiling jit(_checksum)")]
    assert not [text for text in caplog.messages if text.startswith("Compiling jit(slice)")]


def test_a_state_comes_back_on_the_shardings_asked_for(checkpointer):
    state = make_state(1)
    saved = jax.tree.map(lambda x: jax.device_put(x, placed(x, make_mesh(1, 8), "fsdp")), state)
    save(checkpointer, 1, saved)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed(x, make_mesh(4, 2), "data")),
        jax.eval_shape(lambda: state),
    )
    restored = checkpointer.restore(abstract)
    assert_bit_equal(restored, state)
    for x, like in zip(jax.tree.leaves(restored), jax.tree.leaves(abstract), strict=True):
        assert x.sharding == like.sharding


def test_saves_when_due_or_forced_and_keeps_the_newest(tmp_path):
    with Checkpointer(tmp_path, save_every=2, keep=2) as checkpointer:
        assert checkpointer.latest_step() is None
        started = [checkpointer.save(step, make_state(step), CONFIG) for step in range(1, 8)]
        assert started == [False, True, False, True, False, True, False]
        assert checkpointer.save(7, make_state(7), CONFIG, force=True)
        assert not checkpointer.save(7, make_state(7), CONFIG, force=True)
        checkpointer.wait()
        assert checkpointer.steps() == [6, 7]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["6", "7"]
        assert_bit_equal(checkpointer.restore(make_state(), step=6), make_state(6))
        assert_bit_equal(checkpointer.restore(make_state()), make_state(7))


def test_reading_leaves_the_disk_as_it_was(tmp_path):
    with Checkpointer(tmp_path / "absent", save_every=1, keep=1) as reader:
        assert reader.latest_step() is None
        with pytest.raises(UserError, match=r"absent: no checkpoint; it has none"):
            reader.restore(make_state())
        reader.wait()
    assert not list(tmp_path.iterdir())

    with Checkpointer(tmp_path, save_every=1, keep=5) as writer:
        save(writer, 1)
        save(writer, 2)
    half_written = tmp_path / "3.orbax-checkpoint-tmp"  # another process may be writing it
    half_written.mkdir()
    with Checkpointer(tmp_path, save_every=1, keep=1) as reader:
        assert_bit_equal(reader.restore(make_state(), step=1), make_state(1))
        with pytest.raises(UserError, match="no checkpoint of step 3; it has steps 1, 2"):
            reader.saved_config(3)
    assert half_written.exists()
    assert reader.steps() == [1, 2]


DIE = """
import os, signal, sys
from pathlib import Path
import jax
sys.path.insert(0, sys.argv[3])
from test_checkpoint import CONFIG, make_state
from rcgrpo_jax.runs import checkpoint
from rcgrpo_jax.runs.checkpoint import Checkpointer

directory, moment = Path(sys.argv[1]), sys.argv[2]
size = 1 << 15 if moment == "write" else 16
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
checkpointer = Checkpointer(directory, save_every=1, keep=3)
checkpointer.save(1, make_state(1), CONFIG)
checkpointer.wait()
if moment == "commit":
    rename = os.rename
    os.rename = lambda src, dst, **kw: die() if Path(dst) == directory / "2" else rename(src, dst, **kw)
checkpointer.save(2, make_state(2, size=size), CONFIG)
if moment == "write":
    while not any(path.is_file() and path.stat().st_size > 1 << 16 for path in directory.glob("2*/**/*")):
        pass
    die()
checkpointer.wait()
die()
"""


@pytest.mark.parametrize(
    "moment", ["commit", *(pytest.param(moment, marks=pytest.mark.slow) for moment in ("write", "after"))]
)
def test_a_killed_process_leaves_whole_checkpoints_only(tmp_path, moment):
    child = subprocess.run([sys.executable, "-c", DIE, tmp_path, moment, os.path.dirname(__file__)], timeout=120)
    assert child.returncode == -signal.SIGKILL
    with Checkpointer(tmp_path, save_every=1, keep=3) as checkpointer:
        if moment == "commit":
            assert (tmp_path / "2.orbax-checkpoint-tmp").exists()
            assert checkpointer.latest_step() == 1
        if moment == "after":
            assert checkpointer.latest_step() == 2
        assert_bit_equal(checkpointer.restore(make_state(), step=1), make_state(1))
        if checkpointer.latest_step() == 2:
            size = 1 << 15 if moment == "write" else 16
            assert_bit_equal(checkpointer.restore(make_state(size=size)), make_state(2, size=size))
        save(checkpointer, 3)
        assert not list(tmp_path.glob("*tmp*"))
        assert_bit_equal(checkpointer.restore(make_state()), make_state(3))


def test_a_full_disk_is_seen_before_anything_is_written(checkpointer, monkeypatch):
    save(checkpointer, 1)
    free = nbytes(make_state(2)) - 1
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": free}))
    with pytest.raises(UserError, match=f"step 2 needs {free + 1} bytes, {free} are free") as error:
        checkpointer.save(2, make_state(2), CONFIG)
    assert str(checkpointer.directory) in error.value.problem
    assert "resumes from step 1" in error.value.remedy
    assert [path.name for path in checkpointer.directory.iterdir()] == ["1"]


@pytest.mark.parametrize("limit", ["file size", "tmpfs"])
def test_a_disk_that_fills_up_during_the_save(tmp_path, monkeypatch, caplog, limit):
    """The error comes from the real write: a limit on the size of a file, and a small disk where we may mount one."""
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1 << 40}))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit == "tmpfs":
        mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path], capture_output=True)
        if mount.returncode:
            pytest.skip("may not mount a tmpfs")
    large = make_state(2, size=1 << 14)
    try:
        checkpointer = Checkpointer(tmp_path, save_every=1, keep=3)
        save(checkpointer, 1)
        if limit == "file size":
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
        with pytest.raises(UserError, match=f"step 2 needs {nbytes(large)} bytes, {1 << 40} are free") as error:
            save(checkpointer, 2, large)
        assert str(tmp_path) in error.value.problem
        assert {"tmpfs": "No space left", "file size": "File too large"}[limit] in error.value.problem
        assert not [record for record in caplog.records if record.exc_info]  # one error for the user, not one a thread
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert checkpointer.steps() == [1]
        assert_bit_equal(checkpointer.restore(make_state()), make_state(1))
        checkpointer.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        if limit == "tmpfs":
            subprocess.run(["umount", "-l", tmp_path], check=True)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda s: make_state(rank=2), r"lora.blocks.lora_A is float32\[8, 4, 16\] .*, float32\[8, 2, 16\] in this"),
        (lambda s: s.replace(ema=None), r"ema.blocks.lora_A is bfloat16\[8, 4, 16\] in the checkpoint, absent"),
        (lambda s: s.replace(ema=s.lora), r"ema.blocks.lora_A is bfloat16\[8, 4, 16\] .*, float32\[8, 4, 16\]"),
        (lambda s: s.replace(step={"new": s.step}), r"step.new is absent in the checkpoint, int32\[\]"),
        (lambda s: s.replace(optimizer=optax.sgd(1e-3, momentum=0.9).init(s.lora)), r"optimizer\.0\..* is absent"),
        (lambda s: s.replace(key={**s.key, "policy": jax.random.key(0)}), r"key.policy is uint32\[4\] .*, uint32\[2\]"),
    ],
)  # fmt: skip
def test_a_state_of_another_tree_is_refused_by_name(checkpointer, change, problem):
    save(checkpointer, 1)
    with pytest.raises(UserError, match=problem) as error:
        checkpointer.restore(jax.eval_shape(lambda: change(make_state())))
    assert error.value.problem.startswith(str(checkpointer.directory / "1"))
    assert "\n" not in error.value.problem


def _files(directory):
    return [path for path in directory.rglob("*") if path.is_file()]


def _largest(directory):
    return max(_files(directory), key=lambda path: path.stat().st_size)


def _flip_bytes(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 64] = bytes(64)
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: [path.unlink() for path in _files(d)],
        lambda d: (d / "_CHECKPOINT_METADATA").unlink(),
        lambda d: (d / "state" / "_METADATA").unlink(),
        lambda d: (d / "state" / "manifest.ocdbt").unlink(),
        lambda d: _largest(d).unlink(),
        lambda d: os.truncate(_largest(d), 1000),
        lambda d: _flip_bytes(_largest(d)),
    ],
    ids=["empty", "no config", "no tree", "no manifest", "no data", "short data", "flipped bytes"],
)
def test_a_damaged_checkpoint_is_refused(checkpointer, damage):
    state = {"lora": jax.random.bits(jax.random.key(0), (1 << 14,))}  # stored raw: any other bytes would decode too
    save(checkpointer, 1, state)
    save(checkpointer, 2, state)
    damage(checkpointer.directory / "2")
    with pytest.raises(UserError, match="2: the checkpoint cannot be read: ") as error:
        checkpointer.restore(state)
    assert "go on from step 1" in error.value.remedy
    assert "\n" not in error.value.problem
    assert_bit_equal(checkpointer.restore(state, step=1), state)


@pytest.mark.parametrize(
    "error",
    [
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"),
        jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: Barrier timed out"),
        RuntimeError("Unable to initialize backend 'tpu': ABORTED: The TPU is already in use"),
    ],
    ids=str,
)
def test_a_device_without_room_or_taken_and_a_lost_process_are_no_damage(checkpointer, monkeypatch, error):
    save(checkpointer, 1)

    def load(*args, **kwargs):
        raise error

    monkeypatch.setattr(ocp, "load", load)
    with pytest.raises(type(error), match=str(error).split(":")[0]):
        checkpointer.restore(make_state())


@pytest.mark.parametrize("agreed", [True, False])
def test_of_several_processes_a_save_is_finished_if_all_end_with_the_same_error(tmp_path, monkeypatch, agreed):
    closed = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(Checkpointer, "close", lambda self: closed.append(self))
    with pytest.raises(KeyError), Checkpointer(tmp_path, save_every=1, keep=1) as opened:
        raise mark_everywhere(KeyError("judge")) if agreed else KeyError("gone")
    assert closed == [opened] * agreed


def test_the_configuration_is_saved_with_the_state(checkpointer):
    save(checkpointer, 1)
    assert checkpointer.saved_config() == {"explore": {"alpha_edit": 0.3, "steps": [1, 2]}, "seed": 0}
    check_same_config(checkpointer.saved_config(), CONFIG)


@pytest.mark.parametrize("wrap", [lambda config: config, lambda config: {"run": config}], ids=["run", "evaluation"])
def test_a_configuration_of_before_a_field_has_what_runs_did_then(wrap):
    before, now = wrap({"optimizer": {"b1": 0.9}}), wrap({"optimizer": {"b1": 0.9, "eps": 1e-8}})
    check_same_config(before, now)
    other = wrap({"optimizer": {"b1": 0.9, "eps": 1e-6}})
    (line,) = config_differences(before, other)
    assert line.endswith("optimizer.eps: checkpoint 1e-08, config 1e-06")


def test_every_differing_field_is_named():
    saved = {"explore": {"alpha_edit": 0.3, "kind": "region"}, "train": {"num_steps": 4}, "trainer": 1, "old": None}
    current = {"explore": {"alpha_edit": 0.5, "kind": "region"}, "train": {"num_steps": 8}, "trainer": 2, "new": True}
    lines = [
        "explore.alpha_edit: checkpoint 0.3, config 0.5",
        "new: checkpoint absent, config true",
        "old: checkpoint null, config absent",
        "trainer: checkpoint 1, config 2",
    ]
    assert config_differences(saved, current, ignore={"train"}) == lines
    with pytest.raises(UserError) as error:
        check_same_config(saved, current, ignore={"train"})
    assert all(line in error.value.problem for line in lines)
    assert "--workdir" in error.value.remedy
    check_same_config(saved, current, ignore={"train", "trainer", "explore.alpha_edit", "old", "new"})


def test_a_field_that_came_later_counts_as_what_runs_did_before():
    saved = {"data": {"polarity": "white"}}
    new, other = ({"data": {"polarity": "white", "mask_value": value}} for value in ("", "15"))
    check_same_config(saved, new)
    assert config_differences(saved, other) == ['data.mask_value: checkpoint "", config "15"']
    assert config_differences({"run": saved}, {"run": new}) == []
