"""What a configuration file may import: the files beside it, and `configs.*` where the package is a checkout."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import rcgrpo_jax

CHECKOUT = Path(rcgrpo_jax.__file__).resolve().parents[1]
_INSTALLED = ("site-packages", "dist-packages")
_KEPT = {*sys.stdlib_module_names, "__main__", rcgrpo_jax.__name__}


@contextmanager
def neighbours(file: Path) -> Iterator[None]:
    """Lets the block import the modules beside a file, whatever the current directory.

    Afterwards `sys.path` and `sys.modules` are as they were: files of one name in two folders are two modules, and the
    caller sees neither.
    """
    folders = [file.resolve().parent]
    if (CHECKOUT / "configs").is_dir():
        folders.append(CHECKOUT)
    aside = {name: sys.modules.pop(name) for name in [*sys.modules] if _is_in_the_way(name, folders)}
    before, flag = set(sys.modules), sys.dont_write_bytecode
    sys.path[:0] = map(str, folders)
    sys.dont_write_bytecode = True  # or a file that is changed within a second would be taken from its cache
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.dont_write_bytecode = flag
        for folder in folders:
            with suppress(ValueError):
                sys.path.remove(str(folder))
        for name in [name for name in sys.modules.keys() - before if _is_of(name, folders)]:
            del sys.modules[name]
        sys.modules.update(aside)


def _is_in_the_way(name: str, folders: Collection[Path]) -> bool:
    """Whether a loaded module of some program has the name of another one in the folders."""
    top = name.partition(".")[0]
    if top in _KEPT or not any((folder / f"{top}.py").is_file() or (folder / top).is_dir() for folder in folders):
        return False
    return not any(place in folders or place.name in _INSTALLED for place in _places(top))


def _is_of(name: str, folders: Collection[Path]) -> bool:
    """Whether a loaded module lies in one of the folders, itself or as a part of a package there."""
    top = name.partition(".")[0]
    return top not in _KEPT and not _places(top).isdisjoint(folders)


def _places(top: str) -> set[Path]:
    """The folders that a loaded top-level module or package lies in."""
    module = sys.modules.get(top)
    paths = getattr(module, "__path__", None) or [getattr(module, "__file__", None)]
    return {Path(path).parent for path in paths if path}
