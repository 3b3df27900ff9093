"""What a benchmark is: its tasks, its measures, where an editor's pictures lie, and what has been published on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from rcgrpo_jax.data.buckets import NONE
from rcgrpo_jax.data.example import EditExample


class Published(NamedTuple):
    """A row of somebody else's table."""

    editor: str
    values: Mapping[str, float]  # name of a measure -> mean, in that measure's units
    by_task: Mapping[str, Mapping[str, float]] = MappingProxyType({})  # task -> the same, where that is published


class PublishedTable(NamedTuple):
    """A table of a publication."""

    origin: str = ""  # whose it is
    rows: tuple[Published, ...] = ()


class Subset(NamedTuple):
    """Examples of a benchmark that its authors report by themselves too."""

    name: str
    has: Callable[[EditExample], bool]


class Benchmark(NamedTuple):
    """A benchmark of edits. Its examples come from any source: each names its task, and has the benchmark's id.

    Attributes:
        name: As users write it.
        title: As its authors write it.
        tasks: Task -> how many examples of it have been published.
        side: Pixels of the square that every picture is brought to, to be measured (`evaluation.official`). None: there
            are no masks to measure with. A judge scores each edit, in the size of its source.
        measures: Names of `evaluation.measures`, or groups of them: those that the published rows have.
        identify: Example -> its id, which no other example of its task has.
        picture: (folder of an editor's results, task, id) -> where the edit of an example lies.
        layout: The same in words, for messages.
        task_of: Example -> its task; one that is none of `tasks` is left out, and counted.
        judge: The benchmark's own judge, a reward; empty: it has none.
        buckets: In what shapes a model edits by default: a value of `data.buckets`.
        source_mark: How the names of sources end that lie among an editor's results; empty: none do.
        subset: What is reported by itself too.
        published: The rows to stand beside, the first one at the top.
        tables: Name -> published tables that may stand beside instead.
        remarks: What a reader of the table must know.
    """

    name: str
    title: str
    tasks: Mapping[str, int]
    side: int | None
    measures: tuple[str, ...]
    identify: Callable[[EditExample], str]
    picture: Callable[[Path, str, str], Path]
    layout: str
    task_of: Callable[[EditExample], str] = lambda example: example.task
    judge: str = ""
    buckets: str = NONE
    source_mark: str = ""
    subset: Subset | None = None
    published: PublishedTable = PublishedTable()
    tables: Mapping[str, PublishedTable] = MappingProxyType({})
    remarks: tuple[str, ...] = ()
