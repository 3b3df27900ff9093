"""Rollouts of candidates that share their tokens outside the region."""

from __future__ import annotations

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_run
from test_config import make, problems

from rcgrpo_jax.method import sharing, surrogate
from rcgrpo_jax.rl.parts import join
from rcgrpo_jax.rl.policy.base import Rollout
from rcgrpo_jax.rl.trainer import Trainer

# Masks of few tokens of 16: the two share sixteen of thirty-two with the source image's.
SHARE = {"rollout__share": "region", "rollout__share_grow": 0, "explore__alpha_base": 0.0}
EXACT = {"explore__alpha_base": 0.0}
NFT = {"policy": "nft", "surrogate__distance": "l2", "surrogate__anchors": 4, "surrogate__steps": "early"}
BOXES = ((0, 20, 0, 20), (40, 60, 16, 32))  # 4 and 2 tokens


def masks(*boxes: tuple[int, int, int, int]) -> np.ndarray:
    mask = np.zeros((len(boxes), 64, 64), np.float32)
    for of, (top, bottom, left, right) in zip(mask, boxes, strict=True):
        of[top:bottom, left:right] = 1
    return mask


def trainer_of(mesh_shape: tuple[int, ...] = (1, 1, 1), **changes) -> Trainer:
    return small_run.make_trainer(mesh_shape, **{**SHARE, **changes})


def rolled_out(trainer: Trainer, boxes=BOXES, at_a_time: int = 4) -> tuple[Rollout, jax.Array]:
    """Groups of the first two prompts with other masks, and their perturbed tokens."""
    programs = trainer.programs
    with jax.set_mesh(programs.mesh):
        batch = small_run.make_batch(small_run.make_trainer())
        prompts = programs.prompts(batch._replace(mask=masks(*boxes)))
        exploration = programs.explore(jax.random.key(1), prompts, 0)
        adapter = small_run.make_state(trainer).params
        parts = programs.roll_out(trainer.params, adapter, prompts, exploration, at_a_time, programs.room(prompts))
        return jax.tree.map(np.asarray, join(*parts)), np.asarray(prompts.explored) > 0


@cache
def whole_group() -> tuple[Rollout, np.ndarray]:
    return rolled_out(trainer_of())


@cache
def exact() -> Rollout:
    return rolled_out(small_run.make_trainer(**EXACT))[0]


def test_candidates_have_the_background_of_the_first_and_an_edit_of_their_own():
    rollout, explored = whole_group()
    for states, region in zip(rollout.states, explored, strict=True):
        others, first = states[1:], states[:1]
        np.testing.assert_allclose(
            others[:, :, ~region], np.broadcast_to(first, others.shape)[:, :, ~region], atol=1e-6
        )
        assert (np.abs(others - first)[:, 1:, region].max((-1, -2)) > 0.1).all()
    np.testing.assert_allclose(rollout.states[:, 0], exact().states[:, 0], atol=1e-5)
    np.testing.assert_allclose(rollout.acd[:, 0], exact().acd[:, 0], rtol=1e-5)


def test_shared_rollouts_are_near_to_exact_ones():
    rollout, explored = whole_group()
    for shared, full, region in zip(rollout.states, exact().states, explored, strict=True):
        moved = full[1:, :, region] - full[:1, :, region]
        error = shared[1:, :, region] - full[1:, :, region]
        assert 0 < np.square(error).mean() < 0.02 * np.square(moved).mean()


@pytest.mark.parametrize("at_a_time", [1, 2])
def test_parts_of_a_group_are_those_of_the_whole(at_a_time):
    found, _ = rolled_out(trainer_of(), at_a_time=at_a_time)
    for wanted, array in zip(whole_group()[0], found, strict=True):
        np.testing.assert_allclose(array, wanted, atol=1e-5)


@pytest.mark.parametrize("mesh_shape", [pytest.param((8, 1, 1), marks=pytest.mark.slow), (1, 4, 2)])
def test_meshes_give_the_same_groups(mesh_shape):
    found, _ = rolled_out(trainer_of(mesh_shape))
    for wanted, array in zip(whole_group()[0], found, strict=True):
        np.testing.assert_allclose(array, wanted, atol=1e-4)


def test_masks_too_large_to_share_give_the_exact_rollout():
    full = ((0, 64, 0, 64), (0, 16, 0, 16))
    shared, _ = rolled_out(trainer_of(), full)
    wanted, _ = rolled_out(small_run.make_trainer(**EXACT), full)
    for one, other in zip(shared, wanted, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_first_steps_may_be_computed_in_full():
    found, _ = rolled_out(trainer_of(rollout__share_full_steps=2))
    np.testing.assert_allclose(found.states[:, :, :3], exact().states[:, :, :3], atol=1e-5)
    later = np.abs(found.states - exact().states)[:, 1:, 3:].max()
    assert 1e-3 < later < np.abs(whole_group()[0].states - exact().states)[:, 1:, 3:].max()


@pytest.mark.parametrize("own", [{}, NFT], ids=["neighbour", "nft"])
def test_a_training_step_with_shared_rollouts(own):
    trainer = trainer_of(**own)
    batch = small_run.make_batch(trainer)._replace(mask=masks(*BOXES))
    state = small_run.make_state(trainer)
    state = state.replace(old=state.params) if own else state
    after, metrics, _ = small_run.take_step(trainer, state, batch)
    assert metrics["room"] == 8
    assert metrics["grad_norm"] > 0
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), after.params, state.params)
    assert max(jax.tree.leaves(moved)) > 0


# The update

UPDATE = {"surrogate__share": "region", "objective__source_advantage": 0.5, "optimizer__max_grad_norm": 1e9}
EXACT_UPDATE = {**UPDATE, "surrogate__share": "none"}


def updated(trainer: Trainer, boxes=BOXES) -> tuple[np.ndarray, dict[str, float]]:
    """The first moments of an update on the groups of `rolled_out`, side by side, and its metrics."""
    programs = trainer.programs
    rollout, _ = rolled_out(trainer_of(), boxes)
    with jax.set_mesh(programs.mesh):
        prompts = programs.prompts(small_run.make_batch(small_run.make_trainer())._replace(mask=masks(*boxes)))
        exploration = programs.explore(jax.random.key(1), prompts, 0)
        rewards = np.random.default_rng(2).standard_normal(rollout.acd.shape).astype(np.float32)
        advantages = jnp.asarray((rewards - rewards.mean(-1, keepdims=True)) / rewards.std(-1, keepdims=True))
        kept = jnp.zeros(programs.policy.kept_shape())
        data = prompts, exploration, jax.tree.map(jnp.asarray, rollout), advantages, kept
        room = programs.room(prompts) if trainer.options.surrogate.share != "none" else 0
        state = jax.tree.map(jnp.copy, small_run.make_state(trainer))
        state, _, metrics = programs.update(trainer.params, state, *data, jnp.asarray(True), size=room)
    moments = jax.tree.leaves(optax.tree.get(state.opt_state, "mu"))
    return np.concatenate([np.ravel(x) for x in moments]), {name: float(x) for name, x in metrics.items()}


def test_a_shared_update_is_near_to_the_exact_one():
    (shared, metrics), (exact_one, _) = updated(trainer_of(**UPDATE)), updated(trainer_of(**EXACT_UPDATE))
    cosine = shared @ exact_one / np.linalg.norm(shared) / np.linalg.norm(exact_one)
    assert 0.9 < cosine < 0.99999
    assert metrics["ratio_deviation"] == 0
    assert metrics["ratio_mean"] == 1


def test_shared_anchors_end_at_the_states_that_a_shared_rollout_stored():
    """Eq. 14 from the rollout's own states."""
    trainer = trainer_of(surrogate__share="region")
    programs, options = trainer.programs, trainer.options.surrogate
    rollout, _ = whole_group()
    with jax.set_mesh(programs.mesh):
        prompts = programs.prompts(small_run.make_batch(small_run.make_trainer())._replace(mask=masks(*BOXES)))
        exploration = programs.explore(jax.random.key(1), prompts, 0)
        data = prompts, exploration, jax.tree.map(jnp.asarray, rollout), jnp.asarray([[1.0, -1, 1, -1]] * 2)
        state, kept = jax.tree.map(jnp.copy, small_run.make_state(trainer)), jnp.zeros(programs.policy.kept_shape())
        _, log_pi, _ = programs.update(trainer.params, state, *data, kept, jnp.asarray(True), programs.room(prompts))
    for prompt, anchors, steps, found in zip(*map(np.asarray, programs.policy.units(exploration)), log_pi, strict=True):
        distance = surrogate.distance_function("region", prompts.region[prompt], options.tau_edit, options.tau_base)
        stored = programs.policy.read(rollout.states, (prompt, anchors, steps))
        np.testing.assert_array_equal(stored.reference, rollout.states[prompt, 0, steps[0] - 1])
        states = rollout.states[prompt][:, steps].swapaxes(0, 1)  # [B, G, N, C]
        distances = distance(states, states[np.arange(len(anchors)), anchors][:, None])
        np.testing.assert_allclose(found, surrogate.log_policy(distances), rtol=1e-4, atol=1e-4)


def test_an_update_with_masks_too_large_to_share_is_the_exact_one():
    full = ((0, 64, 0, 64), (0, 16, 0, 16))
    (shared, metrics), (exact_one, wanted) = (
        updated(trainer_of(**UPDATE), full),
        updated(trainer_of(**EXACT_UPDATE), full),
    )
    np.testing.assert_allclose(shared, exact_one, atol=1e-5 * np.abs(exact_one).max())
    assert metrics["loss"] == pytest.approx(wanted["loss"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mesh_shape", [(8, 1, 1), (2, 2, 2)])
def test_meshes_give_the_same_shared_update(mesh_shape):
    wanted, _ = updated(trainer_of(**UPDATE))
    found, _ = updated(trainer_of(mesh_shape, **UPDATE))
    np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())


def test_a_set_grows_on_both_pictures():
    region = jnp.zeros((5, 5)).at[2, 2].set(0.3).reshape(-1)
    counts = {
        grown: tuple(int(x.sum()) for x in sharing.own_tokens(region, (5, 5), *grown))
        for grown in ((0, -1), (0, 0), (1, 0), (1, 2))
    }
    assert counts == {(0, -1): (1, 0), (0, 0): (1, 1), (1, 0): (9, 1), (1, 2): (9, 25)}


@pytest.mark.parametrize(
    ("count", "tokens", "size"),
    [(0, 64, 8), (8, 64, 8), (9, 64, 16), (33, 64, 48), (48, 64, 48), (49, 64, 0), (1, 3, 1)],
)
def test_the_size_of_a_program_holds_the_largest_set(count, tokens, size):
    assert sharing.choose_size(count, tokens) == size


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        (
            {"explore__alpha_base": 0.1},
            "rollout.share: region with explore.kind = region and explore.alpha_base",
        ),
        ({"explore__kind": "global"}, "rollout.share: region with explore.kind = global"),
        ({"rollout__share_full_steps": 8}, "rollout.share_full_steps: 8 of rollout.num_steps = 8; fewer were wanted"),
        (
            {"surrogate__share": "region", "rollout__share": "none"},
            "surrogate.share: region with rollout.share = none and surrogate.anchor_mode = replay",
        ),
        ({"policy": "gaussian"}, "rollout.share: 'region' with policy = gaussian, which does not read it"),
        (
            {"rollout__share": "none", "rollout__share_grow": 2},
            "rollout.share_grow: 2 with rollout.share = none, which does not read it; 1 was wanted",
        ),
    ],
)
def test_sharing_is_refused_where_it_means_nothing(changes, wanted):
    config = {"rollout__share": "region", "explore__alpha_base": 0.0} | changes
    assert any(line.startswith(wanted) for line in problems(make(**config)))


def test_sharing_is_accepted_with_the_papers_exploration():
    assert not problems(make(rollout__share="region", explore__alpha_base=0.0))
