"""The measurement in numbers and as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rcgrpo_jax.plan.text import align

FRAMEWORKS = ("jax", "torch")
PROGRAMS = ("rollout", "update")


def summary(report: Mapping[str, Any]) -> dict[str, Any]:
    """By program and for the whole step, of each framework: seconds, samples/s, FLOP/s and MFU, and the ratio.

    Three numbers are a median, the lowest and the highest. The ratio is torch's seconds over JAX's of the same turn:
    above 1 this package is faster. Samples are candidates, of an update units (an anchor at a solver step).
    """
    found = {}
    for program in (*PROGRAMS, "step"):
        parts = PROGRAMS if program == "step" else (program,)
        work = sum(report["flops"][part] for part in parts)
        seconds = {name: sum(np.asarray(report["seconds"][name][part]) for part in parts) for name in FRAMEWORKS}
        found[program] = {"ratio": _spread(seconds["torch"] / seconds["jax"])}
        for name, taken in seconds.items():
            rate = work / float(np.median(taken))
            found[program][name] = {
                "seconds": _spread(taken),
                "samples_per_second": report["samples"][parts[0]] / float(np.median(taken)),
                "flops_per_second": rate,
                "mfu": rate / report["peak"],
            }
    return found


def _spread(x: np.ndarray) -> list[float]:
    return [float(value) for value in (np.median(x), x.min(), x.max())]


def table(report: Mapping[str, Any]) -> str:
    """The report in plain text."""
    config, tera = report["config"], 1e12
    shape = ", ".join(
        f"{letter} {config[group][name]}"
        for letter, group, name in (
            ("P", "rollout", "prompts"), ("G", "rollout", "group_size"), ("K", "rollout", "num_steps"),
            ("B", "surrogate", "anchors"),
        )
    )  # fmt: skip
    matmul = ", ".join(f"{name} {rate / tera:.4g}" for name, rate in report["matmul"].items())
    lines = [
        f"preset    {report['preset']}: {report['tokens']} tokens a sample, {shape}, "
        f"{report['samples']['update']} units, {config['model']['dtype']}, remat {config['model']['remat']}",
        f"device    {report['device']}, peak {report['peak'] / tera:.4g} TFLOP/s, {report['peak_is']} "
        f"(matmul: {matmul}), load average before {report['load']:.2g}",
        *(
            f"{name:<10}{report['software'][name]}; at a time: "
            + ", ".join(
                f"{micro or 'all'} {what}"
                for micro, what in zip(report["micro_batches"][name], ("candidates", "units"), strict=True)
            )
            for name in FRAMEWORKS
        ),
        f"parity    {', '.join(f'{name} {error:.2g}' for name, error in report['parity'].items())} "
        f"(at most {report['tolerance']:g})",
        "",
    ]
    rows = [
        ["", *(f"{name} {unit}" for unit in ("s", "samples/s", "TFLOP/s", "MFU") for name in FRAMEWORKS), "torch / jax"]
    ]
    for program, row in summary(report).items():
        both = [row[name] for name in FRAMEWORKS]
        rows.append(
            [
                program,
                *(_with_spread(one["seconds"]) for one in both),
                *(f"{one['samples_per_second']:.3g}" for one in both),
                *(f"{one['flops_per_second'] / tera:.3g}" for one in both),
                *(f"{one['mfu']:.1%}" for one in both),
                _with_spread(row["ratio"]),
            ]
        )
    count = len(report["seconds"]["jax"]["rollout"])
    return "\n".join([*lines, align(rows), f"median (lowest to highest) of {count} timed steps of each, in turns"])


def _with_spread(values: Sequence[float]) -> str:
    return "{:.3g} ({:.3g} to {:.3g})".format(*values)
