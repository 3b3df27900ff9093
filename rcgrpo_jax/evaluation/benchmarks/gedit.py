"""GEdit-Bench (arXiv 2504.17761): 606 instructions of users, in English and in Chinese, scored by a judge alone."""

from __future__ import annotations

from pathlib import Path

from rcgrpo_jax.data.buckets import KONTEXT
from rcgrpo_jax.data.example import EditExample
from rcgrpo_jax.data.published.gedit import TASKS
from rcgrpo_jax.errors import UserError
from rcgrpo_jax.evaluation.benchmarks.base import Benchmark, Published, PublishedTable, Subset
from rcgrpo_jax.rewards import VIEScore

LANGUAGES = {"en": "English", "cn": "Chinese"}


def parts_of(example: EditExample) -> tuple[str, bool, str]:
    """Language, whether the example is in the intersection, and key, as `rcgrpo data prepare gedit` joins them.

    Raises:
        UserError: It has another id.
    """
    language, flag, key = (*(example.id or example.name).split("-", 2), "", "")[:3]
    if language not in LANGUAGES or flag not in ("true", "false") or not key:
        raise UserError(
            f"{example.name}: the id {example.id!r} found; LANGUAGE-INTERSECTION-KEY was wanted, as en-true-4c309b59.",
            "`rcgrpo data prepare gedit` makes such data.",
        )
    return language, flag == "true", key


def _row(editor: str, *values: float) -> Published:
    return Published(editor, dict(zip(VIEScore.columns, values, strict=True)))


PUBLISHED = {
    "en": {
        "edit-r1": PublishedTable(
            "arXiv 2510.16888, Table 2",
            (
                _row("FLUX.1-Kontext-dev", 6.52, 7.38, 6.00),
                _row("UniWorld-FLUX.1-Kontext", 7.28, 7.49, 6.74),
                _row("FLUX.1-Kontext-pro", 7.02, 7.60, 6.56),
                _row("BAGEL", 7.36, 6.83, 6.52),
                _row("OmniGen2", 7.16, 6.77, 6.41),
                _row("Step1X-Edit", 7.66, 7.35, 6.97),
                _row("GPT-Image-1 (high)", 7.85, 7.62, 7.53),
                _row("Qwen-Image-Edit", 8.00, 7.86, 7.56),
            ),
        ),
    },
    "cn": {
        "bagel": PublishedTable(
            "arXiv 2505.14683, Table 7 (full set)",
            (
                _row("BAGEL", 7.34, 6.85, 6.50),
                _row("Step1X-Edit", 7.20, 6.87, 6.86),
                _row("Gemini 2.0", 5.43, 6.78, 5.36),
                _row("GPT-4o", 7.67, 7.56, 7.30),
            ),
        ),
    },
}


def make(language: str) -> Benchmark:
    """The benchmark of one language: means are of one language's examples."""

    def task_of(example: EditExample) -> str:
        found = parts_of(example)[0]
        return example.task if found == language else f"{example.task} ({LANGUAGES[found]})"

    def picture(folder: Path, task: str, name: str) -> Path:
        return folder / "fullset" / task / language / f"{name}.png"

    tables = PUBLISHED[language]
    return Benchmark(
        name=f"gedit-{language}",
        title=f"GEdit-Bench, {LANGUAGES[language]}",
        tasks=TASKS,
        side=None,
        measures=(),
        identify=lambda example: parts_of(example)[2],
        picture=picture,
        layout=f"MODEL/fullset/TASK/{language}/KEY.png",
        task_of=task_of,
        judge="viescore",
        buckets=KONTEXT,
        source_mark="_SRCIMG",
        subset=Subset("intersection", lambda example: parts_of(example)[1]),
        published=next(iter(tables.values())),
        tables=tables,
        remarks=(
            "G_SC and G_PQ are from 0 to 10, and G_O is the mean of sqrt(SC PQ) of each edit. The benchmark's own "
            "judge is GPT-4.1; another judge has another scale, and published rows say nothing beside it.",
        ),
    )


GEDIT_EN, GEDIT_CN = map(make, LANGUAGES)
