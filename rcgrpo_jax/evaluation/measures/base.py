"""What a measure of an edit is, and how one is found by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from jaxtyping import Array, Float

from rcgrpo_jax.data.example import Source
from rcgrpo_jax.errors import UsageError, UserError, nearest
from rcgrpo_jax.evaluation.examples import EditedBatch


class MeasureInputs(NamedTuple):
    """A batch of `P` edits, and what may be known of them; pictures are sRGB in [0, 1], float32."""

    source: Float[Array, "P H W 3"]
    edited: Float[Array, "P H W 3"]  # one edit of each
    mask: Float[Array, "P H W"]  # in [0, 1], 1 where the edit belongs
    target: Float[Array, "P H W 3"] | None = None  # the right results
    acd: Float[Array, " P"] | None = None  # R_acd of the rollouts that made the edits


class MeasureOptions(NamedTuple):
    """Where the weights of measures are that no package carries."""

    clip: str = ""  # folder of a CLIP model in transformers' layout, or its name on the hub
    lpips_squeeze: str = ""  # safetensors file of SqueezeNet and its heads (`weights.lpips.load_squeeze`)


EDITOR = "editor"  # the group that is measured where nothing is asked for


class Measure(NamedTuple):
    """One number of an edit, and its column in a table.

    Attributes:
        name: Of the measure in an `Evaluation`.
        header: What people call it.
        decimals: That a table shows.
        better: The direction that is better, ↑ or ↓.
        compute: (inputs, what `prepare` or else `load` gave, what `read` gave) -> `[P]`, float32; those of the last two
            that there are. A pure function of arrays: all measures of a batch are compiled into one program. NaN where
            an edit cannot be measured.
        needs: Fields of `MeasureInputs` that may be missing, and without which it cannot be computed.
        fits: (source, size) -> whether it can be computed of such examples; of any by default.
        load: options -> what is read once, such as weights; None where it is not given or not installed. Measures that
            have the same function share what it gives.
        read: (source, index) -> arrays that are known of an example besides; `compute` gets them stacked.
        prepare: (what `load` gave, a batch of edits) -> arrays, computed before `compute`, which gets them in the place
            of what was loaded. Measures that have the same function share these too.
        wanted: What is said where it is not measured, after "HEADER is not measured: ".
        remedy: What to do where it was asked for, and `load` gave nothing.
        group: Measures that are chosen together: `editor`, of a model's edits in their own size; `official`, what
            CompBench's script computes, whose batches are `evaluation.official`'s; `region`, the same with its flaws
            corrected; `single`, chosen by name alone.
        required: Whether it was asked for, by its name or its group: `choose` says so.
    """

    name: str
    header: str
    decimals: int
    better: str
    compute: Callable[..., Float[Array, " P"]]
    needs: tuple[str, ...] = ()
    fits: Callable[[Source, tuple[int, int]], bool] = lambda source, size: True
    load: Callable[[MeasureOptions], Any] | None = None
    read: Callable[[Source, int], Any] | None = None
    prepare: Callable[[Any, EditedBatch], Any] | None = None
    wanted: str = "it was left out"
    remedy: str = ""
    group: str = EDITOR
    required: bool = False

    @property
    def label(self) -> str:
        """The header, with its group where another group has one of this name."""
        return f"{self.group} {self.header}" if self.group in ("official", "region") else self.header


_MEASURES: dict[str, Measure] = {}
REGISTERED: Mapping[str, Measure] = MappingProxyType(_MEASURES)  # name -> measure, in the order of a table's columns


def register(measure: Measure) -> None:
    """Makes a measure known to every evaluation and table, as the last column."""
    if measure.name in _MEASURES:
        raise ValueError(f"The measure {measure.name!r} is registered twice.")
    _MEASURES[measure.name] = measure


def choose(names: Sequence[str] | None) -> list[Measure]:
    """The measures of these names and groups, in the order of their registration; None: the group `editor`.

    Raises:
        UsageError: No measure or group has one of the names, or none is given.
    """
    if names is None:
        return [measure for measure in _MEASURES.values() if measure.group == EDITOR]
    known = [*dict.fromkeys(measure.group for measure in _MEASURES.values()), *_MEASURES]
    for name in names or ("",):
        if name not in known:
            near = nearest(name, known)
            raise UsageError(
                f"measures: {name!r} found; some of {', '.join(known)} were wanted.",
                f"Did you mean {near!r}?" if near else "Name one of these, or register yours.",
            )
    chosen = [measure for measure in _MEASURES.values() if measure.name in names or measure.group in names]
    return [measure._replace(required=True) for measure in chosen]


def load_weights(measures: Sequence[Measure], options: MeasureOptions) -> dict[Callable, Any]:
    """Reads what measures load, once for those that share it; before any edit is made.

    Args:
        measures: As `choose` gives them.
        options: Where weights are.

    Returns:
        `load` -> what it gave, or None.

    Raises:
        UserError: A measure that was asked for lacks its weights, or they cannot be read.
    """
    loaded: dict[Callable, Any] = {}
    for one in measures:
        if one.load is not None and one.load not in loaded:
            loaded[one.load] = one.load(options)
        if one.required and one.load is not None and loaded[one.load] is None:
            raise UserError(f"measures: {one.name}: its weights were not found; they were wanted.", one.remedy)
    return loaded


def note(measure: Measure) -> str:
    """What a reader is told of a measure that an evaluation lacks."""
    return f"{measure.label} is not measured: {measure.wanted}."


def without_region(inputs: MeasureInputs) -> tuple[Float[Array, "P H W 3"], Float[Array, "P H W 3"]]:
    """Source and edit with the edit region set to zero, `image (1 - mask)`: the background as CompBench compares it."""
    outside = (1 - inputs.mask)[..., None]
    return outside * inputs.source, outside * inputs.edited
