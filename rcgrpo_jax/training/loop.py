"""`rcgrpo train`: from a configuration to checkpoints, metrics and image grids. Reads from top to bottom."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rcgrpo_jax import rewards as reward_registry
from rcgrpo_jax.data.example import EditExample
from rcgrpo_jax.data.images import save_image
from rcgrpo_jax.data.pipeline import Batches, EditBatch, EncodedSource
from rcgrpo_jax.data.sources import open_source
from rcgrpo_jax.editor import Editor
from rcgrpo_jax.errors import UsageError, UserError
from rcgrpo_jax.method import grpo
from rcgrpo_jax.models.lora import target_kernels
from rcgrpo_jax.models.mmdit import AttentionOptions
from rcgrpo_jax.parallel.mesh import make_mesh
from rcgrpo_jax.parallel.sharding import parameter_sharding, replicated
from rcgrpo_jax.training.checkpoint import Checkpointer, check_same_config
from rcgrpo_jax.training.config import MAY_DIFFER, validate
from rcgrpo_jax.training.grid import GridRow, comparison_grid
from rcgrpo_jax.training.metrics import MetricsWriter, Progress, check_finite
from rcgrpo_jax.training.state import TrainState, init_state
from rcgrpo_jax.training.step import Programs, Rollout
from rcgrpo_jax.weights.load import ModelFolder
from rcgrpo_jax.weights.networks import abstract_params

logger = logging.getLogger(__name__)


def train(config: ConfigDict, workdir: str | Path, devices: list[jax.Device] | None = None) -> TrainState:
    """Post-trains a LoRA; called again on the same `workdir` it goes on from the last checkpoint.

    `workdir` receives `checkpoints/`, `metrics.jsonl`, `tensorboard/`, `images/` and (by default) `cache/`. SIGTERM
    saves a checkpoint and returns.

    Args:
        config: As `training.config.default_config` lays it out.
        workdir: Directory of the run; created if missing.
        devices: Devices of the mesh; all by default.

    Returns:
        The last state.

    Raises:
        UserError: For every mistake in configuration, model, data or resume that can be told.
    """
    workdir = Path(workdir)
    devices = jax.devices() if devices is None else devices
    validate(config, len(devices))
    mesh = make_mesh(config.mesh, devices)
    rewards = {name: reward_registry.make(name) for name, weight in config.rewards.items() if weight}
    folder = ModelFolder(config.model.path)
    check_model_fits(config, folder)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"workdir: {workdir} cannot be made ({error}).", "Choose a folder you can write to.") from None
    with (
        jax.set_mesh(mesh),
        Checkpointer(
            workdir / "checkpoints", save_every=config.train.save_every, keep=config.train.keep
        ) as checkpointer,
    ):
        saved = checkpointer.latest_step()
        described = config.to_dict()
        if saved is not None:  # before the data are encoded, which may take long
            check_same_config(checkpointer.saved_config(), described, (*MAY_DIFFER, "data_digest"))
        batches = encode(config, folder, workdir, rewards, mesh)
        described["data_digest"] = batches.source.digest
        state = init_state(config, abstract_params("transformer", folder.config("transformer")))
        state = jax.device_put(state, replicated(mesh))
        if saved is not None:
            check_same_config(checkpointer.saved_config(), described, MAY_DIFFER)
            state = checkpointer.restore(state)
            logger.warning("resuming from step %d of %s", saved, checkpointer.directory)
        if (first := int(state.step)) >= config.train.num_steps:
            logger.warning("nothing to do: train.num_steps is %d", config.train.num_steps)
            return state
        editor = Editor(
            folder,
            jnp.dtype(config.model.dtype),
            sharding_of=parameter_sharding(mesh),
            remat=config.model.remat,
            attention=AttentionOptions(
                config.model.attention, config.acd.layers, acd_reference_keys=config.acd.reference_keys
            ),
        )
        trainer = Trainer(config, editor, mesh, rewards)
        with (
            MetricsWriter(workdir, resume_step=first) as writer,
            Progress(config.train.num_steps, first, "train") as progress,
            termination() as stop,
        ):
            for step in range(first, config.train.num_steps):
                draw = (step + 1) % config.train.image_every == 0 or step + 1 == config.train.num_steps
                state, metrics, rows = trainer.step(state, batches[step], draw)
                check_finite(metrics, step + 1)  # before saving: a lost run must not replace a good checkpoint
                writer.scalars(step + 1, metrics)
                if draw:
                    grid = comparison_grid(rows, f"step {step + 1}")
                    save_image(workdir / "images" / f"step_{step + 1:06d}.png", grid)
                    writer.images(step + 1, {"candidates": grid})
                last = step + 1 == config.train.num_steps or stop.is_set()
                checkpointer.save(step + 1, state, described, force=last)
                shown = {name.removeprefix("reward/"): x for name, x in metrics.items() if name.startswith("reward/")}
                progress.update(shown, samples=config.rollout.prompts * config.rollout.group_size)
                if stop.is_set():
                    logger.warning("stopped at step %d on request; the same command resumes", step + 1)
                    break
            checkpointer.wait()
    return state


def check_model_fits(config: ConfigDict, folder: ModelFolder) -> None:
    """Refuses settings that the model at hand cannot serve, before any weight is read."""
    blocks = folder.config("transformer").num_blocks
    if config.acd.weight and config.acd.layers > blocks:
        raise UsageError(
            f"config: acd.layers: {config.acd.layers}; the model has {blocks} blocks.", "Lower acd.layers."
        )
    downscale = 2 * folder.config("vae").downscale
    if any(side % downscale for side in config.data.size):
        raise UsageError(
            f"config: data.size: {tuple(config.data.size)}; this model's tokens are {downscale} pixels a side.",
            f"Choose multiples of {downscale}.",
        )
    target_kernels(abstract_params("transformer", folder.config("transformer")), config.lora.targets)


def encode(config: ConfigDict, folder: ModelFolder, workdir: Path, rewards: dict, mesh: Mesh) -> Batches:
    """Runs the encoders over the data, once; they are freed before the transformer is loaded."""
    source = open_source(config.data.path, config.data.polarity)

    def check(example: EditExample) -> None:
        for name, reward in rewards.items():
            reward.validate(example.instruction)
            if getattr(reward, "needs_target", False) and example.target is None:
                raise UserError(
                    f"{example.name}: no target image; the reward {name!r} compares with one.",
                    f"Add targets, or set --config.rewards.{name}=0.",
                )

    with Progress(len(source), description="encode", lines=10) as progress:
        encoded = EncodedSource(
            source,
            Editor(folder, jnp.dtype(config.model.dtype), config.model.max_text_tokens, parameter_sharding(mesh)),
            tuple(config.data.size),
            config.data.cache or workdir / "cache",
            check,
            lambda done, _: progress.update(),
        )
    return Batches(encoded, config.rollout.prompts, config.seed)


@contextmanager
def termination() -> Iterator[threading.Event]:
    """An event that SIGTERM sets (preemption, `kill`): the step under way is finished and saved."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # signals belong to the main thread
        yield stop
        return
    before = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)


class Trainer:
    """Model, programs and rewards of a run; `step` is one step of Section 4.

    Args:
        config: The run's configuration.
        editor: Transformer and VAE, loaded onto the mesh.
        mesh: The mesh.
        rewards: Name -> reward.
    """

    def __init__(self, config: ConfigDict, editor: Editor, mesh: Mesh, rewards: dict):
        self.config, self.rewards = config, rewards
        self.params = editor.transformer_params
        self.decoder = {"decoder": editor.vae_params["decoder"]}
        self.programs = Programs(config, editor, mesh)
        self.weights = {name: float(config.rewards[name]) for name in rewards}
        if config.acd.weight:
            self.weights["acd"] = float(config.acd.weight)

    def step(
        self, state: TrainState, batch: EditBatch, draw: bool = False
    ) -> tuple[TrainState, dict[str, float], list[GridRow]]:
        """Explore, roll out, score, update.

        Args:
            state: Donated.
            batch: The prompts.
            draw: Whether to return rows for the image grid.

        Returns:
            The new state, metrics, and the rows.
        """
        programs, times = self.programs, [time.monotonic()]
        prompts = programs.prompts(batch)
        exploration = programs.explore(jax.random.fold_in(state.key, state.step), prompts)
        rollout = programs.rollout(self.params, state.lora, prompts, exploration.noise)
        images = programs.decode(self.decoder, rollout.states[:, :, -1])
        images.block_until_ready()
        times.append(time.monotonic())

        scores = self.score(batch, images, rollout)
        total = grpo.combine_rewards(scores, self.weights)
        advantages = grpo.group_advantages(
            total, self.config.objective.advantage_clip, self.config.objective.quasi_norm or None
        )
        rows = grid_rows(batch, images, scores) if draw else []
        measured = reward_metrics(scores, total) | drift_metrics(batch, images)
        del images  # at full size these are gigabytes, and the update needs the room
        times.append(time.monotonic())

        log_old = jnp.zeros(programs.log_policy_shape(), jnp.float32)
        for update in range(self.config.objective.updates):
            state, log_pi, metrics = programs.update(
                self.params, state, prompts, exploration, rollout, advantages, log_old, jnp.asarray(update == 0)
            )
            log_old = log_pi if update == 0 else log_old
        state = state.replace(step=state.step + 1)
        metrics = {name: float(x) for name, x in metrics.items()}
        times.append(time.monotonic())

        metrics |= measured
        metrics |= {f"seconds/{name}": b - a for name, a, b in zip(("rollout", "reward", "update"), times, times[1:])}  # noqa: B905
        metrics["samples_per_second"] = total.size / (times[-1] - times[0])
        return state, metrics, rows

    def score(self, batch: EditBatch, images: jax.Array, rollout: Rollout) -> dict[str, np.ndarray]:
        """Every reward of every candidate, `[P, G]` each; NaN where one could not be scored."""
        source = jnp.asarray(batch.pixels, jnp.float32) / 255
        targets = None if batch.targets is None else jnp.asarray(batch.targets, jnp.float32) / 255
        inputs = reward_registry.RewardInputs(
            source, images, jnp.asarray(batch.mask), batch.instructions, targets=targets
        )
        scores = reward_registry.score_all(self.rewards, inputs)
        if "acd" in self.weights:
            scores["acd"] = np.asarray(rollout.acd)
        return scores


def reward_metrics(scores: dict[str, np.ndarray], total: jax.Array) -> dict[str, float]:
    """Mean and mean within-group std of each reward as it came, and the groups that teach nothing."""
    metrics = {}
    for name, score in scores.items():
        kept = score[np.isfinite(score).all(axis=-1)]
        metrics[f"reward/{name}"] = float(kept.mean()) if kept.size else float("nan")
        metrics[f"reward_std/{name}"] = float(kept.std(axis=-1).mean()) if kept.size else float("nan")
    finite = np.isfinite(np.asarray(total)).all(axis=-1)
    metrics["reward_std/total"] = float(np.asarray(total)[finite].std(axis=-1).mean()) if finite.any() else float("nan")
    metrics["groups/zero_std"] = float(grpo.zero_std_groups(total).sum())
    metrics["groups/dropped"] = float((~finite).sum())
    return metrics


@jax.jit
def _outside(a: jax.Array, b: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean absolute difference of two batches of pictures outside the mask, `[P, G]`, in [0, 1]."""
    background = jnp.broadcast_to((1.0 - mask)[:, None, :, :, None], a.shape)
    return (background * jnp.abs(a - b)).sum((2, 3, 4)) / jnp.maximum(background.sum((2, 3, 4)), 1.0)


def drift_metrics(batch: EditBatch, images: jax.Array) -> dict[str, float]:
    """How far the background moves (Fig. 5b): from candidate to candidate, and from the source."""
    mask = jnp.asarray(batch.mask)
    source = jnp.asarray(batch.pixels, jnp.float32)[:, None] / 255
    return {
        "background/drift": float(_outside(images[:, 1:], images[:, :1], mask).mean()),
        "background/error": float(_outside(images, jnp.broadcast_to(source, images.shape), mask).mean()),
    }


def grid_rows(batch: EditBatch, images: jax.Array, scores: dict[str, np.ndarray]) -> list[GridRow]:
    """Up to four prompts with up to six candidates each, captioned with their raw rewards."""
    pixels = np.asarray(jnp.round(images[:4, :6] * 255)).astype(np.uint8)

    def caption(p: int, i: int) -> str:
        return "  ".join(f"{name} {score[p, i]:.3f}" for name, score in scores.items())

    return [
        GridRow(
            batch.instructions[p], batch.pixels[p], batch.mask[p], group, [caption(p, i) for i in range(len(group))]
        )
        for p, group in enumerate(pixels)
    ]
