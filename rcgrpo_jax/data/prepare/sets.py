"""The data sets that can be prepared: published ones by name, and a user's own by the kind of their files."""

from __future__ import annotations

import re
import shlex
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rcgrpo_jax.data.jsonl import likely
from rcgrpo_jax.data.paths import printable
from rcgrpo_jax.data.prepare.row import RowForm
from rcgrpo_jax.data.published import ALL, Published
from rcgrpo_jax.data.tables import CONTAINERS, FileTable, Table, files_below, find_files
from rcgrpo_jax.errors import UsageError, UserError, nearest

OWN = "edits"  # what TFDS calls a user's own data set
NEEDED = ("image", "mask", "instruction")
_NAMED = 5  # columns, splits or files that a message names before it counts the rest
_SHARD = re.compile(r"(?P<split>.+?)-(?P<index>\d+)-of-(?P<count>\d+)(-[0-9a-f]+)?\.(parquet|arrow)")
_ANY = "data"  # how `datasets` begins the names of Arrow files of every split, which lie in a folder each


@dataclass(frozen=True)
class DataSet:
    """Rows on this machine, and what is known of them."""

    name: str  # what TFDS calls it
    title: str
    split: str  # of the source; empty: it has none
    root: Path  # folder that holds the files of the table
    table: Table
    published: Mapping[str, int]  # task -> rows, `ALL` for all
    notes: Sequence[str] = ()

    def published_of(self, form: RowForm) -> dict[str, int]:
        """The published rows of the tasks that a form keeps."""
        return {task: rows for task, rows in self.published.items() if task == ALL or task in (form.tasks or (task,))}


def open_published(data: Published, path: Path, split: str = "") -> DataSet:
    """Opens what a user has downloaded of a published data set.

    Args:
        data: Which.
        path: The folder.
        split: One of its splits; empty: the first.

    Raises:
        UserError: The folder holds nothing of it.
        UsageError: It has no such split.
    """
    default = next(iter(data.splits))
    split = split or default
    if split not in data.splits:
        raise UsageError(f"--split: {split!r} found; {_listed(data.splits)} was wanted.", f"See {data.hub} on the hub.")
    if not path.exists():
        raise UserError(f"--from: {path}: there is no such folder.", f"Download {data.hub} from the hub to it.")
    notes: list[str] = []
    table = data.open_other(path) if split == default else None  # other layouts hold that one
    if table is None:
        kinds = {kind: found for kind in data.containers if (found := files_below(path, CONTAINERS[kind]))}
        if not kinds:
            raise UserError(f"--from: {path}: {data.layout} wanted; found {_contents(path)}.", f"Download {data.hub}.")
        kind, files = next(iter(kinds.items()))
        files = _of_split(files, split, path, split == default)
        notes = _missing(files)
        table = FileTable(CONTAINERS[kind], files)
    if not data.form.mask:
        notes.append("there are no masks: the region of every example is the whole picture")
    title = f"{data.name} ({data.hub}, {data.licence}), split {split}"
    return DataSet(data.name, title, split, _root(path), table, data.splits[split], notes)


def open_own(kind: str, path: Path, split: str = "") -> DataSet:
    """Opens a user's own files of a kind, or all such files in a folder; errors as `open_published`.

    Args:
        kind: One of `CONTAINERS`.
        path: A file or a folder.
        split: Takes the files alone that are named so: `SPLIT-00000-of-00009.parquet`, or in a folder SPLIT.
    """
    files = find_files(path, CONTAINERS[kind])
    files = _of_split(files, split, path, False) if split else files
    title = f"{kind}: {printable(path.name)}" + (f", split {split}" if split else "")
    return DataSet(OWN, title, split, _root(path), FileTable(CONTAINERS[kind], files), {}, _missing(files))


def fit_form(form: RowForm, table: Table, given: Collection[str]) -> tuple[RowForm, list[str]]:
    """Looks for the columns of a form in a table.

    Args:
        form: The form.
        table: The table.
        given: The fields whose columns the user has named.

    Returns:
        The form without the columns that can be done without and are not there, and a note for each.

    Raises:
        UserError: Another column is not there.
    """
    notes = []
    if not table.columns:
        first = next(table.rows(0, ()), None)
        found = f"{first.where}: {first.fault or 'nothing in it'}" if first else "no rows found"
        raise UserError(f"--from: {table.files[0]}: {found}; a table was wanted.", "Mend the file, or move it away.")
    for field, column in form.columns.items():
        flag = field.partition(" ")[0]
        if column in table.columns:
            continue
        if flag in NEEDED or flag in given:
            near = likely(flag, table.columns) or nearest(column, table.columns)
            raise UserError(
                f"--{flag}: no column {column!r}; found {_listed(table.columns)}.",
                f"Did you mean --{flag} {shlex.quote(near)}?" if near else f"Name the column with --{flag}.",
            )
        form = form.without(field)
        notes.append(f"there is no column {column!r}, so no {flag} is read (--{flag} names another)")
    return form, notes


def check_tasks(tasks: Sequence[str], data: Published | None) -> None:
    """Raises a UsageError for a task that a published data set does not have."""
    for task in tasks if data else ():
        if task not in data.tasks:
            near = nearest(task, data.tasks)
            raise UsageError(
                f"--tasks: {task!r} found; {', '.join(data.tasks) or 'none, since it names no tasks,'} wanted.",
                f"Did you mean {near!r}?" if near else "Leave --tasks out.",
            )


def _root(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _of_split(files: Sequence[Path], split: str, path: Path, is_default: bool) -> list[Path]:
    """The files of a split; of the default one all, where no name tells a split."""
    found = defaultdict(list)
    for file in files:
        named = _SHARD.fullmatch(file.name)
        folders = file.relative_to(_root(path)).parts[:-1]
        is_named = named and named["split"] != _ANY
        found[named["split"] if is_named else split if split in folders else ""].append(file)
    if split not in found and is_default and set(found) == {""}:
        return list(files)
    if split not in found:
        raise UserError(f"--from: {path}: no file of the split {split!r}; found {_listed(filter(None, found))}.",
                        "Choose it with --split, or download the others.")  # fmt: skip
    return found[split]


def _missing(files: Sequence[Path]) -> list[str]:
    """A note if shards are missing, by the count in the names of the others."""
    named = [shard for file in files if (shard := _SHARD.fullmatch(file.name))]
    count = max((int(shard["count"]) for shard in named), default=0)
    absent = sorted({*range(count)} - {int(shard["index"]) for shard in named})
    return [f"{len(absent)} of {count} files are not there: {_listed(map(str, absent))}"] if absent else []


def _contents(path: Path) -> str:
    return _listed(sorted(file.name for file in path.iterdir())) if path.is_dir() else path.name


def _listed(names) -> str:
    names = list(names)
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return (", ".join(map(str, names[:_NAMED])) or "nothing") + more
