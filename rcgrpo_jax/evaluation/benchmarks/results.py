"""Pictures of a benchmark, whoever made them, measured one batch at a time. What cannot be read is listed, with why."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from rcgrpo_jax.data.example import EditExample, Source
from rcgrpo_jax.data.images import read_image
from rcgrpo_jax.data.paths import Finder, composed
from rcgrpo_jax.errors import UsageError, UserError
from rcgrpo_jax.evaluation.benchmarks.base import Benchmark
from rcgrpo_jax.evaluation.benchmarks.rows import MISSING, Row
from rcgrpo_jax.evaluation.examples import EditedBatch, ExampleBatch, check_right, right_batches
from rcgrpo_jax.evaluation.measure import NO_OPTIONS, measure_edits
from rcgrpo_jax.evaluation.measures import Measure, MeasureOptions
from rcgrpo_jax.evaluation.official import official_example, official_picture

Locate = Callable[["Entry"], Path]  # where the edit of an example lies
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


class Entry(NamedTuple):
    """An example of a benchmark, without its pictures."""

    index: int  # in the source
    id: str
    task: str

    @property
    def name(self) -> str:
        """Tells it from those of the other tasks: CompBench gives two tasks one id."""
        return f"{self.task}/{self.id}"


class Listed(NamedTuple):
    """What a source has of a benchmark."""

    entries: list[Entry]
    others: Counter[str]  # tasks that are none of the benchmark -> examples
    uncaptioned: int = 0  # how many entries have no caption
    untargeted: tuple[str, ...] = ()  # the names of those that have no target


class Measured(NamedTuple):
    """What was measured of an editor's results."""

    rows: list[Row]
    pictures: dict[str, UInt8[np.ndarray, "H W 3"]]  # the first edits, by name


class Qualified:
    """A source whose examples are called TASK/ID, so that no two edits have one file."""

    def __init__(self, source: Source, entries: Sequence[Entry]):
        self._source, self._names = source, {entry.index: entry.name for entry in entries}

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> EditExample:
        return replace(self._source[index], name=self._names[index])


def list_entries(
    source: Source,
    benchmark: Benchmark,
    progress: Callable[[], None] = lambda: None,
    check: Callable[[EditExample], None] = lambda example: None,
) -> Listed:
    """Lists the examples of a benchmark's tasks; each is read once for it.

    Args:
        source: Examples that name their task and have the benchmark's ids.
        benchmark: Whose tasks.
        progress: Called for each example.
        check: Refuses an example of the benchmark that could not be measured, before hours of edits.

    Raises:
        UserError: An example cannot be read, its target is flawed, it is refused, or two of a task have one id.
        UsageError: No example has one of the tasks.
    """
    entries, others, seen, uncaptioned, untargeted = [], Counter(), {}, 0, []
    for index in range(len(source)):
        example = source[index]
        entry = Entry(index, benchmark.identify(example), example.task)
        if example.task not in benchmark.tasks:
            others[example.task] += 1
        elif (other := seen.setdefault(str(PurePosixPath(entry.name)), index)) != index:  # a/./b is a/b
            raise UserError(
                f"{entry.name}: the examples {other} and {index} have this name; a name for each was wanted.",
                "Rename one of them in the data.",
            )
        else:
            check_right(example)
            check(example)
            entries.append(entry)
            uncaptioned += not example.has_caption
            if not example.has_target:
                untargeted.append(entry.name)
        progress()
    if not entries:
        found = ", ".join(f"{count} of {task or 'no task'}" for task, count in others.items()) or "none"
        raise UsageError(
            f"--data: examples of {found} found; some of the tasks {', '.join(benchmark.tasks)} were wanted.",
            f"`rcgrpo data prepare {benchmark.name}` makes such data.",
        )
    return Listed(entries, others, uncaptioned, tuple(untargeted))


def check_listed(listed: Listed, measures: Sequence[Measure], results: Mapping[str, Locate]) -> None:
    """Refuses what could not be measured, before hours of edits.

    Args:
        listed: The examples.
        measures: What is to be measured.
        results: Editor -> where its pictures lie, of those whose pictures others made.

    Raises:
        UserError: A measure needs targets, and some of the examples have none; or an editor has no picture at all.
    """
    needing = [one.label for one in measures if "target" in one.needs]
    if needing and 0 < (count := len(listed.untargeted)) < len(listed.entries):
        raise UserError(
            f"{listed.untargeted[0]}: no target image; {count:,} of {len(listed.entries):,} examples have none, and "
            f"{', '.join(needing)} takes one of each.",
            "Add them, leave such examples out, or choose other --measures.",
        )
    for name, locate in results.items():
        if not any(_is_there(locate, entry) for entry in listed.entries):
            raise UserError(
                f"{name}: no picture of any of {len(listed.entries):,} examples found; the first would be "
                f"{_path_of(locate, listed.entries[0])}.",
                "Name the folder of the pictures and the data that they are edits of.",
            )


def _path_of(locate: Locate, entry: Entry) -> Path | str:
    """Where an edit lies; the error's text where there is no such place."""
    try:
        return locate(entry)
    except UserError as error:
        return error.problem


def _is_there(locate: Locate, entry: Entry) -> bool:
    """Whether there is anything in the place of an edit."""
    return os.path.lexists(_path_of(locate, entry))


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
            raise UserError(f"{entry.name}: the id leads out of the folder; one within it was wanted.", "Correct it.")
        file = benchmark.picture(folder, entry.task, entry.id)
        return file if os.path.lexists(file) else find(file)

    return locate


def extra_pictures(folder: Path, benchmark: Benchmark, entries: Sequence[Entry]) -> dict[str, list[str]]:
    """Task -> the pictures in an editor's results that no example has, relative to the folder."""
    wanted, extra = {composed(str(benchmark.picture(folder, x.task, x.id))) for x in entries}, {}
    for task, root in zip(benchmark.tasks, _roots(folder, benchmark), strict=True):
        there = (
            Path(place, file)
            for place, _, files in os.walk(root)
            for file in files
            if not file.startswith(".") and file.lower().endswith(_PICTURES)
        )
        extra[task] = sorted(str(file.relative_to(folder)) for file in there if composed(str(file)) not in wanted)
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
    score: Callable[[EditedBatch], Mapping[str, np.ndarray]] = lambda edited: {},
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
        score: Edits -> `[P]` of each of further measures, such as a judge's score (`evaluation.judge.scores_of`).
        progress: Called for each example.

    Returns:
        A row for each entry, in their order.

    Raises:
        UserError: An example cannot be read, or its target is flawed.
    """
    failed: dict[int, Row] = {}

    def fail(entry: Entry, failure: str, file: str) -> None:
        failed[entry.index] = Row(*entry, {}, failure, file)
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
        entry.index: Row(*entry, {name: float(x[i]) for name, x in found.measures.items()} | scored[i])
        for i, entry in enumerate(there)
    }
    pictures = {entry.name: x for entry, x in zip(there, found.images, strict=False)}
    return Measured([(failed | rows)[entry.index] for entry in entries], pictures)


def _read_batches(
    source: Source,
    entries: Sequence[Entry],
    locate: Locate,
    side: int,
    batch: int,
    fail: Callable[[Entry, str, str], None],
) -> Iterator[EditedBatch]:
    """The examples whose edits can be read, in batches of one shape; `fail` is told of the others."""

    def gather(rows: list[tuple[int, EditExample, np.ndarray]]) -> EditedBatch:
        indices, examples, pictures = zip(*rows, *rows[-1:] * (batch - len(rows)), strict=True)
        (right,) = right_batches([ExampleBatch(examples, np.array(indices), len(rows))])
        return EditedBatch(right, np.stack(pictures), None)

    rows = []
    for entry in entries:
        file = None
        try:
            file = locate(entry)
            picture = official_picture(read_image(file), side)
        except UserError as error:
            is_missing = file is not None and not os.path.lexists(file)
            fail(entry, MISSING if is_missing else error.problem, str(file or ""))
            continue
        rows.append((entry.index, official_example(source[entry.index], side), picture))
        if len(rows) == batch:
            yield gather(rows)
            rows = []
    if rows:
        yield gather(rows)


def _roots(folder: Path, benchmark: Benchmark) -> list[Path]:
    """The folders of the tasks in an editor's results."""
    return [benchmark.picture(folder, task, "x").parent for task in benchmark.tasks]


def _has_layout(folder: Path, benchmark: Benchmark) -> bool:
    return any(root.is_dir() for root in _roots(folder, benchmark))
