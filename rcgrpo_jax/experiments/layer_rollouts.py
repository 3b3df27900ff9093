"""Rollouts of examples with several noises, each with the ACD of every block and a score, kept as they are made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from rcgrpo_jax.data.example import Source
from rcgrpo_jax.editors.model import EditorOptions, Model
from rcgrpo_jax.editors.open import check_fits
from rcgrpo_jax.errors import UserError
from rcgrpo_jax.evaluation.edit import EditOptions, batch_rows, check_request, edit_batches, edit_settings
from rcgrpo_jax.evaluation.examples import Digest, ExampleBatch, read_batches, read_example
from rcgrpo_jax.evaluation.judge import check_scorable, reward_inputs
from rcgrpo_jax.experiments.rollout_log import ROLLOUTS, RolloutLog, Rollouts, claim
from rcgrpo_jax.parallel.mesh import make_mesh
from rcgrpo_jax.progress import ProgressCallback, count_steps, no_progress
from rcgrpo_jax.rewards import Reward, start_all
from rcgrpo_jax.weights.lora import adapter_fingerprint


class Success(NamedTuple):
    """What a good edit scores high on."""

    name: str
    reward: Reward
    options: Mapping[str, Any]  # that the reward was made with


def block_means(densities: Float[Array, "K L"]) -> Float[Array, "3 L"]:
    """Means over the steps of `PARTS`; the middle one of an odd number of steps is in both halves."""
    steps = densities.shape[0]
    half = (steps + 1) // 2
    return jnp.stack([jnp.mean(part, axis=0) for part in (densities, densities[:half], densities[steps - half :])])


def roll_out(
    model: Model,
    lora: dict | None,
    source: Source,
    success: Success,
    folder: Path,
    *,
    examples: int,
    seeds: Sequence[int],
    options: EditOptions,
    batch: int = 8,
    size: tuple[int, int] | None = None,
    instruction_only: bool = False,
    devices: Sequence[jax.Device] | None = None,
    progress: ProgressCallback = no_progress,
    **editor_options: Any,
) -> Rollouts:
    """Edits the first examples from the noise of each seed, and scores the edits; what is there is not made again.

    A rollout is that of `rcgrpo evaluate` from the same noise. More examples and seeds may be added later.

    Args:
        model: The model.
        lora: Adapter with its scale folded in; None is the base.
        source: The examples.
        success: Scores the edits.
        folder: Gets the rollouts; it is there.
        examples: How many; all if there are fewer.
        seeds: Of the noises.
        options: Of the edits; their seed is not used.
        batch: Rollouts at a time.
        size: (height, width) of the edits; that of the first example by default.
        instruction_only: As for `edit_batches`.
        devices: The weights are spread over these; all by default.
        progress: Told of each rollout.
        **editor_options: Of `EditorOptions`.

    Raises:
        UserError: The model reports no attention masses, an example cannot be read or scored, the reward fails, no
            memory holds a batch, or the folder holds other rollouts.
        UsageError: There are no examples, or the size is not a whole number of tokens.
    """
    if not (blocks := model.sizes.num_blocks):
        raise UserError(
            f"--model: {model.path} reports the attention of no block; ACD needs it.", "Name a model that reports it."
        )
    mesh, indices = make_mesh({"fsdp": -1}, devices), range(min(examples, len(source)))
    if indices:  # else `check_request` says so
        size = size or source[0].image.shape[:2]
        check_fits(model, size, options.num_steps, editor_options["dtype"], min(batch, len(indices)))
    editor = model.open(EditorOptions(acd_layers=blocks, **editor_options), mesh)
    size = check_request(editor, source, indices, size)
    names, digests = _check_examples(source, indices, size, success.reward)
    settings = edit_settings(editor, options, size) | {
        "acd_text": "instruction" if instruction_only else "all", "lora": adapter_fingerprint(lora) if lora else "",
        "reward": success.name,
        "options": {name: x for name, x in success.options.items() if name not in success.reward.incidental},
    }  # fmt: skip
    del settings["seed"]
    claim(folder, settings)
    done = count_steps(progress, "rollouts", len(indices) * len(seeds))
    with RolloutLog(folder / ROLLOUTS, blocks) as log:
        log.check(names, digests)
        for seed in seeds:
            missing = [index for index in indices if (index, seed) not in log.lines]
            for _ in range(len(indices) - len(missing)):
                done()
            batches = read_batches(source, missing, batch_rows(batch, len(indices), mesh), size)
            chosen = options._replace(seed=seed)
            for edited in edit_batches(editor, batches, chosen, lora, mesh, block_means, instruction_only):
                scores, cause = _score(success, edited.batch, edited.pictures)
                for row, example in enumerate(edited.batch.own):
                    index = int(edited.batch.indices[row])
                    log.add(example.name, index, seed, digests[index], scores[row], cause, edited.acd[row])
                    done()
        return log.rollouts(names, tuple(seeds))


def _check_examples(
    source: Source, indices: Sequence[int], size: tuple[int, int], reward: Reward
) -> tuple[tuple[str, ...], list[str]]:
    """Names and digests of examples that can all be scored."""
    names, digests = [], []
    for index in indices:
        example, digest = read_example(source, index, size), Digest()
        check_scorable([example], reward)
        digest.add(example)
        names.append(example.name)
        digests.append(str(digest)[:16])
    return tuple(names), digests


def _score(
    success: Success, batch: ExampleBatch, pictures: UInt8[np.ndarray, "P H W 3"]
) -> tuple[Float[np.ndarray, " P"], str]:
    """The scores of a batch, each edit a group of its own, and why there are none."""
    inputs = reward_inputs(batch, pictures[:, None], success.reward)
    found = start_all({success.name: success.reward}, inputs).result()
    return found.by_reward[success.name][:, 0], found.failures.get(success.name, "")
