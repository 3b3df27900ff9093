"""Pictures of what the policy tries: rows of labelled images, each with its source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image, ImageDraw, ImageFont

from rcgrpo_jax.data.images import DISPLAY_SIDES, for_display, outline
from rcgrpo_jax.encoding.batches import EditBatch
from rcgrpo_jax.parallel.distributed import local_row_range

_GAP, _MARGIN = 8, 16  # pixels between cells, between rows
_TEXT_SIZE, _LINE = 15, 20
_LOST = (255, 0, 255)  # colour in the place of a picture that is not finite
_PAPER, _INK, _FAINT = (255, 255, 255), (24, 24, 24), (104, 104, 104)


class PictureRow(NamedTuple):
    """Images side by side under a line of text."""

    text: str
    pictures: Sequence[tuple[str, UInt8[np.ndarray, "_ _ 3"]]]  # label and image, from left to right


@dataclass(frozen=True)
class GridRow:
    """One prompt of the grid.

    Attributes:
        instruction: The edit that was asked for.
        source: Image to edit, uint8.
        mask: Edit region in [0, 1]; what is above 0 is outlined.
        candidates: Edited images, uint8.
        labels: What stands above each of them.
    """

    instruction: str
    source: UInt8[np.ndarray, "h w 3"]
    mask: Float[np.ndarray, "h w"]
    candidates: UInt8[np.ndarray, "G h w 3"]
    labels: Sequence[str]

    def shown(self) -> PictureRow:
        """The source with its region outlined in red, then the candidates."""
        pictures = [shown_source(self.source, self.mask), *self.candidates]
        return PictureRow(self.instruction, [*zip(["source", *self.labels], pictures, strict=True)])


def shown_source(source: UInt8[np.ndarray, "h w 3"], mask: Float[np.ndarray, "h w"]) -> UInt8[np.ndarray, "_ _ 3"]:
    """A source in the size in which it is shown, with its region outlined."""
    return outline(for_display(source), mask)


def candidate_pixels(images: Float[np.ndarray, "*b H W 3"]) -> UInt8[np.ndarray, "*b H W 3"]:
    """Images in [0, 1], clamped, as 8-bit pictures; one that is not finite is `_LOST`."""
    images = np.asarray(images, np.float32)
    finite = np.isfinite(images).all(axis=(-3, -2, -1), keepdims=True)
    return np.where(finite, np.round(np.nan_to_num(images).clip(0, 1) * 255), _LOST).astype(np.uint8)


def grid_rows(batch: EditBatch, images: Array, scores: dict[str, np.ndarray]) -> list[GridRow]:
    """Up to four of this process' prompts with up to six candidates each, labelled with their raw rewards."""
    pixels = candidate_pixels(images[:4, :6])
    first = local_row_range(len(next(iter(scores.values())))).start

    def label(p: int, i: int) -> str:
        return "  ".join(f"{name} {score[first + p, i]:.3f}" for name, score in scores.items())

    return [
        GridRow(batch.instructions[p], batch.pixels[p], batch.mask[p], group, [label(p, i) for i in range(len(group))])
        for p, group in enumerate(pixels)
    ]


def gallery_rows(batch: EditBatch, images: Array, scores: Mapping[str, np.ndarray]) -> list[PictureRow]:
    """The best and the worst candidate by each reward, each beside its source, among this process' own prompts.

    Args:
        batch: This process' prompts.
        images: Their candidates `[p, G, H, W, 3]` in [0, 1].
        scores: What a row is about -> scores of all processes' candidates, `[P, G]`; NaN for one without. A row needs
            two candidates with scores.
    """
    own = local_row_range(len(next(iter(scores.values()))))
    found = {name: np.asarray(score)[own.start : own.stop] for name, score in scores.items()}
    found = {name: score for name, score in found.items() if np.isfinite(score).sum() > 1}
    if not found:
        return []
    ends = np.array([[np.nanargmax(score), np.nanargmin(score)] for score in found.values()])
    prompts, candidates = np.unravel_index(ends, images.shape[:2])  # [rewards, 2]
    pixels = candidate_pixels(images[jnp.asarray(prompts), jnp.asarray(candidates)])
    rows = []
    for r, (name, score) in enumerate(found.items()):
        pictures, texts = [], []
        for end, p, i, edit in zip(("best", "worst"), prompts[r], candidates[r], pixels[r], strict=True):
            pictures.append(("source", shown_source(batch.pixels[p], batch.mask[p])))
            pictures.append((f"{end}  {name} {score[p, i]:.3f}", edit))
            texts.append(f"{end}: {batch.instructions[p]}")
        rows.append(PictureRow(f"{name}, {'  '.join(texts)}", pictures))
    return rows


def comparison_grid(rows: Sequence[GridRow], title: str = "") -> UInt8[np.ndarray, "H W 3"]:
    """`draw_rows` of prompts."""
    return draw_rows([row.shown() for row in rows], title)


def draw_rows(rows: Sequence[PictureRow], title: str = "") -> UInt8[np.ndarray, "H W 3"]:
    """Draws rows of labelled images, each under its text.

    Images are enlarged by whole factors (nearest) until their longer side is at least 160 pixels, and reduced to at
    most 320.

    Args:
        rows: Their images may differ in size and number.
        title: Line above the grid; none if empty.

    Returns:
        uint8 RGB image; columns line up and the longest row sets the width.
    """
    font = ImageFont.load_default(_TEXT_SIZE)
    cells = [[(text, Image.fromarray(for_display(x))) for text, x in row.pictures] for row in rows]
    # An upright image may be narrower than its label.
    column = _GAP + max(
        DISPLAY_SIDES[0], *(max(image.width, int(font.getlength(text))) for row in cells for text, image in row)
    )
    width = 2 * _MARGIN - _GAP + column * max((len(row) for row in cells), default=1)
    heading, *texts = (_wrap(text, font, width - 2 * _MARGIN) for text in [title, *(row.text for row in rows)])
    heights = [
        _LINE * (len(lines) + 1) + max(image.height for _, image in row) + _MARGIN
        for lines, row in zip(texts, cells, strict=True)
    ]
    top = _MARGIN + (_LINE * len(heading) + _GAP if heading else 0)
    canvas = Image.new("RGB", (width, top + sum(heights)), _PAPER)
    draw = ImageDraw.Draw(canvas)

    def write(lines: Sequence[str], x: int, y: int, colour: tuple[int, int, int]) -> int:
        for line in lines:
            draw.text((x, y), line, fill=colour, font=font)
            y += _LINE
        return y

    write(heading, _MARGIN, _MARGIN, _FAINT)
    for row, lines, height in zip(cells, texts, heights, strict=True):
        y = write(lines, _MARGIN, top, _INK)
        for i, (label, image) in enumerate(row):
            x = _MARGIN + i * column
            canvas.paste(image, (x, write([label], x, y, _FAINT)))
        top += height
    return np.asarray(canvas)


def _wrap(text: str, font: ImageFont.ImageFont, width: int) -> list[str]:
    """Lines no wider than `width` pixels, broken at spaces, and within a word only where it is wider than a line."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        lines.append("")
        for letter in word:
            if font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines
