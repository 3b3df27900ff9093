"""`rcgrpo report`: a run, and an evaluation of it, as one HTML page."""

from __future__ import annotations

from pathlib import Path

import jax
from absl import flags

from rcgrpo_jax.cli.arguments import parse
from rcgrpo_jax.cli.devices import leave_devices_alone, open_devices
from rcgrpo_jax.cli.lora_flags import define_lora, read_strengths
from rcgrpo_jax.cli.paths import check_file, path_flag
from rcgrpo_jax.errors import UsageError
from rcgrpo_jax.report.page import write_report
from rcgrpo_jax.report.run_page import describe_run
from rcgrpo_jax.report.run_record import read_run

ABOUT = """Writes a run as one HTML page that needs no network: settings, curves and the last pictures, and with
--evaluation the results of `rcgrpo evaluate`. The run may still go on."""


def _flags(values: flags.FlagValues) -> None:
    path_flag("workdir", "directory of the run", values)
    path_flag("evaluation", "directory that `rcgrpo evaluate` wrote", values)
    path_flag("data", "the examples of that evaluation, to show its edits beside their sources", values)
    flags.DEFINE_enum("polarity", "white", ["white", "black"], "colour of the region in a folder's masks", values)
    flags.DEFINE_string("mask_value", "", "what its masks hold in the region instead: 15, or 2,5, or #800000", values)
    flags.DEFINE_integer("attention", 0, "examples to draw attention maps of; loads the model", 0, flag_values=values)
    define_lora(values)
    path_flag("out", "file to write, HTML; WORKDIR/report.html by default", values)


def run(argv: list[str]) -> None:
    values, _ = parse("report", ABOUT, argv, _flags, required=("workdir",))
    if values.attention and not (values.evaluation and values.data and values.lora):
        raise UsageError(
            "--attention: --evaluation, --data and --lora were wanted; maps are drawn of their edits.",
            "Give all three.",
        )
    workdir, strengths = Path(values.workdir), read_strengths(values)
    out = Path(values.out or workdir / "report.html")
    devices: list[jax.Device] | None = None
    if values.attention:
        devices = open_devices()
    else:
        leave_devices_alone()
    record = read_run(workdir)
    check_file("out", out, ".html")
    report = describe_run(
        workdir,
        record,
        evaluation=values.evaluation or "",
        data=values.data or "",
        polarity=values.polarity,
        mask_value=values.mask_value,
        attention=values.attention,
        loras=values.lora or (),
        strengths=strengths,
        devices=devices,
    )
    write_report(out, report)
    print(f"report: {out} ({out.stat().st_size / 1e6:.1f} MB)")
