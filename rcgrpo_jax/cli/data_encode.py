"""`rcgrpo data encode --config configs/X.py --workdir W [--config.a.b=v]`."""

from __future__ import annotations

import time

import numpy as np

from rcgrpo_jax.cli.config_file import parse_run
from rcgrpo_jax.encoding.cache import EncodedSource
from rcgrpo_jax.parallel.distributed import is_main, report_lost_process, sum_over_processes
from rcgrpo_jax.rl import setup
from rcgrpo_jax.runs.workdir import no_leftovers
from rcgrpo_jax.sft import train

ABOUT = """Runs the text and image encoders over the data of a run, ahead of it.

It takes the flags of `rcgrpo train`, or of `rcgrpo sft` in the stage `lora`, and fills the cache that the run reads:
WORKDIR/cache, or data.cache. Any number of processes share the work. The machines may be others than those that will
train: mesh and micro-batches of the configuration count for nothing here. Stopped, it goes on with the same command."""


def run(argv: list[str]) -> None:
    config, workdir = parse_run("data encode", ABOUT, argv, "rcgrpo_jax.rl.config")
    encode_ahead, start = (train if "stage" in config else setup).encode_ahead, time.monotonic()
    with no_leftovers(workdir), report_lost_process():
        sources = encode_ahead(config, workdir)
        made = int(sum_over_processes(np.array(sum(source.made for source in sources))))
    if is_main():
        print(_summary(sources, made, time.monotonic() - start))


def _summary(sources: list[EncodedSource], made: int, seconds: float) -> str:
    lines = [f"cache        {sources[0].folder}"]
    for name, source in zip(("examples", "samples"), sources, strict=False):
        sizes = ", ".join(f"{len(found)} of {size[1]} x {size[0]}" for size, found in source.buckets.items())
        lines.append(f"{name:<12} {len(source)}: {sizes} pixels")
    rate = f", {made / seconds:.2f} a second" if made else ""
    return "\n".join([*lines, f"encoded      {made} in {seconds:.1f} s{rate}"])
