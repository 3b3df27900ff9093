"""Pictures of a benchmark, whoever made them, measured one batch at a time. What cannot be read is listed, with why."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from rcgrpo_jax.data.example import EditExample, Source
from rcgrpo_jax.data.images import read_image
from rcgrpo_jax.data.paths import Finder, composed
from rcgrpo_jax.errors import UserError
from rcgrpo_jax.evaluation.benchmarks.base import Benchmark
from rcgrpo_jax.evaluation.benchmarks.entries import Entry, Locate
from rcgrpo_jax.evaluation.benchmarks.rows import EVERY, MISSING, Row
from rcgrpo_jax.evaluation.examples import EditedBatch, ExampleBatch, right_batches
from rcgrpo_jax.evaluation.measure import NO_OPTIONS, measure_edits
from rcgrpo_jax.evaluation.measures import Measure, MeasureOptions
from rcgrpo_jax.evaluation.official import official_example, official_picture, resized
from rcgrpo_jax.evaluation.result import PICTURED

Score = Callable[[EditedBatch], Mapping[str, np.ndarray]]  # `[P]` of each further measure, such as a judge's score
AT_ONCE = 32  # edits that a judge is asked about, where each has a size of its own
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


class Measured(NamedTuple):
    """What was measured of an editor's results."""

    rows: list[Row]
    pictures: dict[str, UInt8[np.ndarray, "H W 3"]]  # the first edits, by key


def open_results(folder: Path, benchmark: Benchmark) -> Locate:
    """Where a folder of an editor's results has the edit of an example.

    Raises:
        UserError: The folder has nothing of the benchmark's layout.
    """
    roots = _roots(folder, benchmark)
    if not _has_layout(folder, benchmark):
        is_folder = folder.is_dir()
        inside = [x for x in sorted(folder.iterdir()) if _has_layout(x, benchmark)] if is_folder else []
        found = f"no folder {roots[0].relative_to(folder)} or the like in it" if is_folder else "no such folder"
        raise UserError(
            f"--results: {folder}: {found}; pictures in {benchmark.layout} were wanted.",
            f"Name one editor's folder, such as {inside[0]}." if inside else "Name the folder MODEL.",
        )

    find = Finder()

    def locate(entry: Entry) -> Path:
        parts = PurePosixPath(entry.id)
        if parts.is_absolute() or ".." in parts.parts:
            raise UserError(f"{entry.key}: the id leads out of the folder; one within it was wanted.", "Correct it.")
        file = benchmark.picture(folder, entry.task, entry.id)
        return file if os.path.lexists(file) else find(file)

    return locate


def extra_pictures(folder: Path, benchmark: Benchmark, entries: Sequence[Entry]) -> dict[str, list[str]]:
    """Task -> the pictures in an editor's results that no example has, relative to the folder.

    Where all tasks have one folder, they are those of `EVERY` task.
    """
    wanted, extra = {composed(str(benchmark.picture(folder, x.task, x.id))) for x in entries}, {}
    tasks = defaultdict(list)
    for task, root in zip(benchmark.tasks, _roots(folder, benchmark), strict=True):
        tasks[root].append(task)
    for root, (first, *others) in tasks.items():
        there = (
            Path(place, file)
            for place, _, files in os.walk(root)
            for file in files
            if not file.startswith(".") and file.lower().endswith(_PICTURES)
        )
        found = (file for file in there if composed(str(file)) not in wanted and not _is_source(file, benchmark))
        extra[EVERY if others else first] = sorted(str(file.relative_to(folder)) for file in found)
    return extra


def measure_results(
    source: Source,
    entries: Sequence[Entry],
    locate: Locate,
    measures: Sequence[Measure],
    side: int,
    *,
    batch: int = 8,
    options: MeasureOptions = NO_OPTIONS,
    score: Score = lambda edited: {},
    progress: Callable[[], None] = lambda: None,
) -> Measured:
    """Measures the edits of examples. An edit that is missing or cannot be read becomes a row that says so.

    Memory holds a batch at a time, and the first pictures for people.

    Args:
        source: The examples.
        entries: Which of them.
        locate: Where the edit of each lies; it may raise a UserError.
        measures: What to measure.
        side: Pixels of the square that examples and edits are brought to (`evaluation.official`).
        batch: Examples at a time.
        options: Where the weights of measures are.
        score: Of further measures (`evaluation.judge.scores_of`).
        progress: Called for each example.

    Returns:
        A row for each entry, in their order.

    Raises:
        UserError: An example cannot be read, or its target is flawed.
    """
    failed: dict[int, Row] = {}

    def fail(row: Row) -> None:
        failed[row.index] = row
        progress()

    batches = _read_batches(source, entries, locate, side, min(batch, max(len(entries), 1)), fail)
    first = next(batches, None)
    if first is None:
        return Measured([failed[entry.index] for entry in entries], {})
    scored: list[Mapping[str, float]] = []

    def scoring() -> Iterator[EditedBatch]:
        for edited in chain([first], batches):
            scores = score(edited)
            scored.extend({name: float(x[i]) for name, x in scores.items()} for i in range(edited.batch.count))
            yield edited

    found = measure_edits(scoring(), source, measures, progress, options)
    there = [entry for entry in entries if entry.index not in failed]
    rows = {
        x.index: Row(x.index, x.id, x.task, {name: float(y[i]) for name, y in found.measures.items()} | scored[i])
        for i, x in enumerate(there)
    }
    pictures = {entry.key: x for entry, x in zip(there, found.images, strict=False)}
    return Measured([(failed | rows)[entry.index] for entry in entries], pictures)


def score_results(
    source: Source,
    entries: Sequence[Entry],
    locate: Locate,
    score: Score,
    progress: Callable[[], None] = lambda: None,
) -> Measured:
    """Scores the edits of examples, each by itself in the size of its source, some at the same time.

    Arguments and result are as of `measure_results`. Memory holds `AT_ONCE` examples, and the first pictures.
    """

    shown = {entry.index for entry in entries[:PICTURED]}

    def look(entry: Entry) -> tuple[Row, np.ndarray | None]:
        picture = _read_edit(entry, locate)
        if isinstance(picture, Row):
            return picture, None
        example = replace(source[entry.index], task=entry.task)
        picture = resized(picture, example.image.shape[:2])
        edited = EditedBatch(ExampleBatch((example,), np.array([entry.index]), 1), picture[None], None)
        row = Row(*entry[:3], {name: float(x[0]) for name, x in score(edited).items()})
        return row, picture if entry.index in shown else None

    rows, pictures = [], {}
    pool = ThreadPoolExecutor(AT_ONCE)
    try:
        for entry, (row, picture) in zip(entries, pool.map(look, entries), strict=True):
            rows.append(row)
            if picture is not None:
                pictures[entry.key] = picture
            progress()
    finally:
        pool.shutdown(cancel_futures=True)
    return Measured(rows, pictures)


def _read_edit(entry: Entry, locate: Locate) -> UInt8[np.ndarray, "H W 3"] | Row:
    """The edit of an example, or the row that says why there is none."""
    file = None
    try:
        file = locate(entry)
        return read_image(file)
    except UserError as error:
        is_missing = file is not None and not os.path.lexists(file)
        return Row(*entry[:3], {}, MISSING if is_missing else error.problem, str(file or ""))


def _read_batches(
    source: Source,
    entries: Sequence[Entry],
    locate: Locate,
    side: int,
    batch: int,
    fail: Callable[[Row], None],
) -> Iterator[EditedBatch]:
    """The examples whose edits can be read, in batches of one shape; `fail` is told of the others."""

    def gather(rows: list[tuple[int, EditExample, np.ndarray]]) -> EditedBatch:
        indices, examples, pictures = zip(*rows, *rows[-1:] * (batch - len(rows)), strict=True)
        (right,) = right_batches([ExampleBatch(examples, np.array(indices), len(rows))])
        return EditedBatch(right, np.stack(pictures), None)

    rows = []
    for entry in entries:
        picture = _read_edit(entry, locate)
        if isinstance(picture, Row):
            fail(picture)
            continue
        rows.append((entry.index, official_example(source[entry.index], side), official_picture(picture, side)))
        if len(rows) == batch:
            yield gather(rows)
            rows = []
    if rows:
        yield gather(rows)


def _roots(folder: Path, benchmark: Benchmark) -> list[Path]:
    """The folders of the tasks in an editor's results."""
    return [benchmark.picture(folder, task, "x").parent for task in benchmark.tasks]


def _is_source(file: Path, benchmark: Benchmark) -> bool:
    return bool(benchmark.source_mark) and file.stem.endswith(benchmark.source_mark)


def _has_layout(folder: Path, benchmark: Benchmark) -> bool:
    return any(root.is_dir() for root in _roots(folder, benchmark))
