"""`rcgrpo train --config configs/X.py --workdir W [--config.a.b=v]`."""

from __future__ import annotations

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from rcgrpo_jax.cli.arguments import parse
from rcgrpo_jax.errors import UserError
from rcgrpo_jax.training.loop import train

ABOUT = "Post-trains a LoRA. The same command resumes an interrupted run; SIGTERM saves and stops."


def run(argv: list[str]) -> None:
    def define(values: flags.FlagValues) -> None:
        config_flags.DEFINE_config_file(
            "config", None, "Python file with get_config(); --config.FIELD=VALUE overrides", values, sys_argv=argv
        )
        flags.DEFINE_string("workdir", None, "directory of the run", values)

    values, _ = parse("train", ABOUT, argv, define, required=("config", "workdir"))
    if not hasattr(values.config, "to_dict"):
        raise UserError("--config: the file's get_config() gave no ConfigDict.", "Start from default_config().")
    state = train(values.config, values.workdir)
    workdir = Path(values.workdir)
    print(f"checkpoint   {workdir / 'checkpoints' / str(int(state.step))}")
    print(f"metrics      {workdir / 'metrics.jsonl'}")
    print(f"tensorboard  {workdir / 'tensorboard'}")
    print(f"images       {workdir / 'images'}")
