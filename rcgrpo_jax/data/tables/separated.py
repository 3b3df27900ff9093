"""Rows of tables of separated values, with the names of the columns in the first line."""

from __future__ import annotations

import csv
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from rcgrpo_jax.data.tables.base import Container, Row
from rcgrpo_jax.errors import UserError

_LARGEST = 2**26  # characters of a cell: a picture in Base64 may stand in it


class Separated(Container):
    """CSV or TSV in UTF-8. A `.csv` whose first line has semicolons and no comma is separated by these."""

    suffixes = (".csv", ".tsv")
    form = "a table of separated values"

    def rows(self, file: Path, start: int = 0, columns: Collection[str] | None = None) -> Iterator[Row]:
        with _lines(file) as lines:
            header, number = _header(file, lines), 0
            while True:
                first, fault = lines.line_num + 1, ""
                try:
                    values = next(lines, None)
                    if values and len(values) != len(header):
                        fault = f"{len(values)} cells found; {len(header)} were wanted"
                except csv.Error as error:
                    values, fault = [""], str(error)
                if values is None:
                    return
                if not values:  # an empty line
                    continue
                if number >= start:
                    where = f"{file.name}, row {number}"
                    if fault and lines.line_num > first:  # a quote that is not closed swallows what follows
                        fault = f"lines {first} to {lines.line_num}: {fault}"
                    cells = {} if fault else dict(zip(header, values, strict=True))
                    yield Row(where, cells, file.parent, fault)
                number += 1

    def columns(self, file: Path) -> list[str]:
        with _lines(file) as lines:
            return _header(file, lines)


@contextmanager
def _lines(file: Path) -> Iterator[Iterator[list[str]]]:
    """The lines of a file as lists of cells, which may be as long as pictures: the module has one limit for all.

    Bytes that are not UTF-8 become half characters. Checks of an example find these, so one row alone is lost by them.
    """
    usual = csv.field_size_limit(_LARGEST)
    try:
        with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as opened:
            yield csv.reader(opened, delimiter=_delimiter(file), strict=True)
    finally:
        csv.field_size_limit(usual)


def _header(file: Path, lines: Iterator[list[str]]) -> list[str]:
    try:
        header = next(lines, [])
    except csv.Error as error:
        raise UserError(f"{file}: the first line cannot be read ({error}).", "Write a header.") from None
    if any(re.search(r"[\0\ud800-\udfff]", name) for name in header):
        raise UserError(f"{file}: the first line is not UTF-8.", "Save the table again as UTF-8.")
    if not any(name.strip() for name in header) or len({*header}) < len(header):
        raise UserError(
            f"{file}: the first line is {header!r:.200}; names of columns, each once, were wanted.", "Write a header."
        )
    return header


def _delimiter(file: Path) -> str:
    if file.suffix.lower() == ".tsv":
        return "\t"
    with file.open(encoding="utf-8-sig", errors="replace") as opened:
        first = opened.readline(_LARGEST)
    return ";" if ";" in first and "," not in first else ","
