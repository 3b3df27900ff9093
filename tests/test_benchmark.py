"""A benchmark from any editor's pictures to tables: what is there is measured, what is not is counted and named."""

import csv
import json
import re
import weakref
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import small_run
from PIL import Image

from rcgrpo_jax.cli import benchmark as benchmark_command
from rcgrpo_jax.cli import evaluate as command
from rcgrpo_jax.data.example import EditExample
from rcgrpo_jax.editors.flux_kontext import FluxKontextEditor
from rcgrpo_jax.errors import UsageError, UserError
from rcgrpo_jax.evaluation import edit
from rcgrpo_jax.evaluation.benchmarks import BENCHMARKS
from rcgrpo_jax.evaluation.benchmarks.results import list_entries, measure_results, open_results
from rcgrpo_jax.evaluation.benchmarks.rows import MISSING
from rcgrpo_jax.evaluation.measures import choose

COMPBENCH = BENCHMARKS["compbench"]
SIDE, SIZE = 40, (32, 32)  # of the examples' pictures, and what they are measured in here
IDS = [f"{i % 2:x}f/{i // 2}/0000{i}.png" for i in range(3)]
TASKS = ("add", "remove", "replace")


class Examples:
    """Nine examples in CompBench's naming: each task has the same three ids."""

    def __init__(self):
        self.alive: weakref.WeakSet = weakref.WeakSet()
        self.most = 0

    def __len__(self) -> int:
        return 9

    def __getitem__(self, index: int) -> EditExample:
        rng = np.random.default_rng(index)
        image = np.asarray(Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8)).resize((SIDE, SIDE)))
        mask = np.zeros((SIDE, SIDE), np.float32)
        mask[8:30, 10:24] = 1
        target = np.where(mask[..., None] > 0, 255 - image, image)
        example = EditExample(
            IDS[index % 3], image, mask, f"Edit {index}.", caption="a fish", target=target, task=TASKS[index // 3]
        )
        self.alive.add(example)
        self.most = max(self.most, len(self.alive))
        return example


@pytest.fixture(autouse=True)
def small(monkeypatch) -> Examples:
    """Measures in a small size, and opens the nine examples whatever the --data."""
    source, small = Examples(), COMPBENCH._replace(size=SIZE, measures=("psnr", "ssim"))
    monkeypatch.setitem(BENCHMARKS, "compbench", small)
    monkeypatch.setattr(benchmark_command, "open_source", lambda *_, **__: source)
    return source


def write_results(root: Path, model: str, noise: float = 0, side: int = SIDE) -> Path:
    """An editor's results in CompBench's layout: the targets, with noise."""
    source, rng = Examples(), np.random.default_rng(int(noise))
    for index in range(9):
        example = source[index]
        file = root / model / f"{model}_local" / example.task / example.name
        file.parent.mkdir(parents=True, exist_ok=True)
        picture = np.clip(example.target + rng.normal(0, noise, example.target.shape), 0, 255).astype(np.uint8)
        Image.fromarray(picture).resize((side, side)).save(file)
    return root / model


def run(tmp_path: Path, *argv: str) -> Path:
    command.run(["--benchmark=compbench", "--data=nine", f"--out={tmp_path / 'out'}", "--batch=2", *argv])
    return tmp_path / "out"


def rows_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def numbers(out: Path) -> dict[tuple[str, ...], dict]:
    """The lines of table.csv by editor, kind, task and measure."""
    with (out / "table.csv").open() as file:
        return {tuple(line[x] for x in ("editor", "kind", "task", "measure")): line for line in csv.DictReader(file)}


def test_results_of_editors_are_measured_example_by_example(tmp_path):
    out = run(tmp_path, *(f"--results={write_results(tmp_path, name, noise)}" for name, noise in (("a", 3), ("b", 9))))
    rows = rows_of(out / "a.jsonl")
    assert [(row["task"], row["id"]) for row in rows] == [(task, name) for task in TASKS for name in IDS]
    means = numbers(out)
    assert json.loads((out / "failures.json").read_text())["a"]["failed"] == []
