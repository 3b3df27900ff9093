"""absl flags for one command at a time: parsed into a namespace, mistakes as usage errors."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags

from rcgrpo_jax.errors import UsageError, nearest

_REPEATED = ";\n    repeat this option to specify a list of values"  # absl's, after the help of each such flag


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
        about: What `--help` says before the flags.
        argv: Arguments after the name.
        define: Adds the flags to the `FlagValues` it is given.
        positional: Names of the arguments without dashes, all of them needed.
        required: Flags that must be given.

    Returns:
        The flags and the positional arguments.

    Raises:
        UsageError: For an unknown flag, a bad value, one value too many, or a missing argument.
    """
    values = flags.FlagValues()
    define(values)
    needed = [*(name.upper() for name in positional), *(f"--{name}=VALUE" for name in required)]
    usage = " ".join(["rcgrpo", command, *needed, "[--FLAG=VALUE ...]"])
    if any(arg in ("--help", "-h", "-help") for arg in argv):
        print("\n".join([f"usage: {usage}", "", about, "", "flags:", *(describe(values[name]) for name in values)]))
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
    check_given(values)
    if len(rest) != len(positional) or "" in rest:
        count = len([argument for argument in rest if argument])
        raise UsageError(f"{count} arguments given, {len(positional)} wanted.", f"usage: {usage}")
    if missing := [name for name in required if values[name].value is None]:
        raise UsageError(
            f"missing {', '.join(f'--{name}' for name in missing)}.", f"`rcgrpo {command} --help` lists the flags."
        )
    return values, rest


def describe(flag: flags.Flag) -> str:
    """A flag as `--help` shows it: its name, what it says, what it takes, and its default if it has one."""
    name = f"--[no]{flag.name}" if flag.boolean else f"--{flag.name}"
    facts = [flag.parser.syntactic_help] if flag.parser.syntactic_help else []
    default = flag.default if isinstance(flag.default, list) else [flag.default]
    if shown := ",".join(str(x).lower() if flag.boolean else str(x) for x in default if x not in (None, "")):
        facts.append(f"default: {shown}")
    about = flag.help.removesuffix(_REPEATED) + (f" ({'; '.join(facts)})" if facts else "")
    return flags.text_wrap(f"{name}: {about}", indent=" " * 6, firstline_indent=" " * 2)


def check_given(values: flags.FlagValues) -> None:
    """Refuses what absl lets pass: a second value where the first would be dropped, a blank one, NaN and infinity.

    Fields of a configuration may be blank or infinite: `rl.config.validate` says which.

    Raises:
        UsageError: For the first flag of that kind.
    """
    for name in values:
        flag = values[name]
        several = isinstance(flag, flags.MultiFlag)
        if flag.present > 1 and not several:
            raise given_again(name, flag.present)
        if not flag.present or name.startswith("config."):
            continue
        for value in flag.value if several else [flag.value]:
            if isinstance(value, str) and not value.strip():
                raise UsageError(f"--{name}: blank; a value was wanted.", f"Give one, or leave --{name} out.")
            if isinstance(value, float) and not math.isfinite(value):
                raise UsageError(f"--{name}: {value} found; a number was wanted.", "Give a finite number.")


def given_again(name: str, count: int) -> UsageError:
    """The error for several values of a flag that has one."""
    return UsageError(f"--{name}: given {count} times; one value was wanted.", "Leave the others out.")


def one_line(error: BaseException) -> str:
    text = " ".join(str(error.args[0] if error.args else error).split())
    return text if text.endswith(".") else f"{text}."


def parse_size(text: str) -> tuple[int, int]:
    """`WxH` as (height, width).

    Raises:
        UsageError: If it is not two positive whole numbers, in the digits 0 to 9.
    """
    found = re.fullmatch(r"([1-9][0-9]{0,8})x([1-9][0-9]{0,8})", text)
    if not found:
        raise UsageError(f"--size: {text!r} found; WIDTHxHEIGHT in pixels was wanted.", "For example --size 1024x1024.")
    return int(found[2]), int(found[1])


def dtype_of(name: str) -> Any:
    import jax.numpy as jnp

    return jnp.dtype(name)
