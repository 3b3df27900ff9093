"""A candidate whose states are not finite costs its group, and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_run

from rcgrpo_jax import rewards
from rcgrpo_jax.encoding.batches import EditBatch
from rcgrpo_jax.rewards import RewardInputs
from rcgrpo_jax.rl.policy.base import Rollout
from rcgrpo_jax.rl.step_metrics import drift_metrics
from rcgrpo_jax.rl.trainer import Trainer


def diverged(rollout: Rollout, value: float) -> Rollout:
    """The same with one candidate of the first group lost from the second step on."""
    return rollout._replace(states=rollout.states.at[0, 2, 2:].set(value), acd=rollout.acd.at[0, 2].set(jnp.nan))


def take_step(trainer: Trainer, batch: EditBatch):
    with jax.set_mesh(trainer.programs.mesh):
        return trainer.step(small_run.make_state(trainer), trainer.prepare(batch), draw=True)[1:3]


@pytest.mark.slow
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_step_goes_on_without_the_group(monkeypatch, value):
    """Also under a judge that gives any picture a number."""
    trainer = small_run.make_trainer()
    programs, rollout, batch = trainer.programs, trainer.programs.rollout, small_run.make_batch(trainer)
    monkeypatch.setattr(programs, "rollout", lambda *given: diverged(rollout(*given), value))
    scores = np.random.default_rng(0).standard_normal((2, 4)).astype(np.float32)
    monkeypatch.setattr(trainer, "rewards", {"judge": rewards.as_reward(lambda inputs: scores)})
    monkeypatch.setattr(trainer, "weights", {"judge": 1.0})
    metrics, drawn = take_step(trainer, batch)
    assert metrics["groups/dropped"] == 1
    assert metrics["reward/judge"] == pytest.approx(np.delete(scores, 2).mean())
    assert metrics["reward_failed/judge"] == 1 / 8
    assert [name for name, x in metrics.items() if not np.isfinite(x)] == []
    assert metrics["grad_norm"] > 0
    assert (drawn.grid[0].candidates[2] == (255, 0, 255)).all()  # magenta
    assert "nan" in drawn.grid[0].labels[2]


@pytest.mark.slow
def test_the_update_is_that_of_a_group_without_signal():
    trainer = small_run.make_trainer()
    programs, state = trainer.programs, small_run.make_state(trainer)
    advantages = jnp.array([[0.0, 0.0, 0.0, 0.0], [1.0, -1.0, 1.0, -1.0]])
    log_old, results = jnp.zeros(programs.policy.kept_shape()), []
    with jax.set_mesh(programs.mesh):
        prompts = programs.prompts(small_run.make_batch(trainer))
        exploration = programs.explore(jax.random.key(1), prompts, 0)
        rollout = programs.rollout(trainer.params, state.params, prompts, exploration.noise)
        for found in (rollout, diverged(rollout, jnp.nan)):
            copy = jax.tree.map(jnp.copy, state)
            given = (prompts, exploration, found, advantages, log_old, jnp.asarray(True))
            after, _, metrics = programs.update(trainer.params, copy, *given)
            results.append((after.params, after.opt_state, metrics))
    assert results[0][2]["grad_norm"] > 0
    jax.tree.map(np.testing.assert_array_equal, *results)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_how_far_backgrounds_move_is_told_of_the_other_groups(value):
    rng = np.random.default_rng(0)
    source, edited = rng.random((3, 8, 8, 3), np.float32), rng.random((3, 4, 8, 8, 3), np.float32)
    mask = np.zeros((3, 8, 8), np.float32)
    edited[1, 2, 4, 4, 0] = value
    found = drift_metrics(RewardInputs(source, edited, mask, ("",) * 3))
    whole = [0, 2]
    assert found == pytest.approx(drift_metrics(RewardInputs(source[whole], edited[whole], mask[whole], ("",) * 2)))


def test_a_picture_with_a_pixel_that_is_not_finite_has_no_score():
    edited = np.zeros((2, 3, 4, 4, 3), np.float32)
    edited[0, 1, 2, 2, 1], edited[1, 0, 0, 0, 0] = np.nan, np.inf
    judge = rewards.as_reward(lambda inputs: np.ones((2, 3), np.float32))
    inputs = RewardInputs(edited[:, 0], edited, edited[:, 0, ..., 0], ("",) * 2)
    scores = rewards.start_all({"judge": judge}, inputs).result().by_reward["judge"]
    np.testing.assert_array_equal(scores, [[1, np.nan, 1], [np.nan, 1, 1]])
    assert scores.dtype == np.float32
