"""`python -m benchmarks.step --preset wide`: the training step of this package beside a plain torch implementation.

Both do the same RC-GRPO step: roll out all candidates with their ACD reward, then one optimizer update, with the same
weights, inputs, noise and advantages. What they compute is compared first; where it differs nothing is timed.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.presets import PRESETS, Preset
from benchmarks.report import FRAMEWORKS, PROGRAMS, summary, table
from benchmarks.worker import Workers
from rcgrpo_jax.errors import UsageError, UserError

Ask = Callable[[str, str], tuple[Any, float]]  # (framework, method of its `Step`) -> its result, its seconds


def run(preset: Preset, ask: Ask) -> dict[str, Any]:
    """Compares the frameworks, then times them in turns.

    Returns:
        The report: what `table` prints, and every time taken.

    Raises:
        UserError: If they do not compute the same, or not on the same kind of device.
    """
    found, about, peaks, load = {}, {}, {}, os.getloadavg()[0]
    for name in FRAMEWORKS:
        found[name], about[name], peaks[name] = (ask(name, method)[0] for method in ("results", "about", "peak"))
    if about["jax"]["platform"] != about["torch"]["platform"]:
        raise UserError(
            f"device: JAX runs on {about['jax']['platform']}, torch on {about['torch']['platform']}.",
            "Install both for the GPU, or hide it from both with CUDA_VISIBLE_DEVICES= (empty).",
        )
    parity = differences(**found)
    check(parity, preset.tolerance)
    seconds = {name: {program: [] for program in PROGRAMS} for name in FRAMEWORKS}
    for turn in range(preset.rounds):
        for name in FRAMEWORKS if turn % 2 else FRAMEWORKS[::-1]:  # first the one that is running
            for _ in range(preset.repeats):
                for program in PROGRAMS:
                    seconds[name][program].append(ask(name, program)[1])
        taken = ", ".join(f"{name} {sum(seconds[name][p][-1] for p in PROGRAMS):.3g} s" for name in FRAMEWORKS)
        say(f"round {turn + 1} of {preset.rounds}: a step of {taken}")
    stated = about["jax"]["stated_peak"]
    return {
        "preset": preset.name,
        "config": preset.config.to_dict(),
        "device": about["jax"]["device"],
        "software": {name: about[name]["software"] for name in FRAMEWORKS},
        "micro_batches": {
            name: [config[group].micro_batch for group in ("rollout", "surrogate")]
            for name, config in (("jax", preset.config), ("torch", preset.torch_config))
        },
        "parity": parity,
        "tolerance": preset.tolerance,
        "peak": stated or max(peaks.values()),
        "peak_is": "data sheet" if stated else "measured",
        "matmul": peaks,
        "load": load,  # before: what else the machine had to do
        **{name: about["jax"][name] for name in ("tokens", "samples", "flops")},
        "seconds": seconds,
    }


def differences(jax: Mapping[str, np.ndarray], torch: Mapping[str, np.ndarray]) -> dict[str, float]:
    """`|a - b| / |b|` of each result, in the Euclidean norm; infinite if one is not finite."""

    def difference(a: np.ndarray, b: np.ndarray) -> float:
        assert a.shape == b.shape, f"{a.shape} of JAX, {b.shape} of torch"
        with np.errstate(invalid="ignore"):
            error = np.linalg.norm((a - b).ravel()) / np.linalg.norm(b.ravel())
        return float(error) if np.isfinite(error) else float("inf")

    return {name: difference(jax[name], torch[name]) for name in jax}


def check(parity: Mapping[str, float], tolerance: float) -> None:
    """Refuses to time two implementations that do not compute the same.

    Raises:
        UserError: If a difference is above the tolerance.
    """
    if wrong := [f"{name} {error:.2g}" for name, error in parity.items() if not error <= tolerance]:
        raise UserError(
            f"parity: {', '.join(wrong)} relative difference of JAX and torch; at most {tolerance:g} was wanted.",
            "Times of different computations say nothing: find the difference first.",
        )


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def positive(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} found; a positive whole number was wanted")
    return int(text)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.step", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--rounds", type=positive, help="turns of each framework")
    parser.add_argument("--repeats", type=positive, help="steps a turn")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile; by default on a GPU")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="a field of the configuration, such as lora.rank=8",
    )
    parser.add_argument("--json", type=Path, help="file for the report")
    return parser.parse_args(argv)


def chosen(options: argparse.Namespace) -> Preset:
    """The preset with what the command line changes."""
    preset, changes = PRESETS[options.preset], {}
    for item in options.set:
        name, _, value = item.partition("=")
        if name in ("model.path", "data.path"):
            raise UsageError(f"--set: {name} found; a preset has its own model and inputs.", "Choose another --preset.")
        try:
            changes[name] = ast.literal_eval(value)
        except (SyntaxError, ValueError):  # a bare word
            changes[name] = value
    given = {name: getattr(options, name) for name in ("rounds", "repeats", "compile")}
    given = {name: value for name, value in given.items() if value is not None}
    try:
        torch = {field: value for field, value in preset.torch.items() if field not in changes}
        return dataclasses.replace(preset, changes={**preset.changes, **changes}, torch=torch, **given)
    except (KeyError, TypeError) as error:  # a group that does not exist, or a value of another type
        raise UsageError(f"--set: {error.args[0]}", "For example --set rollout.group_size=8.") from None


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    try:
        preset = chosen(options)
        with Workers(preset) as workers:
            report = run(preset, workers.ask)
    except UserError as error:
        say(f"error: {error}")
        return error.exit_code
    print(table(report))  # first: what was measured must not be lost with the file
    if options.json:
        try:
            options.json.write_text(json.dumps({**report, "summary": summary(report)}, indent=2) + "\n")
        except OSError as error:
            say(f"error: --json: {options.json} cannot be written ({error.strerror}). The table above is all there is.")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
