"""The objective of an update, Eq. 5 over replayed and integrated anchors, with a velocity that needs no model."""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_run

from rcgrpo_jax.models.mmdit import Condition
from rcgrpo_jax.parallel.mesh import make_mesh
from rcgrpo_jax.rl.policy.base import Prompts, Rollout
from rcgrpo_jax.rl.policy.neighbour import Exploration
from rcgrpo_jax.rl.programs import Programs
from rcgrpo_jax.runs.state import new_state

P, G, B, K, N, C = 3, 4, 2, 3, 16, 3
SIGMAS = np.array([1.0, 0.8, 0.5, 0.0], np.float32)
SOURCE_ADVANTAGE = 1.3
# The scale of the states, at which a policy of temperature 1 is neither sharp nor flat.
SCALES = {"l2": 0.3, "tau": 0.3, "region": 2.0, "mean": 2.0}


def velocity(weights: jax.Array, reference: jax.Array, x: jax.Array, sigma: jax.Array) -> jax.Array:
    return jnp.tanh(x @ weights) * (1 + sigma) - reference


class Plain:
    """Networks of one matrix, as much of one as an update reads."""

    def grid(self, height: int, width: int) -> tuple[int, int]:
        return 4, 4

    def sigmas(self, num_steps: int, num_image_tokens: int) -> np.ndarray:
        return SIGMAS

    def source(self, condition: Condition) -> jax.Array:
        return condition.reference

    def velocity(self, params, lora, x, sigma, condition, grid, region=None) -> tuple[jax.Array, None]:
        return velocity(lora["B"], condition.reference, x, sigma), None


class Result(NamedTuple):
    gradient: np.ndarray
    log_pi: np.ndarray  # [U, T, G (+ 1)]
    metrics: dict[str, float]
    after: np.ndarray


class Given(NamedTuple):
    prompts: Prompts
    exploration: Exploration
    rollout: Rollout
    advantages: np.ndarray


@functools.cache
def programs(mode: str, distance: str, weighting: str, source: float) -> Programs:
    options = small_run.make_options(
        surrogate__anchor_mode=mode, surrogate__distance=distance, surrogate__weighting=weighting,
        surrogate__steps="early", surrogate__target_entropy=0.9, objective__source_advantage=source,
        rollout__prompts=P, rollout__group_size=G, rollout__num_steps=K, surrogate__anchors=B,
        lora__rank=1, lora__alpha=1.0, optimizer__max_grad_norm=1e9, objective__clip=0.005,
    )  # fmt: skip
    return Programs(options.step, Plain(), make_mesh({}, jax.devices()[:1]))


@functools.cache
def given(scale: float) -> Given:
    """States as a rollout gives them, of candidates that differ; two trained steps."""
    rng = np.random.default_rng(0)
    reference = scale * rng.standard_normal((P, N, C), np.float32)
    noise = scale * rng.standard_normal((P, G, N, C), np.float32)
    states = [noise]
    for now, then in itertools.pairwise(SIGMAS):
        states.append(states[-1] + (then - now) * velocity(weights(0), reference[:, None], states[-1], now))
    mask = (rng.random((P, N)) < 0.4).astype(np.float32)
    mask[0, :3] = 0.5
    prompts = Prompts(Condition(np.zeros(P), np.zeros(P), reference, np.ones(P)), np.ones((P, 1)), mask, mask)
    anchors, steps = np.array([[1, 3], [2, 1], [3, 2]], np.int32), np.array([1, 2], np.int32)
    rewards = rng.standard_normal((P, G), np.float32)
    advantages = (rewards - rewards.mean(-1, keepdims=True)) / rewards.std(-1, keepdims=True)
    rollout = Rollout(np.stack(states, 2), np.zeros((P, G)))
    return Given(prompts, Exploration(noise, anchors, steps), rollout, advantages)


def weights(moved: float) -> np.ndarray:
    rng = np.random.default_rng(1)
    return rng.standard_normal((C, C), np.float32) + moved * rng.standard_normal((C, C), np.float32)


def update(plain: Programs, data: Given, moved: float = 0.0, log_old: np.ndarray | None = None) -> Result:
    """The first update after a rollout, or one at other weights that compares with `log_old`."""
    state = new_state(plain.options.optimizer, {"B": jnp.asarray(weights(moved))}, jax.random.key(0))
    first = log_old is None
    log_old = np.zeros((plain.policy.kept_shape()), np.float32) if first else log_old
    with jax.set_mesh(plain.mesh):
        after, log_pi, metrics = plain.update({}, state, *data, jnp.asarray(log_old), jnp.asarray(first))
    gradient = optax.tree.get(after.opt_state, "mu")["B"] / (1 - plain.options.optimizer.b1)
    return Result(*map(np.asarray, (gradient, log_pi)), jax.tree.map(float, metrics), np.asarray(after.params["B"]))


# The source as one more candidate


def token_weights(distance: str, mask: np.ndarray) -> np.ndarray:
    edit, base = mask / 0.9**2, (1 - mask) / 1.1**2
    return {
        "l2": np.ones_like(mask),
        "mean": np.ones_like(mask) / (N * C),
        "region": edit / (mask.sum() * C) + base / ((1 - mask).sum() * C),
        "tau": edit + base,
    }[distance]


def temperature_of_entropy(squares: np.ndarray, entropy: float) -> float:
    low, high = -20.0, 20.0
    for _ in range(60):
        odds = np.exp(-(squares - squares.min()) / 2 / np.exp((low + high) / 2))
        pi = odds / odds.sum()
        sharper = -(pi * np.log(np.maximum(pi, 1e-300))).sum() < entropy
        low, high = ((low + high) / 2, high) if sharper else (low, (low + high) / 2)
    return np.exp(low)


def objective_of_all(matrix, log_old, data: Given, mode: str, distance: str, weighting: str, clip: float):
    """Eq. 5 of G + 1 candidates, one anchor and one step after another; the divisor of the plain mean is G."""
    (_, _, references, _), _, masks, _ = data.prompts
    units, total = iter(log_old if log_old is not None else P * B * K * [None]), 0.0
    for p, anchors in enumerate(data.exploration.anchors):
        per_token, mask, reference = token_weights(distance, masks[p]), masks[p][:, None], references[p]
        for anchor in anchors:
            x = data.rollout.states[p, anchor, 0]
            for k in data.exploration.steps:
                group, stored = data.rollout.states[p, :, k], data.rollout.states[p, anchor, [k - 1, k]]
                shrink = SIGMAS[k] / SIGMAS[k - 1]

                def squares(before, x, mask=mask, reference=reference, shrink=shrink, group=group, per=per_token):
                    y = jax.lax.stop_gradient(mask * x + (1 - mask) * (reference + shrink * (before - reference)))
                    return [(per * ((c - x) ** 2).sum(-1)).sum() for c in (*group, y)]

                before = x if mode == "integrate" else stored[0]
                x = before + (SIGMAS[k] - SIGMAS[k - 1]) * velocity(matrix, reference, before, SIGMAS[k - 1])
                temperature = 1.0
                if weighting == "policy":
                    with jax.ensure_compile_time_eval():
                        temperature = temperature_of_entropy(np.array(squares(*stored)), 0.9)
                log_pi = jax.nn.log_softmax(-jnp.stack(squares(before, x)) / 2 / temperature)
                then = next(units)
                then = jax.lax.stop_gradient(log_pi) if then is None else then
                ratio, advantages = jnp.exp(log_pi - then), np.append(data.advantages[p], SOURCE_ADVANTAGE)
                gain = jnp.minimum(advantages * ratio, advantages * jnp.clip(ratio, 1 - clip, 1 + clip))
                total += (gain * (jnp.exp(then) if weighting == "policy" else 1 / G)).sum()
    return total / (P * B * len(data.exploration.steps))


COMBINATIONS = [("replay", distance, weighting) for distance in SCALES for weighting in ("uniform", "policy")]
COMBINATIONS += [("integrate", "region", "uniform"), ("integrate", "l2", "policy")]


@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("combination", COMBINATIONS, ids="-".join)
def test_the_source_is_one_more_candidate_of_equation_5(combination, updates):
    mode, distance, weighting = combination
    plain, data = programs(mode, distance, weighting, SOURCE_ADVANTAGE), given(SCALES[distance])
    clip, first = plain.options.objective.clip, update(plain, data)
    found, moved, log_old = first, 0.0, None
    if updates == 2:
        moved, log_old = 0.5, first.log_pi
        found = update(plain, data, moved, log_old)
    assert first.log_pi.shape[-1] == G + 1
    in_order = None if log_old is None else log_old.reshape(-1, G + 1)  # units are rows of prompt, anchor, step
    objective = functools.partial(
        objective_of_all, data=data, mode=mode, distance=distance, weighting=weighting, clip=clip
    )
    wanted, gradient = jax.jit(jax.value_and_grad(objective))(weights(moved), in_order)
    assert -found.metrics["loss"] == pytest.approx(float(wanted), rel=1e-4)
    assert np.linalg.norm(found.gradient + gradient) <= 1e-3 * np.linalg.norm(gradient)

    outside = np.abs(np.expm1(found.log_pi - first.log_pi)) > clip
    assert found.metrics["clip_fraction"] == pytest.approx(outside.mean())
    entropy = -(np.exp(first.log_pi) * first.log_pi).sum(-1).mean()
    assert found.metrics["policy_entropy"] == pytest.approx(entropy, rel=1e-4)
    if updates == 2:
        assert outside[..., -1].any()
        assert not outside.all()


# Groups that teach nothing


def without_signal(data: Given, group: int = 0) -> Given:
    advantages = data.advantages.copy()
    advantages[group] = 0
    return data._replace(advantages=advantages)


def diverged(data: Given, where: str, value: float) -> Given:
    """The same with `value` in the first group: in the states of a candidate from the second on, or in its prompt."""
    if where == "prompt":
        broken = jax.tree.map(np.array, data.prompts)
        broken.condition.reference[0, 3], broken.region[0, 1] = value, value
        return data._replace(prompts=broken)
    states = data.rollout.states.copy()
    states[0, {"anchor": 1, "other candidate": 2}[where], 1:] = value
    return data._replace(rollout=data.rollout._replace(states=states))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["anchor", "other candidate", "prompt"])
@pytest.mark.parametrize("combination", COMBINATIONS, ids="-".join)
def test_a_group_that_diverged_leaves_the_others_as_they_are(combination, where, value):
    plain, data = programs(*combination, SOURCE_ADVANTAGE), without_signal(given(SCALES[combination[1]]))
    broken = diverged(data, where, value)
    for moved, log_old in ((0.0, None), (0.5, update(plain, data).log_pi)):
        wanted, found = update(plain, data, moved, log_old), update(plain, broken, moved, log_old)
        assert np.linalg.norm(wanted.gradient) > 0
        assert np.isfinite(wanted.gradient).all()
        for x, y in zip(found, wanted, strict=True):
            jax.tree.map(np.testing.assert_array_equal, x, y)


def test_metrics_are_means_over_the_groups_that_teach():
    plain, data = programs("replay", "region", "uniform", SOURCE_ADVANTAGE), given(SCALES["region"])
    first = update(plain, data)
    teach = first.log_pi[len(first.log_pi) // P :]  # units are rows of prompt, anchor, step
    metrics = update(plain, without_signal(data)).metrics
    assert metrics["policy_entropy"] == pytest.approx(-(np.exp(teach) * teach).sum(-1).mean(), rel=1e-5)
    metrics = update(plain, without_signal(data), 0.5, first.log_pi).metrics
    others = [update(plain, without_signal(without_signal(data), p), 0.5, first.log_pi).metrics for p in (1, 2)]
    for name in ("ratio_mean", "clip_fraction", "kl", "policy_entropy", "source_distance", "loss"):
        share = 2 if name == "loss" else 1  # it is what is differentiated: a mean over all groups
        assert metrics[name] == pytest.approx(share * np.mean([x[name] for x in others]), rel=1e-5), name
    assert metrics["ratio_deviation"] == max(x["ratio_deviation"] for x in others)


def test_where_nothing_teaches_there_is_nothing_to_report():
    plain, data = programs("replay", "region", "uniform", SOURCE_ADVANTAGE), given(SCALES["region"])
    result = update(plain, data._replace(advantages=np.zeros((P, G), np.float32)))
    assert result.metrics["loss"] == result.metrics["grad_norm"] == 0
    assert np.isnan(result.metrics["policy_entropy"])
    np.testing.assert_array_equal(result.after, weights(0))
