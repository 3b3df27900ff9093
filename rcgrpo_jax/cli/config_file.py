"""The flags of the commands that train: a Python file with the configuration, overrides, and the run's directory."""

from __future__ import annotations

import contextlib
import re
import runpy
import traceback
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import flags
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict, config_flags

from rcgrpo_jax.cli.arguments import check_given, one_line, parse
from rcgrpo_jax.cli.devices import open_devices
from rcgrpo_jax.cli.paths import check_for_checkpoints, check_workdir, expand_config_flag, expand_fields, path_flag
from rcgrpo_jax.errors import UsageError, UserError, nearest
from rcgrpo_jax.parallel import distributed


def parse_run(command: str, about: str, argv: Sequence[str], defaults: str) -> tuple[ConfigDict, Path]:
    """Parses `--config FILE --workdir DIR [--config.FIELD=VALUE]`, joins the processes of the run, opens its devices.

    Args:
        command: Its name.
        about: One line for `--help`.
        argv: Arguments after the name.
        defaults: Module of the `default_config` that the file should start from, for messages.

    Returns:
        The configuration and the directory.

    Raises:
        UserError: As `load_config`.
        UsageError: For a field that does not exist, a value of another type, a missing flag, or a directory that is a
            URL or what the run reads.
    """
    argv = expand_config_flag(list(argv))

    def define(values: flags.FlagValues) -> None:
        config_flags.DEFINE_config_file(
            "config", None, "Python file with get_config(); --config.FIELD=VALUE overrides", values, sys_argv=argv
        )
        path_flag("workdir", "directory of the run", values)
        several = "; with several processes, where neither a TPU nor Slurm tells"
        flags.DEFINE_string("coordinator", None, f"HOST:PORT of process 0{several}", values)
        flags.DEFINE_string("num_processes", None, f"how many there are{several}", values)
        flags.DEFINE_string("process_id", None, f"number of this one, from 0{several}", values)

    check_config(command, argv, defaults)
    values, _ = parse(command, about, argv, define, required=("config", "workdir"))
    if "://" in values.workdir:
        raise UsageError(
            f"--workdir: {values.workdir!r} found; a directory was wanted.",
            "Mount the bucket and name its directory; launch/tpu.sh does so with gs://BUCKET/PATH.",
        )
    check_for_checkpoints("--workdir", values.workdir)
    expand_fields(values.config)
    check_workdir(Path(values.workdir), values.config)
    distributed.initialize({name: values[name].value for name in distributed.VARIABLES})
    keep_compilations(Path(values.workdir))
    open_devices()
    return values.config, Path(values.workdir)


def keep_compilations(folder: Path) -> None:
    """Keeps compiled programs in `folder/compiled`, so that a run that goes on compiles nothing anew.

    JAX's own JAX_COMPILATION_CACHE_DIR comes first, and JAX_ENABLE_COMPILATION_CACHE=false turns it off.
    """
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(folder.absolute() / "compiled"))


def load_config(path: str, defaults: str) -> ConfigDict:
    """What the `get_config()` of a Python file returns.

    Raises:
        UserError: If there is no such file or function, or it fails; the message names the file and its line.
    """
    try:
        config = runpy.run_path(path)["get_config"]()
        if not isinstance(config, ConfigDict):
            raise TypeError(f"get_config() gave a {type(config).__name__}; a ConfigDict was wanted")
        return config
    except OSError as error:
        raise UserError(f"--config: {path} cannot be read ({error.strerror}).", "Correct the path.") from None
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        where = path if line is None else f"{path}, line {line}"
        raise UserError(
            f"--config: {where}: {type(error).__name__}: {one_line(error)}",
            f"Correct the file; its get_config() starts from {defaults}.default_config().",
        ) from error


def check_config(command: str, argv: Sequence[str], defaults: str) -> None:
    """Runs the file of `--config` by itself and looks up the overridden fields, for messages that name either.

    Raises:
        UserError: As `load_config`.
        UsageError: If `--config.FIELD` names a field that the configuration does not have.
    """
    values = flags.FlagValues()
    flags.DEFINE_string("config", None, "", values)
    with contextlib.suppress(flags.Error):  # reported by `parse`
        values([command, *argv], known_only=True)
    check_given(values)
    if not values["config"].value:
        return
    fields = list(flatten_dict(load_config(values["config"].value, defaults).to_dict(), sep="."))
    for name in re.findall(r"^--?config\.([^=\n]+)", "\n".join(argv), re.MULTILINE):
        if not any(f"{field}.".startswith(f"{name}.") for field in fields):
            near = nearest(name, fields)
            raise UsageError(
                f"--config.{name}: there is no such field." + (f" Did you mean --config.{near}?" if near else ""),
                f"`default_config` in {defaults.replace('.', '/')}.py lists the fields.",
            )


def print_records(workdir: Path) -> None:
    """Says where a run leaves its records."""
    print(f"metrics      {workdir / 'metrics.jsonl'}")
    print(f"tensorboard  {workdir / 'tensorboard'}")
    print(f"images       {workdir / 'images'}")
