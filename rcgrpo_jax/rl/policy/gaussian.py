"""Policies of stochastic samplers: Flow-GRPO, Flow-GRPO-Fast, Flow-CPS, DanceGRPO, MixGRPO, and noise by region."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt32

from rcgrpo_jax.editors.base import Networks
from rcgrpo_jax.flow import sde
from rcgrpo_jax.flow.solvers.base import VelocityWithAux, scan_steps
from rcgrpo_jax.flow.solvers.dpmpp_2m import dpmpp_2m_step, multistep_weights
from rcgrpo_jax.method import explore, gaussian, grpo, window
from rcgrpo_jax.rl.options import SDEOptions, StepOptions
from rcgrpo_jax.rl.policy import likelihood
from rcgrpo_jax.rl.policy.base import Prompts, Velocities
from rcgrpo_jax.rl.policy.noise import initial_noise
from rcgrpo_jax.runs.state import TrainState


class Candidates(NamedTuple):
    """What a candidate's rollout starts from. Its noise follows from key, index and step, whoever else is beside it."""

    noise: Float[Array, "P G N C"]  # at sigma = 1
    key: UInt32[Array, "P G ..."]  # data of the random key of its group
    index: Int[Array, "P G"]  # in its group
    start: Int[Array, "P G"]  # the first random step, counted from 0: one for the whole batch


class Exploration(NamedTuple):
    """The random choices of one step."""

    candidates: Candidates


class StoredStates(NamedTuple):
    """What a unit reads of the rollout: the states around its step."""

    before: Float[Array, "N C"]
    after: Float[Array, "N C"]


class Gaussian:
    """Within a window of steps the next state is drawn from `N(mean, S^2 I)`, whose likelihood gives the ratio.

    A unit is (prompt, candidate, step of the window). The KL is to the base model, without an adapter. Steps outside
    the window are Euler's; with `rollout.solver=dpmpp_2m` those after it are 2M's, whose memory starts there.
    """

    OWN = ("sde", "objective.clip")
    keeps_old = False

    def __init__(self, options: StepOptions, networks: Networks, sigmas: Float[Array, " K+1"]):
        self.options, self.networks, self.sigmas = options, networks, np.asarray(sigmas)
        self.size = window_size(options)
        self.kappa, self.std = sde.coefficients(options.sde.kind, self.sigmas, options.sde.level)
        weights = multistep_weights(self.sigmas)
        self.weights = weights if options.rollout.solver == "dpmpp_2m" else np.zeros_like(weights)

    @staticmethod
    def problems(options: StepOptions) -> list[str]:
        """As `Policy.problems`."""
        settings, k = options.sde, options.rollout.num_steps
        if k < 2:
            return [f"rollout.num_steps: {k} with policy = gaussian; 2 or more were wanted: the last is never random"]
        problems = _window_problems(settings, k) + _unread_problems(settings)
        highest = sde.KINDS[settings.kind].highest_level
        if not 0 < settings.level <= highest:
            allowed = "above 0" if highest == np.inf else f"above 0, at most {highest:g},"
            problems.append(
                f"sde.level: {settings.level} with sde.kind = {settings.kind}; a number {allowed} was wanted"
            )
        if settings.log_prob == "published" and settings.kind != "cps":
            problems.append(
                f"sde.log_prob: published with sde.kind = {settings.kind}, which is published with the density; "
                "density was wanted, or sde.kind = cps"
            )
        if settings.noise == "region" and not options.explore.alpha_edit and not options.explore.alpha_base:
            problems.append(
                "sde.noise: region with explore.alpha_edit = explore.alpha_base = 0, so that all candidates have the "
                "same noise; an alpha above 0 was wanted, or sde.noise = independent"
            )
        return problems + _solver_problems(options)

    @staticmethod
    def num_units(options: StepOptions) -> int:
        """P G w."""
        return options.rollout.prompts * options.rollout.group_size * window_size(options)

    @staticmethod
    def num_evaluations(options: StepOptions) -> int:
        """One a unit."""
        return Gaussian.num_units(options)

    @staticmethod
    def num_forwards(options: StepOptions) -> int:
        """One a unit for the KL to the base, if it has a weight."""
        return Gaussian.num_units(options) if options.objective.kl_weight else 0

    def explore(self, key: PRNGKeyArray, prompts: Prompts, step: Int[Array, ""]) -> Exploration:
        """Initial noises, the keys of the noises of the steps, and where the window is."""
        *key_noise, key_steps, key_window = jax.random.split(key, 4)
        noise = initial_noise(key_noise, prompts, self.networks, self.options)
        shape = noise.shape[:2]
        keys = jax.random.key_data(jax.random.split(key_steps, shape[0]))  # as numbers: these are split and laid out
        keys = jnp.broadcast_to(keys[:, None], (*shape, *keys.shape[1:]))
        index = jnp.broadcast_to(jnp.arange(shape[1])[None], shape)
        return Exploration(
            Candidates(noise, keys, index, jnp.broadcast_to(self._window_start(key_window, step), shape))
        )

    def _window_start(self, key: PRNGKeyArray, step: Int[Array, ""]) -> Int[Array, ""]:
        settings, k = self.options.sde, self.options.rollout.num_steps
        if settings.place == "random":
            return window.random_start(key, self.size, *_range(settings, k))
        return window.progressive_start(jnp.asarray(step), self.size, k, settings.interval, settings.stride)

    def rollout(
        self, velocity: VelocityWithAux, prompt: Prompts, candidate: Candidates
    ) -> tuple[Float[Array, "K+1 N C"], Any]:
        """Random steps in the window, and the run's solver outside of it."""
        past = candidate.start + self.size

        def step(
            x: Array, memory: Any, sigma: Array, sigma_next: Array, kappa: Array, std: Array, weight: Array
        ) -> Any:
            k, data_before = memory
            v, aux = velocity(x, sigma)
            weight = jnp.where(k > past, weight, 0)  # the jump of a random step is no derivative
            solved, data, _ = dpmpp_2m_step(lambda *_: (v, None), x, sigma, sigma_next, weight, data_before)
            drawn = sde.step(v, x, sigma, sigma_next, kappa, std, self._step_noise(prompt, candidate, k))
            return jnp.where(window.covers(k, candidate.start, self.size), drawn, solved), (k + 1, data), aux

        start = candidate.noise, (jnp.zeros((), jnp.int32), candidate.noise)
        return scan_steps(step, *start, self.sigmas, self.kappa, self.std, self.weights)

    def _step_noise(self, prompt: Prompts, candidate: Candidates, k: Int[Array, ""]) -> Float[Array, "N C"]:
        """z of a candidate's step, from N(0, I)."""
        key, settings = jax.random.wrap_key_data(candidate.key), self.options.explore

        def draw(whose: Array | int) -> Array:
            of_step = jax.random.fold_in(jax.random.fold_in(key, whose), k)
            return jax.random.normal(of_step, candidate.noise.shape, jnp.float32)

        own = draw(candidate.index + 1)
        if self.options.sde.noise == "independent":
            return own
        alphas = settings.alpha_edit, settings.alpha_base
        return explore.region_decoupled_step_noise(draw(0), own, prompt.explored, *alphas)

    def units(self, exploration: Exploration) -> tuple[Int[Array, " U"], Int[Array, " U"], Int[Array, " U"]]:
        """Prompt, candidate and solver step, counted from 0, of each unit."""
        start = exploration.candidates.start
        axes = *(jnp.arange(count) for count in start.shape), start[0, 0] + jnp.arange(self.size)
        prompt, candidate, k = (x.reshape(-1) for x in jnp.meshgrid(*axes, indexing="ij"))
        return prompt, candidate, k

    def kept_shape(self) -> tuple[int, int, int]:
        """Of `log pi_old`: (units, 1, 1)."""
        return self.num_units(self.options), 1, 1

    def read(self, states: Float[Array, "P G K+1 N C"], unit: tuple[Array, Array, Array]) -> StoredStates:
        """The candidate's states around the step."""
        prompt, candidate, k = unit
        return StoredStates(states[prompt, candidate, k], states[prompt, candidate, k + 1])

    def loss(
        self,
        velocities: Velocities,
        prompt: Prompts,
        stored: StoredStates,
        unit: tuple[Array, Array, Array],
        advantages: Float[Array, " G"],
        log_old: Float[Array, "1 1"],
        first: Bool[Array, ""],
    ) -> tuple[Float[Array, ""], Float[Array, "1 1"], dict[str, Array]]:
        """`-min(A rho, A clip(rho, 1 - c, 1 + c)) + beta KL` of one step, its log-probability and metrics."""
        objective, (_, candidate, k) = self.options.objective, unit
        sigma, sigma_next, kappa, std = (
            jnp.asarray(x, jnp.float32)[k] for x in (self.sigmas[:-1], self.sigmas[1:], self.kappa, self.std)
        )

        def mean(velocity: Any) -> Array:
            return sde.mean(velocity(stored.before, sigma), stored.before, sigma, sigma_next, kappa)

        of_theta = mean(velocities.theta)
        log_pi = gaussian.LOG_PROBS[self.options.sde.log_prob](stored.after, of_theta, std)[None, None]
        log_ratio, _ = likelihood.log_ratio(log_pi, log_old, first)
        metrics = likelihood.ratio_metrics(log_ratio, objective.clip) | {"random_step": k + 1.0}
        loss = -grpo.clipped_objective(log_ratio, advantages[candidate][None, None], objective.clip)
        if objective.kl_weight:
            metrics["kl"] = gaussian.kl(of_theta, jax.lax.stop_gradient(mean(velocities.base)), std)
            loss += objective.kl_weight * metrics["kl"]
        return loss, log_pi, metrics

    def refresh(self, state: TrainState) -> TrainState:
        """As it is: the trained adapter rolls out."""
        return state


def window_size(options: StepOptions) -> int:
    """w, how many of the K steps are random."""
    return options.sde.window or options.rollout.num_steps - 1


def _range(settings: SDEOptions, num_steps: int) -> tuple[int, int]:
    """The steps that a random window lies in, [start, end)."""
    return settings.range_start, settings.range_end or num_steps - 1


def _window_problems(settings: SDEOptions, k: int) -> list[str]:
    """What is wrong with size and range of the window for K steps."""
    if settings.window > k - 1:
        return [
            f"sde.window: {settings.window} of rollout.num_steps = {k}; at most {k - 1} was wanted: the last is never "
            "random"
        ]
    start, end = _range(settings, k)
    if settings.window and settings.place == "random" and not start + settings.window <= end <= k - 1:
        return [
            f"sde.range_start, sde.range_end: [{start}, {end}) with sde.window = {settings.window} and "
            f"rollout.num_steps = {k}; room for the window in steps [0, {k - 1}) was wanted"
        ]
    return []


def _unread_problems(settings: SDEOptions) -> list[str]:
    """Fields of the window that have been set, and are not read beside the others."""
    moved, drawn, default = ("interval", "stride"), ("range_start", "range_end"), SDEOptions()
    if not settings.window:
        unread, why = ("place", *moved, *drawn), "sde.window = 0"
    elif settings.place == "random":
        unread, why = moved, "sde.place = random"
    else:
        unread, why = drawn, f"sde.place = {settings.place}"
    return [
        f"sde.{field}: {found!r} with {why}, which does not read it; {getattr(default, field)!r} was wanted"
        for field in unread
        if (found := getattr(settings, field)) != getattr(default, field)
    ]


def _solver_problems(options: StepOptions) -> list[str]:
    """What is wrong with the solver of the steps after the window."""
    solver, k, size = options.rollout.solver, options.rollout.num_steps, window_size(options)
    if solver not in ("euler", "dpmpp_2m"):
        return [f"rollout.solver: {solver} with policy = gaussian; euler or dpmpp_2m was wanted"]
    first = options.sde.range_start if options.sde.place == "random" else 0
    if solver == "dpmpp_2m" and first + size + 3 > k:  # the first after the window, and the last, are Euler's
        return [
            f"rollout.solver: dpmpp_2m with rollout.num_steps = {k} and {size} random steps, after which none is left "
            "for it; three or more after the window were wanted, or euler"
        ]
    return []
