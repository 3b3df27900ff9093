"""The layer diagnosis made and shown: rollouts, what they say of the blocks, a plot, a table and all numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rcgrpo_jax import __version__
from rcgrpo_jax.borders import read_object
from rcgrpo_jax.data.example import Source
from rcgrpo_jax.data.images import save_image
from rcgrpo_jax.editors.model import Model
from rcgrpo_jax.evaluation.statistics import Interval
from rcgrpo_jax.evaluation.tables import Table, markdown, plain
from rcgrpo_jax.experiments.layer_rollouts import Success, roll_out
from rcgrpo_jax.experiments.layers import BlockSet, Counts, Diagnosis, diagnose
from rcgrpo_jax.experiments.rollout_log import ROLLOUTS, SETTINGS
from rcgrpo_jax.report.layer_plot import draw_areas
from rcgrpo_jax.runs.workdir import LOCK, hold, make_folder, write_text

FILES = ("layers.json", "layers.md", "layers.png")
WRITTEN = (*FILES, SETTINGS, ROLLOUTS, LOCK)  # into the folder


def diagnose_layers(
    model: Model,
    lora: dict | None,
    source: Source,
    success: Success,
    out: Path,
    *,
    threshold: float | None = None,
    **options: Any,
) -> str:
    """Makes the rollouts that are missing, and writes what they say of the blocks.

    Args:
        model: The model.
        lora: Adapter with its scale folded in; None is the base.
        source: The examples.
        success: Scores the edits.
        out: Gets `settings.json` and `rollouts.jsonl`, and then `layers.json`, `layers.md` and `layers.png`.
        threshold: As for `diagnose`.
        **options: Of `roll_out`.

    Returns:
        What people read of it.

    Raises:
        UserError: As `roll_out` and `diagnose`, or another process is at work in the folder.
        UsageError: As `roll_out`.
    """
    make_folder(out, "--out", files=WRITTEN)
    with hold(out):
        rollouts = roll_out(model, lora, source, success, out, **options)
        found, doubles = diagnose(rollouts, threshold), model.sizes.num_double_blocks
        remarks = verdict(found, doubles, rollouts.causes)
        head = {
            "software": f"rcgrpo_jax {__version__}",
            "settings": read_object(out / SETTINGS, "Choose another folder."),
        }
        numbers = {**head, "seeds": list(rollouts.seeds), "double_blocks": doubles, **_numbers(found)}
        write_text(out / "layers.json", json.dumps(numbers, indent=2, allow_nan=False) + "\n")
        listed = "\n".join(f"- {remark}" for remark in remarks)
        write_text(out / "layers.md", f"{markdown(layer_tables(found, doubles))}\n{listed}\n")
        save_image(out / "layers.png", draw_areas(found, doubles))
    return "\n".join([plain(layer_tables(found, doubles)), *remarks, "", *(f"{out / name}" for name in FILES)])


def layer_tables(found: Diagnosis, doubles: int) -> list[Table]:
    """The areas of each block, and of the last L blocks."""
    header = ["across rollouts", "within prompts", "within, noisier half", "within, cleaner half"]

    def line(name: str, x: BlockSet) -> list[str]:
        sign = {1: " *", 0: "", -1: " (below)"}
        across, within = _cell(x.across) + sign[x.across_direction], _cell(x.within) + sign[x.within_direction]
        return [name, across, within, _cell(x.early), _cell(x.late)]

    single = [line(block_name(x.blocks[0], doubles), x) for x in found.single]
    last = [line(str(len(x.blocks)), x) for x in found.last]
    note = "area under the curve [95 % interval]; * above 0.5 and (below) under it, corrected for the number of rows"
    return [
        Table(f"Each block: {note}", [["block", *header], *single]),
        Table(f"The mean over the last blocks: {note}", [["acd.layers", *header], *last]),
    ]


def block_name(block: int, doubles: int) -> str:
    """A block as a release numbers it: `double 0`, `single 12`."""
    return f"double {block}" if block < doubles else f"single {block - doubles}"


def verdict(found: Diagnosis, doubles: int, causes: Sequence[str] = ()) -> list[str]:
    """What the areas say of the choice, a sentence or two each."""
    choice, total = found.choice, len(found.single)
    best, block = found.last[choice.layers - 1], found.single[choice.block]
    lines = [_of_what(found.counts, found.threshold, causes)]
    if best.within_direction > 0:
        lines.append(
            f"Recommended: acd.layers={choice.layers} of {total}. The better of two rollouts of a prompt has the "
            f"higher ACD in {_cell(best.within)} of the pairs. On prompts that it was not chosen by: "
            f"{_cell(choice.held_out)}."
        )
    else:
        lines.append(
            f"No choice of acd.layers orders the rollouts of a prompt better than chance. The highest area "
            f"is that of acd.layers={choice.layers} of {total}: {_cell(best.within)} of the pairs."
        )
    lines.append(f"Not worse with certainty: acd.layers of {', '.join(map(str, choice.as_good))}.")
    if below := [str(len(x.blocks)) for x in found.last if x.within_direction < 0]:
        lines.append(f"The better rollout has the lower ACD, beyond chance, with acd.layers of {', '.join(below)}.")
    lines.append(
        f"The best single block is {block_name(choice.block, doubles)}: {_cell(block.within)}. Its gain over the best "
        f"last blocks, on prompts that neither was chosen by: {_cell(choice.gain, '+')}."
    )
    for field, more, less in (
        ("within_direction", "the better rollout of a prompt has the higher ACD", "it has the lower"),
        ("across_direction", "successes of all prompts have the higher ACD", "failures have it"),
    ):
        above, below = (
            ", ".join(block_name(x.blocks[0], doubles) for x in found.single if getattr(x, field) == sign) or "no block"
            for sign in (1, -1)
        )
        lines.append(f"Beyond chance {more} in {above}; {less} in {below}.")
    return lines


def _of_what(counts: Counts, threshold: float, causes: Sequence[str]) -> str:
    text = (
        f"{counts.rollouts} rollouts of {counts.examples} examples, {counts.prompts} of them with rollouts of "
        f"different scores. {counts.successes} succeeded with a score of {threshold:.4g} or more, {counts.failures} "
        "failed."
    )
    if counts.unscored:
        text += f" {counts.unscored} more have no score{f' ({causes[0]})' if causes else ''}."
    if counts.not_finite:
        text += f" The ACD of {counts.not_finite} more is not finite."
    return text


def _cell(x: Interval, sign: str = "") -> str:
    mean, low, high = (f"{value:{sign}.3f}" for value in x)
    return f"{mean} [{low}, {high}]"


def _numbers(found: Diagnosis) -> dict[str, Any]:
    """A diagnosis as JSON, null for what is not known."""

    def interval(x: Interval) -> dict[str, float | None]:
        return {name: value if math.isfinite(value) else None for name, value in x._asdict().items()}

    def blocks(x: BlockSet) -> dict[str, Any]:
        areas = {name: interval(getattr(x, name)) for name in ("across", "within", "early", "late")}
        return {
            "blocks": list(x.blocks),
            **areas,
            "directions": {"across": x.across_direction, "within": x.within_direction},
        }

    choice = found.choice
    return {
        "threshold": found.threshold,
        "counts": found.counts._asdict(),
        "single": [*map(blocks, found.single)],
        "last": [*map(blocks, found.last)],
        "choice": {
            "acd.layers": choice.layers, "as_good": list(choice.as_good), "block": choice.block,
            "held_out": interval(choice.held_out), "gain_of_block": interval(choice.gain),
        },
    }  # fmt: skip
