"""A training step does what the paper says: Eq. 4-18 meet a real model, the mesh and the optimizer."""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_run
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding
from safetensors.numpy import load_file

from rcgrpo_jax.editors.open import open_model
from rcgrpo_jax.errors import UserError
from rcgrpo_jax.method import grpo, surrogate
from rcgrpo_jax.models.lora import scale_adapter
from rcgrpo_jax.parallel.sharding import parameter_spec, replicated
from rcgrpo_jax.rewards import as_reward
from rcgrpo_jax.rl.setup import fresh_state
from rcgrpo_jax.rl.trainer import UNSCORED_STEPS, Trainer
from rcgrpo_jax.weights.lora import save_lora

BASE = {
    "optimizer__max_grad_norm": 1e9,
    "optimizer__learning_rate": 1e-2,
    "optimizer__ema_decay": 0.9,
    "surrogate__distance": "l2",
}
# (anchor mode, distance, steps, weighting): every value occurs, and with both anchor modes but for two distances.
COMBINATIONS = [
    ("replay", "l2", "all", "uniform"),
    ("replay", "tau", "early", "uniform"),
    ("replay", "region", "random", "policy"),
    ("integrate", "l2", "early", "uniform"),
    ("integrate", "tau", "all", "uniform"),
    ("integrate", "mean", "random", "policy"),
]
SLOW = (COMBINATIONS[1], COMBINATIONS[2], COMBINATIONS[4])  # programs of their own; test_objective has all distances
CASES = [pytest.param(c, marks=[pytest.mark.slow] * (c in SLOW), id="-".join(c)) for c in COMBINATIONS]
CLOSED_FORM = [case for case in CASES if case.values[0][1] in ("l2", "tau")]


class Step(NamedTuple):
    """What the update reads."""

    prompts: Any
    exploration: Any
    rollout: Any
    advantages: jax.Array


class Update(NamedTuple):
    """What it gives, and what it was given."""

    trainer: Trainer
    step: Step
    before: Any
    after: Any
    log_pi: np.ndarray  # [U, T, G]
    metrics: dict[str, float]


def explore_and_roll_out(trainer: Trainer) -> Step:
    programs = trainer.programs
    with jax.set_mesh(programs.mesh):
        prompts = programs.prompts(small_run.make_batch(trainer))
        exploration = programs.explore(jax.random.key(1), prompts, 0)
        rollout = programs.rollout(trainer.params, small_run.make_state(trainer).params, prompts, exploration.noise)
    rewards = np.random.default_rng(2).standard_normal(rollout.acd.shape).astype(np.float32)
    advantages = (rewards - rewards.mean(-1, keepdims=True)) / rewards.std(-1, keepdims=True)
    return Step(prompts, exploration, rollout, jnp.asarray(advantages))


@functools.cache
def base_step() -> Step:
    return explore_and_roll_out(small_run.make_trainer(**BASE))


def update(trainer: Trainer, step: Step, state: Any, log_old: Any = None) -> Update:
    """The first update after a rollout, or one that compares with `log_old`."""
    programs, first = trainer.programs, log_old is None
    log_old = jnp.zeros(programs.policy.kept_shape()) if first else jnp.asarray(log_old)
    with jax.set_mesh(programs.mesh):
        copy = jax.tree.map(jnp.copy, state)  # the update donates its state
        after, log_pi, metrics = programs.update(trainer.params, copy, *step, log_old, jnp.asarray(first))
    return Update(trainer, step, state, after, np.asarray(log_pi), jax.tree.map(float, metrics))


@functools.cache
def first_update(mode: str, distance: str, steps: str, weighting: str, source_advantage: float = 0.0) -> Update:
    trainer = small_run.make_trainer(
        **BASE
        | {
            "surrogate__anchor_mode": mode,
            "surrogate__distance": distance,
            "surrogate__steps": steps,
            "surrogate__num_random_steps": 2,
            "surrogate__weighting": weighting,
            "objective__source_advantage": source_advantage,
        }
    )
    # The rollout does not depend on the surrogate: one program serves all combinations.
    step = base_step()
    with jax.set_mesh(trainer.programs.mesh):
        step = step._replace(exploration=trainer.programs.explore(jax.random.key(1), step.prompts, 0))
    np.testing.assert_array_equal(step.exploration.noise, base_step().exploration.noise)
    return update(trainer, step, small_run.make_state(trainer))


def gradient(result: Update) -> Any:
    """The loss's gradient: Adam's first moment after one update is (1 - b1) times it."""
    b1 = result.trainer.options.optimizer.b1
    return jax.tree.map(lambda mu: mu / (1 - b1), optax.tree.get(result.after.opt_state, "mu"))


def relative_error(found: Any, wanted: Any) -> float:
    return float(optax.tree.norm(optax.tree.sub(found, wanted)) / optax.tree.norm(wanted))


def leaves_equal(a: Any, b: Any) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


# The ratio and the gradient


@pytest.mark.parametrize("combination", CASES)
def test_the_ratio_is_exactly_one_at_the_first_update(combination):
    result = first_update(*combination)
    assert result.metrics["ratio_deviation"] == 0.0
    assert result.metrics["ratio_mean"] == 1.0
    assert result.metrics["clip_fraction"] == 0.0
    assert result.metrics["kl"] == 0.0
    assert result.metrics["grad_norm"] > 0


@pytest.mark.parametrize("combination", CASES)
def test_the_old_policy_is_that_of_the_stored_states(combination):
    """Eq. 14 from the rollout's own states; a wrong step, anchor, prompt or LoRA scale would show here."""
    mode, distance, _, weighting = combination
    result = first_update(*combination)
    prompts, exploration, rollout, _ = result.step
    options = result.trainer.options.surrogate
    prompt, anchor, steps = (np.asarray(x) for x in result.trainer.programs.policy.units(exploration))
    assert steps.shape[1] == (len(exploration.steps) if mode == "integrate" else 1)
    for unit in range(len(prompt)):
        measure = surrogate.distance_function(
            distance, prompts.region[prompt[unit]], options.tau_edit, options.tau_base
        )
        states = rollout.states[prompt[unit]][:, steps[unit]].swapaxes(0, 1)  # [T, G, N, C]
        distances = measure(states, states[np.arange(len(states)), anchor[unit]][:, None])
        temperature = 1.0
        if weighting == "policy":
            temperature = surrogate.calibrated_temperature(distances, options.target_entropy)
        wanted = surrogate.log_policy(distances, temperature)
        np.testing.assert_allclose(result.log_pi[unit], wanted, rtol=1e-4, atol=2e-3)
        nearest = np.argmax(result.log_pi[unit], -1)
        np.testing.assert_array_equal(nearest, anchor[unit])  # nothing is nearer than the anchor itself


@functools.partial(jax.jit, static_argnums=(0, 1))
def closed_form_gradient(networks, replay, sigmas, params, lora, scale, prompts, states, anchors, trained, pulls):
    """Of -mean_{p, k, s} <sum_i A_i W x_i, xbar> / G in the LoRA, what Eq. 5 and 13-15 come to at theta = theta_old.

    `pulls` `[P, K, N, C]` is sum_i A_i W x_i / G, and `trained` `[K]` is 1 at the steps that carry the loss.
    """

    def loss(lora):
        lora = scale_adapter(lora, scale)

        def of_anchor(prompt, states, pulls, anchor):
            def euler(x, inputs):
                stored, now, then, pull = inputs
                x = stored if replay else x
                x = x + (then - now) * networks.velocity(params, lora, x, now, prompt.condition, (4, 4))[0]
                return x, jnp.sum(pull * x)

            own = states[anchor]
            return jax.lax.scan(euler, own[0], (own[:-1], sigmas[:-1], sigmas[1:], pulls))[1]

        over_anchors = jax.vmap(of_anchor, in_axes=(None, None, None, 0))
        products = jax.vmap(over_anchors)(prompts, states, pulls, anchors)  # [P, B, K]
        return -jnp.sum(products.mean((0, 1)) * trained) / trained.sum()

    return jax.grad(loss)(lora)


@pytest.mark.parametrize("combination", CLOSED_FORM)
def test_the_first_gradient_is_the_closed_form(combination):
    mode, distance, *_ = combination
    result = first_update(*combination)
    prompts, exploration, rollout, advantages = result.step
    options = result.trainer.options.surrogate
    mask = prompts.region
    weights = (
        mask / options.tau_edit**2 + (1 - mask) / options.tau_base**2 if distance == "tau" else jnp.ones_like(mask)
    )
    pulls = jnp.einsum("pg,pn,pgknc->pknc", advantages, weights, rollout.states)[:, 1:] / advantages.shape[1]
    programs, lora = result.trainer.programs, result.trainer.options.lora
    trained = np.isin(np.arange(1, len(programs.sigmas)), exploration.steps).astype(np.float32)
    with jax.set_mesh(programs.mesh):
        wanted = closed_form_gradient(
            programs.networks, mode == "replay", jnp.asarray(programs.sigmas), result.trainer.params,
            result.before.params, lora.alpha / lora.rank, prompts, rollout.states, exploration.anchors, trained, pulls,
        )  # fmt: skip
    found = gradient(result)
    assert relative_error(found, wanted) <= 1e-5
    np.testing.assert_allclose(result.metrics["grad_norm"], optax.tree.norm(wanted), rtol=1e-4)


@functools.partial(jax.jit, static_argnums=(0, 1))
def policy_of_the_source(networks, replay, sigmas, params, lora, prompts, states, anchors):
    """Means over anchors and the first two steps: y's log-probability among the candidates, and |x - y|^2.

    y is on the line to the source outside the mask, and x inside.
    """

    def of_anchor(prompt, states, anchor):
        x, squares = states[anchor, 0], []
        for k in (0, 1):
            x = jax.lax.stop_gradient(states[anchor, k]) if replay else x
            before, share = jax.lax.stop_gradient(x), sigmas[k + 1] / sigmas[k]
            v, _ = networks.velocity(params, lora, x, sigmas[k], prompt.condition, (4, 4))
            x = x + (sigmas[k + 1] - sigmas[k]) * v
            straight = share * before + (1 - share) * prompt.condition.reference
            y = jax.lax.stop_gradient(x + (1 - prompt.region)[:, None] * (straight - x))  # the mask may be soft
            squares.append(jnp.square(x[None] - jnp.concatenate([states[:, k + 1], y[None]])).sum((1, 2)))
        return jnp.stack(squares)

    squares = jax.vmap(jax.vmap(of_anchor, in_axes=(None, None, 0)))(prompts, states, anchors)
    return jax.nn.log_softmax(-squares / 2)[..., -1].mean(), squares[..., -1].mean()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["replay", pytest.param("integrate", marks=pytest.mark.slow)])
def test_the_source_is_one_more_candidate_outside_the_mask(mode):
    combination = (mode, "l2", "early", "uniform")
    plain, result = first_update(*combination), first_update(*combination, source_advantage=3.0)
    prompts, exploration, rollout, advantages = result.step
    trainer, lora = result.trainer, result.trainer.options.lora
    assert set(exploration.steps.tolist()) == {1, 2}

    def policy(params):
        return policy_of_the_source(
            trainer.programs.networks, mode == "replay", jnp.asarray(trainer.programs.sigmas), trainer.params,
            scale_adapter(params, lora.alpha / lora.rank), prompts, rollout.states, exploration.anchors,
        )  # fmt: skip

    with jax.set_mesh(trainer.programs.mesh):
        pull, distance = jax.grad(policy, has_aux=True)(result.before.params)
    assert result.metrics["source_distance"] == pytest.approx(float(distance), rel=1e-4)
    assert "source_distance" not in plain.metrics
    added = optax.tree.sub(gradient(result), gradient(plain))
    assert relative_error(added, optax.tree.scale(-3.0 / advantages.shape[1], pull)) <= 1e-4
    assert result.metrics["ratio_deviation"] == 0.0


def test_a_second_update_compares_with_the_first_and_clips():
    first = first_update("replay", "tau", "early", "uniform")
    trainer, advantages = first.trainer, np.asarray(first.step.advantages)
    second = update(trainer, first.step, first.after, first.log_pi)
    prompt = np.asarray(trainer.programs.policy.units(first.step.exploration)[0])
    clip = trainer.options.objective.clip
    ratio = np.exp(second.log_pi - first.log_pi)
    gain = advantages[prompt][:, None]
    objective = np.minimum(gain * ratio, gain * np.clip(ratio, 1 - clip, 1 + clip)).mean()
    outside = (np.abs(ratio - 1) > clip).mean()

    assert 0 < outside < 1
    assert second.metrics["clip_fraction"] == pytest.approx(outside)
    assert second.metrics["ratio_deviation"] == pytest.approx(np.abs(ratio - 1).max(), rel=1e-3)
    assert second.metrics["loss"] == pytest.approx(-objective, rel=1e-3)
    assert second.metrics["kl"] > 0


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_one_small_update_raises_the_surrogate_objective(seed):
    """Evaluated again on the same rollout; the learning rate is small, so that nothing is clipped."""
    trainer = small_run.make_trainer(**BASE)
    rewards = jax.random.normal(jax.random.key(seed), base_step().advantages.shape)
    advantages = (rewards - rewards.mean(-1, keepdims=True)) / rewards.std(-1, keepdims=True)
    step = base_step()._replace(advantages=advantages)
    state = small_run.make_state(trainer, seed)
    first = update(trainer, step, state)
    # A short way along the optimizer's direction.
    nearby = jax.tree.map(lambda a, b: a + 1e-3 * (b - a), state.params, first.after.params)
    again = update(trainer, step, first.after.replace(params=nearby), first.log_pi)
    assert again.metrics["clip_fraction"] == 0
    assert again.metrics["loss"] < first.metrics["loss"] - 1e-6


# What must not change


def test_a_group_without_signal_teaches_nothing_beside_others():
    """Neither its candidates nor its source: the gradients of the groups add up."""
    plain = first_update("replay", "l2", "early", "uniform", source_advantage=3.0)
    first, second = (plain.step.advantages * jnp.array(mask)[:, None] for mask in ((1.0, 0.0), (0.0, 1.0)))
    state = small_run.make_state(plain.trainer)
    parts = [gradient(update(plain.trainer, plain.step._replace(advantages=a), state)) for a in (first, second)]
    assert relative_error(optax.tree.add(*parts), gradient(plain)) <= 1e-4


def test_groups_without_signal_leave_the_adapter_as_it_is():
    """Momentum is there, and does not move it either."""
    trainer = small_run.make_trainer(**BASE)
    moving = update(trainer, base_step(), small_run.make_state(trainer)).after
    result = update(trainer, base_step()._replace(advantages=jnp.zeros((2, 4))), moving)
    assert leaves_equal(result.after.replace(key=None), moving.replace(key=None))


@pytest.mark.parametrize(
    ("score", "counter"), [(np.nan, "groups/dropped"), (0.5, "groups/zero_std")], ids=["failed", "equal"]
)
def test_failed_and_equal_rewards_teach_nothing(monkeypatch, score, counter):
    trainer = small_run.make_trainer(**BASE)
    batch = small_run.make_batch(trainer)
    state, _, _ = small_run.take_step(trainer, small_run.make_state(trainer), batch)
    always(monkeypatch, trainer, score)
    after, metrics, _ = small_run.take_step(trainer, state, batch)
    assert metrics[counter] == trainer.options.rollout.prompts
    assert metrics["grad_norm"] == 0
    assert np.isfinite(metrics["loss"])
    assert leaves_equal(after.params, state.params)


def test_a_reward_that_keeps_failing_ends_the_run(monkeypatch):
    trainer = small_run.make_trainer(**BASE)
    batch, state = small_run.make_batch(trainer), small_run.make_state(trainer)
    monkeypatch.setattr(trainer, "unscored", 0)
    for score in (np.nan, 0.5, *[np.nan] * (UNSCORED_STEPS - 1)):
        always(monkeypatch, trainer, score)
        small_run.take_step(trainer, state, batch)
    with pytest.raises(UserError, match=f"no group of the last {UNSCORED_STEPS} steps has enough scores; stub failed"):
        small_run.take_step(trainer, state, batch)


def test_rewards_that_fail_in_turns_leave_no_group_either():
    trainer = small_run.make_trainer(**BASE)
    one, other = np.full((2, 4), 0.5), np.full((2, 4), 0.5)
    one[0, 1] = other[1, 2] = np.nan

    def check(scores: dict[str, np.ndarray]) -> None:
        trainer._check_scored(scores, grpo.combine_rewards(scores, dict.fromkeys(scores, 1.0)))

    for _ in range(UNSCORED_STEPS - 1):
        check({"one": one, "other": other})
    with pytest.raises(UserError, match="one, other failed"):
        check({"one": one, "other": other})
    check({"one": one, "other": one})  # the second group has both
    assert trainer.unscored == 0


def always(monkeypatch, trainer: Trainer, score: float) -> None:
    """Makes `score` the only reward of every candidate."""
    stub = as_reward(lambda inputs: np.full(inputs.edited.shape[:2], score, np.float32))
    monkeypatch.setattr(trainer, "rewards", {"stub": stub})
    monkeypatch.setattr(trainer, "weights", {"stub": 1.0})


def test_a_step_changes_the_adapter_and_never_the_base():
    trainer = small_run.make_trainer(**BASE)
    before = jax.tree.map(np.array, (trainer.params, trainer.decoder))
    state = small_run.make_state(trainer)
    after, metrics, _ = small_run.take_step(trainer, state, small_run.make_batch(trainer))
    assert leaves_equal((trainer.params, trainer.decoder), before)
    assert int(after.step) == int(state.step) + 1
    assert metrics["ratio_deviation"] == 0.0
    for path, x in jax.tree_util.tree_leaves_with_path(optax.tree.sub(after.params, state.params)):
        assert np.any(x), path


def test_the_average_follows_the_adapter():
    result = first_update("replay", "l2", "all", "uniform")
    wanted = jax.tree.map(lambda ema, lora: 0.1 * ema + 0.9 * lora, result.before.ema, result.after.params)
    assert relative_error(result.after.ema, wanted) < 1e-6
    assert relative_error(result.after.ema, result.before.ema) > 1e-4


@pytest.mark.slow
def test_bfloat16_keeps_float32_states_and_an_exact_ratio():
    trainer = small_run.make_trainer(**BASE, model__dtype="bfloat16", acd__weight=0.0)
    step = explore_and_roll_out(trainer)
    assert step.rollout.states.dtype == jnp.float32
    rounded = step.rollout.states.astype(jnp.bfloat16).astype(jnp.float32)
    assert not np.array_equal(step.rollout.states, rounded)  # not float32 by name only
    result = update(trainer, step, small_run.make_state(trainer))
    assert result.metrics["ratio_deviation"] == 0.0
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(result.after.params))


# Micro-batches and meshes


def assert_same_step(trainer: Trainer, tolerance: float, folder: Path):
    """States, metrics, gradient, adapter and exported file are those of one device that takes everything at once."""
    wanted, step = base_step(), explore_and_roll_out(trainer)
    np.testing.assert_array_equal(step.exploration.noise, wanted.exploration.noise)
    np.testing.assert_allclose(step.rollout.states, wanted.rollout.states, atol=10 * tolerance)
    np.testing.assert_allclose(step.rollout.acd, wanted.rollout.acd, rtol=tolerance)
    with jax.set_mesh(trainer.programs.mesh):
        images = np.asarray(trainer.programs.decode(trainer.decoder, step.rollout.states[:, :, -1]))
    np.testing.assert_allclose(images, base_images(), atol=10 * tolerance)

    found, wanted = update(trainer, step, small_run.make_state(trainer)), first_update(*COMBINATIONS[0])
    for name, value in wanted.metrics.items():
        assert found.metrics[name] == pytest.approx(value, rel=10 * tolerance, abs=tolerance), name
    np.testing.assert_allclose(found.log_pi, wanted.log_pi, rtol=10 * tolerance, atol=10 * tolerance)
    assert relative_error(*jax.device_get((gradient(found), gradient(wanted)))) < 10 * tolerance
    changes = [optax.tree.sub(*jax.device_get((x.after.params, x.before.params))) for x in (found, wanted)]
    assert relative_error(*changes) < 1e-4  # Adam divides by gradients that may be near zero
    files = [
        save_lora(folder / str(i), x.after.params, trainer.options.lora, trainer.params, dtype="float32")
        for i, x in enumerate((found, wanted))
    ]
    # A is random and large, and would hide an update of B that got lost
    learned = [{key: x for key, x in load_file(file).items() if "lora_B" in key} for file in files]
    assert relative_error(*learned) < 1e-4

    # The first loss is 0 by construction; at an adapter that has moved, a second update's is not.
    losses = []
    for x in (found, wanted):
        moved = x.before.replace(params=jax.tree.map(lambda p: 1.3 * p, x.before.params))
        losses.append(update(x.trainer, x.step, moved, x.log_pi).metrics["loss"])
    assert abs(losses[1]) > 0.01
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@functools.cache
def base_images() -> np.ndarray:
    trainer = small_run.make_trainer(**BASE)
    with jax.set_mesh(trainer.programs.mesh):
        return np.asarray(trainer.programs.decode(trainer.decoder, base_step().rollout.states[:, :, -1]))


@pytest.mark.slow
def test_micro_batches_change_nothing(tmp_path):
    trainer = small_run.make_trainer(
        **BASE, rollout__micro_batch=2, rollout__decode_micro_batch=4, surrogate__micro_batch=4
    )
    assert_same_step(trainer, 1e-6, tmp_path)


@pytest.mark.parametrize(
    "shape", [(2, 2, 2), *(pytest.param(shape, marks=pytest.mark.slow) for shape in ((1, 8, 1), (4, 1, 2)))], ids=str
)
def test_a_mesh_changes_nothing(shape, tmp_path):
    """Samples, weights and heads are spread; `test_resume` has eight devices that spread samples alone."""
    trainer = small_run.make_trainer(shape, **BASE)
    kernel = trainer.params["single_transformer_blocks"]["attn"]["to_q"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // (shape[1] * shape[2])
    mesh = trainer.programs.mesh
    for path, x in flatten_dict(trainer.params).items():
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, parameter_spec(path, x.shape, mesh)), x.ndim), path
    for x in jax.tree.leaves(fresh_state(trainer.options, open_model(small_run.model_folder()), mesh)):
        assert x.sharding.is_equivalent_to(replicated(mesh), x.ndim)
    assert_same_step(trainer, 1e-5, tmp_path)
