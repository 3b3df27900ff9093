"""Held-out examples that the base and the LoRA edit from the same noise, while a run goes on."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8

from rcgrpo_jax import rewards as reward_registry
from rcgrpo_jax.editors.base import Networks
from rcgrpo_jax.editors.model import Editor
from rcgrpo_jax.encoding.batches import make_batch
from rcgrpo_jax.encoding.cache import EncodedSource
from rcgrpo_jax.evaluation.edit import initial_noise
from rcgrpo_jax.parallel.distributed import (
    from_main,
    gather,
    is_main,
    local_row_range,
    local_rows,
    raise_together,
    to_mesh,
)
from rcgrpo_jax.parallel.mesh import SAMPLE_AXES
from rcgrpo_jax.parallel.sharding import replicated
from rcgrpo_jax.rl.options import Options
from rcgrpo_jax.rl.programs import shared_programs
from rcgrpo_jax.rl.reward_fields import ACD
from rcgrpo_jax.rl.reward_inputs import reward_inputs
from rcgrpo_jax.rl.step_metrics import background_error
from rcgrpo_jax.runs.grid import PictureRow, candidate_pixels, draw_rows, shown_source

SEED = 0  # of the noise, the default of `rcgrpo evaluate`
ERROR = "background_error"  # a measure beside the rewards; lower is better

logger = logging.getLogger(__name__)


class Edits(NamedTuple):
    """The samples as one adapter edits them."""

    pictures: Float[np.ndarray, "S H W 3"]  # in [0, 1], or NaN
    scores: dict[str, Float[np.ndarray, " S"]]  # by reward, and ERROR; NaN where there is none


class Samples:
    """The samples of a run.

    They pass through the step's own programs, as groups of one candidate, so that no more of them are in memory at a
    time than candidates of a step. The base is the adapter whose numbers are all zero.

    Args:
        options: The run's.
        editor: Its trained network and decoder are on the mesh.
        mesh: The mesh.
        rewards: Name -> reward.
        examples: The samples; every process has all of them.
    """

    def __init__(
        self,
        options: Options,
        editor: Editor,
        mesh: Mesh,
        rewards: Mapping[str, reward_registry.Reward],
        examples: EncodedSource,
    ):
        self._options, self._mesh, self._rewards = options, mesh, rewards
        self._params, self._decoder = editor.params, editor.decoder_params
        self._programs = shared_programs(options.step, editor.networks, mesh)
        self._rows = [examples[i] for i in range(len(examples))]
        self._batch = make_batch(self._rows)
        self._noise = self._initial_noise(editor.networks)
        self._zero = jax.jit(lambda lora: jax.tree.map(jnp.zeros_like, lora), out_shardings=replicated(mesh))
        self._base: Edits | None = None  # the same every time

    def compare(self, lora: dict, step: int) -> tuple[dict[str, float], UInt8[np.ndarray, "_ _ 3"]]:
        """Edits the samples by the base and by an adapter.

        Args:
            lora: The adapter, on the mesh; not donated.
            step: Steps done, for the title.

        Returns:
            The means of all scores over the samples, `samples/NAME` and `samples_base/NAME`, which are NaN if one of
            the samples has no score; and a picture of them, a row a sample.
        """
        if self._base is None:
            self._base = self._edit(self._zero(lora))
        edits = self._edit(lora)
        named = {"samples": edits, "samples_base": self._base}
        metrics = {f"{kind}/{name}": float(x.mean()) for kind, made in named.items() for name, x in made.scores.items()}
        return metrics, draw_rows([*self._picture_rows(edits)], f"step {step}, scores of base / LoRA")

    def _initial_noise(self, networks: Networks) -> Float[np.ndarray, "S N C"]:
        def source(encoded: Mapping[str, np.ndarray]) -> Array:
            return networks.source(networks.condition(encoded, self._options.model.guidance))

        shape = jax.eval_shape(source, self._batch.encoded).shape
        with jax.set_mesh(self._mesh.local_mesh):  # a program of one process
            return np.asarray(initial_noise(np.uint32(SEED), np.arange(shape[0]), shape[1:]))

    def _edit(self, lora: dict) -> Edits:
        programs, count, at_a_time = self._programs, len(self._rows), self._at_a_time()
        pictures, acd = [], []
        for start in range(0, count, at_a_time):
            # What lacks to a whole part is the last sample again.
            indices = np.minimum(np.arange(start, start + at_a_time), count - 1)
            prompts = programs.prompts(make_batch([self._rows[indices[i]] for i in local_row_range(at_a_time)]))
            noise = to_mesh(self._noise[indices][:, None], self._mesh)
            rollout = programs.rollout(self._params, lora, prompts, noise)
            images = programs.decode(self._decoder, rollout.states[:, :, -1])
            pictures.append(gather(np.asarray(local_rows(images, self._mesh))))
            acd.append(np.asarray(rollout.acd)[:, 0])
        made = np.concatenate(pictures)[:count]
        scores = self._score(made)
        if self._options.acd.weight:
            scores[ACD] = np.concatenate(acd)[:count]
        return Edits(made, scores)

    def _at_a_time(self) -> int:
        """How many samples are edited together: no more than candidates, in whole parts of what is decoded together."""
        options = self._options.rollout
        most = options.micro_batch or options.prompts * options.group_size
        part = int(np.prod([self._mesh.shape[axis] for axis in SAMPLE_AXES]))
        if 0 < options.decode_micro_batch < most:
            part = options.decode_micro_batch
        return min(-(-len(self._rows) // part) * part, most)

    def _score(self, pictures: Float[np.ndarray, "S H W 3"]) -> dict[str, Float[np.ndarray, " S"]]:
        """The scores of all samples, by process 0: a judge is asked once about each."""
        names, mesh = [*self._rewards, ERROR], self._mesh.local_mesh
        scores = np.zeros((len(names), len(pictures)), np.float32)
        with raise_together(), jax.set_mesh(mesh):
            if is_main():
                inputs = reward_inputs(self._batch, mesh)(edited=jnp.asarray(pictures)[:, None])
                found = reward_registry.start_all(self._rewards, inputs).result()
                for name, cause in found.failures.items():
                    logger.warning("train.samples: reward %r: %s", name, cause)
                scores = np.stack([*(found.by_reward[name] for name in names[:-1]), background_error(inputs)])[..., 0]
        return dict(zip(names, from_main(scores), strict=True))

    def _picture_rows(self, edits: Edits) -> Iterator[PictureRow]:
        base = self._base
        for i, row in enumerate(self._rows):
            pictures = [("source", shown_source(row["pixels"], row["mask"]))]
            pictures += [(name, candidate_pixels(x.pictures[i])) for name, x in (("base", base), ("LoRA", edits))]
            if "target" in row:
                pictures.append(("target", row["target"]))
            scores = (f"{name} {base.scores[name][i]:.3f} / {x[i]:.3f}" for name, x in edits.scores.items())
            yield PictureRow(f"{row['instruction']}  {', '.join(scores)}", pictures)
