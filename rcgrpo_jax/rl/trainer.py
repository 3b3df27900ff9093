"""`rcgrpo train`: from a configuration to checkpoints, metrics and image grids. Reads from top to bottom."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float
from ml_collections import ConfigDict

from rcgrpo_jax import rewards as reward_registry
from rcgrpo_jax.editors.model import Editor
from rcgrpo_jax.encoding.batches import EditBatch
from rcgrpo_jax.errors import UserError, mark_everywhere
from rcgrpo_jax.method import grpo
from rcgrpo_jax.parallel.distributed import gather, local_row_range, local_rows, raise_together, to_mesh
from rcgrpo_jax.rl import config as schema
from rcgrpo_jax.rl.config import MAY_DIFFER, PATHS
from rcgrpo_jax.rl.options import Options
from rcgrpo_jax.rl.parts import join
from rcgrpo_jax.rl.policy.base import Exploration, Prompts, Rollout
from rcgrpo_jax.rl.programs import Programs, ProgramsBySize
from rcgrpo_jax.rl.reward_fields import ACD, Schedule, unlearned
from rcgrpo_jax.rl.reward_inputs import reward_inputs
from rcgrpo_jax.rl.samples import Samples
from rcgrpo_jax.rl.setup import set_up
from rcgrpo_jax.rl.step_metrics import (
    correlation_metrics,
    drift_metrics,
    judge_metrics,
    reward_metrics,
    watch_metrics,
)
from rcgrpo_jax.runs.differences import check_same_config
from rcgrpo_jax.runs.grid import GridRow, PictureRow, comparison_grid, draw_rows, gallery_rows, grid_rows
from rcgrpo_jax.runs.run import GALLERY, GRID, SAMPLES, is_finished, open_run, read_best, restore, run_steps
from rcgrpo_jax.runs.saved import saved_config
from rcgrpo_jax.runs.state import TrainState

logger = logging.getLogger(__name__)
UNSCORED_STEPS = 3  # without a group that could be scored, in a row, before a run gives up


class Outcome(NamedTuple):
    """How a run came out."""

    state: TrainState  # the last
    finished: bool  # that it was not stopped on request


def train(config: ConfigDict, workdir: str | Path, devices: list[jax.Device] | None = None) -> TrainState:
    """As `post_train`; the last state."""
    return post_train(config, workdir, devices).state


def post_train(config: ConfigDict, workdir: str | Path, devices: list[jax.Device] | None = None) -> Outcome:
    """Post-trains a LoRA; called again on the same `workdir` it goes on from the last checkpoint.

    `workdir` receives `checkpoints/`, `metrics.jsonl`, `tensorboard/`, `images/` and (by default) `cache/`. SIGTERM
    saves a checkpoint and returns.

    Args:
        config: As `rl.config.default_config` lays it out.
        workdir: Directory of the run; created if missing.
        devices: Devices of the mesh; all by default.

    Raises:
        UserError: For every mistake in configuration, model, data or resume that can be told.
    """
    workdir = Path(workdir)
    setup = set_up(config, devices)
    options = setup.options
    with jax.set_mesh(setup.mesh), open_run(options.train, config.to_dict(), workdir) as checkpointer:
        config_record = config.to_dict() | setup.record()
        incidental = reward_registry.incidental_fields(reward_registry.known_rewards(options.plugins))
        may_differ = (*MAY_DIFFER, *PATHS, *unlearned(config_record), *incidental)
        if checkpointer.latest_step() is None:  # before the data are encoded, which may take long
            state = setup.initial_state()
        else:
            check_same_config(saved_config(checkpointer, schema), config_record, (*may_differ, "data_digest"))
            state = setup.fresh_state()
        if (checkpointer.latest_step() or 0) < options.train.num_steps:
            with raise_together():
                reward_registry.check_all(setup.rewards)
        samples = setup.encode_samples(workdir)
        batches = setup.encode(workdir)
        config_record["data_digest"] = batches.source.digest
        state = restore(checkpointer, state, config_record, schema, may_differ)
        best = read_best(workdir, checkpointer, options.train.best, options.train.patience)
        if is_finished(state, options.train.num_steps, best):
            return Outcome(state, finished=True)
        parts, stop = (options, setup.load_editor(), setup.mesh, setup.rewards), threading.Event()
        trainer, judged = Trainer(*parts, stop), None if samples is None else Samples(*parts, samples)
        prepared_batch = None

        def step(state: TrainState, index: int, draw: bool) -> tuple[TrainState, dict, dict[str, np.ndarray]]:
            nonlocal prepared_batch
            start = time.monotonic()
            with raise_together():  # a thread has read it during the step before
                batch = batches[index] if prepared_batch is None else prepared_batch.batch
                upcoming = batches[index + 1] if index + 1 < options.train.num_steps else None
            metrics = {"seconds/data": time.monotonic() - start}
            state, measured, drawn, prepared_batch = trainer.step(
                state, prepared_batch or trainer.prepare(batch), upcoming, draw
            )
            title, pictures = f"step {index + 1}", {}
            if drawn is not None:
                pictures = {GRID: comparison_grid(drawn.grid, title), GALLERY: draw_rows(drawn.gallery, title)}
            if judged is not None and (index + 1) % options.train.sample_every == 0:
                scores, pictures[SAMPLES] = judged.compare(state.averaged, index + 1)
                measured |= scores
            return state, metrics | measured, pictures

        def before(state: TrainState) -> tuple[dict[str, float], dict[str, np.ndarray]]:
            scores, picture = judged.compare(state.averaged, 0)
            return scores, {SAMPLES: picture}

        def shown(metrics: Mapping[str, float]) -> dict[str, float]:
            return {name.removeprefix("reward/"): x for name, x in metrics.items() if name.startswith("reward/")}

        count = options.rollout.prompts * options.rollout.group_size
        state = run_steps(
            state, step, options.train, config_record, workdir, checkpointer, "train", count, shown, best,
            None if judged is None else before, stop,
        )  # fmt: skip
        return Outcome(state, int(state.step) == options.train.num_steps or best.ends_run)


def train_to_end(config: ConfigDict, workdir: str | Path, devices: list[jax.Device] | None = None) -> TrainState:
    """As `train`, for what comes after a whole run.

    Raises:
        UserError: Also if SIGTERM stopped the run before its last step.
    """
    state, finished = post_train(config, workdir, devices)
    if not finished:
        raise UserError(
            f"{workdir}: stopped on request at step {int(state.step)} of {config.train.num_steps}.",
            "The same command goes on from there.",
        )
    return state


class PreparedBatch(NamedTuple):
    """A batch whose copies are on the devices, or on their way."""

    batch: EditBatch
    programs: Programs  # for its size
    prompts: Prompts  # of all processes
    reward_inputs: Callable[..., reward_registry.RewardInputs]  # what this process' rewards see, but `edited`


class Drawn(NamedTuple):
    """What a step shows of this process' own prompts."""

    grid: list[GridRow]  # the candidates of the first prompts
    gallery: list[PictureRow]  # the best and the worst candidate by each reward, and by their weighted sum


class Sample(NamedTuple):
    """The groups of one step."""

    prompts: Prompts
    exploration: Exploration
    rollout: Rollout
    images: Float[Array, "p G H W 3"] | None  # this process' own rows, in [0, 1]
    scores: dict[str, Float[np.ndarray, "P G"]]
    rolled_out: float  # when the pictures were there, seconds of `time.monotonic`
    programs: Programs  # for their size
    room: int  # R, for tokens of a candidate's own; 0: all are


class Trainer:
    """Model, programs and rewards of a run; `step` is one step of Section 4.

    Args:
        options: The run's.
        editor: Its trained network and decoder are loaded onto the mesh.
        mesh: The mesh.
        rewards: Name -> reward.
        stop: Once it is set, a step that waits for scores is given up.
    """

    def __init__(
        self, options: Options, editor: Editor, mesh: Mesh, rewards: Mapping[str, reward_registry.Reward],
        stop: threading.Event | None = None,
    ):  # fmt: skip
        self.options, self.rewards, self.stop = options, rewards, stop
        self.params = editor.params
        self.decoder = editor.decoder_params
        self.mesh, self.programs_for = mesh, ProgramsBySize(options.step, editor.networks, mesh)
        self.programs = self.programs_for(options.data.size)
        self.local_mesh = mesh.local_mesh  # this process' devices, where its candidates are scored
        self.num_local_prompts = len(local_row_range(options.rollout.prompts))
        self.unscored = 0  # steps in a row without a group to learn from
        self.weights = {name: float(weight) for name in rewards if (weight := options.rewards.get(name))}
        if options.acd.weight:
            self.weights[ACD] = float(options.acd.weight)
        self.schedules = {name: Schedule.read(text) for name, text in options.reward_schedules.items()}

    def weights_after(self, step: int) -> dict[str, float]:
        """The weight of each reward that is learned from, when so many steps are done."""
        factors = {name: schedule(step) for name, schedule in self.schedules.items()}
        return {name: weight * factors.get(name, 1.0) for name, weight in self.weights.items()}

    def prepare(self, batch: EditBatch) -> PreparedBatch:
        """Copies this process' rows of a batch to the devices, and does not wait for them."""
        programs = self.programs_for(batch.mask.shape[1:])
        return PreparedBatch(batch, programs, programs.prompts(batch), self.reward_inputs(batch))

    def step(
        self, state: TrainState, prepared_batch: PreparedBatch, upcoming: EditBatch | None = None, draw: bool = False
    ) -> tuple[TrainState, dict[str, float], Drawn | None, PreparedBatch | None]:
        """Explore, roll out, score, update.

        Args:
            state: Donated.
            prepared_batch: The step's batch.
            upcoming: That of the next step, prepared while the devices compute the update.
            draw: Whether to return what the step shows.

        Returns:
            The new state, metrics, what the step shows, and the next step's batch.

        Raises:
            UserError: Rewards have failed in every group for `UNSCORED_STEPS` steps.
            StopRequested: `stop` was set while scores were waited for; the state is not donated then.
        """
        start, batch = time.monotonic(), prepared_batch.batch
        sample = self.sample(state, prepared_batch)
        weights, times = self.weights_after(int(state.step)), [start, sample.rolled_out]
        scores = {name: score for name, score in sample.scores.items() if name in weights}
        watched = {name: score for name, score in sample.scores.items() if name not in weights}
        objective = self.options.objective
        # Candidates are compared with each other, so that one whose states have diverged takes its group along.
        whole = np.asarray(_finite_groups(sample.rollout.states))[:, None]
        usable = {name: np.where(whole, score, np.nan) for name, score in scores.items()}
        with jax.set_mesh(self.local_mesh):  # all processes have all scores, and come to the same advantages
            total = grpo.combine_rewards(usable, weights, objective.least_scored)
            self._check_scored(scores, total)
            norm = objective.quasi_norm or None, objective.advantage_std
            advantages = grpo.group_advantages(total, objective.advantage_clip, *norm)
            drawn = None
            if draw:
                by_reward = {**sample.scores, "total": np.asarray(total)}
                gallery = gallery_rows(batch, sample.images, by_reward)
                drawn = Drawn(grid_rows(batch, sample.images, sample.scores), gallery)
            measured = reward_metrics(scores, total) | watch_metrics(watched) | correlation_metrics(sample.scores)
            measured |= drift_metrics(prepared_batch.reward_inputs(edited=sample.images))
            measured |= {f"reward_weight/{name}": weights[name] for name in self.schedules}
        measured |= judge_metrics(self.rewards)
        if self.options.rollout.share != "none":
            measured["room"] = sample.room
        sample = sample._replace(images=None)  # at full size these are gigabytes, and the update needs the room
        times.append(time.monotonic())

        state, learned = self.learn(state, sample, advantages)
        state = state.replace(step=state.step + 1)
        following = None if upcoming is None else self.prepare(upcoming)
        metrics = measured | {name: float(x) for name, x in learned.items()}  # waits for the update
        times.append(time.monotonic())

        metrics |= {f"seconds/{name}": b - a for name, a, b in zip(("rollout", "reward", "update"), times, times[1:])}  # noqa: B905
        metrics["samples_per_second"] = total.size / (times[-1] - times[0])
        return state, metrics, drawn, following

    def _check_scored(self, scores: Mapping[str, np.ndarray], total: Float[Array, "P G"]) -> None:
        """Gives up after `UNSCORED_STEPS` steps in a row in which all groups were dropped."""
        self.unscored = 0 if np.isfinite(total).any() else self.unscored + 1
        if self.unscored == UNSCORED_STEPS:
            failed = ", ".join(name for name, score in scores.items() if not np.isfinite(score).all())
            lost = UserError(
                f"rewards: no group of the last {UNSCORED_STEPS} steps has enough scores; {failed} failed.",
                "Look at what computes them; the same command resumes from the last checkpoint.",
            )
            raise mark_everywhere(lost)  # scores are those of all processes

    def sample(self, state: TrainState, prepared_batch: PreparedBatch) -> Sample:
        """Groups of candidates under the present adapter, and their rewards."""
        _, programs, prompts, reward_inputs = prepared_batch
        options = self.options.rollout
        exploration = programs.explore(jax.random.fold_in(state.key, state.step), prompts, state.step)
        at_a_time = options.micro_batch // options.prompts or options.group_size  # candidates of each group
        rollouts, pictures = [], []
        size = programs.room(prompts)
        for part in programs.roll_out(self.params, state.rolling_out, prompts, exploration, at_a_time, size):
            rollouts.append(part)
            pictures.append(self.local_pictures(programs.decode(self.decoder, part.states[:, :, -1])))
        with raise_together():  # all is dispatched: the devices roll out the next part while one is scored
            started = []
            for images in pictures:
                jax.block_until_ready(images)
                rolled_out = time.monotonic()
                started.append(self.start_scoring(reward_inputs, images))
            scores, failures = reward_registry.take_all(started, self.stop)
        for name, cause in failures.items():
            logger.warning("step %d: reward %r: %s", int(state.step) + 1, name, cause)
        rollout = join(*rollouts)
        scores = gather(scores)
        if ACD in self.weights:
            scores[ACD] = np.asarray(rollout.acd)
        with jax.set_mesh(self.local_mesh):
            images = join(*pictures)
        return Sample(prompts, exploration, rollout, images, scores, rolled_out, programs, size)

    def learn(
        self, state: TrainState, sample: Sample, advantages: Float[Array, "P G"]
    ) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
        """The updates on a sample; the state is donated. Does not wait for them."""
        programs = sample.programs
        advantages = to_mesh(advantages, self.mesh)
        room = () if self.options.surrogate.share == "none" else (sample.room,)
        kept = jnp.zeros(programs.policy.kept_shape(), jnp.float32)
        for update in range(self.options.objective.updates):
            data = sample.prompts, sample.exploration, sample.rollout, advantages, kept
            state, of_this, metrics = programs.update(self.params, state, *data, jnp.asarray(update == 0), *room)
            kept = of_this if update == 0 else kept
        return state if state.old is None else programs.refresh(state), metrics

    def local_pictures(self, images: Float[Array, "Pg H W 3"]) -> Float[Array, "p g H W 3"]:
        """This process' rows of pictures that are spread over the mesh."""
        rows = local_rows(images, self.mesh)
        with jax.set_mesh(self.local_mesh):
            return rows.reshape(self.num_local_prompts, -1, *rows.shape[1:])

    def reward_inputs(self, batch: EditBatch) -> Callable[..., reward_registry.RewardInputs]:
        """What this process' rewards compare edits with, all but `edited`."""
        return reward_inputs(batch, self.local_mesh)

    def start_scoring(
        self, reward_inputs: Callable[..., reward_registry.RewardInputs], images: Float[Array, "p g H W 3"]
    ) -> reward_registry.PendingScores:
        """Starts every reward on candidates of this process."""
        with jax.set_mesh(self.local_mesh):
            return reward_registry.start_all(self.rewards, reward_inputs(edited=images))


@jax.jit
def _finite_groups(states: Float[Array, "P G K+1 N C"]) -> Bool[Array, " P"]:
    """Whether all candidates of a group have ended with finite latents."""
    return jnp.isfinite(states[:, :, -1]).all((1, 2, 3))
