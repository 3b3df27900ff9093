"""The flags of the commands that train: a Python file with the configuration, overrides, and the run's directory."""

from __future__ import annotations

import inspect
import re
import runpy
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from absl import flags
from ml_collections import ConfigDict, FrozenConfigDict, config_flags

from rcgrpo_jax.cli.arguments import given_again, one_line, parse
from rcgrpo_jax.cli.config_import import neighbours
from rcgrpo_jax.cli.devices import open_devices
from rcgrpo_jax.cli.paths import check_name, check_workdir, expand_fields, expand_home, path_flag
from rcgrpo_jax.errors import UsageError, UserError, nearest
from rcgrpo_jax.parallel import distributed
from rcgrpo_jax.rewards import known_rewards
from rcgrpo_jax.rl.reward_fields import name_rewards, reward_fields
from rcgrpo_jax.runs.fields import flatten
from rcgrpo_jax.runs.writers import writer_names


def parse_run(command: str, about: str, argv: Sequence[str], defaults: str) -> tuple[ConfigDict, Path]:
    """Parses `--config FILE[:NAME] --workdir DIR [--config.FIELD=VALUE]`, joins the run's processes, opens its devices.

    Args:
        command: Its name.
        about: One line for `--help`.
        argv: Arguments after the name.
        defaults: Module of the `default_config` that the file should start from, for messages.

    Returns:
        The configuration and the directory.

    Raises:
        UserError: As `load_config`.
        UsageError: As `parse_with_config`, or for a directory that is a URL or what the run reads.
    """

    def define(values: flags.FlagValues) -> None:
        path_flag("workdir", "directory of the run", values)
        several = "; with several processes, where neither a TPU nor Slurm tells"
        flags.DEFINE_string("coordinator", None, f"HOST:PORT of process 0{several}", values)
        flags.DEFINE_string("num_processes", None, f"how many there are{several}", values)
        flags.DEFINE_string("process_id", None, f"number of this one, from 0{several}", values)

    values = parse_with_config(command, about, argv, define, ("workdir",), defaults)
    if "://" in values.workdir:
        raise UsageError(
            f"--workdir: {values.workdir!r} found; a directory was wanted.",
            "Mount the bucket and name its directory; launch/tpu.sh does so with gs://BUCKET/PATH.",
        )
    check_name("--workdir", values.workdir)
    expand_fields(values.config)
    check_workdir(Path(values.workdir), values.config)
    distributed.initialize({name: values[name].value for name in distributed.VARIABLES})
    keep_compilations(Path(values.workdir))
    open_devices()
    return values.config, Path(values.workdir)


def parse_with_config(
    command: str,
    about: str,
    argv: Sequence[str],
    define: Callable[[flags.FlagValues], None],
    required: Sequence[str],
    defaults: str,
) -> flags.FlagValues:
    """Parses the flags of a command that reads a configuration: `--config FILE[:NAME]` and `--config.FIELD=VALUE`.

    Args:
        command: Its name.
        about: One line for `--help`.
        argv: Arguments after the name.
        define: Adds the command's other flags to the `FlagValues` it is given.
        required: Those of them that must be given.
        defaults: Module of the `default_config` that the file should start from, for messages.

    Returns:
        The flags; `config` is the configuration with what the flags change.

    Raises:
        UserError: As `load_config`.
        UsageError: As `arguments.parse`, or for a field that does not exist.
    """
    file, others = _split(command, argv)
    config = load_config(file, defaults) if file is not None and not {"--help", "-help", "-h"} & {*argv} else None
    if config is not None:
        fields = re.findall(r"^--?(?:no)?config\.([^=\n]+)", "\n".join(others), re.MULTILINE)
        plugins = re.findall(r"^--?config\.(plugins\.[^=\n]+)[=\n](.*)$", "\n".join(others), re.MULTILINE)
        name_rewards(config, dict.fromkeys(fields, "") | dict(plugins))
        _check_overrides(config, fields, defaults)

    def define_all(values: flags.FlagValues) -> None:
        about = "Python file with get_config(), FILE or FILE:NAME; --config.FIELD=VALUE overrides"
        if config is None:
            flags.DEFINE_string("config", None, about, values)
        else:
            config_flags.DEFINE_config_dict("config", config, about, values, sys_argv=others)
        define(values)

    rest = argv if config is None else others
    return parse(command, about, rest, define_all, required=("config", *required))[0]


def _split(command: str, argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """The value of `--config`, and the other arguments.

    Raises:
        UsageError: For two values.
    """
    values = flags.FlagValues()
    values.set_gnu_getopt()  # it may come after the value of another flag
    flags.DEFINE_multi_string("config", [], "", values)
    try:
        others = values([command, *argv], known_only=True)[1:]
    except flags.Error:  # reported by `parse`
        return None, list(argv)
    if len(values.config) > 1:
        raise given_again("config", len(values.config))
    return next(iter(values.config), None), others


def _check_overrides(config: ConfigDict, names: Sequence[str], defaults: str) -> None:
    fields = list(flatten(config.to_dict()))
    for name in names:
        if not any(f"{field}.".startswith(f"{name}.") for field in fields):
            known = reward_fields(known_rewards(config.plugins)) if "rewards" in config else ()
            near = nearest(name, {*fields, *known} - {name})
            group = name.rpartition(".")[0]
            beside = ", ".join(field.removeprefix(f"{group}.") for field in fields if field.startswith(f"{group}."))
            raise UsageError(
                f"--config.{name}: there is no such field." + (f" Did you mean --config.{near}?" if near else ""),
                f"{defaults.replace('.', '/').removesuffix('config')}options.py lists the fields"
                + (f"; those of {group} are {beside}." if beside else "."),
            )


def keep_compilations(folder: Path) -> None:
    """Keeps compiled programs in `folder/compiled`, so that a run that goes on compiles nothing anew.

    JAX's own JAX_COMPILATION_CACHE_DIR comes first, and JAX_ENABLE_COMPILATION_CACHE=false turns it off.
    """
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(folder.absolute() / "compiled"))


def load_config(path: str | Path, defaults: str) -> ConfigDict:
    """What the `get_config()` of a Python file returns; the file may import its neighbours and `configs.*`.

    Args:
        path: FILE, or FILE:NAME for `get_config(NAME)`: the run of that name, of those that the file has.
        defaults: Module of the `default_config` that the file should start from, for messages.

    Raises:
        UserError: If there is no such file or function, or it fails; the message names the file and its line.
        UsageError: If the file has no run of that name.
    """
    path, name = _split_name(expand_home("--config", str(path)))
    if Path(path).is_dir():
        raise UserError(f"--config: {path!r} is a folder; a Python file was wanted.", "Correct the path.")
    try:
        with neighbours(Path(path)):
            get_config = runpy.run_path(path)["get_config"]
            if name is not None and not inspect.signature(get_config).parameters:
                raise UsageError(f"the name {name!r} found; the file has one run.", f"Write --config {path}.")
            config = get_config() if name is None else get_config(name)
        if not isinstance(config, ConfigDict):
            raise TypeError(f"get_config() gave a {type(config).__name__}; a ConfigDict was wanted")
        flatten(config.to_dict())  # neither endless nor with names that are no text
        return ConfigDict(config) if isinstance(config, FrozenConfigDict) else config
    except UserError as error:
        raise type(error)(f"--config: {path}: {error.problem}", error.remedy) from error
    except Exception as error:
        if isinstance(error, OSError) and not _lines(error, path):
            raise UserError(f"--config: {path} cannot be read ({error.strerror}).", _likely(Path(path))) from None
        lines = _lines(error, path)
        where = path if not lines else f"{path}, line {lines[-1]}"
        if isinstance(error, SyntaxError) and error.filename:
            where = f"{error.filename}, line {error.lineno}"
        said = str(error) if isinstance(error, OSError) else one_line(error)
        raise UserError(
            f"--config: {where}: {type(error).__name__}: {said}",
            f"Correct the file; its get_config() starts from {defaults}.default_config().",
        ) from error


def _split_name(path: str) -> tuple[str, str | None]:
    """FILE:NAME in two, and None as the name of FILE alone; a file whose own name has a colon is that file."""
    file, colon, name = path.rpartition(":")
    return (path, None) if not colon or "/" in name or Path(path).exists() else (file, name)


def _likely(missing: Path) -> str:
    """A remedy for a file that is not there: FILE:NAME, where FILE_NAME was written."""
    for end in range(len(missing.stem)):
        file, name = missing.with_name(f"{missing.stem[:end]}.py"), missing.stem[end + 1 :]
        if missing.stem[end] == "_" and file.is_file():
            return f"Did you mean {file}:{name}?"
    return "Correct the path."


def _lines(error: Exception, path: str) -> list[int]:
    """The lines of a file that an error came through."""
    return [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]


def print_records(workdir: Path, config: ConfigDict) -> None:
    """Says where a run leaves its records."""
    print(f"metrics      {workdir / 'metrics.jsonl'}")
    for name in writer_names(config.train.writers):
        print(f"{name:<11}  {workdir / name}")
    print(f"images       {workdir / 'images'}")
