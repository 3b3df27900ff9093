"""`python -m benchmarks.sharing`: what rollouts that share their background change, and what they save.

Groups of `validation` are rolled out from the same noises in full and with `rollout.share=region`, before any training.
Of each group: the rank correlation of its rewards, and the cosine of `sum_i A_i x_i` over the noisier half of the
steps, which is the gradient of the first update but for the model's derivative. Cost is in FLOPs, beside that of exact
rollouts: with room for the tokens of each group, and as a run pays it, with room for the largest set of each batch.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from scipy.stats import rankdata

from rcgrpo_jax import rewards
from rcgrpo_jax.evaluation.statistics import mean_interval
from rcgrpo_jax.evaluation.tables import Table, markdown
from rcgrpo_jax.experiments.ablation import untrained_run
from rcgrpo_jax.flow.solvers import num_evaluations
from rcgrpo_jax.method import grpo
from rcgrpo_jax.plan import flops
from rcgrpo_jax.rl.parts import join
from rcgrpo_jax.rl.programs import Programs
from rcgrpo_jax.rl.recipes import small_editor
from rcgrpo_jax.rl.setup import set_up
from rcgrpo_jax.rl.trainer import PreparedBatch, Trainer
from rcgrpo_jax.runs.state import TrainState


class Setting(NamedTuple):
    """What `rollout.share=region` is used with."""

    grow: int
    grow_reference: int
    full_steps: int

    @classmethod
    def read(cls, text: str) -> Setting:
        """From `GROW,GROW_REFERENCE,FULL_STEPS`; ValueError for anything else."""
        grow, grow_reference, full_steps = map(int, text.split(","))
        return cls(grow, grow_reference, full_steps)

    @property
    def name(self) -> str:
        source = f", source +{self.grow_reference}" if self.grow_reference >= 0 else ""
        full = f", {self.full_steps} steps in full" if self.full_steps else ""
        return f"region +{self.grow}{source}{full}"


SETTINGS = tuple(
    Setting(*numbers)
    for numbers in (
        (0, -1, 0), (0, 0, 0), (1, -1, 0), (1, 0, 0), (1, 1, 0), (2, -1, 0), (2, 2, 0), (1, -1, 1), (1, -1, 2),
    )
)  # fmt: skip


class Groups(NamedTuple):
    """What a rollout of a batch gave."""

    states: Float[np.ndarray, "P G K+1 N C"]
    scores: Float[np.ndarray, "P G"]
    images: Float[np.ndarray, "P G H W 3"]
    seconds: float  # of the rollout alone


def roll_out(trainer: Trainer, programs: Programs, state: TrainState, batch: PreparedBatch) -> Groups:
    """Explores, rolls out and scores a batch by the oracle; equal states and batches start from equal noises."""
    exploration = programs.explore(jax.random.fold_in(state.key, state.step), batch.prompts, state.step)
    group = programs.options.rollout.group_size
    started = time.monotonic()
    room = programs.room(batch.prompts)
    rollout = join(*programs.roll_out(trainer.params, state.rolling_out, batch.prompts, exploration, group, room))
    states = np.asarray(rollout.states)
    seconds = time.monotonic() - started
    images = trainer.local_pictures(programs.decode(trainer.decoder, rollout.states[:, :, -1]))
    scores, _ = rewards.take_all([trainer.start_scoring(batch.reward_inputs, images)], None)
    return Groups(states, scores["oracle"], np.asarray(images), seconds)


def direction(groups: Groups) -> Float[np.ndarray, "P D"]:
    """`sum_i A_i x_i` over the noisier half of the steps."""
    advantages = np.asarray(grpo.group_advantages(jnp.asarray(groups.scores), 5.0, None, "group"))
    early = groups.states[:, :, 1 : (groups.states.shape[2] + 1) // 2]
    return np.einsum("pg,pgknc->pknc", advantages, early).reshape(len(advantages), -1)


def cosine(a: Float[np.ndarray, "P D"], b: Float[np.ndarray, "P D"]) -> Float[np.ndarray, " P"]:
    """Of each row; NaN where one is nothing."""
    with np.errstate(invalid="ignore"):
        return (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))


def rank_correlation(a: Float[np.ndarray, "P G"], b: Float[np.ndarray, "P G"]) -> Float[np.ndarray, " P"]:
    """Spearman's, of each row; NaN where all are equal."""
    ranks = (rankdata(x, axis=-1) for x in (a, b))
    return cosine(*(x - x.mean(-1, keepdims=True) for x in ranks))


class Measured(NamedTuple):
    """Of every group under one setting."""

    own: Float[np.ndarray, " Q"]  # share of the image tokens
    ranks: Float[np.ndarray, " Q"]
    direction: Float[np.ndarray, " Q"]
    psnr: Float[np.ndarray, " Q"]  # dB, of the pictures to those of exact rollouts
    least_cost: Float[np.ndarray, " Q"]  # of exact rollouts
    cost: Float[np.ndarray, " Q"]
    time: Float[np.ndarray, " Q"]  # seconds, of those of the exact rollout of the same batch


def measure(trainer: Trainer, programs: Programs, exact: Groups, found: Groups, batch: PreparedBatch) -> Measured:
    """Compares a batch with its exact rollout."""
    target, reference = jax.vmap(programs.own_tokens)(batch.prompts)
    counts, num_tokens = np.asarray(target.sum(-1) + reference.sum(-1)), target.shape[-1]
    size = programs.room(batch.prompts)
    error = np.square(found.images - exact.images).mean((1, 2, 3, 4))
    with np.errstate(divide="ignore"):
        psnr = -10 * np.log10(error)
    text = batch.prompts.condition.text.shape[-2]
    costs = np.array([cost(trainer, programs, text, num_tokens, int(count)) for count in counts])
    paid = cost(trainer, programs, text, num_tokens, size) if size else 1.0
    return Measured(
        counts / (2 * num_tokens), rank_correlation(exact.scores, found.scores),
        cosine(direction(exact), direction(found)), psnr, costs, np.full(len(counts), paid),
        np.full(len(counts), found.seconds / exact.seconds),
    )  # fmt: skip


def cost(trainer: Trainer, programs: Programs, text: int, num_tokens: int, size: int) -> float:
    """FLOPs of a group's rollout beside an exact one's, with R tokens of each candidate's own."""
    options, rollout, sizes = trainer.options, programs.options.rollout, programs.networks.transformer.config
    group, full = rollout.group_size, rollout.share_full_steps / num_evaluations(rollout.solver, rollout.num_steps)
    one = flops.mmdit(sizes, text, num_tokens, options.lora, options.acd).forward
    shared = flops.shared(sizes, text, num_tokens, options.lora, options.acd, group - 1, size).forward
    return full + (1 - full) * shared / (group * one)


def table(found: Mapping[str, Sequence[Measured]]) -> Table:
    """A row for each setting, of all batches."""
    lines = [["of a candidate's own", "tokens", "ranks", "direction", "PSNR, dB", "least cost", "cost", "time"]]
    for name, batches in found.items():
        of = Measured(*(np.concatenate(parts) for parts in zip(*batches, strict=True)))
        usable = np.isfinite(of.direction)
        ranks, way = ("{:.3f} [{:.3f}, {:.3f}]".format(*mean_interval(x[usable][None])) for x in of[1:3])
        means = f"{of.own.mean():.3f}", ranks, way, f"{np.median(of.psnr):.1f}"
        lines.append(
            [name, *means, f"{of.least_cost.mean():.3f}", f"{of.cost.mean():.3f}", f"{np.median(of.time):.2f}"]
        )
    return Table("Shared beside exact rollouts: means over groups [95 % interval], medians of PSNR and time", lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sharing", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--groups", type=int, default=96, help="groups of each setting; a multiple of --prompts")
    parser.add_argument("--prompts", type=int, default=4, help="groups of a batch")
    parser.add_argument("--group_size", type=int, default=12, help="G")
    parser.add_argument("--steps", type=int, default=8, help="K")
    parser.add_argument("--alpha_edit", type=float, default=0.5, help="strength of the perturbation")
    parser.add_argument("--seed", type=int, default=0, help="of the noises and the order of the scenes")
    parser.add_argument(
        "--setting", type=Setting.read, action="append", default=[], metavar="GROW,GROW_REFERENCE,FULL_STEPS",
        help="rollout.share_grow, share_grow_reference and share_full_steps; may be repeated",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    if arguments.prompts < 1 or arguments.groups < 1 or arguments.groups % arguments.prompts:
        parser.error(f"--groups: {arguments.groups} found; a multiple of --prompts = {arguments.prompts} was wanted")
    settings = arguments.setting or SETTINGS
    config = small_editor()
    config.seed, config.data.path = arguments.seed, f"scenes:validation:{max(arguments.groups, 200)}"
    config.explore.alpha_edit, config.explore.alpha_base = arguments.alpha_edit, 0.0
    config.rollout.prompts, config.rollout.group_size = arguments.prompts, arguments.group_size
    config.rollout.num_steps = arguments.steps
    setup, found = set_up(config), {setting.name: [] for setting in settings}
    with jax.set_mesh(setup.mesh), TemporaryDirectory() as cache:
        trainer, state, batches = untrained_run(setup, Path(cache))
        programs = {setting: shared_programs(trainer, setting) for setting in settings}
        for step in range(-1, arguments.groups // arguments.prompts):  # the first batch compiles, and is left out
            of_step, batch = state.replace(step=jnp.int32(max(step, 0))), trainer.prepare(batches[max(step, 0)])
            exact = roll_out(trainer, trainer.programs, of_step, batch)
            for setting, of_setting in programs.items():
                measured = measure(trainer, of_setting, exact, roll_out(trainer, of_setting, of_step, batch), batch)
                if step >= 0:
                    found[setting.name].append(measured)
    print(markdown([table(found)]))


def shared_programs(trainer: Trainer, setting: Setting) -> Programs:
    """Those of the trainer, with tokens shared."""
    options = trainer.options.step
    rollout = replace(
        options.rollout, share="region", share_grow=setting.grow, share_grow_reference=setting.grow_reference,
        share_full_steps=setting.full_steps,
    )  # fmt: skip
    return Programs(replace(options, rollout=rollout), trainer.programs.networks, trainer.mesh)


if __name__ == "__main__":
    main()
