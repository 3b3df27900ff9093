"""A run that was stopped, however it was stopped, ends where one that was not would have ended.

Bit for bit, in another process too, if both compile the same programs in the same way: machine, devices, XLA's options.
"""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest
import small_run

from rcgrpo_jax.errors import UserError
from rcgrpo_jax.rl.trainer import Trainer, train
from rcgrpo_jax.runs.checkpoint import Checkpointer
from rcgrpo_jax.runs.metrics import MetricsWriter
from rcgrpo_jax.runs.state import TrainState
from rcgrpo_jax.weights import random_folder

SETTINGS = {"optimizer__ema_decay": 0.9, "optimizer__learning_rate": 1e-3}


def host(state: TrainState) -> list[tuple[str, np.ndarray]]:
    """The leaves of a state with their names, random keys as their data."""
    state = state.replace(key=jax.random.key_data(state.key))
    return [(jax.tree_util.keystr(path), np.asarray(x)) for path, x in jax.tree_util.tree_leaves_with_path(state)]


def assert_bit_equal(found: TrainState, wanted: TrainState) -> None:
    for (name, x), (_, y) in zip(host(found), host(wanted), strict=True):
        assert x.dtype == y.dtype, name
        assert x.tobytes() == y.tobytes(), name


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> tuple[TrainState, Path]:
    """Four steps in one go."""
    workdir = tmp_path_factory.mktemp("straight")
    return train(small_run.make_config(**SETTINGS), workdir), workdir


@pytest.fixture(scope="module")
def half(tmp_path_factory) -> Path:
    """The workdir of a run of two steps."""
    workdir = tmp_path_factory.mktemp("half")
    train(small_run.make_config(**SETTINGS, train__num_steps=2), workdir)
    return workdir


@pytest.fixture
def interrupted(half, tmp_path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(half, tmp_path / "run"))


@pytest.fixture
def taken(monkeypatch) -> list[int]:
    """The steps that this process takes from now on: a run that starts over ends at the same bits."""
    steps, step = [], Trainer.step

    def count(self, state, *args):
        steps.append(int(state.step) + 1)
        return step(self, state, *args)

    monkeypatch.setattr(Trainer, "step", count)
    return steps


def test_two_and_two_steps_are_four(straight, interrupted, taken):
    state = train(small_run.make_config(**SETTINGS), interrupted)
    wanted, workdir = straight
    assert taken == [3, 4]
    assert_bit_equal(state, wanted)
    assert int(state.step) == 4
    metrics = small_run.metrics_without_times(interrupted)
    assert [line["step"] for line in metrics] == [1, 2, 3, 4]
    assert metrics == small_run.metrics_without_times(workdir)


def test_a_finished_run_has_nothing_to_do(straight, tmp_path, taken):
    wanted, workdir = straight
    copy = shutil.copytree(workdir, tmp_path / "run")
    assert_bit_equal(train(small_run.make_config(**SETTINGS), copy), wanted)
    assert not taken
    assert small_run.metrics_without_times(copy) == small_run.metrics_without_times(workdir)


def test_a_checkpoint_of_before_a_field_is_resumed(straight, tmp_path, monkeypatch):
    saved_config = Checkpointer.saved_config

    def of_before(self, *args):
        config = saved_config(self, *args)
        del config["optimizer"]["eps"]
        return config

    monkeypatch.setattr(Checkpointer, "saved_config", of_before)
    copy = shutil.copytree(straight[1], tmp_path / "run")
    assert_bit_equal(train(small_run.make_config(**SETTINGS), copy), straight[0])
    with pytest.raises(UserError, match=r"optimizer\.eps: checkpoint 1e-08, config 1e-06"):
        train(small_run.make_config(**SETTINGS, optimizer__eps=1e-6), copy)


@pytest.mark.slow
def test_one_device_goes_on_where_eight_stopped(straight, interrupted, taken):
    state = train(small_run.make_config(**SETTINGS), interrupted, devices=jax.devices()[:1])
    assert taken == [3, 4]
    wanted, workdir = straight
    for (name, x), (_, y) in zip(host(state), host(wanted), strict=True):
        # Adam divides by gradients that may be near zero: a few elements may differ by a whole step of 1e-3.
        assert np.linalg.norm((x - y).ravel()) <= 0.01 * np.linalg.norm(y.ravel()) + 1e-6, name
    for found, line in zip(
        small_run.metrics_without_times(interrupted), small_run.metrics_without_times(workdir), strict=True
    ):
        assert found == pytest.approx(line, rel=2e-3, abs=1e-5)


@pytest.mark.parametrize("change", [{"explore__alpha_edit": 0.5}, {"lora__rank": 2}], ids=lambda c: next(iter(c)))
def test_another_configuration_is_refused_and_nothing_is_lost(interrupted, change):
    before = {file: file.read_bytes() for file in interrupted.rglob("*") if file.is_file()}
    field = next(iter(change)).replace("__", ".")
    with pytest.raises(UserError, match=f"{field}: checkpoint") as error:
        train(small_run.make_config(**SETTINGS, **change), interrupted)
    assert error.value.exit_code == 1
    assert {file: file.read_bytes() for file in interrupted.rglob("*") if file.is_file()} == before


@pytest.mark.slow
def test_a_full_disk_keeps_the_earlier_checkpoint(interrupted, monkeypatch):
    monkeypatch.setattr("rcgrpo_jax.runs.checkpoint.Checkpointer._free_bytes", lambda self: 10)
    with pytest.raises(UserError, match="No space left on device: the checkpoint of step 4") as error:
        train(small_run.make_config(**SETTINGS), interrupted)
    assert error.value.remedy.endswith("it resumes from step 2.")
    assert [path.name for path in (interrupted / "checkpoints").iterdir()] == ["2"]


@pytest.mark.slow
def test_a_picture_that_cannot_be_written_costs_no_step(tmp_path, monkeypatch):
    def full(*_):
        raise UserError("images: no space", "Free some.")

    monkeypatch.setattr("rcgrpo_jax.runs.run.save_image", full)
    with pytest.raises(UserError, match="images: no space"):
        train(small_run.make_config(**SETTINGS, train__num_steps=2), tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["2"]


@pytest.mark.slow
def test_a_killed_process_loses_only_the_steps_after_its_checkpoint(straight, tmp_path, taken):
    workdir = tmp_path / "run"
    body = small_run.signal_after(3, "SIGKILL", workdir / "checkpoints" / "2")
    file = small_run.config_file(tmp_path / "config.py", body, **SETTINGS)
    command = small_run.command("train", f"--config={file}", f"--workdir={workdir}")
    killed = subprocess.run(command, env=small_run.environment(), capture_output=True, text=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [line["step"] for line in small_run.metrics_without_times(workdir)] == [1, 2, 3]
    state = train(small_run.make_config(**SETTINGS), workdir)
    assert taken == [3, 4]
    assert_bit_equal(state, straight[0])
    assert small_run.metrics_without_times(workdir) == small_run.metrics_without_times(straight[1])


@pytest.mark.slow
def test_a_terminated_run_saves_and_the_same_call_resumes(straight, tmp_path, taken, monkeypatch, caplog):
    """`test_distributed` has the command, on two processes."""
    config, workdir, scalars = small_run.make_config(**SETTINGS), tmp_path / "run", MetricsWriter.scalars

    def interrupt(self, step, metrics):
        scalars(self, step, metrics)
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(MetricsWriter, "scalars", interrupt)
    assert int(train(config, workdir).step) == 3
    assert "stopped at step 3 on request; the same command resumes" in caplog.text
    assert (workdir / "checkpoints" / "3").is_dir()
    state = train(config, workdir)
    assert f"resuming from step 3 of {workdir / 'checkpoints'}" in caplog.text
    assert taken == [1, 2, 3, 4]
    assert small_run.metrics_without_times(workdir) == small_run.metrics_without_times(straight[1])
    assert_bit_equal(state, straight[0])


def test_model_and_data_may_move(straight, interrupted, tmp_path, taken):
    model, data = tmp_path / "model", tmp_path / "data"
    shutil.copytree(small_run.model_folder(), model)
    shutil.copytree(small_run.data_folder(), data)
    moved = small_run.make_config(**SETTINGS, model__path=str(model), data__path=str(data))
    assert_bit_equal(train(moved, interrupted), straight[0])
    assert taken == [3, 4]


def test_another_model_is_refused(interrupted, tmp_path):
    model = random_folder.build(tmp_path / "model", seed=1, configs=small_run.TINY)
    with pytest.raises(UserError, match="model_digest: checkpoint"):
        train(small_run.make_config(**SETTINGS, model__path=str(model)), interrupted)


def test_processes_that_do_not_share_their_directory_are_told(interrupted, monkeypatch):
    monkeypatch.setattr("rcgrpo_jax.runs.run.gather", lambda found: np.append(found, 0))
    with pytest.raises(UserError, match="checkpoints of different steps, 2, 0; one directory for all was wanted"):
        train(small_run.make_config(**SETTINGS), interrupted)


def test_other_data_are_refused(interrupted, tmp_path):
    data = Path(shutil.copytree(small_run.data_folder(), tmp_path / "data"))
    lines = (data / "metadata.jsonl").read_text().splitlines()
    (data / "metadata.jsonl").write_text("\n".join(lines[:-1]))
    with pytest.raises(UserError, match="data_digest: checkpoint"):
        train(small_run.make_config(**SETTINGS, data__path=str(data)), interrupted)
