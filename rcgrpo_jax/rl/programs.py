"""The programs of one training step: prepare the prompts, explore, roll out, decode, update.

The mathematics is in `method` and `flow`; here it meets the model, the mesh and the optimizer. Samples are (prompt,
candidate) pairs in the rollout and (prompt, anchor[, solver step]) units in the update, both flattened to one axis that
is vmapped and spread over the mesh in micro-batches.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from rcgrpo_jax.editors.flux_kontext import Editor, decode
from rcgrpo_jax.encoding.batches import EditBatch
from rcgrpo_jax.flow import rollout as flow_rollout
from rcgrpo_jax.flow.solver import Velocity, euler_step
from rcgrpo_jax.method import concentration, explore, grpo, region, surrogate
from rcgrpo_jax.models.lora import LoRAConfig, scale_adapter
from rcgrpo_jax.models.mmdit import Condition, sown_density
from rcgrpo_jax.parallel.distributed import put_rows
from rcgrpo_jax.parallel.mesh import SAMPLE_AXES
from rcgrpo_jax.parallel.microbatch import accumulate, map_samples
from rcgrpo_jax.parallel.sharding import replicated
from rcgrpo_jax.rl.config import first_perturbed, num_trained_steps
from rcgrpo_jax.runs.state import TrainState, apply_gradients


class Prompts(NamedTuple):
    """What the device keeps of a batch, one row a prompt."""

    condition: Condition
    text_weights: Float[Array, "P N_txt"]
    region: Float[Array, "P N"]  # M on the token grid: surrogate and ACD
    explored: Float[Array, "P N"]  # M, perhaps dilated: the perturbation


class Exploration(NamedTuple):
    """The random choices of one step."""

    noise: Float[Array, "P G N C"]  # initial noises; candidate 0 is the reference itself, not if kind=global
    anchors: Int[Array, "P B"]  # candidates that serve as anchors
    steps: Int[Array, " T"]  # solver steps that carry the loss, in 1..K


class Rollout(NamedTuple):
    """Candidates under the old parameters."""

    states: Float[Array, "P G K+1 N C"]  # float32: rounded states would break the ratio
    acd: Float[Array, "P G"]  # R_acd; zeros if ACD is off


class Programs:
    """The compiled programs of a run.

    Args:
        config: The run's configuration, validated.
        editor: Model and VAE; only their modules are used, parameters are arguments.
        mesh: The mesh; the programs must be called under `jax.set_mesh(mesh)`.
    """

    def __init__(self, config: ConfigDict, editor: Editor, mesh: Mesh):
        self.config, self.editor, self.mesh = config, editor, mesh
        self.grid = editor.grid(*config.data.size)
        self.sigmas = editor.sigmas(config.rollout.num_steps, self.grid[0] * self.grid[1])
        self.lora_scale = LoRAConfig(**config.lora).scale
        whole = replicated(mesh)
        self.gather_prompts = jax.jit(self._prompts, out_shardings=whole)
        self.explore = jax.jit(self._explore, out_shardings=whole)
        self.rollout = jax.jit(self._rollout, out_shardings=whole)
        self.decode = jax.jit(self._decode, out_shardings=NamedSharding(mesh, PartitionSpec(SAMPLE_AXES)))
        self.update = jax.jit(self._update, out_shardings=whole, donate_argnums=1)

    def prompts(self, batch: EditBatch) -> Prompts:
        """The rows of all processes, on every device; does not wait for them."""
        rows = (batch.text, batch.pooled, batch.reference, batch.text_weights, batch.mask)
        return self.gather_prompts(*put_rows(rows, self.mesh))

    def _prompts(self, text: Array, pooled: Array, reference: Array, text_weights: Array, mask: Array) -> Prompts:
        """A batch with its masks on the token grid."""
        options = {"threshold": self.config.explore.mask_threshold or None}

        def tokens(dilation: int) -> Array:
            return jax.vmap(partial(region.token_mask, grid=self.grid, dilation=dilation, **options))(mask)

        guidance = jnp.full(len(mask), self.config.model.guidance, jnp.float32)
        condition = Condition(text, pooled, reference, guidance)
        return Prompts(condition, text_weights, tokens(0), tokens(self.config.explore.mask_dilation))

    def _explore(self, key: Array, prompts: Prompts) -> Exploration:
        """Initial noises of all groups (Eq. 6 or 10-11), anchors (Section 4.1) and trained steps."""
        options, group = self.config.explore, self.config.rollout.group_size
        num_prompts = prompts.region.shape[0]
        key_reference, key_noise, key_anchors, key_steps = jax.random.split(key, 4)
        references = jax.random.normal(key_reference, prompts.condition.reference.shape, jnp.float32)
        keys = jax.random.split(key_noise, num_prompts)
        alphas = (options.alpha_edit, options.alpha_base)

        def perturb(key: Array, reference: Array, mask: Array) -> Array:
            match options.kind:
                case "global":
                    return explore.neighbour_noise(key, reference, group, options.sigma)
                case "mixed":
                    return explore.mixed_noise(key, reference, mask, group, *alphas, options.sigma)
            return explore.region_decoupled_noise(key, reference, mask, group, *alphas)

        noise = jax.vmap(perturb)(keys, references, prompts.explored)
        anchors = jax.vmap(
            lambda key: explore.sample_anchors(key, group, self.config.surrogate.anchors, first_perturbed(self.config))
        )(jax.random.split(key_anchors, num_prompts))
        return Exploration(noise, anchors, self._trained_steps(key_steps))

    def _trained_steps(self, key: Array) -> Int[Array, " T"]:
        steps = jnp.arange(1, self.config.rollout.num_steps + 1)
        match self.config.surrogate.steps:
            case "early":
                return steps[: num_trained_steps(self.config)]
            case "random":
                return jnp.sort(jax.random.choice(key, steps, (self.config.surrogate.num_random_steps,), replace=False))
        return steps

    def _velocity(self, params: dict, lora: dict, condition: Condition) -> Velocity:
        """`v_theta(., ., c)` of one sample."""
        variables = {"params": params, "lora": lora}
        return lambda x, sigma: self.editor.transformer.apply(variables, x, sigma, condition, self.grid)

    def _velocity_and_density(self, params: dict, lora: dict, prompt: Prompts) -> Any:
        """The velocity beside the ACD of each selected layer (Eq. 17), `[L_sel]`."""
        variables = {"params": params, "lora": lora}
        weights = prompt.text_weights if self.config.acd.text == "instruction" else None

        def apply(x: Array, sigma: Array) -> tuple[Array, Array]:
            v, sown = self.editor.transformer.apply(
                variables, x, sigma, prompt.condition, self.grid, prompt.region, mutable=["intermediates"]
            )
            return v, sown_density(sown["intermediates"], self.config.acd.layers, prompt.region, weights)

        return apply

    def _rollout(self, params: dict, lora: dict, prompts: Prompts, noise: Float[Array, "P g N C"]) -> Rollout:
        """Integrates candidates of every group under the old parameters (Eq. 12) and takes R_acd (Eq. 18)."""
        lora = scale_adapter(lora, self.lora_scale)
        num_prompts, group = noise.shape[:2]

        def candidate(index: Array, noise: Array) -> tuple[Array, Array]:
            prompt = _row(prompts, index)
            if not self.config.acd.weight:
                states = flow_rollout.integrate(self._velocity(params, lora, prompt.condition), noise, self.sigmas)
                return states, jnp.zeros(())
            velocity = self._velocity_and_density(params, lora, prompt)
            states, densities = flow_rollout.integrate_with_aux(velocity, noise, self.sigmas)
            return states, concentration.reward(densities)

        samples = (jnp.repeat(jnp.arange(num_prompts), group), noise.reshape(-1, *noise.shape[2:]))
        states, acd = map_samples(candidate, samples, 0, self.mesh)
        return Rollout(states.reshape(num_prompts, group, *states.shape[1:]), acd.reshape(num_prompts, group))

    def _decode(self, vae_params: dict, tokens: Float[Array, "P g N C"]) -> Float[Array, "Pg H W 3"]:
        """Pictures of final states, in [0, 1] or NaN, each on the device that rolled it out."""
        images = map_samples(
            lambda x: decode(self.editor.vae, vae_params, x, self.grid),
            (tokens.reshape(-1, *tokens.shape[2:]),),
            min(self.config.rollout.decode_micro_batch, math.prod(tokens.shape[:2])),
            self.mesh,
        )
        return jnp.where(jnp.isfinite(images), jnp.clip(images / 2 + 0.5, 0, 1), jnp.nan)

    def units(self, exploration: Exploration) -> tuple[Int[Array, " U"], Int[Array, " U"], Int[Array, "U T"]]:
        """What the update differentiates, one a row: prompt, anchor and the solver steps that are compared.

        With `integrate` a unit is an anchor's whole path; with `replay` it is one solver step of an anchor.
        """
        num_prompts, num_anchors = exploration.anchors.shape
        steps = (
            exploration.steps[None] if self.config.surrogate.anchor_mode == "integrate" else exploration.steps[:, None]
        )
        prompt = jnp.repeat(jnp.arange(num_prompts), num_anchors * len(steps))
        anchor = jnp.repeat(exploration.anchors.reshape(-1), len(steps))
        return prompt, anchor, jnp.tile(steps, (num_prompts * num_anchors, 1))

    def _anchor_states(self, velocity: Velocity, stored: Array, steps: Int[Array, " T"]) -> tuple[Array, Array]:
        """`xbar_s^(k)` under theta, the only path that carries gradient (Eq. 13), before and after the given steps.

        Both are `[T, N, C]`; `stored` `[K+1, N, C]` are the anchor's states in the old rollout.
        """
        sigmas = jnp.asarray(self.sigmas)
        if self.config.surrogate.anchor_mode == "integrate":
            if self.config.surrogate.steps == "early":
                sigmas = sigmas[: len(steps) + 1]  # the later half would be thrown away
            path = flow_rollout.integrate(jax.checkpoint(velocity), stored[0], sigmas)
            return path[steps - 1], path[steps]
        k = steps[0]
        before = stored[k - 1]
        return before[None], euler_step(velocity, before, sigmas[k - 1], sigmas[k])[None]

    def _members(self, prompt: Prompts, group: Array, before: Array, after: Array, steps: Array) -> Array:
        """What the policy is over: the group after the given steps, and the source if it has an advantage (ours).

        Args:
            prompt: One row.
            group: `[T, G, N, C]`.
            before, after: The anchor's states around each step, `[T, N, C]`.
            steps: `[T]`.

        Returns:
            `[T, G, N, C]`, or `[T, G + 1, N, C]` with the source last.
        """
        if not self.config.objective.source_advantage:
            return group
        sigmas = jnp.asarray(self.sigmas)
        shrink = sigmas[steps] / sigmas[steps - 1]
        source = surrogate.source_candidate(before, after, shrink, prompt.condition.reference, prompt.region)
        return jnp.concatenate([group, source[:, None]], axis=1)

    def _unit_loss(
        self, lora: dict, params: dict, prompts: Prompts, states: Array, advantages: Array, unit: tuple, first: Array
    ) -> tuple[Array, tuple[Array, dict]]:
        """`-J` of one unit (Eq. 5, 14, 15), 0 if its group teaches nothing, with its log-policy and metrics."""
        index, anchor_index, steps, log_old = unit
        options, objective = self.config.surrogate, self.config.objective
        advantage = advantages[index]
        taught = jnp.any(advantage != 0)  # dropped groups and those of equal rewards do not

        def finite(x: Array) -> Array:
            # Before the loss, not only around it: the gradient of what has diverged is zero times NaN, which is NaN.
            return jnp.where(taught, x, 0)

        prompt = jax.tree.map(finite, _row(prompts, index))
        stored = finite(states[index, anchor_index])  # [K+1, N, C]
        group = finite(states[index, :, steps])  # [T, G, N, C]
        velocity = self._velocity(params, scale_adapter(lora, self.lora_scale), prompt.condition)
        before, anchor = self._anchor_states(velocity, stored, steps)
        members = self._members(prompt, group, before, anchor, steps)
        distance = surrogate.distance_function(options.distance, prompt.region, options.tau_edit, options.tau_base)
        temperature = 1.0
        if options.weighting == "policy":
            old = self._members(prompt, group, stored[steps - 1], stored[steps], steps)
            distances = distance(old, stored[steps][:, None])
            temperature = surrogate.calibrated_temperature(distances, options.target_entropy)
        log_pi = surrogate.anchor_log_policy(anchor, members, distance, temperature)
        # The first update compares the policy with itself.
        log_ratio = jnp.where(first, surrogate.log_ratio_to_itself(log_pi), log_pi - log_old)
        log_old = jnp.where(first, jax.lax.stop_gradient(log_pi), log_old)
        weights = None  # 1 / G each
        if objective.source_advantage:
            advantage = jnp.append(advantage, objective.source_advantage)
            weights = jnp.full_like(log_pi, 1 / group.shape[1])  # 1 / G still: the source takes nothing from the others
        if options.weighting == "policy":
            weights = jnp.exp(log_old)
        gain = grpo.clipped_objective(log_ratio, advantage[None], objective.clip, weights)
        kl = grpo.categorical_kl(log_old, log_pi).mean()
        metrics = {
            "ratio_mean": jnp.exp(jnp.minimum(log_ratio, grpo.MAX_LOG_RATIO)).mean(),
            "ratio_deviation": jnp.abs(jnp.expm1(jnp.minimum(log_ratio, grpo.MAX_LOG_RATIO))).max(),
            "clip_fraction": grpo.clip_fraction(log_ratio, objective.clip),
            "kl": kl,
            "policy_entropy": -(jnp.exp(log_old) * log_old).sum(-1).mean(),
        }
        if objective.source_advantage:
            metrics["source_distance"] = distance(anchor, members[:, -1]).mean()
        return jnp.where(taught, objective.kl_weight * kl - gain, 0.0), (log_pi, metrics)

    def _update(
        self,
        params: dict,
        state: TrainState,
        prompts: Prompts,
        exploration: Exploration,
        rollout: Rollout,
        advantages: Float[Array, "P G"],
        log_old: Float[Array, "U T G"],
        first: Array,
    ) -> tuple[TrainState, Float[Array, "U T G"], dict]:
        """One optimizer update on a rollout.

        Args:
            params: Frozen base.
            state: Donated.
            prompts, exploration, rollout: The step's data.
            advantages: `[P, G]`.
            log_old: The first update's log-policy; ignored on the first.
            first: Whether this is the first update after the rollout.

        Returns:
            The new state, this update's log-policy, and metrics.
        """

        def chunk_loss(lora: dict, *chunk: Array) -> tuple[Array, tuple]:
            one = partial(self._unit_loss, lora, params, prompts, rollout.states, advantages)
            losses, aux = jax.vmap(lambda *unit: one(unit, first), spmd_axis_name=SAMPLE_AXES)(*chunk)
            return losses.mean(), (losses, *aux)

        def gradients(*chunk: Array) -> tuple[dict, tuple]:
            return jax.grad(chunk_loss, has_aux=True)(state.params, *chunk)

        units = (*self.units(exploration), log_old)
        grads, (losses, log_pi, metrics) = accumulate(gradients, units, self.config.surrogate.micro_batch, self.mesh)
        updated = apply_gradients(state, grads, self.config.optimizer)
        taught = jnp.any(advantages != 0, axis=-1)[units[0]]  # [U]
        learned = taught.any()  # else momentum and weight decay would move the adapter all the same
        state = jax.tree.map(partial(jnp.where, learned), updated, state)
        scalars = {name: jnp.mean(x, where=taught) for name, x in metrics.items()}  # NaN if nothing teaches
        scalars["ratio_deviation"] = jnp.max(metrics["ratio_deviation"], where=taught, initial=0.0)
        scalars |= {"loss": losses.mean(), "grad_norm": optax.tree.norm(grads)}
        return state, log_pi, scalars

    def log_policy_shape(self) -> tuple[int, int, int]:
        """(units, steps of a unit, G or with the source G + 1), the shape of `log_old`."""
        anchors = self.config.rollout.prompts * self.config.surrogate.anchors
        members = self.config.rollout.group_size + bool(self.config.objective.source_advantage)
        trained, replay = num_trained_steps(self.config), self.config.surrogate.anchor_mode == "replay"
        return (anchors * trained, 1, members) if replay else (anchors, trained, members)


def _row(prompts: Prompts, index: Array) -> Prompts:
    return jax.tree.map(lambda x: x[index], prompts)
