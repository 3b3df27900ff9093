"""Held-out examples that the base and the LoRA edit from the same noise, while a run goes on."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8

from rcgrpo_jax import rewards as reward_registry
from rcgrpo_jax.editors.base import Networks
from rcgrpo_jax.editors.model import Editor
from rcgrpo_jax.encoding.batches import EditBatch, make_batch
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
from rcgrpo_jax.rl.programs import Programs, ProgramsBySize
from rcgrpo_jax.rl.reward_fields import ACD
from rcgrpo_jax.rl.reward_inputs import reward_inputs
from rcgrpo_jax.rl.step_metrics import background_error
from rcgrpo_jax.runs.grid import PictureRow, candidate_pixels, draw_rows, shown_source

SEED = 0  # of the noise, the default of `rcgrpo evaluate`
ERROR = "background_error"  # a measure beside the rewards; lower is better

logger = logging.getLogger(__name__)


class Edits(NamedTuple):
    """The samples as one adapter edits them."""

    pictures: Sequence[Float[np.ndarray, "_ _ 3"]]  # S of them, in [0, 1], or NaN
    scores: dict[str, Float[np.ndarray, " S"]]  # by reward, and ERROR; NaN where there is none


class SizeGroup(NamedTuple):
    """The samples of one size."""

    indices: list[int]  # among all samples
    rows: list[dict[str, Any]]  # entries of the cache
    batch: EditBatch  # of them
    programs: Programs
    noise: Float[np.ndarray, "s N C"]


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
        self._rows = [examples[i] for i in range(len(examples))]
        programs = ProgramsBySize(options.step, editor.networks, mesh)
        self._groups = [
            self._group(indices.tolist(), programs, editor.networks) for indices in examples.buckets.values()
        ]
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

    def _group(self, indices: list[int], programs: ProgramsBySize, networks: Networks) -> SizeGroup:
        rows = [self._rows[i] for i in indices]
        batch = make_batch(rows)
        noise = self._initial_noise(networks, batch, indices)
        return SizeGroup(indices, rows, batch, programs(batch.mask.shape[1:]), noise)

    def _initial_noise(
        self, networks: Networks, batch: EditBatch, indices: Sequence[int]
    ) -> Float[np.ndarray, "s N C"]:
        def source(encoded: Mapping[str, np.ndarray]) -> Array:
            return networks.source(networks.condition(encoded, self._options.model.guidance))

        shape = jax.eval_shape(source, batch.encoded).shape
        with jax.set_mesh(self._mesh.local_mesh):  # a program of one process
            return np.asarray(initial_noise(np.uint32(SEED), np.array(indices), shape[1:]))

    def _edit(self, lora: dict) -> Edits:
        made = [self._edit_group(group, lora) for group in self._groups]
        scores = self._score([pictures for pictures, _ in made])
        if self._options.acd.weight:
            scores[ACD] = self._in_order([acd for _, acd in made])
        pictures = {}
        for group, (edits, _) in zip(self._groups, made, strict=True):
            pictures |= zip(group.indices, edits, strict=True)
        return Edits([pictures[i] for i in range(len(self._rows))], scores)

    def _edit_group(self, group: SizeGroup, lora: dict) -> tuple[Float[np.ndarray, "s H W 3"], Float[np.ndarray, " s"]]:
        """The pictures of a group, and R_acd of each."""
        programs, count, at_a_time = group.programs, len(group.rows), self._at_a_time(len(group.rows))
        pictures, acd = [], []
        for start in range(0, count, at_a_time):
            # What lacks to a whole part is the last sample again.
            indices = np.minimum(np.arange(start, start + at_a_time), count - 1)
            prompts = programs.prompts(make_batch([group.rows[indices[i]] for i in local_row_range(at_a_time)]))
            noise = to_mesh(group.noise[indices][:, None], self._mesh)
            rollout = programs.rollout(self._params, lora, prompts, noise)
            images = programs.decode(self._decoder, rollout.states[:, :, -1])
            pictures.append(gather(np.asarray(local_rows(images, self._mesh))))
            acd.append(np.asarray(rollout.acd)[:, 0])
        return np.concatenate(pictures)[:count], np.concatenate(acd)[:count]

    def _in_order(self, parts: Sequence[Float[np.ndarray, "... s"]]) -> Float[np.ndarray, "... S"]:
        """What there is of each group, in the order of the samples."""
        return np.concatenate(parts, axis=-1)[..., np.argsort(np.concatenate([x.indices for x in self._groups]))]

    def _at_a_time(self, count: int) -> int:
        """How many of so many samples are edited together: no more than candidates, in whole parts of the decoding."""
        options = self._options.rollout
        most = options.micro_batch or options.prompts * options.group_size
        part = int(np.prod([self._mesh.shape[axis] for axis in SAMPLE_AXES]))
        if 0 < options.decode_micro_batch < most:
            part = options.decode_micro_batch
        return min(-(-count // part) * part, most)

    def _score(self, pictures: Sequence[Float[np.ndarray, "s H W 3"]]) -> dict[str, Float[np.ndarray, " S"]]:
        """The scores of all samples, by process 0: a judge is asked once about each.

        Args:
            pictures: Of each group.
        """
        names, mesh = [*self._rewards, ERROR], self._mesh.local_mesh
        scores = np.zeros((len(names), len(self._rows)), np.float32)
        with raise_together(), jax.set_mesh(mesh):
            if is_main():
                pairs = zip(self._groups, pictures, strict=True)
                inputs = [reward_inputs(x.batch, mesh)(edited=jnp.asarray(edits)[:, None]) for x, edits in pairs]
                results = [x.result() for x in [reward_registry.start_all(self._rewards, x) for x in inputs]]
                for name, cause in {name: x for found in results for name, x in found.failures.items()}.items():
                    logger.warning("train.samples: reward %r: %s", name, cause)
                parts = [
                    np.stack([*(found.by_reward[name] for name in names[:-1]), background_error(x)])[..., 0]
                    for found, x in zip(results, inputs, strict=True)
                ]
                scores = self._in_order(parts)
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
