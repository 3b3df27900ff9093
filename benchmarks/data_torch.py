"""What a plain torch `DataLoader` makes of the same files: the peer of `benchmarks.data`, in a process of its own.

It imports nothing of JAX, so that its workers may be forked. A line of JSON on standard input is a `Job`, which is
answered by a line with its seconds and the sum of all pixels that it has made.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset


class Picture(NamedTuple):
    """What becomes of one example."""

    box: tuple[int, int, int, int]  # left, top, right and lower edge of what is kept
    size: tuple[int, int]  # (width, height) that it is resized to
    files: tuple[str, str, str] = ("", "", "")  # source, mask and target of a folder


class Job(NamedTuple):
    """What is to be timed."""

    kind: str  # folder, records, scenes, entries
    path: str  # of records, the name of scenes, or the folder of entries
    pictures: list[Picture]
    batches: list[list[int]]  # examples of each, of one size
    names: list[str]  # of the files of entries
    workers: int


class Pictures(Dataset):
    """Sources, masks and targets, cropped and resized."""

    def __init__(self, job: Job):
        self.job = job
        if job.kind == "records":
            import tensorflow_datasets as tfds

            self.records = tfds.builder_from_directory(job.path).as_data_source("train")
        elif job.kind == "scenes":
            from rcgrpo_jax.data.scenes.source import parse_scenes

            self.records = parse_scenes(job.path)

    def __len__(self) -> int:
        return len(self.job.pictures)

    def __getitem__(self, index: int) -> tuple[np.ndarray, ...]:
        picture = self.job.pictures[index]

        def fitted(image: Image.Image, filter: Image.Resampling) -> np.ndarray:
            return np.array(image.crop(picture.box).resize(picture.size, filter))

        source, mask, target = self.load(index)
        source, target = (fitted(x, Image.Resampling.LANCZOS) for x in (source, target))
        return source, fitted(mask, Image.Resampling.NEAREST), target

    def load(self, index: int) -> tuple[Image.Image, ...]:
        if self.job.kind == "folder":
            files = self.job.pictures[index].files
            return tuple(Image.open(file).convert(mode) for file, mode in zip(files, ("RGB", "L", "RGB"), strict=True))
        record = self.records[index]
        if self.job.kind == "records":
            return tuple(Image.fromarray(x) for x in (record["image"], record["mask"][..., 0], record["target"]))
        mask = np.rint(255 * record.mask).astype(np.uint8)
        return tuple(Image.fromarray(x) for x in (record.image, mask, record.target))


class Entries(Dataset):
    """The entries of the cache."""

    def __init__(self, job: Job):
        self.files = [str(Path(job.path) / name) for name in job.names]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file

        row = load_file(self.files[index])
        return row | {"mask": row["mask"].float() / 255}


def measure(job: Job) -> tuple[float, int]:
    """Seconds of an epoch, with the start of the workers, and the sum of all pixels of sources and targets."""
    start, total = time.perf_counter(), 0
    entries = job.kind == "entries"
    data = Entries(job) if entries else Pictures(job)
    loader = DataLoader(data, batch_sampler=job.batches, num_workers=job.workers)
    for batch in loader:
        for x in (batch["pixels"], batch["target"]) if entries else (batch[0], batch[2]):
            total += int(x.sum(dtype=torch.int64))
    return time.perf_counter() - start, total


def main() -> None:
    torch.set_num_threads(1)  # workers are its parallelism
    for line in sys.stdin:
        given = json.loads(line)
        job = Job(*given[:2], [Picture(*map(tuple, picture)) for picture in given[2]], *given[3:])
        print(json.dumps(measure(job)), flush=True)


if __name__ == "__main__":
    main()
