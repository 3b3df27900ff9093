"""Measures edits of any model against the examples that they are edits of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from rcgrpo_jax.data.example import Source
from rcgrpo_jax.errors import UsageError, UserError
from rcgrpo_jax.evaluation.examples import Digest, EditedBatch, ExampleBatch, check_targets, read_batches, right_batches
from rcgrpo_jax.evaluation.measures import Measure, MeasureInputs, MeasureOptions, choose, load_weights
from rcgrpo_jax.evaluation.official import official_batch
from rcgrpo_jax.evaluation.pictures import read_common, read_lines, read_picture, size_in
from rcgrpo_jax.evaluation.result import PICTURED, Evaluation

OFFICIAL = "official"  # the group of measures that has a form of its own
NO_OPTIONS = MeasureOptions()


def measure(
    pictures: str | Path | UInt8[np.ndarray, "N H W 3"],
    source: Source,
    indices: Sequence[int] | None = None,
    measures: Sequence[str] | None = None,
    *,
    batch: int = 8,
    size: tuple[int, int] | None = None,
    options: MeasureOptions = NO_OPTIONS,
    progress: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Measures edits that are there, whoever made them.

    What cannot be measured of them is left out (`evaluation.measures`): success where examples have no targets, R_acd
    where `edit_all` has not made the edits, and so on.

    Args:
        pictures: A folder with a PNG for each example, named by it, or the pictures in the order of the indices.
        source: The examples.
        indices: Which of them; all by default.
        measures: Names of measures and of groups (`evaluation.measures`); the group `editor` by default.
        batch: Examples at a time. Memory depends on it, results do not.
        size: (height, width) of the pictures, which the examples are brought to. By default that of the edits where
            `edit_all` made them, else that of the first example. The group `official` is measured in its own.
        options: Where weights are that no package carries.
        progress: Called for each example, after its batch.

    Returns:
        One value a measure and example, in the order of the indices. Its settings are those that `edit_all` left in the
        folder, or the size and the digest of the data alone.

    Raises:
        UserError: A picture is missing or of another size, the folder holds edits of other data, an example cannot be
            read, its target is flawed or missing where others have one, or a measure that was asked for lacks weights.
        UsageError: There are no examples, no measure has one of the names, or the targets are flawed on purpose.
    """
    check_targets(source)
    chosen, every = choose(measures), indices is None
    indices = range(len(source)) if every else indices
    if not len(indices):
        raise UsageError("measure: no examples found; at least one was wanted.", "Name more examples.")
    folder = None if isinstance(pictures, np.ndarray) else Path(pictures)
    common = None if folder is None else read_common(folder)
    size = tuple(size or (folder and size_in(folder, common)) or source[indices[0]].image.shape[:2])
    batches = right_batches(read_batches(source, indices, min(batch, len(indices)), size))
    if folder is None:
        edits = _of_array(pictures, batches, len(indices), size)
    else:
        edits = _of_folder(folder, batches, None if common is None else read_lines(folder), size)
    found = measure_edits(edits, source, chosen, progress, options)
    if common is None:
        return found
    if every and (there := common["settings"].get("data")) != found.settings["data"]:
        raise UserError(
            f"{folder}: its edits are of data of the digest {there}; the examples have {found.settings['data']}.",
            "Name the data that was edited.",
        )
    return replace(found, settings={**common["settings"], **found.settings}, origin=common["origin"])


def measure_edits(
    edits: Iterable[EditedBatch],
    source: Source,
    measures: Sequence[Measure],
    progress: Callable[[], None] = lambda: None,
    options: MeasureOptions = NO_OPTIONS,
) -> Evaluation:
    """Measures batch after batch, of which no more than the last is in memory.

    Args:
        edits: Batches of examples and their edits, all of one size; one at least.
        source: What the examples are of.
        measures: What to measure; what cannot be measured of the first batch is left out. Those of the group `official`
            get the batches as `evaluation.official` makes them.
        progress: Called for each example, after its batch.
        options: Where weights are that no package carries. They are read before the first batch is asked for.

    Returns:
        All values, and the first `PICTURED` pictures. Its settings are the size and the digest of the data.

    Raises:
        UserError: A target is missing, and the first examples have theirs; or a measure that was asked for lacks its
            weights.
    """
    weights = load_weights(measures, options)
    official = [one for one in measures if one.group == OFFICIAL]
    meters = [_Meter([one for one in measures if one.group != OFFICIAL], source, weights)]
    names, images, values, digest, size, uncaptioned = [], [], [], Digest(), (), 0
    if official:
        meters.append(_Meter(official, source, weights))
    for edited in edits:
        batch = edited.batch
        for example in batch.own:
            digest.add(example)
            uncaptioned += not example.has_caption
        forms = (edited, official_batch(edited, source)) if official else (edited,)
        found = {}
        for meter, form in zip(meters, forms, strict=True):
            found |= meter.measure(form)
        values.append({name: np.asarray(x, np.float32)[: batch.count] for name, x in found.items()})
        names += [example.name for example in batch.own]
        images += [picture.copy() for picture in edited.pictures[: min(batch.count, PICTURED - len(images))]]
        size = edited.pictures.shape[1:3]
        for _ in batch.own:
            progress()
    joined = {name: np.concatenate([part[name] for part in values]) for name in values[0]}
    settings = {"size": list(size), "data": str(digest)}
    return Evaluation(tuple(names), joined, np.stack(images), settings, uncaptioned=uncaptioned)


class _Meter:
    """Measures batches of one form; what cannot be measured of the first is left out."""

    def __init__(self, measures: Sequence[Measure], source: Source, weights: Mapping[Callable, Any]):
        self._measures, self._source, self._weights = measures, source, weights
        self._opened: tuple[Measure, ...] | None = None

    def measure(self, edited: EditedBatch) -> dict[str, Float[Array, " P"]]:
        """One value a measure and row."""
        if not self._measures:
            return {}
        inputs = _inputs(*edited)
        if self._opened is None:
            self._opened = tuple(one for one in self._measures if self._can(one, inputs))
        if inputs.target is None and any("target" in one.needs for one in self._opened):
            lacking = next(example.name for example in edited.batch.own if example.target is None)
            raise UserError(
                f"{lacking}: no target image, and examples before it have theirs.",
                "Add it, or leave such examples out.",
            )
        loads = {one.prepare: one.load for one in self._opened if one.prepare is not None}
        prepared = {prepare: prepare(self._weights[load], edited) for prepare, load in loads.items()}
        besides = tuple(self._besides(one, edited.batch.indices, prepared) for one in self._opened)
        return _compute(self._opened, inputs, besides)

    def _can(self, one: Measure, inputs: MeasureInputs) -> bool:
        """Whether a measure can be computed of such a batch."""
        return (
            one.fits(self._source, tuple(inputs.edited.shape[1:3]))
            and all(getattr(inputs, need) is not None for need in one.needs)
            and (one.load is None or self._weights[one.load] is not None)
        )

    def _besides(self, one: Measure, indices: np.ndarray, prepared: Mapping[Callable, Any]) -> tuple:
        """What a measure computes with besides the inputs: what was prepared or loaded, and what it reads, stacked."""
        known = () if one.load is None else (self._weights[one.load],)
        if one.prepare is not None:
            known = (prepared[one.prepare],)
        if one.read is None:
            return known
        return (*known, jax.tree.map(lambda *x: np.stack(x), *(one.read(self._source, int(i)) for i in indices)))


def _of_folder(
    folder: Path, batches: Iterable[ExampleBatch], lines: Mapping[str, Mapping[str, Any]] | None, size: tuple[int, int]
) -> Iterator[EditedBatch]:
    """The pictures of a folder, and R_acd where the lines of `edit_all` tell it."""

    def acd_of(name: str) -> float:
        if name not in lines:
            raise UserError(
                f"{folder}: the picture of {name} has no line in edits-*.jsonl, so it may not be whole.",
                "Edit again with the same settings: what is missing is made.",
            )
        return np.nan if lines[name]["acd"] is None else lines[name]["acd"]

    for batch in batches:
        names = [example.name for example in batch.examples]
        acd = None if lines is None else np.array([*map(acd_of, names)], np.float32)  # tells first what is not made yet
        yield EditedBatch(batch, np.stack([read_picture(folder, name, size) for name in names]), acd)


def _of_array(
    pictures: UInt8[np.ndarray, "N H W 3"], batches: Iterable[ExampleBatch], count: int, size: tuple[int, int]
) -> Iterator[EditedBatch]:
    wanted = (count, *size, 3)
    if pictures.dtype != np.uint8 or pictures.shape != wanted:
        raise UsageError(
            f"measure: pictures of {pictures.dtype} {list(pictures.shape)} found; uint8 {list(wanted)} were wanted.",
            "Give one 8-bit RGB picture for each example, and name their size.",
        )
    start = 0
    for batch in batches:
        rows = start + np.arange(len(batch.examples)).clip(max=batch.count - 1)
        yield EditedBatch(batch, pictures[rows], None)
        start += batch.count


def _inputs(batch: ExampleBatch, pictures: np.ndarray, acd: np.ndarray | None) -> MeasureInputs:
    targets = batch.targets
    return MeasureInputs(
        _unit(batch.pixels),
        _unit(pictures),
        jnp.asarray(batch.masks),
        None if targets is None else _unit(targets),
        None if acd is None else jnp.asarray(acd),
    )


@partial(jax.jit, static_argnums=0)
def _compute(
    measures: tuple[Measure, ...], inputs: MeasureInputs, besides: tuple[tuple, ...]
) -> dict[str, Float[Array, " P"]]:
    return {one.name: one.compute(inputs, *known) for one, known in zip(measures, besides, strict=True)}


def _unit(pixels: UInt8[np.ndarray, "P H W 3"]) -> Float[Array, "P H W 3"]:
    return jnp.asarray(pixels, jnp.float32) / 255
