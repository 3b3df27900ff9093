"""An error that all processes raise together is marked so: none is gone, and the save under way is ended."""

from dataclasses import asdict
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_run
from flax import struct

from rcgrpo_jax.encoding import cache as pipeline
from rcgrpo_jax.errors import UserError, is_everywhere, mark_everywhere
from rcgrpo_jax.parallel.mesh import make_mesh
from rcgrpo_jax.rl import trainer as rl_trainer
from rcgrpo_jax.runs import run
from rcgrpo_jax.runs.checkpoint import Checkpointer
from rcgrpo_jax.runs.metrics import MetricsWriter
from rcgrpo_jax.sft import train as sft

OPTIONS = small_run.make_options()


def test_rewards_that_all_failed():
    trainer = object.__new__(rl_trainer.Trainer)
    trainer.unscored = rl_trainer.UNSCORED_STEPS - 1
    with pytest.raises(UserError, match="no group of the last") as lost:
        trainer._check_scored({"judge": np.full((2, 3), np.nan)}, np.full((2, 3), np.nan))
    assert is_everywhere(lost.value)


@struct.dataclass
class State:
    step: jax.Array


@pytest.mark.parametrize("fails", ["scalars", "images", "save_image", "loss"])
def test_records_that_process_0_cannot_write_and_a_lost_loss(monkeypatch, tmp_path, fails):
    def fail(*_):
        raise UserError("a record cannot be written.", "Free some space.")

    if fails == "save_image":
        monkeypatch.setattr(run, fails, fail)
    elif fails != "loss":
        monkeypatch.setattr(MetricsWriter, fails, fail)
    options = small_run.make_options(train__num_steps=1, train__image_every=1).train

    def step(state, index, draw):
        picture = np.zeros((4, 4, 3), np.uint8)
        return state.replace(step=state.step + 1), {"loss": np.nan if fails == "loss" else 0.5}, {run.GRID: picture}

    with pytest.raises(UserError) as lost, run.open_run(options, {}, tmp_path) as checkpointer:
        run.run_steps(State(jnp.int32(0)), step, options, {}, tmp_path, checkpointer, "", 1, lambda metrics: metrics)
    assert is_everywhere(lost.value)
    assert checkpointer.steps() == ([1] if fails in ("images", "save_image") else [])


def test_a_disk_that_is_full_for_all(tmp_path):
    checkpointer = Checkpointer(tmp_path, save_every=1, keep=1)
    for error in (OSError("No space left on device"), mark_everywhere(OSError("No space left on device"))):
        with pytest.raises(UserError, match="are free") as lost, checkpointer._disk_errors():
            raise error
        assert is_everywhere(lost.value) == is_everywhere(error)


def test_checkpoints_of_different_steps(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "gather", lambda _: np.array([0, 2]))
    with (
        pytest.raises(UserError, match="the processes find checkpoints") as lost,
        run.open_run(OPTIONS.train, asdict(OPTIONS), tmp_path),
    ):
        pass
    assert is_everywhere(lost.value)


def test_another_configuration(monkeypatch, tmp_path):
    other = small_run.make_config(seed=1).to_json()
    monkeypatch.setattr(run, "text_of_main", lambda _: other)
    with (
        pytest.raises(UserError, match="not that of process 0: seed") as lost,
        run.open_run(OPTIONS.train, asdict(OPTIONS), tmp_path),
    ):
        pass
    assert is_everywhere(lost.value)


def test_different_numbers_of_examples(monkeypatch, tmp_path):
    monkeypatch.setattr(pipeline.distributed, "gather", lambda _: np.array([3, 4]))
    editor = SimpleNamespace(encoding_key=())
    with pytest.raises(UserError, match="different numbers of examples, 3, 4") as lost:
        pipeline.EncodedSource([], editor, (32, 32), tmp_path)
    assert is_everywhere(lost.value)


def test_a_result_of_supervised_training_that_cannot_be_written(tmp_path):
    def save(*_):
        raise OSError("No space left on device")

    stage = SimpleNamespace(
        arrays=lambda batch: batch, save=save, workdir=tmp_path, mesh=make_mesh({}, jax.devices()[:1])
    )
    with pytest.raises(UserError, match="the result cannot be written") as lost:
        sft._save(stage, SimpleNamespace(averaged={}), [np.zeros(1)])
    assert is_everywhere(lost.value)
