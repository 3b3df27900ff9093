"""`rcgrpo report`: a run, and an evaluation of it, as one HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from flax.traverse_util import flatten_dict

from rcgrpo_jax import __version__
from rcgrpo_jax.cli.arguments import parse
from rcgrpo_jax.cli.devices import leave_devices_alone, open_devices
from rcgrpo_jax.cli.lora_flags import define_lora, read_lora
from rcgrpo_jax.cli.paths import check_file, path_flag
from rcgrpo_jax.data.example import EditExample, Source
from rcgrpo_jax.data.images import for_display, outline, resize_image, resize_mask
from rcgrpo_jax.data.sources import open_source
from rcgrpo_jax.editors.open import open_editor
from rcgrpo_jax.errors import UsageError, UserError
from rcgrpo_jax.evaluation.edit import initial_noise
from rcgrpo_jax.evaluation.result import Evaluation
from rcgrpo_jax.evaluation.tables import all_columns, differences, make_tables
from rcgrpo_jax.parallel.mesh import make_mesh
from rcgrpo_jax.parallel.sharding import replicated
from rcgrpo_jax.report.heatmaps import attention_maps, overlay
from rcgrpo_jax.report.page import Report, Row, write_report
from rcgrpo_jax.report.run_record import SCRIPT, commands, config_script, facts, read_run
from rcgrpo_jax.weights.load import ModelFolder
from rcgrpo_jax.weights.lora import adapter_fingerprint

ABOUT = """Writes a run as one HTML page that needs no network: settings, curves and the last pictures, and with
--evaluation the results of `rcgrpo evaluate`. The run may still go on."""
PICTURED = 8  # examples
CAPTIONED = ("success", "psnr")  # measures under an edit


def _flags(values: flags.FlagValues) -> None:
    path_flag("workdir", "directory of the run", values)
    path_flag("evaluation", "directory that `rcgrpo evaluate` wrote", values)
    path_flag("data", "the examples of that evaluation, to show its edits beside their sources", values)
    flags.DEFINE_enum("polarity", "white", ["white", "black"], "colour of the region in a folder's masks", values)
    flags.DEFINE_string("mask_value", "", "what its masks hold in the region instead: 15, or 2,5, or #800000", values)
    flags.DEFINE_integer("attention", 0, "examples to draw attention maps of; loads the model", 0, flag_values=values)
    define_lora(values)
    path_flag("out", "file to write, HTML; WORKDIR/report.html by default", values)


def run(argv: list[str], devices: list[jax.Device] | None = None) -> None:
    """Runs the command, on these devices where the caller has opened them."""
    values, _ = parse("report", ABOUT, argv, _flags, required=("workdir",))
    if values.attention and not (values.evaluation and values.data and values.lora):
        raise UsageError(
            "--attention: --evaluation, --data and --lora were wanted; maps are drawn of their edits.",
            "Give all three.",
        )
    workdir = Path(values.workdir)
    out = Path(values.out or workdir / "report.html")
    if values.attention:
        devices = devices or open_devices()
    else:
        leave_devices_alone()
    record = read_run(workdir)
    check_file("out", out, ".html")
    config, found = record.config, {**facts(record), "Written by": f"rcgrpo_jax {__version__}"}
    sections: dict[str, Any] = {}
    settings = None
    if values.evaluation:
        evaluations = read_evaluations(Path(values.evaluation))
        first = next(iter(evaluations.values()))
        settings = first.settings
        variants = {name: [evaluation] for name, evaluation in evaluations.items()}
        sections |= {"tables": make_tables(variants), "differences": differences(variants)}
        (height, width), told = settings["size"], "{steps} solver steps, guidance {guidance}, seed {seed}"
        found["Evaluation"] = f"{len(first.names)} edits of {width} x {height} pixels, {told.format(**settings)}"
        if values.data:
            if not all(len(x.images) for x in evaluations.values()):
                raise UserError(
                    f"--data: the evaluations of {values.evaluation} have no pictures, as `rcgrpo ablate` keeps none.",
                    "Leave --data out, or name the --out of `rcgrpo evaluate`.",
                )
            source = open_source(values.data, values.polarity, mask_value=values.mask_value)
            examples = read_examples(source, first)
            found["Pictures"] = f"the first {len(examples)} of {values.data}"
            sections["examples"] = [example_row(i, example, evaluations) for i, example in enumerate(examples)]
            if values.attention:
                folder = trained_model(workdir, config)
                lora = read_lora(values, folder)
                check_evaluated(folder, values.lora, lora, evaluations)
                rows, top = attention_rows(folder, lora, examples[: values.attention], settings, devices)
                sections |= {"attention": rows, "attention_top": top}
    if config:
        described = {name: str(value) for name, value in flatten_dict(config, sep=".").items()}
        recipe = {"settings": described, "script": (SCRIPT, config_script(config))}
        sections |= {**recipe, "commands": commands(config, values.data, settings, values.polarity, values.mask_value)}
    grids = dict([record.picture]) if record.picture else {}
    title = f"{found.get('Method', 'Training')}: {workdir.absolute().name}"
    write_report(out, Report(title, found, metrics=record.metrics, grids=grids, **sections))
    print(f"report: {out} ({out.stat().st_size / 1e6:.1f} MB)")


def read_evaluations(folder: Path) -> dict[str, Evaluation]:
    """The evaluations that `rcgrpo evaluate` wrote, by name, the base first.

    Raises:
        UserError: There are none.
    """
    files = sorted(folder.glob("*.npz"), key=lambda path: (path.stem != "base", path.stem))
    if not files:
        raise UserError(f"--evaluation: {folder} has no .npz files.", "Name the --out of `rcgrpo evaluate`.")
    return {path.stem: Evaluation.load(path) for path in files}


def read_examples(source: Source, evaluation: Evaluation) -> list[EditExample]:
    """The first examples, in the size of the edits.

    Raises:
        UserError: The source is not that of the evaluation.
    """
    examples, size = [], evaluation.images.shape[1:3]
    for i, name in enumerate(evaluation.names[:PICTURED]):
        example = source[i] if i < len(source) else None
        if example is None or example.name != name:
            raise UserError(
                f"--data: example {i} is {example.name if example else 'missing'}; the evaluation's is {name}.",
                "Name the --data of `rcgrpo evaluate`.",
            )
        pictures = (x if x is None else resize_image(x, size) for x in (example.image, example.target))
        image, target = pictures
        mask = resize_mask(example.mask, size)
        examples.append(EditExample(name, image, mask, example.instruction, target=target))
    return examples


def example_row(index: int, example: EditExample, evaluations: Mapping[str, Evaluation]) -> Row:
    """An example's source with its region outlined, all edits of it, and the target."""

    def caption(name: str, evaluation: Evaluation) -> str:
        shown = [
            column for column in all_columns() if column.measure in CAPTIONED and column.measure in evaluation.measures
        ]
        return ", ".join([name, *(f"{c.header} {evaluation.measures[c.measure][index]:.{c.decimals}f}" for c in shown)])

    pictures = [("source", outline(for_display(example.image), example.mask))]
    pictures += [(caption(name, x), for_display(x.images[index])) for name, x in evaluations.items()]
    if example.target is not None:
        pictures.append(("target", for_display(example.target)))
    return Row(example.instruction, pictures)


def trained_model(workdir: Path, config: Mapping[str, Any]) -> ModelFolder:
    """The model that a run post-trains.

    Raises:
        UserError: The run has no checkpoint of a post-training.
    """
    if not config or "stage" in config:
        raise UserError(
            f"--attention: {workdir} has no checkpoint of `rcgrpo train`; one was wanted.", "Leave --attention out."
        )
    return ModelFolder(config["model"]["path"])


def check_evaluated(
    folder: ModelFolder, paths: Sequence[str], adapter: dict, evaluations: Mapping[str, Evaluation]
) -> None:
    """Refuses a model or LoRAs that are not those of the evaluation.

    Raises:
        UserError: Naming the flag.
    """
    for flag, path, here, measured in (
        ("workdir", folder.path, folder.whole_fingerprint(), {x.settings["model"] for x in evaluations.values()}),
        ("lora", ", ".join(paths), adapter_fingerprint(adapter), {x.origin.get("lora") for x in evaluations.values()}),
    ):
        if here not in measured:
            raise UserError(
                f"--{flag}: {path} is not what --evaluation is of.", f"Name the --{flag} whose edits were evaluated."
            )


def attention_rows(
    folder: ModelFolder,
    lora: dict,
    examples: Sequence[EditExample],
    settings: Mapping[str, Any],
    devices: Sequence[jax.Device],
) -> tuple[list[Row], float]:
    """Attention maps of base and LoRA, and what their brightest colour stands for: the 99th percentile of all.

    Edits start from the noise of the evaluation.
    """
    mesh = make_mesh({"fsdp": -1}, devices)
    editor = open_editor(
        folder,
        mesh,
        dtype=settings["dtype"],
        max_text_tokens=settings["text_tokens"],
        quantization=settings["quantization"],
        attention="xla",  # the one that gives maps
        acd_layers=settings["acd_layers"],
    )
    images, masks = (np.stack([getattr(x, field) for x in examples]) for field in ("image", "mask"))
    grid = editor.grid(*images.shape[1:3])
    shape = (grid[0] * grid[1], editor.transformer.config.in_channels)
    noise = initial_noise(np.uint32(settings["seed"]), np.arange(len(examples)), shape)
    lora = jax.device_put(lora, replicated(mesh))
    instructions = [x.instruction for x in examples]
    with jax.set_mesh(mesh):
        found = {
            name: attention_maps(
                editor, images, instructions, masks, noise, settings["steps"], settings["guidance"], adapter
            )
            for name, adapter in (("base", None), ("lora", lora))
        }
    top = float(np.percentile([x.relative() for x in found.values()], 99))
    rows = [
        Row(
            instruction,
            [
                (f"{name}, ACD {x.acd[i]:.2f}", overlay(x.edited[i], x.relative()[i], grid, masks[i], top))
                for name, x in found.items()
            ],
        )
        for i, instruction in enumerate(instructions)
    ]
    return rows, top
