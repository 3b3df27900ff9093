"""What is in a synthetic editing task: which objects lie where, what changes, and in which words it is asked for."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
from jaxtyping import Bool

from rcgrpo_jax.data.scenes import wording
from rcgrpo_jax.data.scenes.shapes import COLOURS, SHAPES, SIZES, SceneObject, footprint

T = TypeVar("T")
Kind = Literal["add", "remove", "replace"]
Combination = tuple[str, str]  # (shape, colour)

# A quarter of all combinations, two of each shape and two of each colour: those whose numbers differ by 1 or 4.
HELD_OUT: tuple[Combination, ...] = tuple(
    (shape, colour)
    for i, shape in enumerate(SHAPES)
    for j, colour in enumerate(COLOURS)
    if (j - i) % len(COLOURS) in (1, 4)
)
SEEN: tuple[Combination, ...] = tuple(
    (shape, colour) for shape in SHAPES for colour in COLOURS if (shape, colour) not in HELD_OUT
)

ADD_MARGIN = 1 / 64  # sides; whoever asks for a new object marks its place only roughly
_EDGE = 0.03  # sides that objects stay away from the border
_GAP = 0.03  # sides between objects that stand apart
_OVERLAP = 0.6  # radii of the smaller object that two overlap by, at most
_TRIES = 60  # places tried before an object is left out
_BACKGROUND_WORDS = {
    "gradient": "smooth",
    "clouds": "cloudy",
    "stripes": "striped",
    "checks": "checkered",
    "blotches": "blotchy",
}


@dataclass(frozen=True)
class Scene:
    """A task before it is drawn: `old` gives way to `new` at one level of a pile of other objects."""

    kind: Kind
    background: str  # of `backgrounds.TEXTURES`, or the name of a photograph
    below: tuple[SceneObject, ...]  # bottom first
    old: SceneObject | None  # None for add
    new: SceneObject | None  # None for remove
    above: tuple[SceneObject, ...]
    instruction: str
    caption: str  # of the edited region afterwards

    @property
    def before(self) -> tuple[SceneObject, ...]:
        """The objects of the source picture, bottom first."""
        return (*self.below, *filter(None, [self.old]), *self.above)

    @property
    def after(self) -> tuple[SceneObject, ...]:
        """The objects of the target picture, bottom first."""
        return (*self.below, *filter(None, [self.new]), *self.above)

    def mask(self, size: int) -> Bool[np.ndarray, "S S"]:
        """Finds the pixels that can differ between source and target: the visible footprints of `old` and `new`.

        For `add` the outline is moved outwards by `ADD_MARGIN`, two pixels of 128.
        """
        margin = ADD_MARGIN * size if self.kind == "add" else 0.0
        things = filter(None, [self.old, self.new])
        return np.any([footprint(thing, self.above, size, margin) for thing in things], axis=0)


def compose(
    rng: np.random.Generator, kind: Kind, combinations: Sequence[Combination], backgrounds: Sequence[str]
) -> Scene:
    """Draws a task.

    What is added stands free. In half of the tasks that remove or replace, the edited object lies over or under
    another; in two of five, a second object is like it but for its size or place.

    Args:
        rng: Draws everything.
        kind: Of the edit.
        combinations: Which shapes and colours are edited, and edited to; the objects around are of `SEEN`.
        backgrounds: Names to choose one from.

    Returns:
        The task, with an instruction that fits one object alone.
    """
    background, look, size = _pick(rng, backgrounds), _pick(rng, combinations), _pick(rng, tuple(SIZES))
    if kind == "add":
        old, (new, others, instruction) = None, _add(rng, look, size)
        others = _surround(rng, new, others, overlap=False)
        return Scene(kind, background, _shuffled(rng, others), old, new, (), instruction, wording.caption(new))

    old = SceneObject(*look, size, *rng.uniform(SIZES[size] + _EDGE, 1 - SIZES[size] - _EDGE, 2).tolist())
    others = _twin(rng, old) if rng.random() < 0.4 else []
    others = _surround(rng, old, others, overlap=rng.random() < 0.5)
    name = wording.describe(old, others)
    if kind == "remove":
        new, instruction = None, wording.remove(rng, name)
        what = _BACKGROUND_WORDS.get(background)
        caption = f"a {what} background" if what else "a photograph"
    else:
        new = SceneObject(*_other_look(rng, look, combinations), size, old.x, old.y)
        instruction, caption = wording.replace(rng, name, old, new), wording.caption(new)
    others, level = _shuffled(rng, others), rng.integers(len(others) + 1)
    return Scene(kind, background, others[:level], old, new, others[level:], instruction, caption)


def _add(rng: np.random.Generator, look: Combination, size: str) -> tuple[SceneObject, list[SceneObject], str]:
    """A new object at a named place or beside an anchor: the object, the anchor if there is one, the instruction."""
    radius = SIZES[size]
    if rng.random() < 0.5:
        place = _pick(rng, tuple(wording.PLACES))
        x, y = np.clip(wording.PLACES[place] + rng.uniform(-0.03, 0.03, 2), radius + _EDGE, 1 - radius - _EDGE)
        new = SceneObject(*look, size, float(x), float(y))
        return new, [], wording.add_at(rng, new, place)
    direction, anchor_size = _pick(rng, tuple(wording.DIRECTIONS)), _pick(rng, tuple(SIZES))
    anchor_radius = SIZES[anchor_size]
    step = (radius + anchor_radius + rng.uniform(_GAP, 0.09)) * np.array(wording.DIRECTIONS[direction])
    low = _EDGE + np.maximum(anchor_radius, radius - step)  # both objects fit into the picture
    high = 1 - _EDGE - np.maximum(anchor_radius, radius + step)
    at = rng.uniform(low, high)
    anchor_look = _pick(rng, [other for other in SEEN if other != look])
    anchor = SceneObject(*anchor_look, anchor_size, *at.tolist())
    new = SceneObject(*look, size, *(at + step).tolist())
    return new, [anchor], wording.add_beside(rng, new, direction, wording.describe(anchor, [new]))


def _twin(rng: np.random.Generator, old: SceneObject) -> list[SceneObject]:
    """An object of the same shape and colour that size or place tells apart; none if no room was found."""
    size = _pick(rng, tuple(SIZES))
    for _ in range(_TRIES):
        place = _place(rng, size, [old])
        twin = place and SceneObject(old.shape, old.colour, size, *place)
        if twin and wording.describe(old, [twin]):
            return [twin]
    return []


def _surround(
    rng: np.random.Generator, edited: SceneObject, others: Sequence[SceneObject], overlap: bool
) -> list[SceneObject]:
    """Adds two to four objects to `others`, each of a combination that nothing else has; fewer if room is short.

    With `overlap`, the first of them overlaps the edited object if it can; all else stands apart.
    """
    others = list(others)
    for i in range(rng.integers(2, 5)):
        taken = [edited, *others]
        looks = {(thing.shape, thing.colour) for thing in taken}
        look, size = _pick(rng, [other for other in SEEN if other not in looks]), _pick(rng, tuple(SIZES))
        place = _place(rng, size, taken, edited) if overlap and i == 0 else None
        if place := place or _place(rng, size, taken):
            others.append(SceneObject(*look, size, *place))
    return others


def _place(
    rng: np.random.Generator, size: str, taken: Collection[SceneObject], partner: SceneObject | None = None
) -> tuple[float, float] | None:
    """A place for an object, apart from all others but the partner, into which it reaches; None if none was found."""
    radius = SIZES[size]
    for _ in range(_TRIES):
        if partner:
            angle, depth = rng.uniform(0, 2 * math.pi), rng.uniform(0.2, _OVERLAP) * min(radius, partner.radius)
            reach = radius + partner.radius - depth
            x, y = partner.x + reach * math.cos(angle), partner.y + reach * math.sin(angle)
        else:
            x, y = rng.uniform(radius + _EDGE, 1 - radius - _EDGE, 2).tolist()
        inside = all(radius + _EDGE <= centre <= 1 - radius - _EDGE for centre in (x, y))
        apart = (
            other is partner or math.hypot(x - other.x, y - other.y) >= radius + other.radius + _GAP for other in taken
        )
        if inside and all(apart):
            return x, y
    return None


def _other_look(rng: np.random.Generator, look: Combination, combinations: Sequence[Combination]) -> Combination:
    """Another colour, another shape, or both, each in a third of the cases."""
    differs = _pick(rng, ((False, True), (True, False), (True, True)))
    others = [other for other in combinations if (other[0] != look[0], other[1] != look[1]) == differs]
    return _pick(rng, others)


def _shuffled(rng: np.random.Generator, things: Sequence[T]) -> tuple[T, ...]:
    return tuple(things[i] for i in rng.permutation(len(things)))


def _pick(rng: np.random.Generator, choices: Sequence[T]) -> T:
    return choices[rng.integers(len(choices))]
