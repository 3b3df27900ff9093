"""ImgEdit-Bench (arXiv 2505.20275), its basic suite: 737 instructions of nine kinds, scored by a judge alone."""

from __future__ import annotations

from pathlib import Path

from rcgrpo_jax.data.buckets import KONTEXT
from rcgrpo_jax.data.example import EditExample
from rcgrpo_jax.data.published.imgedit import TASKS
from rcgrpo_jax.evaluation.benchmarks.base import Benchmark, Published, PublishedTable
from rcgrpo_jax.rewards import ImgEditJudge

(SCORE,) = ImgEditJudge.columns
# The columns of the published tables; "Hybrid" is the kind `compose`.
COLUMNS = ("add", "adjust", "extract", "replace", "remove", "background", "style", "compose", "action")


def picture(folder: Path, task: str, name: str) -> Path:
    """Where the official script looks for an edit: `{result_img_folder}/{key}.png`, whatever its kind."""
    return folder / f"{name}.png"


def _row(editor: str, *scores: float, overall: float) -> Published:
    return Published(editor, {SCORE: overall}, {x: {SCORE: y} for x, y in zip(COLUMNS, scores, strict=True)})


def _id(example: EditExample) -> str:
    return example.id or example.name


TABLES = {
    "imgedit": PublishedTable(
        "the leaderboard of PKU-YuanGroup/ImgEdit of 2025-07-27, Table 4 (judge GPT-4.1)",
        (
            _row("FLUX.1-Kontext-dev", 3.83, 3.65, 2.27, 4.45, 3.17, 3.98, 4.55, 3.35, 4.29, overall=3.71),
            _row("InstructPix2Pix", 2.45, 1.83, 1.44, 2.01, 1.50, 1.44, 3.55, 1.20, 1.46, overall=1.88),
            _row("Step1X-Edit", 3.88, 3.14, 1.76, 3.40, 2.41, 3.16, 4.63, 2.64, 2.52, overall=3.06),
            _row("UniWorld-V1", 3.82, 3.64, 2.27, 3.47, 3.24, 2.99, 4.21, 2.96, 2.74, overall=3.26),
            _row("BAGEL", 3.81, 3.59, 1.58, 3.85, 3.16, 3.39, 4.51, 2.67, 4.25, overall=3.42),
            _row("OmniGen2", 3.57, 3.06, 1.77, 3.74, 3.20, 3.57, 4.81, 2.52, 4.68, overall=3.44),
            _row("Ovis-U1", 3.99, 3.73, 2.66, 4.38, 4.15, 4.05, 4.86, 3.43, 4.68, overall=3.97),
            _row("GPT-4o-Image", 4.61, 4.33, 2.90, 4.35, 3.66, 4.57, 4.93, 3.96, 4.89, overall=4.20),
        ),
    ),
    "edit-r1": PublishedTable(
        "arXiv 2510.16888, Table 1 (judge GPT-4.1)",
        (
            _row("FLUX.1-Kontext-dev", 4.12, 3.80, 2.04, 4.22, 3.09, 3.97, 4.51, 3.35, 4.25, overall=3.71),
            _row("UniWorld-FLUX.1-Kontext", 4.19, 4.20, 2.43, 4.32, 3.91, 4.08, 4.68, 3.72, 4.63, overall=4.02),
            _row("FLUX.1-Kontext-pro", 4.25, 4.15, 2.35, 4.56, 3.57, 4.26, 4.57, 3.68, 4.63, overall=4.00),
            _row("Qwen-Image-Edit", 4.38, 4.16, 3.43, 4.66, 4.14, 4.38, 4.81, 3.82, 4.69, overall=4.27),
        ),
    ),
}
IMGEDIT = Benchmark(
    name="imgedit",
    title="ImgEdit-Bench, basic suite",
    tasks=TASKS,
    side=None,
    measures=(),
    identify=_id,
    picture=picture,
    layout="MODEL/KEY.png",
    judge="imgedit",
    buckets=KONTEXT,
    published=TABLES["imgedit"],
    tables=TABLES,
    remarks=(
        "A score is the mean of three ratings from 1 to 5. What is measured here is the unweighted mean of the kinds "
        "of edit; some published overall scores are not that of their own columns. The judge of the published rows is "
        "GPT-4.1; another judge has another scale.",
    ),
)
