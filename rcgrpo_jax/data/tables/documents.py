"""Rows of JSON: an object a line, or one document that lists them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

from rcgrpo_jax.borders import parse_json, shorten
from rcgrpo_jax.data.tables.base import Container, Row
from rcgrpo_jax.errors import UserError, reason

_LARGEST_LINE = 2**26  # bytes: a picture in Base64 may stand in it
_LARGEST = 2**28  # bytes of a document, which is read whole
KEY = "key"  # the column with the names of the objects in a document that is an object of objects


class Documents(Container):
    """JSON in UTF-8.

    `.jsonl` and `.ndjson` have an object a line. `.json` is a list of objects, an object of objects, whose names become
    the column `key`, or has an object a line too.
    """

    suffixes = (".json", ".jsonl", ".ndjson")
    form = "JSON"

    def rows(self, file: Path, start: int = 0, columns: Collection[str] | None = None) -> Iterator[Row]:
        found = _lines(file) if _has_lines(file) else _document(file)
        for number, (where, value) in enumerate(found):
            if number >= start:
                if isinstance(value, dict):
                    yield Row(where, value, file.parent)
                else:
                    fault = str(value) if isinstance(value, ValueError) else f"{shorten(value)} found, no object"
                    yield Row(where, fault=fault)


def _has_lines(file: Path) -> bool:
    """Whether a file has an object a line: by its suffix, or because its first line is a whole object."""
    if file.suffix.lower() != ".json":
        return True
    with file.open("rb") as opened:
        first, second = (opened.readline(_LARGEST_LINE) for _ in range(2))
    try:
        return bool(second.strip()) and isinstance(parse_json(first), dict)
    except ValueError:
        return False


def _lines(file: Path) -> Iterator[tuple[str, object]]:
    """Each line that is not blank: what it is called, and its value or why there is none."""
    with file.open("rb") as opened:
        for number, line in enumerate(iter(lambda: opened.readline(_LARGEST_LINE + 1), b""), start=1):
            where = f"{file.name}, line {number}"
            if len(line) > _LARGEST_LINE:
                while line and not line.endswith(b"\n"):  # the rest of it is no line of its own
                    line = opened.readline(_LARGEST_LINE)
                yield where, ValueError(f"longer than {_LARGEST_LINE:,} bytes")
                continue
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if not line.strip():
                continue
            try:
                yield where, parse_json(line)
            except ValueError as error:
                yield where, ValueError(f"no JSON ({reason(error)})")


def _document(file: Path) -> Iterator[tuple[str, object]]:
    """Each value in the list or the object that a file is."""
    remedy = "Write a list of objects, or an object a line as .jsonl."
    if (size := file.stat().st_size) > _LARGEST:
        raise UserError(f"{file}: {size:,} bytes; at most {_LARGEST:,} of one document were wanted.", remedy)
    try:
        value = parse_json(file.read_bytes())
    except ValueError as error:
        raise UserError(f"{file}: not readable as JSON ({reason(error)}); a list was wanted.", remedy) from None
    if isinstance(value, dict) and value and all(isinstance(inner, dict) for inner in value.values()):
        value = [{KEY: key, **inner} for key, inner in value.items()]
    if not isinstance(value, list):
        raise UserError(f"{file}: {shorten(value)} found; a list of objects was wanted.", remedy)
    for number, inner in enumerate(value):
        yield f"{file.name}, row {number}", inner
