"""A run on one page: an HTML file without scripts that asks nothing of the network, for screen, phone and paper."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from rcgrpo_jax.errors import UserError
from rcgrpo_jax.evaluation.statistics import Interval
from rcgrpo_jax.evaluation.tables import Table
from rcgrpo_jax.report import plots
from rcgrpo_jax.report.heatmaps import colour_scale

_WIDEST, _LOSSLESS, _QUALITY = 1600, 50_000, 80  # pixels, bytes, WebP's quality of what is larger


class Row(NamedTuple):
    """Pictures side by side under a line of text."""

    text: str
    pictures: Sequence[tuple[str, UInt8[np.ndarray, "_ _ 3"]]]  # caption and picture


@dataclass(frozen=True)
class Report:
    """What the page shows; a section without content is left out. All text may hold any characters.

    Attributes:
        title: Of the page.
        facts: What was run, name -> value.
        settings: Fields of the configuration -> value, for the folded list.
        script: Name and text of a configuration file that gives these settings again.
        commands: What to run with it, a line each.
        tables: Results.
        differences: Measure -> what is compared -> paired difference.
        examples: Pictures before and after.
        attention: Attention maps, as `heatmaps.overlay` draws them.
        attention_top: What the brightest colour of these stands for, in units of even attention.
        distributions: What was measured -> arm -> values (Fig. 5).
        metrics: The steps of `metrics.jsonl`.
        grids: Caption -> picture, shown in full width.
    """

    title: str
    facts: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)
    script: tuple[str, str] | None = None
    commands: Sequence[str] = ()
    tables: Sequence[Table] = ()
    differences: Mapping[str, Mapping[str, Interval]] = field(default_factory=dict)
    examples: Sequence[Row] = ()
    attention: Sequence[Row] = ()
    attention_top: float = 1.0
    distributions: Mapping[str, Mapping[str, Float[np.ndarray, " N"]]] = field(default_factory=dict)
    metrics: Sequence[Mapping[str, Any]] = ()
    grids: Mapping[str, UInt8[np.ndarray, "_ _ 3"]] = field(default_factory=dict)


def write_report(path: str | Path, report: Report) -> None:
    """Writes the page, whole or not at all; the folder is made if need be.

    Raises:
        UserError: The file cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.partial")
    page = render(report)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(page, encoding="utf-8", errors="replace")  # lone surrogates
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error}).", "Choose a file you can write to.") from None


def render(report: Report) -> str:
    """The page as HTML."""
    environment = Environment(
        loader=PackageLoader("rcgrpo_jax.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(
        report=report,
        curves=[Markup(svg) for svg in plots.curves(report.metrics)],
        distributions=[Markup(plots.distributions(arms, label)) for label, arms in report.distributions.items()],
        intervals=[Markup(plots.intervals(rows, label)) for label, rows in report.differences.items()],
        data_url=data_url,
        colour_scale=colour_scale(),
    )


def data_url(image: UInt8[np.ndarray, "H W 3"]) -> str:
    """A picture as the address that holds it: WebP, lossless where that is small, at most `_WIDEST` pixels wide."""
    picture = Image.fromarray(image)
    if picture.width > _WIDEST:
        picture = picture.resize((_WIDEST, max(1, picture.height * _WIDEST // picture.width)), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, "WEBP", lossless=True)
    if file.tell() > _LOSSLESS:
        file = io.BytesIO()
        picture.save(file, "WEBP", quality=_QUALITY)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
