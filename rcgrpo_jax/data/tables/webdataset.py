"""Rows of WebDataset archives: files of a tar whose names agree up to the first dot are a row."""

from __future__ import annotations

import lzma
import tarfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import groupby
from pathlib import Path

from rcgrpo_jax.borders import parse_json
from rcgrpo_jax.data.tables.base import Container, Row
from rcgrpo_jax.errors import UserError, reason

KEY = "__key__"  # the column with the name that the files of a row share, as WebDataset calls it
_LARGEST = 2**28  # bytes of a file in an archive


class WebDataset(Container):
    """Tar files, compressed or not. They are read as a stream, and nothing is written anywhere.

    The columns are what follows the first dot of a file's name, in lower case: `jpg`, `mask.png`, `txt`. The members of
    an object in `NAME.json` are columns too, such as `json.prompt`. An archive that was cut short gives the rows before
    the cut.
    """

    suffixes = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
    form = "a tar archive of WebDataset"

    def rows(self, file: Path, start: int = 0, columns: Collection[str] | None = None) -> Iterator[Row]:
        def is_wanted(number: int, column: str) -> bool:
            return number >= start and (columns is None or any(_holds(column, name) for name in columns))

        for number, (key, members) in enumerate(_samples(file, is_wanted)):
            cells, faults = {KEY: key}, []
            for _, _, column, content in members:
                if isinstance(content, ValueError):
                    faults.append(str(content))
                elif content is not None:
                    faults += [f"{column} is there twice"] * (column in cells)
                    cells |= _cells(column, content)
            where = f"{file.name}, {key}"
            if number >= start:
                yield Row(where, fault="; ".join(faults)) if faults else Row(where, cells, file.parent)

    def count(self, file: Path) -> int:
        return sum(1 for _ in _samples(file, lambda number, column: False))


def _holds(column: str, name: str) -> bool:
    """Whether a file has a wanted column: it is that, or is a JSON that has it."""
    return name == column or (column.endswith("json") and name.startswith(f"{column}."))


def _cells(column: str, content: bytes) -> dict[str, object]:
    cells: dict[str, object] = {column: content}
    if column.endswith("json"):
        try:
            value = parse_json(content)
        except ValueError:
            return cells
        if isinstance(value, dict):
            cells |= {f"{column}.{name}": inner for name, inner in value.items()}
    return cells


def _samples(file: Path, is_wanted: Callable[[int, str], bool]) -> Iterator[tuple[str, Iterable[tuple]]]:
    """The files of an archive by row: key, and the files as `_members` gives them."""
    return ((key, members) for (_, key), members in groupby(_members(file, is_wanted), lambda member: member[:2]))


def _members(
    file: Path, is_wanted: Callable[[int, str], bool]
) -> Iterator[tuple[int, str, str, bytes | ValueError | None]]:
    """The files of an archive in order.

    Yields:
        Number and key of the row, column, and content: None where it is not wanted, an error where it cannot be had.
    """
    number, key = -1, ""
    try:
        with tarfile.open(file, "r|*") as archive:
            for member in archive:
                if member.isdir():
                    continue
                folder, slash, name = member.name.rpartition("/")
                stem, _, column = name.lower().partition(".")
                found = f"{folder}{slash}{name[: len(stem)]}"
                if number < 0 or found != key:
                    number, key = number + 1, found
                content: bytes | ValueError | None = None
                if member.size > _LARGEST:
                    content = ValueError(f"{column} has {member.size:,} bytes; at most {_LARGEST:,} can be")
                elif is_wanted(number, column) and not member.isfile():
                    content = ValueError(f"{column} is a link or a device, and no file")
                elif is_wanted(number, column):
                    content = archive.extractfile(member).read()  # of a file: never None
                yield number, key, column, content
    except (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        if number < 0:
            raise UserError(
                f"{file}: cannot be read as a tar archive ({reason(error)}).", "Download it again, or move it away."
            ) from None
        yield number, key, "", ValueError(f"the archive cannot be read on ({reason(error)})")
