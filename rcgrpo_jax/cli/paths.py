"""The paths that a user names: `~` in them, and what may be written where."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatch
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from rcgrpo_jax.data.kinds import split_prefix
from rcgrpo_jax.data.sources import folder_of
from rcgrpo_jax.errors import UsageError, UserError
from rcgrpo_jax.runs.fields import flatten
from rcgrpo_jax.runs.workdir import FOLDERS, LOCK

# Of a configuration, where it has them; in `reward_options` whatever the reward.
_PATH_FIELD = re.compile(
    r"(model|data)\.path|data\.cache|lora\.init|train\.samples|reward_options\.\w+\.(path|template|prompts)"
)
STARTS = {  # how the files begin that commands write; a plan, a search and scores of a reward begin differently
    ".png": (b"\x89PNG\r\n\x1a\n",),
    ".html": (b"<!DOCTYPE html>",),
    ".json": (b'{\n  "software": {', b'{\n  "topology": "', b'{\n  "reward": "', b'{\n  "scored_study": "'),
    ".md": (b"**Preference rates",),
    ".tex": (b"% \\usepackage{booktabs}",),
}
RUN = (  # what lies in the directory of a run, logs of the shell among it
    *FOLDERS, LOCK, "metrics.jsonl*", "start", "model", "lora", "evaluation", "*.html", "*.log", "*.out", "*.err", ".*",
)  # fmt: skip

Inputs = Mapping[str, str | os.PathLike[str] | None]  # flag or field -> what is read; None and "": nothing


def path_flag(name: str, about: str, values: flags.FlagValues, default: str | None = None) -> None:
    """Defines a flag whose value is a path, or what stands for one (`tfds:PATH`, a hub id)."""
    flags.DEFINE(PathParser(name), name, default, about, values, serializer=flags.ArgumentSerializer())


class PathParser(flags.ArgumentParser):
    """Reads a path with `expand_home`."""

    def __init__(self, name: str):
        super().__init__()
        self._name = name

    def parse(self, argument: str) -> str:
        return expand_home(f"--{self._name}", argument)

    def flag_type(self) -> str:
        return "path"


def name_folders(flag: str, paths: Iterable[str]) -> dict[str, Path]:
    """Folders by their own names, in the order of a flag that is given again.

    Raises:
        UsageError: Two have one name.
    """
    folders = [Path(path) for path in paths]
    named = {folder.absolute().name: folder for folder in folders}
    if len(named) < len(folders):
        raise UsageError(
            f"--{flag}: {', '.join(map(str, folders))} found; folders of different names were wanted.",
            "Rename one: the names stand in the table.",
        )
    return named


def expand_home(field: str, path: str) -> str:
    """A path with the home directory in the place of a leading `~` or `~user`, which shells leave after a "=".

    Raises:
        UsageError: There is no such user, or no home directory.
    """
    prefix, rest = split_prefix(path)
    if prefix:
        return f"{prefix}:{expand_home(field, rest)}"
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        name = path.partition("/")[0]
        raise UsageError(
            f"{field}: {path!r} found, and {name} is nobody's home directory here.",
            f"Write ./{path} if the name itself begins with ~.",
        )
    return expanded


def expand_fields(config: ConfigDict) -> None:
    """Applies `expand_home` to the paths in a configuration, in place."""
    expanded = {field: expand_home(f"config: {field}", path) for field, path in path_fields(config).items()}
    config.update_from_flattened_dict(expanded)


def path_fields(config: ConfigDict) -> dict[str, str]:
    """The paths in a configuration, by field; those that are no text are left for its check."""
    return {field: x for field, x in flatten(config.to_dict()).items() if is_path_field(field) and isinstance(x, str)}


def is_path_field(field: str) -> bool:
    """Whether a field of a configuration, dotted, is a path."""
    return bool(_PATH_FIELD.fullmatch(field))


def check_writable(flag: str, path: Path) -> None:
    """Refuses a file that could not be written, before the work that it is for; its folder is made.

    Raises:
        UserError: If it is a folder, or lies in one that cannot be made or written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise UserError(
            f"--{flag}: {path} cannot be written ({error}).", "Name a file in a folder you can write to."
        ) from None


def check_file(flag: str, path: Path, suffix: str, inputs: Inputs | None = None) -> None:
    """Refuses a file to write that could not be written, or in whose place another one would be lost.

    Args:
        flag: That names it.
        path: The file.
        suffix: That it must have, a key of `STARTS`.
        inputs: Files that the command reads.

    Raises:
        UserError: It has another suffix, cannot be written, is an input, or holds something else.
    """
    if path.suffix.lower() != suffix:
        raise UserError(
            f"--{flag}: {path}: the suffix is {path.suffix!r}; {suffix!r} was wanted.",
            f"Name the output NAME{suffix}.",
        )
    check_writable(flag, path)
    for field, read in (inputs or {}).items():
        if read and _same(path, Path(read)):
            raise _overwrites(f"--{flag}", path, f"{field} {read}")
    found = _head(path, max(map(len, STARTS[suffix]))) if path.is_file() else b""
    if found and not found.startswith(STARTS[suffix]):
        raise UserError(
            f"--{flag}: {path} is there and begins with {found!r}; a file that this command has written was wanted.",
            "Choose another name, or remove the file.",
        )


def check_apart(flag: str, output: Path, inputs: Inputs, own: Collection[str] = ()) -> None:
    """Refuses to write into a folder that is read, or into one in it.

    Links count as what they lead to.

    Args:
        flag: That names the output, for the message.
        output: The folder to write; it need not be there.
        inputs: What the command reads. A `.jsonl` file stands for its folder: that of the examples.
        own: Patterns of what the command writes: a folder in an input will do if it has nothing else.

    Raises:
        UsageError: It is or does.
    """
    for field, path in inputs.items():
        read = folder_of(str(path)) if path else None
        if read is None or not read.exists():
            continue
        if not _same(output, read):
            inside = any(_same(parent, read) for parent in Path(os.path.realpath(output)).parents)  # of a loop, too
            if not inside or (own and _has_only(output, own)):
                continue
        raise _overwrites(flag, output, f"{'' if _same(output, read) else 'in '}{field} {path}")


def check_name(flag: str, folder: str) -> None:
    """Refuses a folder whose name is not UTF-8: Orbax and ArrayRecord could not write there, after the first steps.

    Raises:
        UsageError: It is not.
    """
    try:
        folder.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{flag}: {folder!r} found; a name in UTF-8 was wanted.", "Choose another name.") from None


def check_workdir(workdir: Path, config: ConfigDict) -> None:
    """Refuses a directory among the run's model or data, and one whose result would replace what the run reads."""
    paths = path_fields(config)
    if cache := paths.pop("data.cache", None):  # which a run writes too
        check_apart("data.cache", Path(cache), paths, ["*"])
    check_apart("--workdir", workdir, paths, RUN)
    if "stage" in config:
        check_apart("the run's result", workdir / ("lora" if config.stage == "lora" else "model"), paths, ["*"])


def _has_only(folder: Path, patterns: Collection[str]) -> bool:
    """Whether a folder is new, or all that is in it has a name of these patterns."""
    found = folder.iterdir() if folder.is_dir() else ()
    return all(any(fnmatch(file.name, pattern) for pattern in patterns) for file in found)


def _overwrites(flag: str, output: Path, read: str) -> UsageError:
    return UsageError(
        f"{flag}: {output} is {read}, which is read; another place was wanted.", "Write to a place of its own."
    )


def _same(one: Path, other: Path) -> bool:
    """Whether two names lead to one file or folder."""
    try:
        return os.path.samefile(one, other)
    except OSError:  # one of them is not there
        return False


def _head(path: Path, size: int) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(size)
    except OSError:  # it can be replaced all the same
        return b""
