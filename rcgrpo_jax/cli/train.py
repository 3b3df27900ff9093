"""`rcgrpo train --config configs/X.py --workdir W [--config.a.b=v]`."""

from __future__ import annotations

from rcgrpo_jax.cli.config_file import parse_run, print_records
from rcgrpo_jax.parallel.distributed import is_main
from rcgrpo_jax.training.loop import train

ABOUT = "Post-trains a LoRA. The same command resumes an interrupted run; SIGTERM saves and stops."


def run(argv: list[str]) -> None:
    config, workdir = parse_run("train", ABOUT, argv, "rcgrpo_jax.training.config")
    state = train(config, workdir)
    if not is_main():
        return
    print(f"checkpoint   {workdir / 'checkpoints' / str(int(state.step))}")
    print_records(workdir)
