"""`rcgrpo data preview --data D --size WxH --out preview.png`."""

from __future__ import annotations

from pathlib import Path

from absl import flags

from rcgrpo_jax.cli.arguments import parse, parse_size
from rcgrpo_jax.cli.devices import leave_devices_alone
from rcgrpo_jax.cli.paths import check_apart, check_file, path_flag
from rcgrpo_jax.data.buckets import KONTEXT, make_buckets
from rcgrpo_jax.data.example import NOTHING
from rcgrpo_jax.data.images import save_image
from rcgrpo_jax.data.sources import open_source
from rcgrpo_jax.errors import UsageError
from rcgrpo_jax.progress import Progress
from rcgrpo_jax.report.buckets import preview
from rcgrpo_jax.runs.fields import size_problems

ABOUT = """Shows what data.buckets=kontext does to a data set: the bucket of each picture, and what is cut.

It prints a table of the buckets, names the examples that lose a part of their region, and draws a sheet of crops."""


def _flags(values: flags.FlagValues) -> None:
    path_flag("data", "as data.path of a configuration", values)
    path_flag("out", "PNG file to write", values)
    flags.DEFINE_string("size", "512x512", "WIDTHxHEIGHT, as data.size: its area is that of the buckets", values)
    flags.DEFINE_integer("shown", 6, "pictures a bucket on the sheet, those that lose most", 1, flag_values=values)
    flags.DEFINE_enum("polarity", "white", ["white", "black"], "colour of the region in a folder's masks", values)
    flags.DEFINE_string("mask_value", "", "what its masks hold in the region instead: 15, or 2,5, or #800000", values)


def run(argv: list[str]) -> None:
    values, _ = parse("data preview", ABOUT, argv, _flags, required=("data", "out"))
    size, out = parse_size(values.size), Path(values.out)
    if problems := size_problems(size):
        raise UsageError(f"--size: {values.size}: {problems[0].partition('; ')[2]}.", "For example --size 512x512.")
    leave_devices_alone()
    check_apart("--out", out, {"--data": values.data})
    check_file("out", out, ".png")
    source = open_source(values.data, values.polarity, values.mask_value, NOTHING)
    with Progress(len(source), description="preview", lines=10) as progress:
        found = preview(source, make_buckets(KONTEXT, size), values.shown, progress.update)
    save_image(out, found.sheet)
    print(f"{found}\n\nsheet  {out}")
