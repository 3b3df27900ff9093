"""Synthetic editing tasks with exact masks and rendered targets: Add, Remove and Replace, as in CompBench, in small.

Everything about task `i` follows from `(split, i, seed)` through numpy's generators: random access and no state, and
the same bytes in every run, but for the last bit of numpy's sines on another processor.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, UInt8

from rcgrpo_jax.data.example import EditExample, Needs, Source
from rcgrpo_jax.data.kinds import SourceKind, register
from rcgrpo_jax.data.masks import Marking
from rcgrpo_jax.data.scenes import flaws
from rcgrpo_jax.data.scenes.backgrounds import TEXTURES, find_photographs, photograph, texture
from rcgrpo_jax.data.scenes.composition import HELD_OUT, SEEN, Kind, Scene, compose
from rcgrpo_jax.data.scenes.shapes import render, signed_distance
from rcgrpo_jax.errors import UsageError, nearest

Flaw = Literal["wrong", "spill", "ghost"]

KINDS: tuple[Kind, ...] = ("add", "remove", "replace")
SPLITS = ("train", "heldout", "photo", "validation")  # a split's place in it seeds its tasks: append only
MIN_SIZE = 32  # pixels; below, small shapes cannot be told apart
_STREAMS = ("scene", "background", "flaw")  # of random numbers, independent of each other


class Scenes:
    """A random-access source of editing tasks on pictures of a few shapes over a textured background.

    Eight shapes, eight CSS colours and three sizes; task `i` is of kind `kinds[i % len(kinds)]`. The splits:
      - `train`: only the 48 combinations `SEEN` of shape and colour occur, in any role.
      - `heldout`: what is added, removed, replaced and replaced by is of the 16 combinations `HELD_OUT`; the objects
        around are of `SEEN`, but for one that looks like the edited object and is told apart by size or place.
      - `validation`: as `train`, other tasks; for choosing settings, so that `heldout` stays unseen.
      - `photo`: as `heldout`, on crops of the photographs of `data.scenes.photographs`, their tonal range narrowed.

    With `flaws`, that share of the targets shows an edit gone wrong, for pre-training an editor that has something left
    to learn. Half of these are a spill, a halo of the object's colour around its place. The other half shows the wrong
    shape or the wrong colour for add and replace, and a ghost of what was to go for remove. All else stays as it is:
    the clean target is that of the same scenes without flaws.

    Args:
        split: Of `SPLITS`.
        count: Tasks; the first ones do not depend on it.
        size: Side, pixels; what is in the pictures does not depend on it.
        seed: Another seed gives other tasks.
        flaws: The share of flawed targets, in [0, 1].
        kinds: Kinds of the tasks, in turn; one that is named twice comes twice as often.

    Raises:
        UsageError: An unknown split or kind, no tasks, too small a side, a negative seed, or a share outside [0, 1].
        UserError: The split is `photo`, and what carries the photographs is not installed (`find_photographs`).
    """

    def __init__(
        self,
        split: str = "train",
        count: int = 1000,
        size: int = 128,
        seed: int = 0,
        flaws: float = 0.0,
        kinds: Sequence[Kind] = KINDS,
    ):
        for field, found, known in (("split", split, SPLITS), *(("kind", kind, KINDS) for kind in kinds)):
            if found not in known:
                near = nearest(found, known)
                raise UsageError(
                    f"scenes: the {field} {found!r} found; one of {', '.join(known)} was wanted.",
                    f"Did you mean {near!r}?" if near else "Name one of these.",
                )
        for field, found, least in (("count", count, 1), ("size", size, MIN_SIZE), ("seed", seed, 0)):
            if found < least:
                raise UsageError(f"scenes: {field} {found} found; at least {least} was wanted.", f"Raise the {field}.")
        if not kinds:
            raise UsageError(
                f"scenes: no kinds of edits found; some of {', '.join(KINDS)} were wanted.",
                "Name one, or leave them out.",
            )
        if not 0 <= flaws <= 1:
            raise UsageError(f"scenes: flaws {flaws} found; a share in [0, 1] was wanted.", "Write 0.4 for 40 %.")
        self.split, self.count, self.size, self.seed, self.flaws, self.kinds = split, count, size, seed, flaws, kinds
        self._combinations = SEEN if split in ("train", "validation") else HELD_OUT
        self._backgrounds = tuple(find_photographs()) if split == "photo" else tuple(TEXTURES)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> EditExample:
        """Draws a task: source, mask and target, with the caption of the region after the edit."""
        index, scene = self._check(index), self.scene(index)
        background = self._background(index, scene)
        mask = scene.mask(self.size)
        source, target = render(scene.before, background), render(scene.after, background)
        flaw, rng = self._flaw(index)
        if flaw:
            target = self._spoil(flaw, rng, scene, background, source, target, mask)
        return EditExample(
            name=f"{self.split}-{index:05d}-{scene.kind}",
            image=source,
            mask=mask.astype(np.float32),
            instruction=scene.instruction,
            caption=scene.caption,
            target=target,
            flawed=flaw is not None,
            task=scene.kind,
        )

    def scene(self, index: int) -> Scene:
        """Composes a task without drawing it."""
        index = self._check(index)
        return compose(self._rng(index, "scene"), self._kind(index), self._combinations, self._backgrounds)

    def background(self, index: int) -> Float[np.ndarray, "S S 3"]:
        """Draws what lies behind a task's objects, sRGB in [0, 255]; `render` draws them over it."""
        index = self._check(index)
        return self._background(index, self.scene(index))

    def _background(self, index: int, scene: Scene) -> Float[np.ndarray, "S S 3"]:
        kind = scene.background
        return (texture if kind in TEXTURES else photograph)(kind, self._rng(index, "background"), self.size)

    def flaw(self, index: int) -> Flaw | None:
        """Names what is wrong with a task's target."""
        return self._flaw(self._check(index))[0]

    def _check(self, index: int) -> int:
        if not -self.count <= index < self.count:
            raise IndexError(f"scene {index} of {self.count}")
        return int(index) % self.count

    def _kind(self, index: int) -> Kind:
        return self.kinds[index % len(self.kinds)]

    def _rng(self, index: int, stream: str) -> np.random.Generator:
        return np.random.default_rng([self.seed, SPLITS.index(self.split), index, _STREAMS.index(stream)])

    def _flaw(self, index: int) -> tuple[Flaw | None, np.random.Generator]:
        rng = self._rng(index, "flaw")
        flawed, spill = rng.random(2) < (self.flaws, 0.5)
        other: Flaw = "ghost" if self._kind(index) == "remove" else "wrong"
        return (None if not flawed else "spill" if spill else other), rng

    def _spoil(
        self, flaw: Flaw, rng: np.random.Generator, scene: Scene, background: Float[np.ndarray, "S S 3"],
        source: UInt8[np.ndarray, "S S 3"], target: UInt8[np.ndarray, "S S 3"], mask: Bool[np.ndarray, "S S"],
    ) -> UInt8[np.ndarray, "S S 3"]:  # fmt: skip
        """Draws the target with a flaw, the strength of which is drawn too."""
        if flaw == "ghost":
            return flaws.ghost(source, target, mask, rng.uniform(0.15, 0.45))
        if flaw == "spill":
            thing = scene.new or scene.old
            return flaws.spill(target, signed_distance(thing, self.size), thing.rgb, rng.uniform(0.4, 0.8))
        asked = scene.new
        look = (asked.shape, asked.colour)
        old = scene.old and (scene.old.shape, scene.old.colour)
        near = [c for c in self._combinations if (c[0] == look[0]) != (c[1] == look[1]) and c != old]
        shape, colour = near[rng.integers(len(near))]
        wrong = replace(scene, new=replace(asked, shape=shape, colour=colour))
        return render(wrong.after, background)


def parse_scenes(text: str) -> Scenes:
    """Opens the scenes that `SPLIT[/KINDS][:COUNT[:FLAWS]]` names: `train:5000`, `train:5000:0.4`, `heldout/add:100`,
    or `train/add+add+replace:5000` for two thirds of additions.

    Raises:
        UsageError: As `Scenes`, or the count or the share of flaws is not a number.
    """
    found = re.fullmatch(r"([^:/]+)(?:/([^:/]*))?(?::([0-9]{1,18})(?::([0-9]*\.?[0-9]+))?)?", text)
    if not found:
        raise UsageError(
            f"scenes: {text!r} found; SPLIT[/KINDS][:COUNT[:FLAWS]] was wanted.",
            "Write train:5000, train:5000:0.4, or train/add+remove:5000.",
        )
    split, kinds, count, flaws = found.groups()
    options = {"kinds": tuple(kinds.split("+"))} if kinds is not None else {}
    options |= {"count": int(count), "flaws": float(flaws or 0)} if count else {}
    return Scenes(split, **options)


@register("scenes")
class ScenesKind(SourceKind):
    """Tasks that are drawn; their masks are exact, so that there is nothing to mark."""

    form = "scenes:SPLIT[/KINDS][:COUNT[:FLAWS]]"

    def open(self, path: str, marking: Marking, needs: Needs) -> Source:
        return parse_scenes(path)

    def same_examples(self, path: str, other: str) -> bool:
        """Whether they are of one split."""
        return re.split("[/:]", path)[0] == re.split("[/:]", other)[0]
