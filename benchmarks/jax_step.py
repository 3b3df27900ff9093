"""The step as `rcgrpo train` runs it: the programs of `rl.programs`, with the arguments that its loop gives them."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array

from benchmarks.presets import Preset, inputs, offset_and_scale, pseudorandom, seed_of
from benchmarks.worker import MATMUL, best_rate
from rcgrpo_jax.editors.open import open_model
from rcgrpo_jax.errors import UserError
from rcgrpo_jax.models.config import MMDiTConfig, VAEConfig
from rcgrpo_jax.models.mmdit import Condition
from rcgrpo_jax.options import read_options, with_changes
from rcgrpo_jax.parallel.mesh import make_mesh
from rcgrpo_jax.parallel.sharding import replicated
from rcgrpo_jax.plan import flops
from rcgrpo_jax.plan.chips import chip_of
from rcgrpo_jax.plan.programs import FluxKontextDev, counts
from rcgrpo_jax.rl.options import Options
from rcgrpo_jax.rl.parts import join, split_groups
from rcgrpo_jax.rl.policy.base import Prompts, Rollout
from rcgrpo_jax.rl.policy.neighbour import Exploration
from rcgrpo_jax.rl.programs import Programs
from rcgrpo_jax.rl.setup import fresh_state
from rcgrpo_jax.runs.model import load_editor
from rcgrpo_jax.weights.keymap import diffusers_key, is_stacked
from rcgrpo_jax.weights.load import ShardingOf
from rcgrpo_jax.weights.networks import abstract_params


class Step:
    """The step of a preset, on the first device.

    Args:
        preset: What to run.

    Raises:
        UserError: If the preset needs a GPU and there is none.
    """

    def __init__(self, preset: Preset):
        self.options, self.sizes = read_options(Options, preset.config), preset.transformer
        self.device = jax.devices()[0]
        if preset.alone and self.device.platform != "gpu":
            raise UserError(f"{preset.name} needs a GPU; JAX found {self.device.platform}.", "Install jax[cuda12].")
        if self.options.model.dtype == "float32":
            jax.config.update("jax_default_matmul_precision", "highest")  # torch's default; a GPU's is lower
        self.mesh = make_mesh(vars(self.options.mesh), [self.device])
        model = RandomModel(preset.model) if preset.model else open_model(self.options.model.path)
        editor = load_editor(self.options.model, model, self.mesh, self.options.acd.layers)
        with jax.set_mesh(self.mesh):
            self.programs = Programs(self.options.step, editor.networks, self.mesh)
            self.params = editor.params
            state = fresh_state(self.options, model, self.mesh)
            self.state = state.replace(params=random_tree(state.params, jnp.float32, lambda *_: replicated(self.mesh)))
            given = jax.device_put(inputs(preset), replicated(self.mesh))
        dtype, guidance = jnp.dtype(self.options.model.dtype), jnp.full(len(given["text"]), self.options.model.guidance)
        texts = given["text"].astype(dtype), given["pooled"].astype(dtype)
        prompts = Prompts(
            Condition(*texts, given["reference"], guidance),
            jnp.ones(given["text"].shape[:2]), given["region"], given["region"],
        )  # fmt: skip
        self.prompts = jax.device_put(prompts, replicated(self.mesh))
        self.exploration = Exploration(given["noise"], given["anchors"], given["steps"])
        self.given = Rollout(given["states"], jnp.zeros(given["advantages"].shape))
        self.objective = given["advantages"], given["log_old"], jnp.asarray(False)

    def rollout(self) -> None:
        """All candidates, as `rl.trainer.Trainer.sample` rolls them out."""
        options = self.options.rollout
        at_a_time = options.micro_batch // options.prompts or options.group_size
        with jax.set_mesh(self.mesh):
            noises = split_groups(self.exploration.candidates, at_a_time)
            parts = [self.programs.rollout(self.params, self.state.params, self.prompts, noise) for noise in noises]
            self.rolled_out = jax.block_until_ready(join(*parts))

    def update(self) -> None:
        """One optimizer update, on given states: what a rollout's rounding does to them is not part of it."""
        data = self.prompts, self.exploration, self.given
        with jax.set_mesh(self.mesh):
            self.state, *self.updated = self.programs.update(self.params, self.state, *data, *self.objective)
            jax.block_until_ready(self.state)

    def results(self) -> dict[str, np.ndarray]:
        """What the first step computes; its gradient g is read from Adam's first moment, then `(1 - b1) g`."""
        self.rollout()
        self.update()
        states, sigmas = np.asarray(self.rolled_out.states), np.asarray(self.programs.sigmas)
        log_policy, metrics = self.updated
        moment = flatten_dict(optax.tree.get(self.state.opt_state, "mu"))
        gradient = {}
        for path, leaf in moment.items():
            for key, part in zip(keys(path, leaf.shape), np.asarray(leaf), strict=True):
                gradient[key] = part.T / np.float32(1 - self.options.optimizer.b1)
        return {
            "velocity": (states[:, :, 1] - states[:, :, 0]) / (sigmas[1] - sigmas[0]),
            "sample": states[:, :, -1],
            "acd": np.asarray(self.rolled_out.acd),
            "log_policy": np.asarray(log_policy)[:, 0],
            "loss": np.asarray(metrics["loss"])[None],
            "gradient": np.concatenate([gradient[key].ravel() for key in sorted(gradient)]),
        }

    def about(self) -> dict:
        """Device, versions and FLOPs, and the device's peak by data sheet if it is listed."""
        text, target = self.options.model.max_text_tokens, self.exploration.noise.shape[2]
        # What checkpointing repeats is no work of the model's.
        once = with_changes(self.options, {"model.remat": "none"})
        dtype, chip = jnp.dtype(self.options.model.dtype), chip_of(self.device.device_kind)
        attention = self.programs.networks.transformer.attention.implementation
        return {
            "platform": self.device.platform,
            "device": self.device.device_kind,
            "software": f"jax {jax.__version__}, attention {attention}",
            "tokens": text + 2 * target,
            "samples": dict(zip(("rollout", "update"), counts(self.options), strict=True)),
            "flops": flops.step(once, self.sizes, VAEConfig(), text, target),
            "stated_peak": chip.flops if chip and dtype.itemsize == 2 else None,
        }

    def peak(self) -> float:
        """FLOP/s of a large matrix product."""
        side = MATMUL[self.device.platform]
        x = jnp.full((side, side), 0.5, self.options.model.dtype)
        multiply = jax.jit(jnp.matmul)
        return best_rate(lambda: jax.block_until_ready(multiply(x, x)), side)


class RandomModel(FluxKontextDev):
    """A folder of FLUX with a transformer without files, whose weights are `pseudorandom`."""

    def __init__(self, transformer: MMDiTConfig):
        super().__init__()
        self.transformer = transformer

    def config(self, name: str) -> MMDiTConfig | VAEConfig:
        return self.transformer if name == "transformer" else super().config(name)

    def load(self, name: str, dtype: Any, sharding_of: ShardingOf, quantization: str) -> dict:
        return random_tree(abstract_params(name, self.config(name)), dtype, sharding_of)


def keys(path: tuple[str, ...], shape: tuple[int, ...]) -> list[str]:
    """diffusers' keys of a leaf, one a layer."""
    module, name = (path, "") if path[-1] not in "AB" else (path[:-1], f".lora_{path[-1]}.weight")
    return [diffusers_key(module, i) + name for i in (range(shape[0]) if is_stacked(path) else [None])]


def random_tree(shapes: dict, dtype: jnp.dtype, sharding_of: ShardingOf) -> dict:
    """A parameter tree by `pseudorandom`, made on the device leaf by leaf."""

    @partial(jax.jit, static_argnums=(1, 2, 3, 4))
    def draw(seeds: Array, shape: tuple[int, ...], stacked: bool, offset: float, scale: float) -> Array:
        one = shape[1:] if stacked else shape
        index = jnp.arange(np.prod(one), dtype=jnp.int32).reshape(one[::-1]).T
        values = jax.vmap(lambda seed: pseudorandom(index, seed))(seeds).astype(jnp.float32)
        return (jnp.float32(offset) + jnp.float32(scale) * values).astype(dtype).reshape(shape)

    tree = {}
    for path, leaf in flatten_dict(shapes).items():
        names, stacked = keys(path, leaf.shape), is_stacked(path)
        seeds = jnp.asarray([seed_of(name) for name in names], jnp.int32)
        one = leaf.shape[1:] if stacked else leaf.shape
        drawn = draw(seeds, leaf.shape, stacked, *offset_and_scale(names[0], one[::-1]))
        tree[path] = jax.device_put(drawn, sharding_of(path, leaf.shape))
    return unflatten_dict(tree)
