"""What was measured of each example of a benchmark: a row an example, in JSON lines and in Parquet."""

from __future__ import annotations

import importlib.util
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rcgrpo_jax.data.paths import printable
from rcgrpo_jax.errors import UserError


class Row(NamedTuple):
    """One example, and what was measured of the edit of it."""

    index: int  # in the source
    id: str
    task: str
    values: Mapping[str, float]  # by measure; NaN where one could not be measured, nothing where the edit failed
    failure: str = ""  # why there is no edit to measure: MISSING or another reason
    file: str = ""  # the picture that failed


MISSING = "no such picture"
EVERY = "all"  # tasks, in the place of one


def measures_of(rows: Iterable[Row]) -> list[str]:
    """The measures that some row has, in the order in which they come."""
    return list(dict.fromkeys(name for row in rows for name in row.values))


def has_parquet() -> bool:
    """Whether Parquet can be written here."""
    return importlib.util.find_spec("pyarrow") is not None


def write_jsonl(path: Path, rows: Sequence[Row]) -> None:
    """Writes `{"id", "task", "failure", MEASURE: ...}` a line, null for what was not measured, whole or not at all.

    Raises:
        UserError: The file cannot be written.
    """
    lines = [json.dumps(_record(row, measures_of(rows)), ensure_ascii=False, allow_nan=False) for row in rows]
    _write(path, lambda partial: partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8"))


def write_parquet(path: Path, rows: Sequence[Row]) -> None:
    """Writes the same as a table, whole or not at all.

    Raises:
        UserError: The file cannot be written.
    """
    import pyarrow
    import pyarrow.parquet

    names, text = measures_of(rows), pyarrow.string()
    schema = pyarrow.schema([(name, text) for name in ("id", "task", "failure")] + [(x, "float32") for x in names])
    table = pyarrow.Table.from_pylist([_record(row, names) for row in rows], schema)

    def write(partial: Path) -> None:
        with partial.open("wb") as file:  # pyarrow takes no path that is not UTF-8
            pyarrow.parquet.write_table(table, file)

    _write(path, write)


def _record(row: Row, names: Sequence[str]) -> dict[str, str | float | None]:
    def finite(value: float) -> float | None:
        return value if math.isfinite(value) else None

    values = {name: finite(row.values.get(name, math.nan)) for name in names}
    return {"id": printable(row.id), "task": row.task, "failure": row.failure or None, **values}


def _write(path: Path, write: Callable[[Path], object]) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"--out: {path} cannot be written ({error}).", "Choose a folder you can write to.") from None
