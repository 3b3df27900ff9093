"""`rcgrpo evaluate`: how well a model edits, with and without a LoRA, or how good pictures of other programs are."""

from __future__ import annotations

from pathlib import Path

from absl import flags

from rcgrpo_jax.cli.arguments import parse, parse_size
from rcgrpo_jax.cli.benchmark import (
    check_no_benchmark,
    check_nothing_edits,
    define_benchmark,
    measure_options,
    run_benchmark,
)
from rcgrpo_jax.cli.devices import open_devices
from rcgrpo_jax.cli.edit import define_solver, editor_options
from rcgrpo_jax.cli.lora_flags import define_lora, read_lora
from rcgrpo_jax.cli.paths import PathParser, check_apart, check_file, name_folders, path_flag
from rcgrpo_jax.data.kinds import forms
from rcgrpo_jax.data.sources import open_source
from rcgrpo_jax.editors.open import open_model
from rcgrpo_jax.errors import UsageError
from rcgrpo_jax.evaluation.measures import choose
from rcgrpo_jax.experiments.compare import FILES, compare, evaluate_adapters, measure_folders, summary
from rcgrpo_jax.flow.solvers import choose_solver
from rcgrpo_jax.models.quantization import NONE, QUANTIZATIONS
from rcgrpo_jax.progress import Jobs

ABOUT = """Edits examples, and measures the edits: success inside the region, background outside.

With --lora, base and LoRA edit from the same noise, and their differences come with 95 % intervals. With --pictures in
place of --model, edits that are there are measured, whoever made them: a PNG for each example, NAME.png, in pixels of
--size; given again, the folders are compared with the first.

With --benchmark, the examples are those of a published benchmark, and its published rows stand in the table. --model
edits all of them, and goes on where it was stopped; --results DIR, which may be given again, has the edits of another
editor, in the layout of the benchmark. docs/compbench.md has the whole way, docs/benchmarks.md that of the others."""


def _flags(values: flags.FlagValues) -> None:
    path_flag("model", "diffusers folder, converted directory, or small-editor", values)
    define_lora(values)
    about = "folder of edits to measure in place of a model's, NAME.png for each example; may be given again"
    flags.DEFINE_multi(PathParser("pictures"), flags.ArgumentSerializer(), "pictures", None, about, values)
    path_flag("data", forms(), values)
    flags.DEFINE_enum("polarity", "white", ["white", "black"], "colour of the region in a folder's masks", values)
    flags.DEFINE_string("mask_value", "", "what its masks hold in the region instead: 15, or 2,5, or #800000", values)
    path_flag("out", "directory to write", values)
    about = "directory that keeps the edits as they are made, so that a call that was stopped goes on"
    path_flag("edits", f"{about}; of a benchmark OUT/edits by default", values)
    define_benchmark(values)
    about = "measures or groups (docs/compbench.md); editor by default, official,region of a benchmark"
    flags.DEFINE_list("measures", None, about, values)
    path_flag("clip", "CLIP model of LC-I and LC-T: a folder, or its name on the hub", values)
    path_flag("lpips_squeeze", "safetensors file of SqueezeNet's LPIPS (docs/compbench.md)", values)
    flags.DEFINE_integer("seed", 0, "seed of the initial noise", 0, 2**32 - 1, flag_values=values)
    flags.DEFINE_integer("steps", 28, "solver steps", lower_bound=1, flag_values=values)
    define_solver(values)
    flags.DEFINE_float("guidance", 2.5, "guidance scale", flag_values=values)
    flags.DEFINE_integer(
        "batch",
        8,
        "edits at a time, encoded and decoded by every device: memory, not results, depends on it",
        lower_bound=1,
        flag_values=values,
    )
    flags.DEFINE_string(
        "size", None, "WIDTHxHEIGHT in pixels; that of the first image, or the benchmark's, by default", values
    )
    flags.DEFINE_integer("acd_layers", 10, "last blocks whose attention counts for ACD", 1, flag_values=values)
    flags.DEFINE_integer("text_tokens", 0, "length of the T5 sequence; 0: the model's", 0, 512, flag_values=values)
    flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "compute dtype", values)
    flags.DEFINE_enum("quantization", NONE, QUANTIZATIONS, "of the transformer's kernels", values)


def run(argv: list[str]) -> None:
    values, _ = parse("evaluate", ABOUT, argv, _flags, required=("data", "out"))
    if values.benchmark:
        run_benchmark(values)
        return
    check_no_benchmark(values)
    choose_solver(values.solver, values.steps)
    size, out = parse_size(values.size) if values.size else None, Path(values.out)
    folders = picture_folders(values)
    check_file("out", out / "grid.png", ".png")
    inputs = {"--data": values.data, "--model": values.model}
    check_apart("--out", out, inputs, FILES)
    check_apart("--edits", Path(values.edits or ""), inputs if values.edits else {})
    for folder in folders.values():
        check_apart("--out", out, {"--pictures": folder})
    options = measure_options(values, choose(values.measures))
    common = {"batch": values.batch, "size": size, "measures": values.measures, "measure_options": options}
    with Jobs(lines=10) as progress:
        if folders:
            open_devices()
            source = open_source(values.data, values.polarity, mask_value=values.mask_value)
            found = measure_folders(folders, source, **common, progress=progress)
            title = "pictures as they were found"
        else:
            model = open_model(values.model)
            devices = open_devices()
            lora = read_lora(values, model)
            source = open_source(values.data, values.polarity, mask_value=values.mask_value)
            found = evaluate_adapters(
                model, source, {"base": None} | ({"lora": lora} if lora else {}), **common, steps=values.steps,
                solver=values.solver, guidance=values.guidance, seed=values.seed, acd_layers=values.acd_layers,
                **editor_options(values),
                edits=Path(values.edits) if values.edits else None, devices=devices, progress=progress,
            )  # fmt: skip
            title = f"{values.steps} steps of {values.solver}, guidance {values.guidance}, one noise"
        comparison = compare(found, source, out, title)
    print(summary(comparison, out))


def picture_folders(values: flags.FlagValues) -> dict[str, Path]:
    """The folders of `--pictures` by their own names; none where a model makes the edits.

    Raises:
        UsageError: Both or neither are given, a flag that says how a model edits, or two folders of one name.
    """
    folders = name_folders("pictures", values.pictures or ())
    if bool(values.model) == bool(folders):
        found = "both --model and --pictures" if folders else "neither --model nor --pictures"
        raise UsageError(
            f"{found} found; one of them was wanted.",
            "Name the model that shall edit, or the folder of edits that are there.",
        )
    if folders:
        check_nothing_edits(values, "--pictures")
    return folders
