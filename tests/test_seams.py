"""Another solver, family or policy is one class: toys of each go through what training uses."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_run

from rcgrpo_jax.errors import UsageError
from rcgrpo_jax.flow import rollout, schedule
from rcgrpo_jax.flow.solvers.base import scan_steps
from rcgrpo_jax.flow.solvers.euler import euler_step
from rcgrpo_jax.method import grpo
from rcgrpo_jax.parallel.mesh import make_mesh
from rcgrpo_jax.rl import policy as policies
from rcgrpo_jax.rl.config import validate
from rcgrpo_jax.rl.parts import join, split_groups
from rcgrpo_jax.rl.policy import likelihood
from rcgrpo_jax.rl.policy.base import Rollout
from rcgrpo_jax.rl.programs import Programs
from rcgrpo_jax.runs.state import new_state

P, G, K, N, C = 2, 3, 4, 16, 3
STD = 0.3


class AdamsBashforth:
    """A solver that remembers the step before: two-step Adams-Bashforth for uneven steps, Euler's first."""

    def integrate(self, velocity, x, sigmas):
        def step(x, memory, sigma, sigma_next):
            before, length_before = memory
            v, aux = velocity(x, sigma)
            length = sigma_next - sigma
            share = length / (2 * length_before)  # 0 in the first step
            return x + length * ((1 + share) * v - share * before), (v, length), aux

        return scan_steps(step, x, (jnp.zeros_like(x), jnp.float32(jnp.inf)), sigmas)


class Midpoint:
    """A solver that evaluates the velocity twice a step."""

    def integrate(self, velocity, x, sigmas):
        def step(x, memory, sigma, sigma_next):
            middle = (sigma + sigma_next) / 2
            v, aux = velocity(x, sigma)
            return x + (sigma_next - sigma) * velocity(x + (middle - sigma) * v, middle)[0], memory, aux

        return scan_steps(step, x, (), sigmas)


@pytest.mark.parametrize("solver", [AdamsBashforth(), Midpoint()], ids=["memory", "two evaluations"])
def test_another_solver_has_its_order_in_a_rollout(solver):
    """v = cos(3 s) x has the solution x(s) = x(1) exp((sin(3 s) - sin(3)) / 3)."""
    steps, start = np.array([16, 32, 64]), jnp.linspace(-1.0, 1.0, 10).reshape(5, 2)

    @jax.jit
    def integrate(sigmas):
        def velocity(x, sigma):
            return jnp.cos(3 * sigma) * x, sigma

        return rollout.integrate_with_aux(velocity, start, sigmas, solver)

    errors = []
    for k in steps.tolist():
        sigmas = schedule.sigmas(k, 1024)
        states, aux = integrate(sigmas)
        np.testing.assert_array_equal(aux, sigmas[:-1])  # of each step's first evaluation
        errors.append(np.abs(states[-1] - start * np.exp(-np.sin(3) / 3)).max())
    assert abs(np.polyfit(np.log(steps), np.log(errors), 1)[0] + 2) < 0.2


class Matrix:
    """Networks of one matrix: its condition is the source alone, its pictures are its tokens."""

    def grid(self, height, width):
        return 4, 4

    def sigmas(self, num_steps, num_image_tokens):
        return schedule.sigmas(num_steps, num_image_tokens)

    def condition(self, encoded, guidance):
        return encoded["latents"]

    def source(self, condition):
        return condition

    def text_weights(self, encoded):
        return jnp.ones((len(encoded["latents"]), 1))

    def velocity(self, params, lora, x, sigma, condition, grid, region=None, own=None):
        return jnp.tanh(x @ (params["W"] + lora.get("B", 0.0))) * (1 + sigma) - condition, None

    def decode(self, params, tokens, grid):
        return tokens.reshape(*tokens.shape[:-2], *grid, tokens.shape[-1])


class Noise(NamedTuple):
    noise: jax.Array  # [P, G, N, C]
    strength: jax.Array  # [P, G]

    @property
    def candidates(self):
        return self


class Toy:
    """A policy without anchors: `log N(x_k; one step under theta from x_(k-1), STD^2)` of each candidate and step."""

    OWN = ("objective.clip",)
    keeps_old = True

    def __init__(self, options, networks, sigmas):
        self.options, self.sigmas = options, jnp.asarray(sigmas)

    @staticmethod
    def problems(options):
        return [] if options.rollout.num_steps > 1 else ["rollout.num_steps: 1; more were wanted"]

    @staticmethod
    def num_units(options):
        return options.rollout.prompts * options.rollout.group_size * options.rollout.num_steps

    num_evaluations = num_units

    @staticmethod
    def num_forwards(options):
        return 0

    def explore(self, key, prompts, step):
        shape = len(prompts.region), self.options.rollout.group_size
        return Noise(jax.random.normal(key, (*shape, N, C)), jnp.full(shape, 1.0 + step))

    def rollout(self, velocity, prompt, candidate):
        return rollout.integrate_with_aux(velocity, candidate.strength * candidate.noise, self.sigmas)

    def units(self, exploration):
        grid = jnp.meshgrid(jnp.arange(P), jnp.arange(G), jnp.arange(1, K + 1), indexing="ij")
        return tuple(x.reshape(-1) for x in grid)

    def kept_shape(self):
        return self.num_units(self.options), 1, 1

    def read(self, states, unit):
        prompt, candidate, k = unit
        return states[prompt, candidate, k - 1], states[prompt, candidate, k]

    def loss(self, velocities, prompt, stored, unit, advantages, log_old, first):
        (before, after), (_, candidate, k) = stored, unit
        mean = euler_step(velocities.theta, before, self.sigmas[k - 1], self.sigmas[k])
        log_pi = -jnp.square(after - mean).mean()[None, None] / (2 * STD**2)
        log_ratio, _ = likelihood.log_ratio(log_pi, log_old, first)
        v, v_old, v_base = (velocity(before, self.sigmas[k - 1]) for velocity in velocities[:3])
        metrics = {"ratio_deviation": jnp.abs(jnp.expm1(log_ratio)).max(), "largest_deviation": jnp.abs(v).max()}
        metrics |= {"mean": jnp.abs(v).max(), "from_old": jnp.abs(v - v_old).max(), "base": jnp.abs(v_base).max()}
        return -grpo.clipped_objective(log_ratio, advantages[candidate][None, None], 0.2), log_pi, metrics

    def refresh(self, state):
        return state.replace(old=jax.tree.map(lambda old, new: (old + new) / 2, state.old, state.params))


def test_another_family_and_policy_take_a_step(monkeypatch):
    monkeypatch.setitem(policies.POLICIES, "toy", Toy)
    options = small_run.make_options(
        policy="toy", rollout__prompts=P, rollout__group_size=G, rollout__num_steps=K, lora__rank=1,
        lora__alpha=1.0, acd__weight=0.0, optimizer__max_grad_norm=1e9, surrogate__micro_batch=4,
    )  # fmt: skip
    mesh = make_mesh({}, jax.devices()[:1])
    programs = Programs(options.step, Matrix(), mesh)
    rng = np.random.default_rng(0)
    params = {"W": rng.standard_normal((C, C), np.float32)}
    adapter = {"B": 0.1 * rng.standard_normal((C, C), np.float32)}
    advantages = np.float32([[1.0, -1.0, 0.0], [0.5, 0.5, -1.0]])
    with jax.set_mesh(mesh):
        encoded, mask = {"latents": rng.standard_normal((P, N, C), np.float32)}, np.ones((P, 64, 64), np.float32)
        prompts = programs.gather_prompts(encoded, mask)
        state = new_state(options.optimizer, jax.tree.map(jnp.asarray, adapter), jax.random.key(0), keep_old=True)
        exploration = programs.explore(jax.random.key(0), prompts, state.step + 1)
        parts = [
            programs.rollout(params, state.rolling_out, prompts, candidates)
            for candidates in split_groups(exploration.candidates, 1)
        ]
        rolled: Rollout = join(*parts)
        pictures = programs.decode({}, rolled.states[:, :, -1])
        states = rolled.states + STD * jax.random.normal(jax.random.key(1), rolled.states.shape)  # off the ODE's path
        log_old, first = jnp.zeros(programs.policy.kept_shape()), jnp.asarray(True)
        after, log_pi, metrics = programs.update(
            params, state, prompts, exploration, rolled._replace(states=states), advantages, log_old, first
        )
        refreshed = programs.refresh(jax.tree.map(jnp.copy, after))
    np.testing.assert_array_equal(rolled.states[:, :, 0], 2 * exploration.noise)  # its strength after one step
    assert pictures.shape == (P * G, 4, 4, C)
    assert log_pi.shape == (P * G * K, 1, 1)
    assert metrics["ratio_deviation"] == metrics["from_old"] == 0
    assert metrics["largest_deviation"] > metrics["mean"] > metrics["base"] > 0
    np.testing.assert_array_equal(after.old["B"], adapter["B"])
    assert (after.params["B"] != adapter["B"]).any()
    np.testing.assert_array_equal(refreshed.rolling_out["B"], (after.params["B"] + adapter["B"]) / 2)

    def loss(B):
        """-mean A log pi over candidates and steps: Eq. 5 at the old policy."""
        before, later = states[:, :, :-1], states[:, :, 1:]
        now, then = (x[None, None, :, None, None] for x in (programs.sigmas[:-1], programs.sigmas[1:]))
        v = jnp.tanh(before @ (params["W"] + B)) * (1 + now) - prompts.condition[:, None, None]
        log_pi = -jnp.square(later - before - (then - now) * v).mean((-1, -2)) / (2 * STD**2)
        return -jnp.mean(advantages[:, :, None] * log_pi)

    found = optax.tree.get(after.opt_state, "mu")["B"] / (1 - options.optimizer.b1)
    np.testing.assert_allclose(found, jax.grad(loss)(adapter["B"]), rtol=1e-4, atol=1e-7)


def test_a_configuration_is_held_to_its_policy(monkeypatch):
    anchors = {"surrogate__anchors": 64, "surrogate__micro_batch": 5}  # the first is refused by Neighbour alone
    config = small_run.make_config(policy="toy", rollout__num_steps=1, **anchors)
    with pytest.raises(UsageError, match=r"policy: 'toy' found; one of .*neighbour.* was wanted"):
        validate(config, 1)
    monkeypatch.setitem(policies.POLICIES, "toy", Toy)
    with pytest.raises(UsageError) as error:
        validate(config, 1)
    problems = error.value.problem.removeprefix("config: ").splitlines()
    assert [x.split(":")[0].strip() for x in problems] == [  # what the toy does not read, and what it refuses itself
        "surrogate.distance", "surrogate.anchors", "surrogate.steps", "rollout.num_steps", "surrogate",
    ]  # fmt: skip
    assert problems[1].strip() == (
        "surrogate.anchors: 64 with policy = toy, which does not read it; 4 was wanted, or policy = neighbour"
    )
    assert problems[-1].strip() == (
        "surrogate: units to differentiate = 8 in micro-batches of 5 does not divide over data x fsdp = "
        "1 x 1 = 1 devices"
    )
