"""`python -m benchmarks.data`: how many examples a second reach a training step, beside a torch `DataLoader`.

Examples are a folder of PNG files, the same as ArrayRecord, and scenes that are drawn. They have pictures of three
shapes, but for scenes, which are squares. Each row is one of these at one size or in buckets.

- *read*: pictures and masks decoded, cropped and resized, as often in a second, by this package and by a `DataLoader`
  with a worker a core, Pillow and the same crops. Both make the same pixels, which is checked.
- *first start*: examples a second from an empty cache to the first batch. They are read twice and encoded by the small
  editor. The share that is encoding is beside it.
- *next start*: examples a second until a start has found all of them encoded and unchanged.
- *from the cache*: examples a second in batches, as a step gets them; the `DataLoader` reads the same files.

A ratio is this package's rate over the `DataLoader`'s of the same turn. All files are in the system's memory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, UInt8

from benchmarks.step import positive
from rcgrpo_jax.data.buckets import KINDS, KONTEXT, Fitted, Size, make_buckets, window
from rcgrpo_jax.data.example import EditExample, Source
from rcgrpo_jax.data.images import resize_image, resize_mask
from rcgrpo_jax.data.scenes.files import write_folder
from rcgrpo_jax.data.scenes.source import Scenes
from rcgrpo_jax.data.sources import open_source
from rcgrpo_jax.data.tfds_writer import write_tfds
from rcgrpo_jax.editors.model import Editor, EditorOptions
from rcgrpo_jax.editors.open import open_model
from rcgrpo_jax.encoding.batches import Batches
from rcgrpo_jax.encoding.cache import EncodedSource
from rcgrpo_jax.encoding.prefetch import read_ahead
from rcgrpo_jax.evaluation.tables import Table, markdown
from rcgrpo_jax.parallel.mesh import make_mesh

SHAPES = ((1, 1), (2, 3), (3, 2))  # height : width of the pictures, in turn
PEERS = (("read", "peer read"), ("from the cache", "peer cache"))
Fit = Callable[[EditExample], Fitted]


class Shaped:
    """Scenes cropped to the shapes of `SHAPES`, as photographs come in several."""

    def __init__(self, count: int, side: int):
        self._scenes = Scenes("train", count, side)

    def __len__(self) -> int:
        return len(self._scenes)

    def __getitem__(self, index: int) -> EditExample:
        example = self._scenes[index]
        kept = window(example.mask, SHAPES[index % len(SHAPES)])
        return replace(example, image=example.image[kept], mask=example.mask[kept], target=example.target[kept])


class Timed:
    """An editor of which the seconds of encoding are counted."""

    def __init__(self, editor: Editor):
        self._editor, self.seconds = editor, 0.0

    @property
    def encoding_key(self) -> tuple[str | int, ...]:
        return self._editor.encoding_key

    def load_encoders(self) -> None:
        self._editor.load_encoders()

    def encode(self, pixels: UInt8[np.ndarray, "P H W 3"], instructions: Sequence[str]) -> dict[str, Array]:
        start = time.perf_counter()
        encoded = jax.block_until_ready(self._editor.encode(pixels, instructions))
        self.seconds += time.perf_counter() - start
        return encoded


class Peer:
    """The process of `benchmarks.data_torch`."""

    def __enter__(self) -> Peer:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.data_torch"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait()

    def ask(self, job: list) -> tuple[float, int]:
        """Seconds and the sum of pixels of a `data_torch.Job`."""
        print(json.dumps(job), file=self._process.stdin, flush=True)
        seconds, total = json.loads(self._process.stdout.readline())
        return seconds, total


def read(source: Source, fit: Fit) -> int:
    """Reads all examples as the cache does, and returns the sum of the pixels of their sources and targets."""

    def one(index: int) -> int:
        example, size, *_ = fit(source[index])
        resize_mask(example.mask, size)
        return sum(int(resize_image(x, size).sum(dtype=np.int64)) for x in (example.image, example.target))

    return sum(read_ahead(one, range(len(source))))


def epoch(source: EncodedSource, prompts: int) -> tuple[float, int]:
    """Seconds, and how many examples come, of the batches of about an epoch, from the first on."""
    batches, steps = Batches(source, prompts, 0, [*source.buckets.values()]), -(-len(source) // prompts)
    start = time.perf_counter()
    for step in range(steps):
        batches[step]
    return time.perf_counter() - start, steps * prompts


def orders(source: EncodedSource, prompts: int) -> list[list[int]]:
    """As many batches of one bucket each, for the peer."""
    found = []
    for indices in source.buckets.values():
        shuffled = np.random.default_rng(0).permutation(indices)
        found += [shuffled[i : i + prompts].tolist() for i in range(0, len(shuffled), prompts)]
    return found


def pictures_of(source: Source, fit: Fit, folder: Path | None = None) -> list[tuple]:
    """What becomes of each example, for the peer: `data_torch.Picture` as plain tuples."""
    table = (folder / "metadata.jsonl").read_text().splitlines() if folder else [None] * len(source)
    found = []
    for index, line in enumerate(table):
        row = json.loads(line) if line else {}
        files = [str(folder / row[field]) if row else "" for field in ("image", "mask", "target")]
        fitted = fit(source[index])
        rows, columns = fitted.window
        found.append(((columns.start, rows.start, columns.stop, rows.stop), fitted.size[::-1], files))
    return found


def measure(
    path: str, kind: str, size: Size, editor: Editor, mesh: Mesh, peer: Peer, prompts: int, repeats: int
) -> dict[str, list[float]]:
    """Examples a second in each repeat: those of the table by name, and `encoding`, a share of the time.

    Raises:
        RuntimeError: The peer made other pixels.
    """
    source, buckets, found = open_source(path), make_buckets(kind, size), {}
    make = partial(EncodedSource, size=size, buckets=kind)
    form = {"tfds": "records", "scenes": "scenes"}.get(path.partition(":")[0], "folder")
    place = path if form == "folder" else path.partition(":")[2]
    pictures = pictures_of(source, buckets.fit, Path(path) if form == "folder" else None)

    def note(name: str, count: int, seconds: float) -> None:
        found.setdefault(name, []).append(count / seconds)

    cores, count = os.cpu_count() or 1, len(source)
    for turn in range(repeats + 1):  # the first of all compiles and fills the system's memory, and is left out
        with tempfile.TemporaryDirectory() as cache, jax.set_mesh(mesh):
            timed, start = Timed(editor), time.perf_counter()
            total = read(source, buckets.fit)
            note("read", count, time.perf_counter() - start)
            start = time.perf_counter()
            encoded = make(open_source(path), timed, folder=cache)
            Batches(encoded, prompts, 0, [*encoded.buckets.values()])[0]
            seconds = time.perf_counter() - start
            note("first start", count, seconds)
            found.setdefault("encoding", []).append(timed.seconds / seconds)
            start = time.perf_counter()
            encoded = make(open_source(path), timed, folder=cache)
            note("next start", count, time.perf_counter() - start)
            seconds, delivered = epoch(encoded, prompts)
            note("from the cache", delivered, seconds)

            batches = orders(encoded, prompts)
            seconds, other = peer.ask([form, place, pictures, batches, [], cores])
            if other != total:
                raise RuntimeError(f"{path}, {kind}: the peer's pixels add up to {other}, ours to {total}")
            note("peer read", count, seconds)
            names = [encoded.file(index).name for index in range(count)]
            seconds, other = peer.ask(["entries", cache, [], batches, names, cores])
            if other != total:
                raise RuntimeError(f"{path}, {kind}: the peer's entries add up to {other}, ours to {total}")
            note("peer cache", count, seconds)
            print(f"{path} {kind}, turn {turn} of {repeats}: {found['first start'][-1]:.3g}/s", file=sys.stderr)
    return {name: rates[1:] for name, rates in found.items()}


def spread(values: Sequence[float]) -> str:
    """The median with the lowest and the highest."""
    return f"{np.median(values):.3g} ({np.min(values):.3g} to {np.max(values):.3g})"


def rows(report: dict[str, dict[str, list[float]]]) -> Iterator[list[str]]:
    """The lines of the table."""
    yield [
        "examples", "sizes", "read, /s", "DataLoader", "ratio", "first start, /s", "of it encoding", "next start, /s",
        "from the cache, /s", "DataLoader", "ratio",
    ]  # fmt: skip
    for name, found in report.items():
        ratios = [np.divide(found[ours], found[peer]) for ours, peer in PEERS]
        yield [
            *name.split(", "),
            spread(found["read"]), f"{np.median(found['peer read']):.3g}", spread(ratios[0]),
            spread(found["first start"]), f"{np.median(found['encoding']):.0%}",
            f"{np.median(found['next start']):.3g}",
            spread(found["from the cache"]), f"{np.median(found['peer cache']):.3g}", spread(ratios[1]),
        ]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=positive, default=96, help="examples of each kind")
    parser.add_argument("--side", type=positive, default=512, help="of the squares that pictures are cut from, pixels")
    parser.add_argument("--size", type=positive, default=128, help="side of data.size, pixels")
    parser.add_argument("--prompts", type=positive, default=4, help="examples of a batch")
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument("--json", type=Path, help="file for all that was measured")
    arguments = parser.parse_args(argv)
    mesh = make_mesh({}, jax.devices()[:1])
    report = {}
    with tempfile.TemporaryDirectory() as folder, Peer() as peer:
        shaped = Shaped(arguments.count, arguments.side)
        write_folder(shaped, Path(folder) / "edits")
        paths = {
            "folder": f"{folder}/edits",
            "records": f"tfds:{write_tfds(open_source(f'{folder}/edits'), 'edits', folder)}",
            "scenes": f"scenes:train:{arguments.count}",
        }
        editor = open_model("small-editor").open(EditorOptions("float32"), mesh)
        for name, path in paths.items():
            for kind in KINDS:
                size = (arguments.size, arguments.size)
                found = measure(path, kind, size, editor, mesh, peer, arguments.prompts, arguments.repeats)
                report[f"{name}, {'buckets' if kind == KONTEXT else 'one'}"] = found
    title = (
        f"{arguments.count} examples of {arguments.side} pixels a side (scenes: 128) to {arguments.size}, "
        f"batches of {arguments.prompts}, {os.cpu_count()} cores; median (lowest to highest) of {arguments.repeats}"
    )
    print(markdown([Table(title, [*rows(report)])]))
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"arguments": vars(arguments), "rates": report}, indent=2, default=str) + "\n"
        )


if __name__ == "__main__":
    main()
