"""One image to edit, where, and how."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Float, UInt8

from rcgrpo_jax.errors import UserError

MAX_CHARACTERS = 100_000  # of an instruction: FLUX's text encoders read about 2,000
MIN_SIDE = 16  # pixels of one image token: 8 of the VAE x 2 of packing


@dataclass(frozen=True, eq=False)
class EditExample:
    """One edit as every source yields it."""

    name: str  # names the example in messages and output files
    image: UInt8[np.ndarray, "H W 3"]  # the source
    mask: Float[np.ndarray, "H W"]  # float32 in [0, 1], 1 where the edit belongs
    instruction: str  # any Unicode text, passed on as it is
    caption: str | None = None  # describes the edited image
    target: UInt8[np.ndarray, "H W 3"] | None = None  # the right result, where one is known
    flawed: bool = False  # whether the target is wrong on purpose, as a share of `data.scenes` may be
    task: str = ""  # the kind of edit, such as add or remove, where a data set tells them apart
    id: str = ""  # what a data set calls it, where `name` had to change

    @property
    def has_target(self) -> bool:
        return self.target is not None

    @property
    def has_caption(self) -> bool:
        return bool(self.caption and self.caption.strip())


def check_example(example: EditExample) -> EditExample:
    """Returns the example as it came, if an editor can be run and scored on it.

    Raises:
        UserError: The image is smaller than a token (16 x 16 pixels), the mask or target is of another size, the mask
            is empty, not finite or outside [0, 1], or a text is blank, endless or not Unicode.
    """
    name, mask = example.name, example.mask
    height, width = example.image.shape[:2]
    if min(height, width) < MIN_SIDE:
        raise UserError(
            f"{name}: the image is {width} x {height} pixels; at least {MIN_SIDE} x {MIN_SIDE} were wanted.",
            "Use a larger image.",
        )
    for field, array in (("mask", mask), ("target", example.target)):
        if array is not None and array.shape[:2] != (height, width):
            raise UserError(
                f"{name}: the {field} is {array.shape[1]} x {array.shape[0]} pixels; the image's {width} x {height} "
                "were wanted.",
                f"Make the {field} for this image at the image's size, and check that neither was rotated or cropped.",
            )
    if not np.isfinite(mask).all() or mask.min() < 0 or mask.max() > 1:
        raise UserError(
            f"{name}: mask values from {mask.min()} to {mask.max()} found; finite ones in [0, 1] were wanted.",
            "Divide 8-bit masks by 255, and look for NaN.",
        )
    if mask.any() and (0 < np.ptp(mask) < 1.5 / 255 or mask.max() < 1.5 / 255):
        raise UserError(
            f"{name}: the mask's levels are {mask.min() * 255:.0f} to {mask.max() * 255:.0f} of 255, so nothing is "
            "marked; black and white were wanted.",
            "If the file's values are 0 and 1, multiply them by 255.",
        )
    if not mask.any():
        raise UserError(
            f"{name}: the mask is empty; at least one pixel of edit region was wanted.",
            "Draw the region, or set the mask polarity to the colour that marks it.",
        )
    if not example.instruction.strip():
        raise UserError(f"{name}: the instruction is blank; a sentence was wanted.", "Say what to change.")
    if (count := len(example.instruction)) > MAX_CHARACTERS:
        raise UserError(
            f"{name}: the instruction has {count:,} characters; at most {MAX_CHARACTERS:,} were wanted.",
            "Write what to change in a sentence.",
        )
    for field, text in (("instruction", example.instruction), ("caption", example.caption or "")):
        if re.search(r"[\ud800-\udfff]", text):  # half of a surrogate pair
            raise UserError(
                f"{name}: the {field} {text!a} is not whole Unicode text, which was wanted.",
                "It was cut within a character: write it again.",
            )
    return example


class Needs(NamedTuple):
    """What examples must have beside an image and an instruction.

    Each text names who needs it, for the message to those whose examples lack it; empty: nobody does.
    """

    mask: str = ""
    target: str = ""  # also one that is flawed on purpose
    right_target: str = ""  # one that is not
    caption: str = ""
    each_alone: bool = False  # masks are not looked at, and a missing file costs its own example when that is read


NOTHING = Needs()
UNMASKED = Needs(each_alone=True)
REGION = Needs(mask="an edit by region")


class ExampleDescription(Protocol):
    """What can be known of an example without its pictures."""

    @property
    def name(self) -> str: ...
    @property
    def has_target(self) -> bool: ...
    @property
    def flawed(self) -> bool: ...
    @property
    def has_caption(self) -> bool: ...


def check_needs(example: ExampleDescription, needs: Needs) -> None:
    """Refuses an example without the target or caption that is needed; sources themselves refuse those without a mask.

    Raises:
        UserError: With the example, what it lacks, and who needs it.
    """
    if not example.has_target and (who := needs.target or needs.right_target):
        raise UserError(
            f"{example.name}: no target image; {who} needs one.",
            "Add targets, or choose examples that have them, such as scenes:train.",
        )
    if example.flawed and needs.right_target:
        raise UserError(
            f"{example.name}: its target is flawed on purpose; {needs.right_target} needs a right one.",
            "Leave such examples out; of scenes, the share of flaws.",
        )
    if not example.has_caption and needs.caption:
        raise UserError(
            f"{example.name}: no caption; {needs.caption} needs one.",
            'Add a "caption" that describes the edited image, or choose what needs none.',
        )


class Source(Protocol):
    """Random access to examples, which several threads may ask for; `data.folder.EditFolder` is one.

    A source whose examples are files has `stamp(index) -> str` too: a text that changes when one of an example's files
    does, and is had without reading them.
    """

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> EditExample: ...


class First:
    """The first examples of a source, at most `count`."""

    def __init__(self, source: Source, count: int):
        self._source, self._count = source, min(count, len(source))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> EditExample:
        return self._source[range(self._count)[index]]

    def stamp(self, index: int) -> str | None:
        """As `stamp_of` the source."""
        return stamp_of(self._source, index)


def stamp_of(source: Source, index: int) -> str | None:
    """The stamp of an example; None where a source has none, or its files cannot be looked at."""
    stamp = getattr(source, "stamp", None)
    try:
        return stamp(index) if stamp else None
    except OSError:
        return None
