"""`python -m benchmarks.agreement --variant 'NAME: FIELD=VALUE ...' ...`: how much of a gradient is signal.

The gradients of independent batches at the same parameters have their mean in common and nothing else. The mean cosine
of two of them, their agreement c, is the share of that signal in a gradient's squared length: about 1 / c steps make it
as large as what is left of the noise. A few batches tell settings apart that differ after hundreds of steps.

Each reward is looked at by itself too, and against the others: a negative cosine means that what teaches one of them
unteaches the other. The adapter is the untrained one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float
from ml_collections import ConfigDict

from rcgrpo_jax.errors import UserError
from rcgrpo_jax.experiments.ablation import Variant, configure, parse_variant, untrained_run
from rcgrpo_jax.method import grpo
from rcgrpo_jax.plan.text import align
from rcgrpo_jax.rl import recipes
from rcgrpo_jax.rl.config import validate
from rcgrpo_jax.rl.setup import set_up
from rcgrpo_jax.rl.trainer import Sample, Trainer
from rcgrpo_jax.runs.state import TrainState

TOTAL = "total"  # all rewards, as they are weighed in training


class Agreement(NamedTuple):
    """A mean cosine and its standard error."""

    mean: float
    error: float


def agreement(a: Float[np.ndarray, "Q D"], b: Float[np.ndarray, "Q D"]) -> Agreement:
    """The mean cosine of `a[i]` and `b[j]` over all i != j, so that no pair shares a batch; the error by jackknife.

    Args:
        a: A gradient of each of Q batches, Q >= 3.
        b: The same of another reward, or `a` itself.
    """
    count = len(a)
    with np.errstate(invalid="ignore"):
        a, b = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (a, b))
    cosines = np.where(np.eye(count, dtype=bool), 0.0, a @ b.T)
    left = [np.delete(np.delete(cosines, i, 0), i, 1).sum() for i in range(count)]
    without = np.array(left) / ((count - 1) * (count - 2))
    error = np.sqrt((count - 1) / count * np.square(without - without.mean()).sum())
    return Agreement(float(cosines.sum() / (count * (count - 1))), float(error))


def gradients(trainer: Trainer, state: TrainState, sample: Sample) -> dict[str, Float[np.ndarray, " D"]]:
    """The gradient of a batch by reward, and that of all together, up to a factor."""
    found = {}
    for name, scores, weights in (
        (TOTAL, {name: sample.scores[name] for name in trainer.weights}, trainer.weights),
        *((name, {name: score}, {name: 1.0}) for name, score in sample.scores.items()),
    ):
        rewards = grpo.combine_rewards(scores, weights)
        options = trainer.options.objective
        advantages = grpo.group_advantages(rewards, options.advantage_clip, options.quasi_norm or None)
        after, _ = trainer.learn(jax.tree.map(jnp.copy, state), sample, advantages)
        # Adam's first moment after one update is the gradient, by a factor.
        moments = jax.tree.leaves(optax.tree.get(after.opt_state, "mu"))
        found[name] = np.concatenate([np.ravel(x) for x in moments])
    return found


def measure(config: ConfigDict, count: int, cache: Path) -> tuple[dict[str, float], dict[str, Agreement]]:
    """The median within-group std of each reward, and the agreements, over `count` batches."""
    config.objective.updates = 1
    setup = set_up(config, jax.devices()[:1])
    with jax.set_mesh(setup.mesh):
        trainer, state, batches = untrained_run(setup, cache)
        stds, found = [], []
        for step in range(count):
            sample = trainer.sample(state.replace(step=jnp.int32(step)), trainer.prepare(batches[step]))
            stds.append({name: np.median(score[:, 1:].std(-1)) for name, score in sample.scores.items()})
            found.append(gradients(trainer, state, sample))
    stacked = {name: np.stack([x[name] for x in found]) for name in found[0]}
    result = {name: agreement(x, x) for name, x in stacked.items()}
    for one, other in combinations([name for name in stacked if name != TOTAL], 2):
        result[f"{one} x {other}"] = agreement(stacked[one], stacked[other])
    return {name: float(np.median([x[name] for x in stds])) for name in stds[0]}, result


def lines(name: str, stds: Mapping[str, float], found: Mapping[str, Agreement]) -> list[list[str]]:
    """A row for each reward and pair."""
    return [
        [name, reward, f"{stds[reward]:.4f}" if reward in stds else "", f"{c.mean:+.4f}", f"+- {c.error:.4f}"]
        for reward, c in found.items()
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.agreement", description=__doc__)
    parser.add_argument("--variant", action="append", default=[], help="fields of rl.recipes.small_editor")
    parser.add_argument("--batches", type=int, default=8, help="independent batches, 3 or more")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and noise")
    arguments = parser.parse_args(argv)
    if arguments.batches < 3:
        parser.error(f"--batches: {arguments.batches} found; 3 or more were wanted.")
    table = [["variant", "reward", "std", "agreement", ""]]
    try:
        variants = [parse_variant(text) for text in arguments.variant] or [Variant("small editor", {})]
        configs = [configure(recipes.small_editor(), variant, arguments.seed) for variant in variants]
        for config in configs:
            validate(config, 1)
        with TemporaryDirectory() as cache:
            for variant, config in zip(variants, configs, strict=True):
                rows = lines(variant.name, *measure(config, arguments.batches, Path(cache)))
                print(align(rows), file=sys.stderr)  # the next one takes minutes
                table += rows
    except UserError as error:
        parser.error(str(error))
    print(align(table))


if __name__ == "__main__":
    main()
