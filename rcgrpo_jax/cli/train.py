"""`rcgrpo train --config configs/X.py --workdir W [--config.a.b=v]`."""

from __future__ import annotations

from rcgrpo_jax.cli.config_file import parse_run, print_records
from rcgrpo_jax.errors import STOPPED
from rcgrpo_jax.parallel.distributed import is_main
from rcgrpo_jax.rl.trainer import post_train
from rcgrpo_jax.runs.workdir import no_leftovers

ABOUT = f"""Post-trains a LoRA.

The same command resumes an interrupted run. SIGTERM saves and stops; the exit status is then {STOPPED}."""


def run(argv: list[str]) -> int:
    config, workdir = parse_run("train", ABOUT, argv, "rcgrpo_jax.rl.config")
    with no_leftovers(workdir):
        state, finished = post_train(config, workdir)
    if is_main():
        if int(state.step):
            print(f"checkpoint   {workdir / 'checkpoints' / str(int(state.step))}")
        print_records(workdir, config)
    return 0 if finished else STOPPED
