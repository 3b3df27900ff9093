"""What a benchmark is: its tasks, its measures, where an editor's pictures lie, and what has been published on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from rcgrpo_jax.data.example import EditExample


class Published(NamedTuple):
    """A row of somebody else's table."""

    editor: str
    values: Mapping[str, float]  # name of a measure -> mean, in that measure's units


class PublishedTable(NamedTuple):
    """A table of a publication."""

    origin: str = ""  # whose it is
    rows: tuple[Published, ...] = ()


class Benchmark(NamedTuple):
    """A benchmark of edits. Its examples come from any source: each names its task, and has the benchmark's id.

    Attributes:
        name: As users write it.
        title: As its authors write it.
        tasks: Task -> how many examples of it have been published.
        side: Pixels of the square that every picture is brought to, to be measured (`evaluation.official`).
        measures: Names of `evaluation.measures`, or groups of them: those that the published rows have.
        identify: Example -> its id, which no other example of its task has.
        picture: (folder of an editor's results, task, id) -> where the edit of an example lies.
        layout: The same in words, for messages.
        published: The rows to stand beside, the first one at the top.
        tables: Name -> published tables that may stand beside instead.
        remarks: What a reader of the table must know.
    """

    name: str
    title: str
    tasks: Mapping[str, int]
    side: int
    measures: tuple[str, ...]
    identify: Callable[[EditExample], str]
    picture: Callable[[Path, str, str], Path]
    layout: str
    published: PublishedTable = PublishedTable()
    tables: Mapping[str, PublishedTable] = MappingProxyType({})
    remarks: tuple[str, ...] = ()
