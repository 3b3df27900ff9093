"""Instructions for scenes, in varied words: they name one object, and the last colour in them is the one asked for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rcgrpo_jax.data.scenes.shapes import SceneObject

APART = 0.22  # sides of the picture from which one object is plainly left of, or above, another

PLACES = {  # (x, y) of the middle of each place
    "in the upper left": (0.22, 0.22),
    "at the top": (0.5, 0.2),
    "in the upper right": (0.78, 0.22),
    "on the left": (0.2, 0.5),
    "in the centre": (0.5, 0.5),
    "on the right": (0.8, 0.5),
    "in the lower left": (0.22, 0.78),
    "at the bottom": (0.5, 0.8),
    "in the lower right": (0.78, 0.78),
}
DIRECTIONS = {"to the left of": (-1, 0), "to the right of": (1, 0), "above": (0, -1), "below": (0, 1)}

# Where the object's colour would not come last, the place is put in front: colour rewards read the last one.
_ADD = ("Add {new} {place}.", "Put {new} {place}.", "Place {new} {place}.", "Draw {new} {place}.")
_ADD_BESIDE = ("{place}, add {new}.", "{place}, put {new}.", "{place}, draw {new}.", "{place}, insert {new}.")
_REMOVE = (
    "Remove {old}.",
    "Erase {old}.",
    "Delete {old}.",
    "Take away {old}.",
    "Get rid of {old}.",
    "Please remove {old}.",
    "Take {old} out of the picture.",
)
_RECOLOUR = (
    "Make {old} {colour}.",
    "Paint {old} {colour}.",
    "Turn {old} {colour}.",
    "Change the colour of {old} to {colour}.",
    "Change {old} to {colour}.",
)
_RESHAPE = (
    "Turn {old} into {a_shape}.",
    "Change {old} into {a_shape}.",
    "Make {old} {a_shape}.",
    "Turn {old} into {a_shape} of the same colour.",
    "Replace {old} with {a_new}.",
)
_REPLACE = (
    "Replace {old} with {a_new}.",
    "Turn {old} into {a_new}.",
    "Change {old} into {a_new}.",
    "Swap {old} for {a_new}.",
)


def caption(thing: SceneObject) -> str:
    """Describes an object by itself: "a small red circle"."""
    return f"a {thing.size} {thing.colour} {thing.shape}"


def describe(thing: SceneObject, others: Sequence[SceneObject]) -> str | None:
    """Names one object among others: by colour and shape, and by size or place where several are alike in these.

    Args:
        thing: The object to name.
        others: The other objects in the picture.

    Returns:
        "the red circle", "the small red circle" or "the red circle on the left", the first that fits it alone; None
        if none does.
    """
    alike = [other for other in others if (other.shape, other.colour) == (thing.shape, thing.colour)]
    if not alike:
        return f"the {thing.colour} {thing.shape}"
    if all(other.size != thing.size for other in alike):
        return f"the {thing.size} {thing.colour} {thing.shape}"
    sides = {
        "on the left": all(thing.x < other.x - APART for other in alike),
        "on the right": all(thing.x > other.x + APART for other in alike),
        "at the top": all(thing.y < other.y - APART for other in alike),
        "at the bottom": all(thing.y > other.y + APART for other in alike),
    }
    return next((f"the {thing.colour} {thing.shape} {side}" for side, true in sides.items() if true), None)


def add_at(rng: np.random.Generator, new: SceneObject, place: str) -> str:
    """Asks for a new object at one of `PLACES`."""
    if rng.random() < 0.3:
        return _pick(rng, _ADD_BESIDE).format(new=caption(new), place=place.capitalize())
    return _pick(rng, _ADD).format(new=caption(new), place=place)


def add_beside(rng: np.random.Generator, new: SceneObject, direction: str, anchor: str) -> str:
    """Asks for a new object in one of `DIRECTIONS` from another, which `anchor` names."""
    return _pick(rng, _ADD_BESIDE).format(new=caption(new), place=f"{direction.capitalize()} {anchor}")


def remove(rng: np.random.Generator, old: str) -> str:
    """Asks to remove the object that `old` names."""
    return _pick(rng, _REMOVE).format(old=old)


def replace(rng: np.random.Generator, old: str, before: SceneObject, after: SceneObject) -> str:
    """Asks to turn the object that `old` names into another of the same size and place; says only what differs."""
    if before.shape == after.shape:
        templates = _RECOLOUR
    elif before.colour == after.colour:
        templates = _RESHAPE
    else:
        templates = _REPLACE
    article = "an" if after.colour == "orange" else "a"
    return _pick(rng, templates).format(
        old=old, colour=after.colour, a_shape=f"a {after.shape}", a_new=f"{article} {after.colour} {after.shape}"
    )


def _pick(rng: np.random.Generator, templates: Sequence[str]) -> str:
    return templates[rng.integers(len(templates))]
