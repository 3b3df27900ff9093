"""Edits every example of a source, and measures the edits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import jax
from jax.sharding import Mesh

from rcgrpo_jax.data.example import Source
from rcgrpo_jax.editors.model import Editor
from rcgrpo_jax.evaluation.edit import EditOptions, batch_rows, check_request, edit_batches, edit_settings
from rcgrpo_jax.evaluation.examples import check_targets, read_batches, right_batches
from rcgrpo_jax.evaluation.measure import NO_OPTIONS, measure_edits
from rcgrpo_jax.evaluation.measures import Measure, MeasureOptions, choose
from rcgrpo_jax.evaluation.result import Evaluation
from rcgrpo_jax.parallel.mesh import make_mesh


def evaluate(
    editor: Editor,
    source: Source,
    indices: Sequence[int],
    *,
    num_steps: int = 28,
    guidance: float = 2.5,
    seed: int = 0,
    solver: str = "euler",
    lora: dict | None = None,
    batch: int = 8,
    size: tuple[int, int] | None = None,
    mesh: Mesh | None = None,
    measures: Sequence[str] | None = None,
    options: MeasureOptions = NO_OPTIONS,
    progress: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Edits examples from unperturbed noise, and measures the edits, as 8-bit pictures in memory.

    The measures are those of `evaluation.measures`; what cannot be measured is left out, as LPIPS where its weights are
    not installed, and success where examples have no targets. An example's noise depends on the seed and its index
    alone, so that different models can be compared in pairs.

    Args:
        editor: The model.
        source: The examples, with targets or without.
        indices: Which of them.
        num_steps: K.
        guidance: Guidance scale.
        seed: Of the noise.
        solver: A name of `flow.solvers.SOLVERS`.
        lora: Adapter with its scale folded in (`models.lora.scale_adapter`); None is the base.
        batch: Examples at a time; rounded up to what the mesh divides. Memory depends on it, results do not.
        size: (height, width) that images are brought to; that of the first example by default.
        mesh: Where the editor's parameters lie; one device by default.
        measures: Names of measures and of groups; the group `editor` by default.
        options: Where weights are that no package carries.
        progress: Called for each example, after its batch.

    Returns:
        One value a measure and example, in the order of the indices.

    Raises:
        UserError: An example has no target that is needed or one that is flawed, or cannot be read; or a measure that
            was asked for lacks its weights.
        UsageError: There are no examples, their targets are flawed on purpose, or the size is not a whole number of
            tokens.
    """
    check_targets(source)
    chosen = choose(measures)
    size, making = check_request(editor, source, indices, size), EditOptions(num_steps, guidance, seed, solver)
    mesh = make_mesh({}, jax.local_devices()[:1]) if mesh is None else mesh
    batches = read_batches(source, indices, batch_rows(batch, len(indices), mesh), size)
    edits = edit_batches(editor, right_batches(batches, need_targets(chosen)), making, lora, mesh)
    found = measure_edits(edits, source, chosen, progress, options)
    return replace(found, settings={**edit_settings(editor, making, size), "data": found.settings["data"]})


def need_targets(measures: Sequence[Measure]) -> bool:
    """Whether a measure that was asked for cannot do without the right results."""
    return any(one.required and "target" in one.needs for one in measures)
