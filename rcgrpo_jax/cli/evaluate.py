"""`rcgrpo evaluate`: how well a model edits, with and without a LoRA, on examples whose right result is known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from absl import flags

from rcgrpo_jax.borders import check_memory
from rcgrpo_jax.cli.arguments import parse, parse_size
from rcgrpo_jax.cli.devices import open_devices
from rcgrpo_jax.cli.edit import editor_options
from rcgrpo_jax.cli.lora_flags import define_lora, read_lora
from rcgrpo_jax.cli.paths import check_apart, check_file, path_flag, write_text
from rcgrpo_jax.data.example import Source
from rcgrpo_jax.data.images import resize_image, resize_mask, save_image
from rcgrpo_jax.data.kinds import forms
from rcgrpo_jax.data.sources import open_source
from rcgrpo_jax.editors.open import check_fits, open_editor
from rcgrpo_jax.evaluation.evaluate import Evaluation, evaluate
from rcgrpo_jax.evaluation.tables import make_tables, markdown, notes, plain
from rcgrpo_jax.models.quantization import NONE, QUANTIZATIONS
from rcgrpo_jax.parallel.mesh import make_mesh
from rcgrpo_jax.progress import Progress
from rcgrpo_jax.runs.grid import GridRow, comparison_grid
from rcgrpo_jax.weights.load import ModelFolder
from rcgrpo_jax.weights.lora import adapter_fingerprint

ABOUT = """Edits examples that have targets, and measures the edits: success inside the region, background outside.

With --lora, base and LoRA edit from the same noise, and their differences come with 95 % intervals."""
PICTURED = 8  # examples in the grid


def _flags(values: flags.FlagValues) -> None:
    path_flag("model", "diffusers folder or converted directory", values)
    define_lora(values)
    path_flag("data", forms(), values)
    flags.DEFINE_enum("polarity", "white", ["white", "black"], "colour of the region in a folder's masks", values)
    flags.DEFINE_string("mask_value", "", "what its masks hold in the region instead: 15, or 2,5, or #800000", values)
    path_flag("out", "directory to write", values)
    flags.DEFINE_integer("seed", 0, "seed of the initial noise", 0, 2**32 - 1, flag_values=values)
    flags.DEFINE_integer("steps", 28, "solver steps", lower_bound=1, flag_values=values)
    flags.DEFINE_float("guidance", 2.5, "guidance scale", flag_values=values)
    flags.DEFINE_integer(
        "batch",
        8,
        "edits at a time, encoded and decoded by every device: memory, not results, depends on it",
        lower_bound=1,
        flag_values=values,
    )
    flags.DEFINE_string("size", None, "WIDTHxHEIGHT in pixels; that of the first image by default", values)
    flags.DEFINE_integer("acd_layers", 10, "last blocks whose attention counts for ACD", 1, flag_values=values)
    flags.DEFINE_integer("text_tokens", 0, "length of the T5 sequence; 0: the model's", 0, 512, flag_values=values)
    flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "compute dtype", values)
    flags.DEFINE_enum("quantization", NONE, QUANTIZATIONS, "of the transformer's kernels", values)


def run(argv: list[str], devices: list[jax.Device] | None = None) -> None:
    """Runs the command, on these devices where the caller has opened them."""
    values, _ = parse("evaluate", ABOUT, argv, _flags, required=("model", "data", "out"))
    size, out = parse_size(values.size) if values.size else None, Path(values.out)
    check_file("out", out / "grid.png", ".png")
    check_apart("--out", out, {"--data": values.data, "--model": values.model}, ("*.npz", "table.md", "grid.png"))
    folder = ModelFolder(values.model)
    devices = devices or open_devices()
    lora = read_lora(values, folder)
    adapters = {"base": None} | ({"lora": lora} if lora else {})
    source = open_source(values.data, values.polarity, mask_value=values.mask_value)
    mesh = make_mesh({"fsdp": -1}, devices)
    check_all_fit(folder, source, size, values)
    editor = open_editor(folder, mesh, **editor_options(values), acd_layers=values.acd_layers)
    evaluations = {}
    for name, lora in adapters.items():
        with Progress(len(source), description=name, lines=10) as progress:
            found = evaluate(
                editor,
                source,
                range(len(source)),
                num_steps=values.steps,
                guidance=values.guidance,
                seed=values.seed,
                lora=lora,
                batch=values.batch,
                size=size,
                mesh=mesh,
                progress=progress.update,
            )
        evaluations[name] = replace(found, origin={"lora": adapter_fingerprint(lora)} if lora else {})
        evaluations[name].save(out / f"{name}.npz")
    tables = make_tables({name: [evaluation] for name, evaluation in evaluations.items()})
    remarks = "\n".join(notes(evaluations["base"]))
    write_text(out / "table.md", f"{markdown(tables)}\n{remarks}\n")
    title = f"{values.steps} solver steps, guidance {values.guidance}, one noise"
    save_image(out / "grid.png", comparison_grid(grid_rows(source, evaluations), title))
    print(f"{plain(tables)}\n{remarks}\n")
    print(f"measures  {', '.join(str(out / f'{name}.npz') for name in evaluations)}")
    print(f"table     {out / 'table.md'}")
    print(f"grid      {out / 'grid.png'}")


def check_all_fit(folder: ModelFolder, source: Source, size: tuple[int, int] | None, values: flags.FlagValues) -> None:
    """Refuses edits that no memory here holds: those of a batch while they are made, and all of them after.

    Raises:
        UserError: With what is too large.
    """
    if not len(source):
        return  # `evaluate` says so
    size = size or source[0].image.shape[:2]
    check_fits(folder, size, values.steps, values.dtype, min(values.batch, len(source)))
    edits = f"--data: {len(source)} edits of {size[1]}x{size[0]}"
    check_memory(edits, 3 * len(source) * size[0] * size[1], "Evaluate on fewer examples.")


def grid_rows(source: Source, evaluations: Mapping[str, Evaluation]) -> list[GridRow]:
    """The first examples, each with the edit of every model and the target."""
    (height, width), rows = next(iter(evaluations.values())).images.shape[1:3], []
    for i in range(min(PICTURED, len(source))):
        example = source[i]
        image, target = (resize_image(x, (height, width)) for x in (example.image, example.target))
        edits = np.stack([*(evaluation.images[i] for evaluation in evaluations.values()), target])
        captions = [f"{name}  success {x.measures['success'][i]:.2f}" for name, x in evaluations.items()]
        mask = resize_mask(example.mask, (height, width))
        rows.append(GridRow(example.instruction, image, mask, edits, [*captions, "target"]))
    return rows
