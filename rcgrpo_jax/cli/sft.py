"""`rcgrpo sft --config configs/X.py --workdir W [--config.a.b=v]`."""

from __future__ import annotations

from rcgrpo_jax.cli.config_file import parse_run, print_records
from rcgrpo_jax.errors import STOPPED
from rcgrpo_jax.parallel.distributed import is_main
from rcgrpo_jax.runs.workdir import no_leftovers
from rcgrpo_jax.sft.train import train_supervised

ABOUT = f"""Trains an autoencoder, a flow with its text encoders, or a LoRA, on source, instruction and target.

The same command resumes an interrupted run. SIGTERM saves and stops; the exit status is then {STOPPED}."""


def run(argv: list[str]) -> int:
    config, workdir = parse_run("sft", ABOUT, argv, "rcgrpo_jax.sft.config")
    with no_leftovers(workdir):
        result = train_supervised(config, workdir)
    if is_main():
        print(f"{'LoRA' if config.stage == 'lora' else 'model':<12} {result or 'not yet: the run was stopped'}")
        print(f"checkpoints  {workdir / 'checkpoints'}")
        print_records(workdir, config)
    return 0 if result else STOPPED
