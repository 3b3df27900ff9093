"""A table becomes a data set of ArrayRecord files, shard by shard: what is finished is not done again."""

from __future__ import annotations

import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from rcgrpo_jax.data.paths import Finder, printable
from rcgrpo_jax.data.prepare.parts import (
    FOLDER,
    SETTINGS,
    Part,
    check_settings,
    read_parts,
    total,
    write_json,
    write_part,
)
from rcgrpo_jax.data.prepare.report import Report
from rcgrpo_jax.data.prepare.row import Prepared, RowForm, Skipped, read_row
from rcgrpo_jax.data.prepare.sets import DataSet
from rcgrpo_jax.data.records import RecordSet, ShardWriter
from rcgrpo_jax.errors import UserError
from rcgrpo_jax.progress import ProgressCallback, no_progress
from rcgrpo_jax.whole import sweep, write_whole

REPORT, SKIPPED = "prepare.json", "skipped.jsonl"
_AHEAD = 2  # rows a worker that are decoded before they are written
T, U = TypeVar("T"), TypeVar("U")


def prepare(
    data: DataSet, form: RowForm, folder: Path, workers: int = 1, progress: ProgressCallback = no_progress
) -> Report:
    """Writes a data set into a folder, and goes on where an earlier call was stopped.

    The shards, and all else in the folder, are the same bytes however often it was stopped, and whatever `workers`.

    Args:
        data: The table, and what is known of it.
        form: How its rows are read.
        folder: Where to write; one process at a time may.
        workers: Threads that decode.
        progress: Told of each row.

    Returns:
        What became of all rows.

    Raises:
        UserError: The folder was begun with other settings or cannot be written, or no row is an example.
    """
    check_settings(folder, settings_of(data, form))
    records = RecordSet(folder, data.name, data.title)
    parts = read_parts(folder, records)
    _remove_unknown(folder, {records.file(index) for index in range(len(parts))})
    names = {name for part in parts for name in part.names}
    start, count, find = sum(part.rows for part in parts), len(data.table), Finder()
    rows = enumerate(data.table.rows(start, form.columns.values()), start=start)
    part, shard = Part(), None
    records.load()
    for found in _in_order(lambda row: read_row(row[1], row[0], form, find), rows, workers):
        found = _refuse_repeated(found, names)
        if isinstance(found, Skipped):
            part.leave_out(found)
        else:
            names.add(found.example.name)
            shard = shard or records.open_shard(len(parts))
            shard.add(records.serialize(found.example, found.pictures, found.id))
            part.add(found)
        if shard and shard.is_full:
            parts.append(_finish(folder, len(parts), part, shard))
            part, shard = Part(), None
        progress(data.name, start := start + 1, count)
    if part.rows:
        parts.append(_finish(folder, len(parts), part, shard))
    whole = total(parts)
    report = Report(data.title, whole, data.published_of(form), data.notes)
    write_json(folder / REPORT, {"settings": settings_of(data, form), **report.as_json()})
    _write_skipped(folder / SKIPPED, whole)
    if not whole.names:
        shutil.rmtree(folder / FOLDER, ignore_errors=True)  # nothing to go on from
        raise UserError(f"{data.title}: {report.emptiness()}.", f"{folder / REPORT} and {SKIPPED} beside it say more.")
    records.write_info([len(part.names) for part in parts if part.names], whole.bytes)
    return report


def settings_of(data: DataSet, form: RowForm) -> dict[str, Any]:
    """What makes the records what they are: the data set, how it is read, and the files with their sizes."""
    files = {printable(str(file.relative_to(data.root))): file.stat().st_size for file in data.table.files}
    settings = {"data_set": data.name, "split": data.split, "form": asdict(form), "files": files}
    return json.loads(json.dumps(settings))  # as it is read from a file, where tuples are lists


def publish(folder: Path, out: Path) -> None:
    """Gives a finished folder its name."""
    os.replace(folder, out)
    tidy(out)


def tidy(out: Path) -> None:
    """Removes from a finished folder what only helped to make it; one for reading alone is as good."""
    shutil.rmtree(out / FOLDER, ignore_errors=True)
    with suppress(OSError):
        (out / SETTINGS).unlink()


def _remove_unknown(folder: Path, known: set[Path]) -> None:
    """Removes what was under way when a call was stopped, such as shards that belong to no finished part."""
    sweep(folder)
    for file in folder.glob("*array_record*"):
        if file not in known:
            file.unlink()


def _refuse_repeated(found: Prepared | Skipped, names: set[str]) -> Prepared | Skipped:
    if isinstance(found, Prepared) and found.example.name in names:
        return Skipped(found.where, found.id, "the id is there already", "")
    return found


def _finish(folder: Path, index: int, part: Part, shard: ShardWriter | None) -> Part:
    """Ends a part: first its shard gets its name, then the part is known."""
    if shard:
        shard.close()
        part.bytes = shard.count_bytes
    write_part(folder, index, part)
    return part


def _write_skipped(file: Path, whole: Part) -> None:
    """A line for each row that was skipped."""
    keys = ("row", "id", "reason", "found")
    lines = (json.dumps(dict(zip(keys, row, strict=True)), ensure_ascii=False) for row in whole.skipped)
    write_whole(file, "".join(f"{line}\n" for line in lines))


def _in_order(function: Callable[[T], U], items: Iterable[T], workers: int) -> Iterator[U]:
    """The results of a function, computed by threads, in the order of the items; few are in memory at a time."""
    waiting: deque[Future[U]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > _AHEAD * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
