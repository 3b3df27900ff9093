"""absl flags for one command at a time: parsed into a namespace, mistakes as usage errors."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from rcgrpo_jax.errors import UsageError, UserError, nearest


def parse(
    command: str,
    about: str,
    argv: Sequence[str],
    define: Callable[[flags.FlagValues], None],
    positional: Sequence[str] = (),
    required: Sequence[str] = (),
) -> tuple[flags.FlagValues, list[str]]:
    """Parses the flags of a command.

    Args:
        command: Its name.
        about: One line for `--help`.
        argv: Arguments after the name.
        define: Adds the flags to the `FlagValues` it is given.
        positional: Names of the arguments without dashes, all of them needed.
        required: Flags that must be given.

    Returns:
        The flags and the positional arguments.

    Raises:
        UsageError: For an unknown flag, a bad value, or a missing argument.
    """
    values = flags.FlagValues()
    define(values)
    usage = " ".join(["rcgrpo", command, *(name.upper() for name in positional), "[--FLAG=VALUE ...]"])
    if any(arg in ("--help", "-h", "-help") for arg in argv):
        print(f"usage: {usage}\n\n{about}\n\n{values.get_help()}")
        sys.exit(0)
    try:
        rest = values([command, *argv])[1:]
    except flags.UnrecognizedFlagError as error:
        near = nearest(error.flagname, list(values))
        raise UsageError(
            f"unknown flag --{error.flagname}." + (f" Did you mean --{near}?" if near else ""),
            f"`rcgrpo {command} --help` lists the flags.",
        ) from None
    except (flags.Error, ValueError, TypeError, AttributeError, KeyError) as error:
        raise UsageError(one_line(error), f"`rcgrpo {command} --help` lists the flags.") from None
    if len(rest) != len(positional):
        raise UsageError(f"{len(rest)} arguments given, {len(positional)} wanted.", f"usage: {usage}")
    if missing := [name for name in required if values[name].value is None]:
        raise UsageError(
            f"missing {', '.join(f'--{name}' for name in missing)}.", f"`rcgrpo {command} --help` lists the flags."
        )
    return values, rest


def one_line(error: BaseException) -> str:
    text = " ".join(str(error.args[0] if error.args else error).split())
    return text if text.endswith(".") else f"{text}."


def parse_size(text: str) -> tuple[int, int]:
    """`WxH` as (height, width).

    Raises:
        UsageError: If it is not two positive whole numbers.
    """
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not found:
        raise UsageError(f"--size: {text!r} found; WIDTHxHEIGHT in pixels was wanted.", "For example --size 1024x1024.")
    return int(found[2]), int(found[1])


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


def write_text(path: Path, text: str) -> None:
    """Writes a file, and makes its folder.

    Raises:
        UserError: If it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out: {path} cannot be written ({error}).", "Choose a folder you can write to.") from None


def dtype_of(name: str) -> Any:
    import jax.numpy as jnp

    return jnp.dtype(name)


def leave_devices_alone() -> None:
    """Has JAX compute on the CPU, unless JAX_PLATFORMS says where: a run may have the accelerator to itself.

    Without effect once JAX has computed something.
    """
    import jax

    if not os.environ.get("JAX_PLATFORMS"):
        jax.config.update("jax_platforms", "cpu")
