"""Several processes are one run: the same losses, one checkpoint, one set of records, and none waits for the dead."""

import contextlib
import os
import re
import signal
import socket
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest
import small_run
from safetensors.numpy import load_file

from rcgrpo_jax.editors.open import open_model
from rcgrpo_jax.encoding.encode import encode
from rcgrpo_jax.errors import STOPPED
from rcgrpo_jax.experiments.export import export
from rcgrpo_jax.models.config import VAEConfig
from rcgrpo_jax.parallel.mesh import make_mesh
from rcgrpo_jax.rl.trainer import train
from rcgrpo_jax.sft import config as sft_config
from rcgrpo_jax.weights import random_folder
from rcgrpo_jax.weights.convert import convert

# Metrics are those of a step's last update; of the first, the loss is zero up to rounding.
WHOLE = {
    "rollout__prompts": 4, "mesh__fsdp": 2, "objective__updates": 2, "optimizer__learning_rate": 1e-3,
    "train__num_steps": 4, "train__save_every": 1,
}  # fmt: skip
SETTINGS = WHOLE | {"rollout__micro_batch": 8}  # of several processes, which roll out and score in parts
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


def start(
    config: Path, workdir: Path, count: int, command: str = "train", last: tuple[str, ...] = (), **variables: str
) -> list[subprocess.Popen]:
    """`rcgrpo train`, or another command, on `count` processes that share eight devices; `last` for the last alone."""
    port, log = free_port(), config.parent
    environment = small_run.environment() | {
        "XLA_FLAGS": re.sub("device_count=8", f"device_count={8 // count}", os.environ["XLA_FLAGS"]),
    }
    return [
        subprocess.Popen(
            small_run.command(
                *command.split(), f"--config={config}", f"--workdir={workdir}", f"--coordinator=127.0.0.1:{port}",
                f"--num_processes={count}", f"--process_id={index}", *(last if index == count - 1 else ()),
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
def alone(tmp_path_factory) -> Path:
    """The directory of the run on one process with eight devices, which takes all candidates at once."""
    workdir = tmp_path_factory.mktemp("alone")
    train(small_run.make_config(**WHOLE), workdir)
    return workdir


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


def assert_same_adapter(workdir: Path, alone: Path, out: Path) -> None:
    found, wanted = (load_file(export(run, out / name)) for name, run in (("found", workdir), ("wanted", alone)))
    assert found.keys() == wanted.keys()
    learned = [name for name in wanted if "lora_B" in name]  # which starts at zero
    difference, size = (
        np.sqrt(sum(np.square(x[name].astype(np.float32)).sum() for name in learned))
        for x in ({name: found[name] - wanted[name] for name in learned}, wanted)
    )
    assert difference < 1e-2 * size


@pytest.mark.slow
def test_two_processes_are_one_run(alone, tmp_path):
    workdir = tmp_path / "run"
    body = OPENED.format(workdir=str(workdir), checkpoints=str(workdir / "checkpoints"))
    config = small_run.config_file(tmp_path / "config.py", body, **SETTINGS)  # the run alone has encoded the data
    assert_written_once(finish(start(config, workdir, 2), tmp_path), workdir)
    assert_same_losses(workdir, alone)
    assert_same_adapter(workdir, alone, tmp_path)


@pytest.mark.slow
def test_two_processes_judge_the_samples_as_one_does_and_end_together(tmp_path):
    """Three samples do not divide over the devices; patience ends both processes after the same step."""
    judging = SETTINGS | {
        "train__samples": "scenes:heldout:3", "train__sample_every": 1,
        "train__best": "samples/acd", "train__patience": 1,
        "optimizer__learning_rate": 1e-6, "data__cache": str(tmp_path / "cache"),
    }  # fmt: skip
    alone, workdir = tmp_path / "alone", tmp_path / "run"
    train(small_run.make_config(**judging), alone)
    config = small_run.config_file(tmp_path / "config.py", **judging)
    ended = finish(start(config, workdir, 2), tmp_path)
    assert [code for code, _, _ in ended] == [0, 0], ended
    found, wanted = (small_run.metrics_without_times(path) for path in (workdir, alone))
    assert len(found) > 1
    for line, expected in zip(found[:2], wanted[:2], strict=True):
        names = [name for name in expected if name.startswith("samples")]
        assert len(names) == 8
        for name in names:
            assert line[name] == pytest.approx(expected[name], rel=2e-3)
    assert sorted(path.name for path in (workdir / "images").glob("samples*"))[0] == "samples_000000.png"
    assert (workdir / "checkpoints" / "best.json").is_file()


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_after_the_same_step_and_the_command_goes_on(alone, tmp_path):
    workdir = tmp_path / "run"
    body = OPENED.format(workdir=str(workdir), checkpoints=str(workdir / "checkpoints"))
    body += small_run.signal_after(2, "SIGTERM", process=1)  # a preemption may reach one alone
    config = small_run.config_file(tmp_path / "config.py", body, **SETTINGS)
    ended = finish(start(config, workdir, 2), tmp_path)
    assert [code for code, _, _ in ended] == [STOPPED, STOPPED], ended
    assert all("stopped at step 2 on request" in error for _, _, error in ended)
    ended = finish(start(config, workdir, 2), tmp_path)
    assert_written_once(ended, workdir)
    for _, _, error in ended:
        assert f"resuming from step 2 of {workdir / 'checkpoints'}" in error
        assert re.findall(r"train: step (\d+)/4", error) == ["3", "4"]
    assert_same_losses(workdir, alone)
    assert_same_adapter(workdir, alone, tmp_path)


@pytest.mark.slow
def test_when_a_process_is_killed_the_others_say_so_and_another_number_goes_on(alone, tmp_path):
    """Four, two, then four again are one run. Process 0 is also the one at which the others meet."""
    workdir = tmp_path / "run"
    for count, victim, step in ((4, 0, 2), (2, 1, 3)):
        body = small_run.signal_after(step, "SIGKILL", workdir / "checkpoints" / str(step - 1), victim)
        config = small_run.config_file(tmp_path / f"{count}.py", body, **SETTINGS)
        ended = finish(start(config, workdir, count), tmp_path)
        assert ended.pop(victim)[0] == -signal.SIGKILL
        for code, _, error in ended:
            if victim == 0 and code == -signal.SIGABRT:  # JAX ends the others too, and may be the first to do so
                assert "another task died" in error
                continue
            assert code == 1
            assert "another process is gone" in error
            assert "Traceback" not in error
    body = OPENED.format(workdir=str(workdir), checkpoints=str(workdir / "checkpoints"))
    config = small_run.config_file(tmp_path / "again.py", body, **SETTINGS)
    ended = finish(start(config, workdir, 4), tmp_path)
    assert_written_once(ended, workdir)
    for _, _, error in ended:
        assert f"resuming from step 2 of {workdir / 'checkpoints'}" in error
        assert re.findall(r"train: step (\d+)/4", error) == ["3", "4"]
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["3", "4"]
    assert len(list((workdir / "tensorboard").iterdir())) == 3  # one a start
    assert_same_losses(workdir, alone)


# The judge of one process is not to be had; the configuration file is run more than once.
FAILURE = """
import sys
from rcgrpo_jax.rewards.colour import Colour
def fail(self, inputs):
    raise ConnectionError("the judge hung up")
if "--process_id=1" in sys.argv:
    Colour.__call__ = fail
"""


@pytest.mark.slow
def test_a_reward_that_fails_on_one_process_ends_all_with_its_cause(tmp_path):
    """Of a converted model, which processes read together, also where the cache lacks an example of one of them."""
    convert(str(small_run.model_folder()), tmp_path / "model")
    settings = SETTINGS | {"model__path": str(tmp_path / "model"), "data__cache": str(tmp_path / "cache")}
    options, one_device = small_run.make_options(**settings), make_mesh({}, jax.devices()[:1])
    encode(options.data, options.model, open_model(tmp_path / "model"), tmp_path, one_device, 4, 0)
    next((tmp_path / "cache").iterdir()).unlink()
    config = small_run.config_file(tmp_path / "config.py", FAILURE, **settings)
    ended = finish(start(config, tmp_path / "run", 2), tmp_path)
    cause = "reward 'colour' failed: ConnectionError: the judge hung up"
    for (code, _, error), first in zip(ended, ("process 1 failed, so this one stops: ", "process 1: "), strict=True):
        assert code == 1
        assert f"rcgrpo train: error: {first}{cause}" in error
        assert "Traceback" not in error
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
def test_another_configuration_on_one_process_is_refused(tmp_path):
    config = small_run.config_file(tmp_path / "config.py", **SETTINGS)
    ended = finish(start(config, tmp_path / "run", 2, last=("--config.seed=1",)), tmp_path)
    for code, _, error in ended:
        assert code == 1
        assert "The configuration is not that of process 0: seed: process 0 0, config 1." in error
        assert "Traceback" not in error


# The pictures of a supervised run take longer to compile than its update.
NO_PICTURES = """
from rcgrpo_jax.editors.model import to_unit
from rcgrpo_jax.sft.stages import FlowStage
FlowStage.picture = lambda self, trained, frozen, example: to_unit(example.source)
"""


@pytest.mark.slow
def test_supervised_training_on_two_processes_is_that_of_one(tmp_path):
    shallow = {"vae": VAEConfig(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)}
    before = random_folder.build(tmp_path / "before", configs=small_run.TINY | shallow)
    config = sft_config.default_config()
    config.stage = "flow"  # which trains weights that are spread over the devices of both
    config.model.update(path=str(before), dtype="float32", max_text_tokens=24, remat="none")
    config.data.update(path="scenes:train:16", size=(32, 32))
    config.batch.update(size=16, micro_batch=8)
    config.train.update(num_steps=2, save_every=1, image_every=2)
    config.mesh.fsdp = 2
    file = small_run.config_file(tmp_path / "config.py", NO_PICTURES, config)

    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled")}
    one, two = tmp_path / "one", tmp_path / "two"
    for count, workdir in ((1, one), (2, two)):
        ended = finish(start(file, workdir, count, "sft", **cache), tmp_path)
        assert [code for code, _, _ in ended] == [0] * count, ended
        assert [f"{workdir / 'model'}" in output for _, output, _ in ended] == [True] + [False] * (count - 1)
        assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["1", "2"]
        assert len(list((workdir / "tensorboard").iterdir())) == 1

    found, wanted = (small_run.metrics_without_times(path) for path in (two, one))
    assert [line["step"] for line in found] == [1, 2]
    for line, expected in zip(found, wanted, strict=True):
        assert line == pytest.approx(expected, rel=1e-4)
    first, found, wanted = (small_run.tensors(path) for path in (before, two / "model", one / "model"))
    assert found.keys() == wanted.keys() == first.keys()
    difference, change = (
        np.sqrt(sum(np.square(x - other[name]).sum() for name, x in wanted.items())) for other in (found, first)
    )
    assert difference < 1e-3 * change
