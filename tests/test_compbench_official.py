"""The command agrees with CompBench's own script, written anew in torch: every measure of every edit, and the means."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
from compbench_data import TASKS, result_file
from official_compbench import MEASURES, OfficialScript, squeezenet, trunk_weights
from PIL import Image
from safetensors.numpy import save_file
from tiny_clip import write_clip

from rcgrpo_jax.cli import benchmark as benchmark_command
from rcgrpo_jax.cli import evaluate as command
from rcgrpo_jax.data.example import EditExample
from rcgrpo_jax.data.images import read_image
from rcgrpo_jax.data.masks import read_mask

WIDTH, HEIGHT = 96, 64  # of the pictures; all are measured at 512 x 512
TOLERANCE = 1e-3
COUNT = 4  # add, remove, replace, add


def write_pictures(folder: Path) -> list[dict[str, Path]]:
    """The files of each example in CompBench's layout, with soft masks, one of them of a single row."""
    written = []
    for index in range(COUNT):
        rng = np.random.default_rng(index)
        image, other = (
            np.asarray(Image.fromarray(rng.integers(0, 256, (6, 9, 3), np.uint8)).resize((WIDTH, HEIGHT)))
            for _ in range(2)
        )
        mask = np.zeros((HEIGHT, WIDTH), np.uint8)
        mask[10 + index : 40, 20:70] = 255
        mask[8 : 10 + index, 20:60] = 90  # a grey rim, which the script does not binarise
        if index == 3:
            mask[:] = 0
            mask[-1, 20:70] = 255
        target = np.where(mask[..., None] > 0, other, image)
        pictures = {"input_image": image, "edited_image": target, "mask": mask}
        path = f"{index:02x}/{index}/{index:05d}.png"
        files = {name: folder / "tasks" / TASKS[index % 3] / name / path for name in pictures}
        for name, file in files.items():
            file.parent.mkdir(parents=True)
            Image.fromarray(pictures[name]).save(file)
        written.append(files)
    return written


class Written:
    """The examples of those files, as a data set has them."""

    def __init__(self, files: list[dict[str, Path]]):
        self._files = files

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> EditExample:
        files = self._files[index]
        image, target = (read_image(files[name]) for name in ("input_image", "edited_image"))
        name = str(files["mask"].relative_to(files["mask"].parents[2]))
        mask, caption = read_mask(files["mask"]), "" if index == 1 else f"a red thing {index}"
        return EditExample(name, image, mask, "Edit.", caption=caption, target=target, task=TASKS[index % 3])


def test_every_measure_is_that_of_the_official_script_and_so_are_the_means(tmp_path, monkeypatch):
    files, results = write_pictures(tmp_path), tmp_path / "gpt"
    source = Written(files)
    monkeypatch.setattr(benchmark_command, "open_source", lambda *_, **__: source)
    for index in range(COUNT):
        rng, example = np.random.default_rng(100 + index), source[index]
        picture = np.clip(example.target + rng.normal(0, 12, example.target.shape), 0, 255).astype(np.uint8)
        file = result_file(results, example)
        file.parent.mkdir(parents=True)
        side = (200, 120) if index == 2 else (WIDTH, HEIGHT)  # an editor with a size of its own
        Image.fromarray(picture).resize(side).save(file)

    trunk, clip = squeezenet(), write_clip(tmp_path / "clip")
    script = OfficialScript(clip, trunk)
    heads = {key: x for key, x in script.lpips.state_dict().items() if re.match(r"lin\d", key)}
    weights = {key: x.numpy() for key, x in (trunk_weights(trunk) | heads).items()}
    save_file(weights, tmp_path / "squeeze.safetensors")
    command.run([
        "--benchmark=compbench", "--data=written", f"--results={results}", f"--out={tmp_path / 'out'}",
        f"--clip={clip}", f"--lpips_squeeze={tmp_path / 'squeeze.safetensors'}", "--measures=official", "--batch=3",
    ])  # fmt: skip

    rows = {row["id"]: row for row in map(json.loads, (tmp_path / "out" / "gpt.jsonl").read_text().splitlines())}
    wanted: dict[str, dict[str, list[float]]] = {name: {task: [] for task in TASKS} for name in MEASURES}
    for index in range(COUNT):
        example, file = source[index], files[index]
        theirs = script.measure(
            file["input_image"], result_file(results, example), file["mask"], file["edited_image"], example.caption
        )
        for name, value in theirs.items():
            assert rows[example.name][f"official_{name}"] == pytest.approx(value, abs=TOLERANCE), (name, index)
            wanted[name][example.task].append(value)
    with (tmp_path / "out" / "table.csv").open() as table:
        lines = [line for line in csv.DictReader(table) if (line["editor"], line["task"]) == ("gpt", "mean")]
    assert len(lines) == len(MEASURES)
    for line in lines:
        tasks = wanted[line["measure"].removeprefix("official_")]
        mean = np.mean([np.mean(values) for values in tasks.values()])
        assert float(line["mean"]) == pytest.approx(mean, abs=TOLERANCE)
