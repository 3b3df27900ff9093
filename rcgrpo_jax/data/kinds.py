"""The kinds of data sets that `data.path` can name: how the paths of each are written, opened, compared and protected.

A new kind is a file that registers a `SourceKind`, and a line in `data.sources` that imports it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

from rcgrpo_jax.data.example import Needs, Source
from rcgrpo_jax.data.masks import Marking


class SourceKind(ABC):
    """A kind of data set. Paths are those of `data.path` without the prefix and its colon."""

    form: str  # how users write such a path, with the prefix

    @abstractmethod
    def open(self, path: str, marking: Marking, needs: Needs) -> Source:
        """Opens a data set.

        Args:
            path: Which.
            marking: How masks tell the region.
            needs: Examples without a mask are refused if one is needed; else the whole picture is their region.

        Raises:
            UserError: It cannot be read, or examples lack what is needed.
            UsageError: The path or the marking is malformed.
        """

    def same_examples(self, path: str, other: str) -> bool:
        """Whether two paths of the kind share examples."""
        return path == other

    def folder(self, path: str) -> Path | None:
        """The folder on this machine that is read, in which nothing must be written; None if there is none."""
        return None


_KINDS: dict[str, SourceKind] = {}


def register(prefix: str) -> Callable[[type[SourceKind]], type[SourceKind]]:
    """Makes a kind known under a prefix; the empty one is of paths without a prefix."""

    def add(kind: type[SourceKind]) -> type[SourceKind]:
        if prefix in _KINDS:
            raise ValueError(f"The prefix {prefix!r} is registered twice.")
        _KINDS[prefix] = kind()
        return kind

    return add


def split_prefix(path: str) -> tuple[str, str]:
    """The prefix, empty if it is not a registered one, and the rest of a `data.path`."""
    prefix, colon, rest = path.partition(":")
    return (prefix, rest) if colon and prefix and prefix in _KINDS else ("", path)


def kind_of(prefix: str) -> SourceKind:
    """The kind that is registered under a prefix."""
    return _KINDS[prefix]


def forms() -> str:
    """How a user can write a path, for messages and help: of every kind."""
    *others, last = (kind.form for kind in _KINDS.values())
    return f"{', '.join(others)} or {last}" if others else last
