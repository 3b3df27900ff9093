"""Which examples of a source are a benchmark's, and what is refused of them before hours of edits."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from rcgrpo_jax.data.example import EditExample, Source
from rcgrpo_jax.errors import UsageError, UserError
from rcgrpo_jax.evaluation.benchmarks.base import Benchmark
from rcgrpo_jax.evaluation.examples import check_right
from rcgrpo_jax.evaluation.measures import Measure

Locate = Callable[["Entry"], Path]  # where the edit of an example lies


class Entry(NamedTuple):
    """An example of a benchmark, without its pictures."""

    index: int  # in the source
    id: str
    task: str
    name: str  # in the source: that of a picture which a model of ours makes

    @property
    def key(self) -> str:
        """Tells it from those of the other tasks: CompBench gives two tasks one id."""
        return f"{self.task}/{self.id}"


class Listed(NamedTuple):
    """What a source has of a benchmark."""

    entries: list[Entry]
    others: Counter[str]  # tasks that are none of the benchmark -> examples
    uncaptioned: int = 0  # how many entries have no caption
    untargeted: tuple[str, ...] = ()  # the keys of those that have no target
    subset: frozenset[int] = frozenset()  # indices of the entries in the benchmark's subset


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
    entries, others, seen, uncaptioned, untargeted, subset = [], Counter(), {}, 0, [], set()
    for index in range(len(source)):
        example = source[index]
        entry = Entry(index, benchmark.identify(example), benchmark.task_of(example), example.name)
        if entry.task not in benchmark.tasks:
            others[entry.task] += 1
        elif (other := seen.setdefault(str(PurePosixPath(entry.key)), index)) != index:  # a/./b is a/b
            raise UserError(
                f"{entry.key}: the examples {other} and {index} have this name; a name for each was wanted.",
                "Rename one of them in the data.",
            )
        else:
            check_right(example)
            check(example)
            entries.append(entry)
            uncaptioned += not example.has_caption
            if not example.has_target:
                untargeted.append(entry.key)
            if benchmark.subset and benchmark.subset.has(example):
                subset.add(index)
        progress()
    if not entries:
        found = ", ".join(f"{count} of {task or 'no task'}" for task, count in others.items()) or "none"
        raise UsageError(
            f"--data: examples of {found} found; some of the tasks {', '.join(benchmark.tasks)} were wanted.",
            f"`rcgrpo data prepare {benchmark.name.partition('-')[0]}` makes such data.",
        )
    return Listed(entries, others, uncaptioned, tuple(untargeted), frozenset(subset))


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
