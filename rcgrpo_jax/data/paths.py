"""File names as people write them: in any normal form of Unicode, and not all of them text."""

from __future__ import annotations

import os
import unicodedata
from collections import defaultdict
from functools import lru_cache
from pathlib import Path

from rcgrpo_jax.errors import UserError


def composed(name: str) -> str:
    """The name in Unicode's normal form C: Linux keeps "é" as one character mostly, and macOS writes two (form D)."""
    return unicodedata.normalize("NFC", name)


def printable(name: str) -> str:
    """The name as text that can be written anywhere: `\\udcff` stands for a byte ff that is not UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode()


class Finder:
    """Finds files whose names are written in another normal form of Unicode; each folder is listed once."""

    def __init__(self):
        self._listed = lru_cache(maxsize=None)(_by_composed_name)

    def __call__(self, path: Path) -> Path:
        """The existing path that a person would call the same; the path itself where there is none.

        Raises:
            UserError: Several names in one folder differ in their normal form alone.
        """
        if str(path).isascii():
            return path
        found = Path(path.anchor)
        for part in path.parts[len(found.parts) :]:
            names = [] if part.isascii() or part == ".." else self._listed(found).get(composed(part), [])
            if len(names) > 1:
                raise UserError(
                    f"{found}: {len(names)} names are {part!r} in different normal forms of Unicode "
                    f"({', '.join(map(ascii, names))}); one was wanted.",
                    "Rename or remove all but one of them.",
                )
            found /= names[0] if names else part
        return found


def _by_composed_name(folder: Path) -> dict[str, list[str]]:
    """Name in form C -> the names that a folder really has; of those that are not ASCII."""
    found = defaultdict(list)
    try:
        names = os.listdir(folder)
    except OSError:
        return {}
    for name in names:
        if not name.isascii():
            found[composed(name)].append(name)
    return found
