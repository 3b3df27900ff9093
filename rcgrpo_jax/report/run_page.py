"""A run, and evaluations of it, as a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from flax.traverse_util import flatten_dict

from rcgrpo_jax import __version__
from rcgrpo_jax.data.example import EditExample, Source
from rcgrpo_jax.data.images import for_display, outline
from rcgrpo_jax.data.masks import Polarity
from rcgrpo_jax.data.sources import open_source
from rcgrpo_jax.errors import UserError
from rcgrpo_jax.evaluation.examples import read_example
from rcgrpo_jax.evaluation.result import PICTURED, Evaluation
from rcgrpo_jax.evaluation.tables import all_columns, differences, make_tables
from rcgrpo_jax.report.attention import attention_rows, check_evaluated, trained_model
from rcgrpo_jax.report.page import Report, Row
from rcgrpo_jax.report.run_record import SCRIPT, RunRecord, commands, config_script, facts
from rcgrpo_jax.weights.lora import load_loras

CAPTIONED = ("success", "psnr")  # measures under an edit


def describe_run(
    workdir: Path,
    record: RunRecord,
    *,
    evaluation: str = "",
    data: str = "",
    polarity: Polarity = "white",
    mask_value: str = "",
    attention: int = 0,
    loras: Sequence[str] = (),
    strengths: Sequence[float] = (),
    devices: Sequence[jax.Device] | None = None,
) -> Report:
    """Puts together what a run's directory and its evaluations say.

    Args:
        workdir: The directory of the run.
        record: What `read_run` found in it.
        evaluation: Folder of evaluations, as `rcgrpo evaluate` leaves it; "": none.
        data: Its examples, to show its edits beside their sources; "": no pictures.
        polarity: The colour of the region in the masks of a folder.
        mask_value: What these masks hold in the region instead; "": a colour.
        attention: How many examples to draw attention maps of; this loads the model.
        loras: Files of the LoRAs that were evaluated, for these maps.
        strengths: Of each of them.
        devices: Where the maps are computed; all by default.

    Raises:
        UserError: Something is missing, damaged, or not of this run or evaluation.
    """
    config, found = record.config, {**facts(record), "Written by": f"rcgrpo_jax {__version__}"}
    sections: dict[str, Any] = {}
    settings = None  # of the model's edits
    if evaluation:
        evaluations = read_evaluations(Path(evaluation))
        first = next(iter(evaluations.values()))
        settings = next((x.settings for x in evaluations.values() if not x.of_pictures), None)
        variants = {name: [x] for name, x in evaluations.items()}
        sections |= {"tables": make_tables(variants), "differences": differences(variants)}
        height, width = first.settings["size"]
        found["Evaluation"] = f"{len(first.names)} edits of {width} x {height} pixels"
        if settings:
            found["Evaluation"] += ", {steps} steps of {solver}, guidance {guidance}, seed {seed}".format(**settings)
        if data:
            if not all(len(x.images) for x in evaluations.values()):
                raise UserError(
                    f"--data: the evaluations of {evaluation} have no pictures, as `rcgrpo ablate` keeps none.",
                    "Leave --data out, or name the --out of `rcgrpo evaluate`.",
                )
            examples = read_examples(open_source(data, polarity, mask_value=mask_value), first)
            found["Pictures"] = f"the first {len(examples)} of {data}"
            sections["examples"] = [example_row(i, example, evaluations) for i, example in enumerate(examples)]
            if attention:
                model = trained_model(workdir, config)
                lora = load_loras(loras, strengths, model.param_shapes)
                check_evaluated(model, loras, lora, evaluations)
                rows, top = attention_rows(model, lora, examples[:attention], settings, devices)
                sections |= {"attention": rows, "attention_top": top}
    if config:
        described = {name: str(value) for name, value in flatten_dict(config, sep=".").items()}
        recipe = {"settings": described, "script": (SCRIPT, config_script(config))}
        sections |= {**recipe, "commands": commands(config, data, settings, polarity, mask_value)}
    title = f"{found.get('Method', 'Training')}: {workdir.absolute().name}"
    return Report(title, found, metrics=record.metrics, grids=record.pictures, **sections)


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
        example = read_example(source, i, size) if i < len(source) else None
        if example is None or example.name != name:
            raise UserError(
                f"--data: example {i} is {example.name if example else 'missing'}; the evaluation's is {name}.",
                "Name the --data of `rcgrpo evaluate`.",
            )
        examples.append(example)
    return examples


def example_row(index: int, example: EditExample, evaluations: Mapping[str, Evaluation]) -> Row:
    """An example's source with its region outlined, all edits of it, and the target."""

    def caption(name: str, evaluation: Evaluation) -> str:
        shown = [column for column in all_columns() if column.measure in {*CAPTIONED} & {*evaluation.measures}]
        return ", ".join([name, *(f"{c.header} {evaluation.measures[c.measure][index]:.{c.decimals}f}" for c in shown)])

    pictures = [("source", outline(for_display(example.image), example.mask))]
    pictures += [(caption(name, x), for_display(x.images[index])) for name, x in evaluations.items()]
    if example.target is not None:
        pictures.append(("target", for_display(example.target)))
    return Row(example.instruction, pictures)
