"""The data of a run through the text and image encoders, once, before the transformer is loaded."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import jax
from jax.sharding import Mesh

from rcgrpo_jax.data.example import REGION, First, Needs, check_needs
from rcgrpo_jax.data.sources import open_source
from rcgrpo_jax.editors.model import EditorOptions, Model
from rcgrpo_jax.encoding.batches import Batches
from rcgrpo_jax.encoding.cache import EncodedSource
from rcgrpo_jax.encoding.index import KnownExample
from rcgrpo_jax.options import DataOptions, ModelOptions
from rcgrpo_jax.parallel.distributed import local_job_range
from rcgrpo_jax.progress import Progress

logger = logging.getLogger(__name__)


def encode(
    data: DataOptions,
    options: ModelOptions,
    model: Model,
    workdir: Path,
    mesh: Mesh,
    batch_size: int,
    seed: int,
    check: Callable[[KnownExample], None] = lambda known: None,
    needs: Needs = REGION,
    captions: bool = False,
    first: int = 0,
) -> Batches:
    """Runs the encoders over the examples that are not in the cache yet; they are freed afterwards.

    Args:
        data: The examples.
        options: The model's.
        model: The model.
        workdir: Has the cache, unless `data.cache` says where.
        mesh: The mesh of all processes.
        batch_size: Examples in a batch.
        seed: Of their order.
        check: Raises if an example cannot be used for another reason than `needs`.
        needs: What examples must have.
        captions: Whether batches have captions, which every example must have then.
        first: How many examples there are, from the first on; 0: all.
    """
    source = open_source(data.path, data.polarity, data.mask_value, needs)
    if first and len(source) > first:
        logger.warning("%s: the first %d of %d examples are used", data.path, first, len(source))
        source = First(source, first)

    def check_all(example: KnownExample) -> None:
        check_needs(example, needs)
        check(example)

    mesh = mesh.local_mesh  # each process encodes its own share of the examples
    with jax.set_mesh(mesh), Progress(len(local_job_range(len(source))), description="encode", lines=10) as progress:
        encoded = EncodedSource(
            source,
            model.open(EditorOptions(options.dtype, options.max_text_tokens), mesh),
            data.size,
            data.cache or workdir / "cache",
            check_all,
            lambda done, _: progress.update(),
            captions,
            data.buckets,
        )
    if lost := [known for known in encoded.known.values() if known.lost]:
        worst = max(lost, key=lambda known: known.lost)
        logger.warning(
            "data.buckets: %d of %d regions are wider than what their bucket keeps; %s loses %.0f %% of its region "
            "(`rcgrpo data preview` shows it)", len(lost), len(encoded.known), worst.name, 100 * worst.lost,
        )  # fmt: skip
    return Batches(encoded, batch_size, seed, [*encoded.buckets.values()])
