"""What a measure of an edit is, and how one is found by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from jaxtyping import Array, Float

from rcgrpo_jax.data.example import Source
from rcgrpo_jax.errors import UsageError, nearest


class MeasureInputs(NamedTuple):
    """A batch of `P` edits, and what may be known of them; pictures are sRGB in [0, 1], float32."""

    source: Float[Array, "P H W 3"]
    edited: Float[Array, "P H W 3"]  # one edit of each
    mask: Float[Array, "P H W"]  # in [0, 1], 1 where the edit belongs
    target: Float[Array, "P H W 3"] | None = None  # the right results
    acd: Float[Array, " P"] | None = None  # R_acd of the rollouts that made the edits


class Measure(NamedTuple):
    """One number of an edit, and its column in a table.

    Attributes:
        name: Of the measure in an `Evaluation`.
        header: What people call it.
        decimals: That a table shows.
        better: The direction that is better, ↑ or ↓.
        compute: (inputs, what `load` gave, what `read` gave) -> `[P]`, float32; the last two where there are such. A
            pure function of arrays: all measures of a batch are compiled into one program.
        needs: Fields of `MeasureInputs` that may be missing, and without which it cannot be computed.
        fits: (source, size) -> whether it can be computed of such examples; of any by default.
        load: () -> arrays that are read once, such as weights; None where they are not installed.
        read: (source, index) -> arrays that are known of an example besides; `compute` gets them stacked.
        wanted: What is said where it is not measured, after "HEADER is not measured: ".
    """

    name: str
    header: str
    decimals: int
    better: str
    compute: Callable[..., Float[Array, " P"]]
    needs: tuple[str, ...] = ()
    fits: Callable[[Source, tuple[int, int]], bool] = lambda source, size: True
    load: Callable[[], Any] | None = None
    read: Callable[[Source, int], Any] | None = None
    wanted: str = "it was left out"


_MEASURES: dict[str, Measure] = {}
REGISTERED: Mapping[str, Measure] = MappingProxyType(_MEASURES)  # name -> measure, in the order of a table's columns


def register(measure: Measure) -> None:
    """Makes a measure known to every evaluation and table, as the last column."""
    if measure.name in _MEASURES:
        raise ValueError(f"The measure {measure.name!r} is registered twice.")
    _MEASURES[measure.name] = measure


def choose(names: Sequence[str] | None) -> list[Measure]:
    """The measures of these names, in the order of their registration; None: all.

    Raises:
        UsageError: No measure has one of the names.
    """
    for name in names or ():
        if name not in _MEASURES:
            near = nearest(name, _MEASURES)
            raise UsageError(
                f"measures: {name!r} found; some of {', '.join(_MEASURES)} were wanted.",
                f"Did you mean {near!r}?" if near else "Name one of these, or register yours.",
            )
    return [measure for name, measure in _MEASURES.items() if names is None or name in names]


def note(measure: Measure) -> str:
    """What a reader is told of a measure that an evaluation lacks."""
    return f"{measure.header} is not measured: {measure.wanted}."


def without_region(inputs: MeasureInputs) -> tuple[Float[Array, "P H W 3"], Float[Array, "P H W 3"]]:
    """Source and edit with the edit region set to zero, `image (1 - mask)`: the background as CompBench compares it."""
    outside = (1 - inputs.mask)[..., None]
    return outside * inputs.source, outside * inputs.edited
