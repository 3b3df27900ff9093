"""`rcgrpo pretrain --config configs/X.py --workdir W [--config.a.b=v]`."""

from __future__ import annotations

from rcgrpo_jax.cli.config_file import parse_run, print_records
from rcgrpo_jax.parallel.distributed import is_main
from rcgrpo_jax.training.pretrain import pretrain

ABOUT = """Trains an autoencoder, a flow with its text encoders, or a LoRA on triples of source, instruction and target.

The same command resumes an interrupted run; SIGTERM saves and stops."""


def run(argv: list[str]) -> None:
    config, workdir = parse_run("pretrain", ABOUT, argv, "rcgrpo_jax.training.pretrain_config")
    result = pretrain(config, workdir)
    if not is_main():
        return
    print(f"{'LoRA' if config.stage == 'lora' else 'model':<12} {result or 'not yet: the run was stopped'}")
    print(f"checkpoints  {workdir / 'checkpoints'}")
    print_records(workdir)
