"""CompBench (arXiv 2505.12200), its local edits: what is added, removed and replaced in 640 x 640 photographs."""

from __future__ import annotations

from pathlib import Path

from rcgrpo_jax.data.example import EditExample
from rcgrpo_jax.evaluation.benchmarks.base import Benchmark, Published, PublishedTable
from rcgrpo_jax.evaluation.official import SIDE


def image_path(example: EditExample) -> str:
    """The `image_path` of an example. `rcgrpo data prepare` puts its task before it, since two tasks may have one."""
    found = example.id or example.name
    prefix = f"{example.task}-", f"{example.task}/"
    return found[len(prefix[0]) :] if found.startswith(prefix) else found


def picture(folder: Path, task: str, name: str) -> Path:
    """Where the official script looks for an edit: `{results}/{model}/{model}_local/{task}/{image_path}`.

    Args:
        folder: `{results}/{model}`.
        task: Of the example.
        name: Its `image_path`.
    """
    return folder / f"{folder.name}_local" / task / name


def _row(editor: str, *values: float) -> Published:
    names = ("official_lc_i", "official_lc_t", "official_psnr", "official_ssim", "official_lpips")
    return Published(editor, dict(zip(names, values, strict=True)))


PAPER = "arXiv 2604.09386"
TABLES = {
    "table-1": PublishedTable(
        f"{PAPER}, Table 1",
        (
            _row("InstructPix2Pix", 0.777, 19.445, 21.416, 0.695, 0.173),
            _row("GoT", 0.807, 20.268, 24.675, 0.890, 0.067),
            _row("Step1X-Edit", 0.817, 20.501, 23.371, 0.882, 0.078),
            _row("FLUX.1-Kontext-dev", 0.818, 21.027, 24.585, 0.890, 0.071),
            _row("RC-GRPO-Editing", 0.822, 21.548, 24.952, 0.897, 0.068),
        ),
    ),
    "table-2": PublishedTable(
        f"{PAPER}, Table 2",
        (
            _row("base", 0.818, 21.027, 24.585, 0.890, 0.071),
            _row("GRPO (global perturb.)", 0.820, 21.529, 24.384, 0.884, 0.074),
            _row("GRPO + RDP", 0.821, 21.540, 24.788, 0.893, 0.070),
            _row("RDP + ACD", 0.822, 21.548, 24.952, 0.897, 0.068),
        ),
    ),
    "table-3": PublishedTable(
        f"{PAPER}, Table 3",
        (
            _row("tau 1.0, 1.0", 0.821, 21.533, 24.906, 0.896, 0.069),
            _row("tau 0.9, 1.1", 0.822, 21.548, 24.952, 0.897, 0.068),
            _row("tau 0.8, 1.2", 0.819, 21.640, 24.726, 0.883, 0.072),
            _row("tau 1.2, 0.8", 0.821, 21.499, 24.996, 0.902, 0.068),
        ),
    ),
}
COMPBENCH = Benchmark(
    name="compbench",
    title="CompBench, local edits",
    tasks={"add": 982, "remove": 1331, "replace": 152},
    side=SIDE,
    measures=("official", "region"),
    identify=image_path,
    picture=picture,
    layout="MODEL/MODEL_local/TASK/IMAGE_PATH",
    published=TABLES["table-1"],
    tables=TABLES,
    remarks=(
        "What is measured here is the unweighted mean of the tasks, as in CompBench's own tables. Whether the "
        "published rows are such means or means over all edits is not known, nor are their seeds and solver steps.",
    ),
)
