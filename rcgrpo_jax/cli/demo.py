"""`rcgrpo demo --out DIR`: the whole way on the small editor, from a run to a page about what it changed."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from absl import flags

from rcgrpo_jax.cli.arguments import parse
from rcgrpo_jax.cli.devices import open_devices
from rcgrpo_jax.cli.paths import check_name, path_flag
from rcgrpo_jax.progress import Jobs
from rcgrpo_jax.report.demo import run_demo

ABOUT = """Post-trains the editor that ships with the package on synthetic edits, exports the LoRA, compares it with the
base on held-out edits, and writes a page about it. Run again with the same flags, it resumes the training."""


def _flags(values: flags.FlagValues) -> None:
    path_flag("out", "directory to write", values)
    flags.DEFINE_integer("steps", 28, "training steps", 1, 100_000, flag_values=values)
    flags.DEFINE_integer("examples", 60, "held-out edits to compare on", 1, 100_000, flag_values=values)


def run(argv: list[str]) -> None:
    values, _ = parse("demo", ABOUT, argv, _flags, required=("out",))
    check_name("--out", values.out)
    page, devices = Path(values.out) / "report.html", open_devices()
    with Jobs(lines=10) as progress:
        run_demo(
            Path(values.out), values.steps, values.examples, devices=devices, say=partial(print, flush=True),
            progress=progress,
        )  # fmt: skip
    print(f"report: {page} ({page.stat().st_size / 1e6:.1f} MB)\n\nopen {page}")
