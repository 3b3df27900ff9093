"""Edits every example of a source as a user would, from unperturbed noise. All models see the same noise."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8

from rcgrpo_jax.data.buckets import NONE, make_buckets
from rcgrpo_jax.data.example import NOTHING, Needs, Source, check_needs
from rcgrpo_jax.editors.base import Networks, velocity_and_density
from rcgrpo_jax.editors.model import Editor
from rcgrpo_jax.errors import UsageError
from rcgrpo_jax.evaluation.examples import Digest, EditedBatch, ExampleBatch, read_batches, read_example
from rcgrpo_jax.evaluation.pictures import PictureLog, check_names, claim, edited_names
from rcgrpo_jax.flow import rollout
from rcgrpo_jax.flow.solvers import choose_solver
from rcgrpo_jax.method import concentration, region
from rcgrpo_jax.parallel import distributed
from rcgrpo_jax.parallel.mesh import SAMPLE_AXES, make_mesh
from rcgrpo_jax.parallel.microbatch import map_samples
from rcgrpo_jax.weights.lora import adapter_fingerprint

Summary = Callable[[Float[Array, "K L_sel"]], Float[Array, "..."]]  # of the densities of one rollout, a pure function


class EditOptions(NamedTuple):
    """How examples are edited."""

    num_steps: int  # K
    guidance: float  # guidance scale
    seed: int  # of the noise, which depends on it and the index of the example alone
    solver: str = "euler"  # a name of `flow.solvers.SOLVERS`


def edit_all(
    editor: Editor,
    source: Source,
    indices: Sequence[int],
    folder: str | Path,
    *,
    num_steps: int = 28,
    guidance: float = 2.5,
    seed: int = 0,
    solver: str = "euler",
    lora: dict | None = None,
    batch: int = 8,
    size: tuple[int, int] | None = None,
    buckets: str = NONE,
    mesh: Mesh | None = None,
    share: tuple[int, int] | None = None,
    needs: Needs = NOTHING,
    progress: Callable[[], None] = lambda: None,
) -> None:
    """Edits examples into a folder, each picture as soon as it is made: `evaluation.pictures` says what lies there.

    What is there already is not made again, so that a call that was stopped goes on. Several calls may share the work,
    and the folder: each makes its share, of a batch at a time in memory.

    Args:
        editor: The model.
        source: The examples; the editing needs no targets.
        indices: Which of them; the same in all calls.
        folder: Gets the pictures.
        num_steps: K.
        guidance: Guidance scale.
        seed: Of the noise.
        solver: A name of `flow.solvers.SOLVERS`.
        lora: Adapter with its scale folded in (`models.lora.scale_adapter`); None is the base.
        batch: Examples at a time; rounded up to what the mesh divides.
        size: (height, width) that images are brought to; that of the first example by default.
        buckets: `kontext`: each image is brought to the nearest of Kontext's shapes in place of `size`, whose area they
            have (`data.buckets.make_buckets`), and its edit has that shape. A program is compiled for each.
        mesh: Where the editor's parameters lie, devices of this process; one device by default.
        share: (k, n): this call makes the examples k, k + n, ...; by default k is the process, n how many there are.
        needs: What examples must have to be measured later.
        progress: Called for each example of the share.

    Raises:
        UserError: An example cannot be read or lacks what is needed, two have one name, the folder holds other edits,
            another process is at work on this share, or the folder cannot be written.
        UsageError: There are no examples or no such share, or the size is not a whole number of tokens.
    """
    size, options = check_request(editor, source, indices, size), EditOptions(num_steps, guidance, seed, solver)
    shapes = make_buckets(buckets, size)
    for shape in shapes.sizes:
        check_request(editor, source, indices, shape)
    mesh = make_mesh({}, jax.local_devices()[:1]) if mesh is None else mesh
    rank, count = share or (jax.process_index(), jax.process_count())
    if not 0 <= rank < count:
        raise UsageError(f"share: {rank} of {count} found; one from 0 to {count - 1} was wanted.", "Count from 0.")
    own = indices[rank::count]
    with ExitStack() as stack:
        with distributed.raise_together():
            names, sizes, digest = [], {}, Digest()
            for index in indices:
                example = read_example(source, index, shapes)
                check_needs(example, needs)
                names.append(example.name)
                sizes[index] = example.image.shape[:2]
                digest.add(example)
            check_names(names)
            settings = edit_settings(editor, options, size) | {"data": str(digest)}
            settings |= {"buckets": buckets} if buckets != NONE else {}
            claim(Path(folder), settings, {"lora": adapter_fingerprint(lora)} if lora else {})
            log = stack.enter_context(PictureLog(Path(folder), rank, count))  # before weights are read
            made = edited_names(Path(folder), dict(zip(names, indices, strict=True)))
            missing = [index for index, name in zip(own, names[rank::count], strict=True) if name not in made]
        for _ in range(len(own) - len(missing)):
            progress()
        if distributed.any_process(bool(missing)):  # all processes read a converted folder at once, or none
            editor.load_encoders()
            _ = editor.params
        parts = []
        for shape in shapes.sizes:
            rows = batch_rows(batch, sum(sizes[index] == shape for index in own), mesh)  # the same when a call goes on
            parts.append(read_batches(source, [index for index in missing if sizes[index] == shape], rows, shape))
        for edited in edit_batches(editor, chain(*parts), options, lora, mesh):
            for row, example in enumerate(edited.batch.own):
                index = int(edited.batch.indices[row])
                log.add(example.name, index, example.instruction, edited.pictures[row], float(edited.acd[row]))
                progress()


def check_request(
    editor: Editor, source: Source, indices: Sequence[int], size: tuple[int, int] | None
) -> tuple[int, int]:
    """The (height, width) of the edits, which is that of the first example by default.

    Raises:
        UsageError: There are no examples, or the size is not a whole number of the editor's tokens.
    """
    if not len(indices):
        raise UsageError("evaluate: no examples found; at least one was wanted.", "Name more examples.")
    height, width = source[indices[0]].image.shape[:2] if size is None else size
    side = editor.model.sizes.token_pixels
    if any(x % side or x < side for x in (height, width)):
        nearest = (max(x // side, 1) * side for x in (width, height))
        raise UsageError(
            f"evaluate: images of {width} x {height} pixels found; multiples of {side} were wanted.",
            "Choose a size for them, for example {}x{}.".format(*nearest),
        )
    return height, width


def batch_rows(batch: int, count: int, mesh: Mesh) -> int:
    """P: no more rows than there are examples, rounded up to what the mesh divides."""
    spread = int(np.prod([mesh.shape[axis] for axis in SAMPLE_AXES]))
    return -(-max(min(batch, count), 1) // spread) * spread


def edit_settings(editor: Editor, options: EditOptions, size: tuple[int, int]) -> dict[str, Any]:
    """What edits depend on besides the adapter and the data, and R_acd with them."""
    opened = editor.options
    return {
        "steps": options.num_steps, "solver": options.solver, "guidance": float(options.guidance), "seed": options.seed,
        "size": list(size),
        "acd_layers": min(opened.acd_layers, editor.model.sizes.num_blocks),
        "acd_reference_keys": opened.acd_reference_keys, "text_tokens": opened.max_text_tokens,
        "dtype": opened.dtype, "quantization": opened.quantization, "model": editor.model.whole_fingerprint(),
    }  # fmt: skip


def edit_batches(
    editor: Editor,
    batches: Iterable[ExampleBatch],
    options: EditOptions,
    lora: dict | None,
    mesh: Mesh,
    summarise: Summary = concentration.reward,
    instruction_only: bool = False,
) -> Iterator[EditedBatch]:
    """Edits batch after batch.

    Args:
        editor: The model.
        batches: The examples.
        options: How they are edited.
        lora: Adapter with its scale folded in; None is the base.
        mesh: Where the editor's parameters lie.
        summarise: What is kept of a rollout's densities; R_acd by default. A program is compiled for each.
        instruction_only: Whether the instruction's own text tokens alone count in the densities, as in a run with
            `acd.text=instruction`; all by default.
    """
    for batch in batches:
        with jax.set_mesh(mesh):
            pictures, acd = _edit(editor, batch, options, lora or {}, mesh, summarise, instruction_only)
        yield EditedBatch(batch, pictures, np.asarray(acd))


def _edit(
    editor: Editor, batch: ExampleBatch, options: EditOptions, lora: dict, mesh: Mesh, summarise: Summary,
    instruction_only: bool,
) -> tuple[UInt8[np.ndarray, "P H W 3"], Float[Array, "P ..."]]:  # fmt: skip
    """The edits of a batch, and what is kept of the densities of each."""
    pixels = batch.pixels
    grid = editor.grid(*pixels.shape[1:3])
    encoded = editor.encode(pixels, batch.instructions)
    condition = editor.networks.condition(encoded, options.guidance)
    shape = editor.networks.source(condition).shape[1:]
    noise = initial_noise(np.uint32(options.seed), batch.indices, shape)
    text_weights = jnp.asarray(editor.networks.text_weights(encoded)) if instruction_only else None
    inputs = (condition, jnp.asarray(batch.masks), noise, text_weights)
    how = (grid, mesh, summarise, options.num_steps, options.solver)
    tokens, acd = _edit_latents(editor.networks, editor.params, lora, inputs, *how)
    return editor.decode(tokens, grid), acd


# Compiled by networks, as those of `editors`: parameters and adapter are arguments, and all adapters share one program.


@partial(jax.jit, static_argnums=2)
def initial_noise(seed: np.uint32, indices: Array, shape: tuple[int, int]) -> Float[Array, "P N C"]:
    """The noise from which the examples of these indices are edited, of shape (N, C) each."""
    return jax.vmap(lambda index: jax.random.normal(jax.random.fold_in(jax.random.key(seed), index), shape))(indices)


@partial(jax.jit, static_argnums=(0, 4, 5, 6, 7, 8))
def _edit_latents(
    networks: Networks, params: dict, lora: dict, inputs: tuple, grid: tuple[int, int], mesh: Mesh,
    summarise: Summary, num_steps: int, solver: str,
) -> tuple[Float[Array, "P N C"], Float[Array, "P ..."]]:  # fmt: skip
    """The last state of each rollout (Eq. 12), and what is kept of its densities (Eq. 17), R_acd (Eq. 18) as a rule."""
    sigmas = networks.sigmas(num_steps, grid[0] * grid[1])

    def one(condition: Any, mask: Array, noise: Array, text_weights: Array | None) -> tuple[Array, Array]:
        tokens = region.token_region(mask, grid)
        velocity = velocity_and_density(networks, params, lora, condition, grid, tokens, text_weights)
        states, densities = rollout.integrate_with_aux(velocity, noise, sigmas, choose_solver(solver, num_steps))
        return states[-1], summarise(densities)

    return map_samples(one, inputs, 0, mesh)
