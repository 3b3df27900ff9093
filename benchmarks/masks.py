"""`python -m benchmarks.masks`: how near found masks come to exact ones, by way of finding them.

The exact ones are those of scenes (`validation`, and `photo`: shapes on photographs), and with `--cutouts FOLDER` the
alpha channels of its pictures, pasted on photographs, one each: to be removed, with the photograph as the target.

- *IoU*: intersection over union of pixels at the default threshold.
- *soft IoU*: sum min(a, b) / sum max(a, b) of the scores themselves, as `--soft` keeps them.
- *token IoU*: of the regions on a grid of 16 x 16 pixels, any touched token inside: what training sees.
- *covered*: the share of the exact mask that the found one has.
- *missed*: examples whose found mask has nothing of the exact one.

A second table has the share of sources in which `difference` finds an edit if they are saved once more, as JPEG files.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from rcgrpo_jax.data.example import EditExample, Source
from rcgrpo_jax.data.images import as_rgb, open_image
from rcgrpo_jax.data.scenes.backgrounds import photograph
from rcgrpo_jax.data.scenes.photographs import find_photographs
from rcgrpo_jax.data.scenes.source import Scenes
from rcgrpo_jax.errors import UserError
from rcgrpo_jax.evaluation.statistics import mean_interval, share_interval
from rcgrpo_jax.evaluation.tables import Table, markdown
from rcgrpo_jax.masking.method import HALF, Finish, Method, MethodOptions, finish_mask
from rcgrpo_jax.masking.methods import METHODS

TOKEN = 16  # pixels of a token's side
COLUMNS = ("IoU", "soft IoU", "token IoU", "covered")
SIDE = 256  # pixels of a photograph with a cut-out
QUALITIES, ALARMING = (90, 75), (90, 75, 50)  # of JPEG files

Mask = Float[np.ndarray, "H W"]


def overlap(a: Mask, b: Mask) -> float:
    """Soft intersection over union, `sum min(a, b) / sum max(a, b)`: that of sets for masks of 0 and 1."""
    return float(np.minimum(a, b).sum() / max(np.maximum(a, b).sum(), 1e-9))


def tokens(mask: Mask) -> Mask:
    """The largest value in each square of `TOKEN` pixels; what is left at the borders is a token too."""
    rows, columns = (-(-side // TOKEN) for side in mask.shape)
    padded = np.pad(mask, [(0, n * TOKEN - side) for n, side in zip((rows, columns), mask.shape, strict=True)])
    return padded.reshape(rows, TOKEN, columns, TOKEN).max(axis=(1, 3))


def compare(scores: Mask, exact: Mask) -> list[float]:
    """The `COLUMNS` of one example."""
    found, wanted = finish_mask(scores, Finish()), (exact >= HALF).astype(np.float32)
    covered = float((found * wanted).sum() / wanted.sum())
    return [overlap(found, wanted), overlap(scores, exact), overlap(tokens(found), tokens(wanted)), covered]


class CutOuts:
    """Pictures with an alpha channel, one on each of so many photographs; the exact mask is its alpha.

    Args:
        folder: PNG or WebP files; those that are opaque or all but empty are passed over.
        count: Examples, the files in a random order.
        seed: Of photographs, places and sizes.
    """

    def __init__(self, folder: Path, count: int, seed: int = 0):
        files = sorted(file for file in folder.iterdir() if file.suffix.lower() in (".png", ".webp"))
        self._files = [files[i] for i in np.random.default_rng(seed).permutation(len(files))]
        self._files = [file for file in self._files[: 2 * count] if 0.01 < _alpha(file).mean() < 0.99][:count]
        self._seed, self._photographs = seed, sorted(find_photographs())
        if not self._files:
            raise UserError(f"--cutouts: {folder}: no pictures with an alpha channel found.", "Name their folder.")

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> EditExample:
        rng = np.random.default_rng([self._seed, index])
        behind = photograph(self._photographs[rng.integers(len(self._photographs))], rng, SIDE)
        side = round(SIDE * rng.uniform(0.25, 0.6))
        with Image.open(self._files[index]) as file:
            cut = np.asarray(file.convert("RGBA").resize((side, side), Image.Resampling.LANCZOS), np.float64)
        top, left = rng.integers(0, SIDE - side, 2)
        window = np.s_[top : top + side, left : left + side]
        mask, source = np.zeros((SIDE, SIDE), np.float32), behind.copy()
        mask[window] = cut[..., 3] / 255
        source[window] += (cut[..., :3] - source[window]) * mask[window][..., None]
        source, target = (np.rint(picture).clip(0, 255).astype(np.uint8) for picture in (source, behind))
        return EditExample(f"{index:05d}-{self._files[index].stem}", source, mask, "Remove it.", target=target)


def _alpha(file: Path) -> Float[np.ndarray, "h w"]:
    with Image.open(file) as picture:
        return np.asarray(picture.convert("RGBA").getchannel("A"), np.float32) / 255


def as_jpeg(example: EditExample, quality: int) -> EditExample:
    """The example with its source and target through a JPEG file each."""

    def through(picture: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "H W 3"]:
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "JPEG", quality=quality)
        return as_rgb(open_image(file, "JPEG"), "JPEG")

    return replace(example, image=through(example.image), target=through(example.target))


def measure(
    source: Source, method: Method, change: Callable[[EditExample], EditExample] = lambda example: example
) -> Float[np.ndarray, "N 4"]:
    """The `COLUMNS` of all examples."""
    examples = (source[index] for index in range(len(source)))
    return np.array([compare(method.scores(change(example)), example.mask) for example in examples])


def false_alarms(source: Source, method: Method, quality: int) -> Float[np.ndarray, " N"]:
    """1 for each example whose source and the same source as a JPEG file have a difference, else 0."""
    pairs = ((x, as_jpeg(replace(x, target=x.image), quality)) for x in (source[i] for i in range(len(source))))
    return np.array([finish_mask(method.scores(replace(x, target=y.target)), Finish()).any() for x, y in pairs], float)


def rows(arguments: argparse.Namespace) -> Iterator[tuple[str, str, Float[np.ndarray, "N 4"]]]:
    """Examples, method and what was measured, one row after the other."""
    sources: dict[str, Source] = {f"scenes:{x}": Scenes(x, arguments.count) for x in ("validation", "photo")}
    if arguments.cutouts:
        sources["cut-outs"] = CutOuts(arguments.cutouts, arguments.count)
    options = MethodOptions(
        segmenter=arguments.segmenter or "", model=arguments.model or "", size=(128, 128), dtype="float32"
    )
    difference = METHODS["difference"](options)
    for name, source in sources.items():
        yield name, "difference", measure(source, difference)
        for quality in QUALITIES:
            yield name, f"difference, JPEG {quality}", measure(source, difference, lambda x, q=quality: as_jpeg(x, q))
        if arguments.segmenter:
            yield name, "segment", measure(source, METHODS["segment"](options))
        if arguments.model and name != "cut-outs":
            yield name, "editor", measure(source, METHODS["editor"](options))
        yield name, "whole picture", measure(source, Method(lambda x: np.ones(x.mask.shape, np.float32), {}))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.masks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=200, help="examples of each kind")
    parser.add_argument("--model", help="editor, such as small-editor")
    parser.add_argument("--segmenter", help="ONNX file")
    parser.add_argument("--cutouts", type=Path, help="folder of pictures with an alpha channel")
    arguments = parser.parse_args(argv)
    lines = [["examples", "method", *COLUMNS, "missed"]]
    try:
        for name, method, found in rows(arguments):
            intervals = (mean_interval(found[None, :, i]) for i in range(len(COLUMNS)))
            cells = [f"{mean:.3f} [{low:.3f}, {high:.3f}]" for mean, low, high in intervals]
            lines.append([name, method, *cells, str(int((found[:, 0] == 0).sum()))])
            print(*lines[-1], sep=" | ", flush=True)
    except UserError as error:
        parser.error(str(error))
    alarms = [["examples", *(f"JPEG {quality}" for quality in ALARMING)]]
    for split in ("validation", "photo"):
        scenes, method = Scenes(split, arguments.count), METHODS["difference"](MethodOptions())
        shares = (share_interval(false_alarms(scenes, method, quality)) for quality in ALARMING)
        alarms.append([f"scenes:{split}", *(f"{mean:.3f} [{low:.3f}, {high:.3f}]" for mean, low, high in shares)])
    tables = [Table(f"Mean of {arguments.count} examples [95 % interval]", lines), Table("Edits that are none", alarms)]
    print(markdown(tables))


if __name__ == "__main__":
    main()
