"""`rcgrpo data mask --from DATA --method M --out DIR`: masks for examples that have none."""

from __future__ import annotations

from pathlib import Path

from absl import flags

from rcgrpo_jax.cli.arguments import parse, parse_size
from rcgrpo_jax.cli.devices import leave_devices_alone, open_devices
from rcgrpo_jax.cli.edit import editor_options
from rcgrpo_jax.cli.paths import check_apart, path_flag
from rcgrpo_jax.data.example import UNMASKED
from rcgrpo_jax.data.images import save_image
from rcgrpo_jax.data.kinds import forms
from rcgrpo_jax.data.sources import open_source
from rcgrpo_jax.errors import UsageError, UserError
from rcgrpo_jax.masking.folder import SHEET, SKIPPED, Made, make_masks
from rcgrpo_jax.masking.method import HALF, Finish, MethodOptions
from rcgrpo_jax.masking.methods import METHODS
from rcgrpo_jax.masking.segmenter import NORMALISATIONS, WHERE
from rcgrpo_jax.masking.sheet import contact_sheet
from rcgrpo_jax.models.quantization import NONE, QUANTIZATIONS
from rcgrpo_jax.progress import Progress

ABOUT = """Finds a mask for every example of a data set, and writes a folder that data.path takes.

difference: where the target differs from the source; for examples with targets.
segment: what stands out in the source, by a segmenter's network (--segmenter).
editor: where the predictions of --model with and without the instruction differ; needs no target.

Masks that the examples have are not looked at. An example whose mask comes out empty or full is left out and named.
The same command goes on where it was stopped. sheet.png shows the first masks: look at it."""
OWN = {  # flags that belong to one method; the first one must be given
    "segment": ("segmenter", "normalisation"),
    "editor": ("model", "size", "seed", "guidance", "dtype", "quantization", "text_tokens"),
}
SHOWN = 5  # skipped examples that are named on the terminal


def _flags(values: flags.FlagValues) -> None:
    path_flag("from", forms(), values)
    flags.DEFINE_enum("method", None, [*METHODS], "how the masks are found", values)
    path_flag("out", "directory to write", values)
    flags.DEFINE_float("threshold", None, f"score from which a pixel is in the mask; {HALF} by default", 0, 1, values)
    flags.DEFINE_bool("soft", False, "keep the scores themselves as soft masks, without a threshold", values)
    flags.DEFINE_integer("dilate", 0, "pixels by which the masks grow", 0, 1024, flag_values=values)
    path_flag("segmenter", "segment: ONNX file of a network that finds the foreground", values)
    flags.DEFINE_enum(
        "normalisation", "imagenet", [*NORMALISATIONS], "segment: how the network wants its input", values
    )
    path_flag("model", "editor: diffusers folder, converted directory, or small-editor", values)
    flags.DEFINE_string("size", None, "editor: WIDTHxHEIGHT; nearest of Kontext's 17 sizes by default", values)
    flags.DEFINE_integer("seed", 0, "editor: seed of the noise", 0, 2**32 - 1, flag_values=values)
    flags.DEFINE_float("guidance", 2.5, "editor: guidance scale", flag_values=values)
    flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "editor: compute dtype", values)
    flags.DEFINE_enum("quantization", NONE, QUANTIZATIONS, "editor: of the transformer's kernels", values)
    flags.DEFINE_integer(
        "text_tokens", 0, "editor: length of the T5 sequence; 0: the model's", 0, 512, flag_values=values
    )


def run(argv: list[str]) -> None:
    values, _ = parse("data mask", ABOUT, argv, _flags, required=("from", "method", "out"))
    check_method_flags(values)
    given, out = values["from"].value, Path(values.out)
    check_apart("--out", out, {"--from": given, "--model": values.model})
    options = MethodOptions(
        segmenter=values.segmenter or "", normalisation=values.normalisation, model=values.model or "",
        size=parse_size(values.size) if values.size else None, seed=values.seed, guidance=values.guidance,
        **editor_options(values),
    )  # fmt: skip
    source = open_source(given, needs=UNMASKED)
    open_devices() if values.method == "editor" else leave_devices_alone()
    method = METHODS[values.method](options)
    finish = Finish(None if values.soft else HALF if values.threshold is None else values.threshold, values.dilate)
    with Progress(len(source), description=f"masks by {values.method}", lines=10) as progress:
        made = make_masks(source, out, method, finish, {"method": values.method}, progress.update)
    if not made.lines:
        raise UserError(
            f"--from: {given}: none of {len(source)} examples got a mask; {made.skipped[0]['reason']}",
            f"{out / SKIPPED} has the reason of each.",
        )
    save_image(out / SHEET, contact_sheet(out, made.lines, f"{values.method}: the first masks"))
    print(summary(made, out))


def check_method_flags(values: flags.FlagValues) -> None:
    """Refuses flags of another method, a method without its own, and two ways to finish.

    Raises:
        UsageError: With the first of them.
    """
    for method, names in OWN.items():
        if method != values.method and (given := [name for name in names if values[name].present]):
            raise UsageError(
                f"--{given[0]}: found with --method {values.method}; it belongs to {method}.",
                f"Leave --{given[0]} out.",
            )
        if method == values.method and not values[names[0]].present:
            raise UsageError(
                f"--method {method}: no --{names[0]} found, which it needs.",
                WHERE if method == "segment" else "Name the folder of the editor, or small-editor.",
            )
    if values.soft and values.threshold is not None:
        raise UsageError("--soft: found with --threshold; one of them was wanted.", "Leave one of them out.")


def summary(made: Made, out: Path) -> str:
    """What was made and left out, for the terminal."""
    lines = [f"{len(made.lines)} masks: {out}" + (f" ({made.kept} were there)" if made.kept else "")]
    if made.skipped:
        lines.append(f"{len(made.skipped)} examples left out, with their reasons in {out / SKIPPED}:")
        lines += [f"  {x['reason']}" for x in made.skipped[:SHOWN]]
        lines += [f"  and {len(made.skipped) - SHOWN} more"] * (len(made.skipped) > SHOWN)
    return "\n".join([*lines, f"look at      {out / SHEET}"])
