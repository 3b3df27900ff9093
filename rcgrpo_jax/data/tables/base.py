"""Tables of rows, whatever holds them: a container reads one file, and a table is several files of one container."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from rcgrpo_jax import filetypes
from rcgrpo_jax.errors import UserError

_LOOKED_AT = 100  # rows whose keys are taken for the columns where a container has no header


@dataclass(frozen=True)
class Row:
    """A row as it is stored: nothing in it has been looked at."""

    where: str  # names it in messages: file and number
    cells: Mapping[str, Any] = field(default_factory=dict)  # column -> text, number, bytes, dict or None
    folder: Path = Path()  # which paths in it are relative to, and must not leave
    fault: str = ""  # why it cannot be read; such a row has no cells


class Container(ABC):
    """A kind of file that holds rows."""

    suffixes: tuple[str, ...]  # of its files, in lower case
    form: str  # what it is, for messages

    @abstractmethod
    def rows(self, file: Path, start: int = 0, columns: Collection[str] | None = None) -> Iterator[Row]:
        """The rows of a file, one or a small batch in memory at a time.

        A row that cannot be read has a `fault`, and the next one follows.

        Args:
            file: Which.
            start: Rows to pass over.
            columns: Those that are needed; None: all.

        Raises:
            UserError: The file is not of this kind, or nothing of it can be read.
        """

    def columns(self, file: Path) -> list[str]:
        """The names of the columns: those of the first rows."""
        found = dict.fromkeys(name for row in islice(self.rows(file), _LOOKED_AT) for name in row.cells)
        return list(found)

    def count(self, file: Path) -> int:
        """How many rows a file has, faulty ones among them."""
        return sum(1 for _ in self.rows(file))


class Table(Protocol):
    """Rows in an order that is the same every time."""

    columns: Sequence[str]
    files: Sequence[Path]  # that hold the rows; pictures may lie in others

    def __len__(self) -> int: ...
    def rows(self, start: int, columns: Collection[str]) -> Iterator[Row]:
        """The rows from `start` on, with these columns at least."""
        ...


class FileTable:
    """The rows of several files of one kind, one file after another.

    Args:
        container: The kind.
        files: At least one.

    Raises:
        UserError: A file is a pointer of Git LFS.
    """

    def __init__(self, container: Container, files: Sequence[Path]):
        for file in files:
            check_whole(file)
        self._container, self.files = container, list(files)

    @cached_property
    def columns(self) -> list[str]:
        """Those of the first file that has any."""
        return list(dict.fromkeys(next(filter(None, map(self._container.columns, self.files)), [])))

    @cached_property
    def counts(self) -> list[int]:
        """The rows of each file."""
        return [self._container.count(file) for file in self.files]

    def __len__(self) -> int:
        return sum(self.counts)

    def rows(self, start: int, columns: Collection[str]) -> Iterator[Row]:
        for file, count in zip(self.files, self.counts, strict=True):
            if start < count:
                yield from self._container.rows(file, start, columns)
            start = max(0, start - count)


def check_whole(file: Path) -> None:
    """Raises a UserError for a pointer of Git LFS, an empty file, or one that cannot be opened."""
    try:
        file.open("rb").close()
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}).", "Check the path and its permissions.") from None
    kind = filetypes.describe(file)
    if kind == filetypes.LFS_POINTER:
        raise UserError(f"{file}: this is {kind}; the file itself was wanted.", filetypes.LFS_REMEDY)
    if kind == "an empty file":
        raise UserError(f"{file}: this is {kind}; rows were wanted.", "Download it again, or move it away.")


def files_below(path: Path, container: Container) -> list[Path]:
    """The files of a container in a folder and those below it, sorted, without hidden ones; or the file itself."""
    if path.is_file():
        return [path]
    found = (file for file in path.rglob("*") if file.name.lower().endswith(container.suffixes) and file.is_file())
    return sorted(x for x in found if not any(part.startswith(".") for part in x.relative_to(path).parts))


def find_files(path: Path, container: Container) -> list[Path]:
    """As `files_below`.

    Raises:
        UserError: There is no such path, or no such file in it.
    """
    if not path.exists():
        raise UserError(f"--from: {path}: there is no such file or folder.", "Correct the path.")
    found = files_below(path, container)
    if not found:
        raise UserError(
            f"--from: {path}: no {' or '.join(container.suffixes)} file found; {container.form} was wanted.",
            "Name the folder that holds the files.",
        )
    return found
