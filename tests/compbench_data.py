"""Nine examples of a benchmark, and editors' results in CompBench's layout."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from rcgrpo_jax.data.example import EditExample

SIDE = 40  # of the pictures
IDS = [f"{i % 2:x}f/{i // 2}/0000{i}.png" for i in range(3)]
TASKS = ("add", "remove", "replace")


class Examples:
    """Each task has the same three ids, as CompBench may.

    Args:
        repeats: Times that every example comes, under other ids.
        **changes: To every example.
    """

    def __init__(self, repeats: int = 1, **changes):
        self._repeats, self._changes = repeats, changes

    def __len__(self) -> int:
        return 9 * self._repeats

    def __getitem__(self, index: int) -> EditExample:
        if index >= len(self):
            raise IndexError(index)
        rng = np.random.default_rng(index)
        image = np.asarray(Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8)).resize((SIDE, SIDE)))
        mask = np.zeros((SIDE, SIDE), np.float32)
        mask[8:30, 10:24] = 1
        target = np.where(mask[..., None] > 0, 255 - image, image)
        again = f"{index // 9}" if index >= 9 else ""
        task = TASKS[index // 3 % 3]
        name = f"{task}-{again}{IDS[index % 3]}"  # as `rcgrpo data prepare` has them
        example = EditExample(name, image, mask, f"Edit {index}.", caption="a fish", target=target, task=task)
        return replace(example, **self._changes)


def result_file(folder: Path, example: EditExample) -> Path:
    return folder / f"{folder.name}_local" / example.task / example.name.removeprefix(f"{example.task}-")


def write_results(folder: Path, noise: int = 0, source: Examples | None = None) -> Path:
    """The targets with noise of so many grey levels, as an editor would leave them in its folder."""
    source, rng = source or Examples(), np.random.default_rng(noise)
    for index in range(len(source)):
        example = source[index]
        picture = np.clip(example.target + rng.normal(0, noise, example.target.shape), 0, 255).astype(np.uint8)
        file = result_file(folder, example)
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(file)
    return folder
