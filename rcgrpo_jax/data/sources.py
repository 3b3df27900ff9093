"""The examples that `data.path` of a configuration names."""

from __future__ import annotations

from pathlib import Path

# Each of these registers its kind.
import rcgrpo_jax.data.folder
import rcgrpo_jax.data.scenes.source
import rcgrpo_jax.data.tfds  # noqa: F401
from rcgrpo_jax.data.example import REGION, Needs, Source
from rcgrpo_jax.data.kinds import kind_of, split_prefix
from rcgrpo_jax.data.masks import Polarity


def open_source(path: str, polarity: Polarity = "white", mask_value: str = "", needs: Needs = REGION) -> Source:
    """Opens a data set of any registered kind.

    Args:
        path: The value of `data.path`, such as `edits`, `tfds:edits@train[:90%]` or `scenes:train:600`.
        polarity: The colour of the edit region in the masks.
        mask_value: What masks hold where the edit belongs (`masks.parse_mask_value`); empty: a colour, by `polarity`.
        needs: What examples must have; `example.check_needs` says of each whether it has a target.

    Raises:
        UserError: The data set cannot be read, or lacks masks that are needed.
        UsageError: The path, the polarity or the mask value are malformed.
    """
    prefix, rest = split_prefix(path)
    return kind_of(prefix).open(rest, (polarity, mask_value), needs)


def same_examples(path: str, other: str) -> bool:
    """Whether two values of `data.path` share examples by their names."""
    (prefix, one), (other_prefix, two) = split_prefix(path), split_prefix(other)
    return prefix == other_prefix and kind_of(prefix).same_examples(one, two)


def folder_of(path: str) -> Path | None:
    """The folder that a value of `data.path` reads; None if it reads none."""
    prefix, rest = split_prefix(path)
    return kind_of(prefix).folder(rest)
