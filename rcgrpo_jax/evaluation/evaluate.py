"""Edits every example of a source as a user would, and measures the edits. All models see the same noise."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
from annotated_types import Ge
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8

from rcgrpo_jax.borders import STRICT, check_memory, conform, parse_json
from rcgrpo_jax.data.example import EditExample, Needs, Source, check_needs
from rcgrpo_jax.data.images import resize_image, resize_mask
from rcgrpo_jax.data.scenes.source import KINDS, Scenes
from rcgrpo_jax.editors.flux_kontext import Editor
from rcgrpo_jax.errors import UsageError, UserError, reason
from rcgrpo_jax.evaluation.caption import caption_scores, read_region
from rcgrpo_jax.evaluation.lpips import load_weights
from rcgrpo_jax.evaluation.metrics import background_scores, edit_scores
from rcgrpo_jax.flow import rollout
from rcgrpo_jax.method import concentration, region
from rcgrpo_jax.models.mmdit import Condition, MMDiT, sown_density
from rcgrpo_jax.models.quantization import QUANTIZATIONS
from rcgrpo_jax.parallel.mesh import SAMPLE_AXES, make_mesh
from rcgrpo_jax.parallel.microbatch import map_samples

Count = Annotated[int, Ge(0)]
Positive = Annotated[int, Ge(1)]


@dataclass(frozen=True)
class _Settings:
    """The types of `Evaluation.settings` in a file."""

    __pydantic_config__ = STRICT
    steps: Positive
    guidance: float
    seed: Count
    size: tuple[Positive, Positive]
    acd_layers: Positive
    text_tokens: Positive
    dtype: Literal["bfloat16", "float32"]
    quantization: Literal[QUANTIZATIONS]
    model: str
    acd_reference_keys: bool = False
    data: str = ""


@dataclass(frozen=True)
class _Origin:
    """Those of `Evaluation.origin`."""

    __pydantic_config__ = STRICT
    lora: str = ""
    evaluation: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Described:
    """What a file holds beside its arrays."""

    __pydantic_config__ = STRICT
    names: tuple[str, ...]
    settings: _Settings
    origin: _Origin = _Origin()


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The edits of one model, and what was measured of each."""

    names: tuple[str, ...]  # of the examples
    measures: Mapping[str, Float[np.ndarray, " N"]]  # float32; NaN where something could not be measured
    images: UInt8[np.ndarray, "N H W 3"]  # the edits; `rcgrpo ablate` keeps none: N = 0
    settings: Mapping[str, Any]  # what the values depend on besides the adapter: base model, data, noise, solver, ACD
    origin: Mapping[str, Any] = field(default_factory=dict)  # the adapter's fingerprint, or its run's configuration

    @property
    def kinds(self) -> tuple[str | None, ...]:
        """The kind of each edit (add, remove, replace) where its name ends in one, as those of scenes do."""
        ends = (name.rpartition("-")[2] for name in self.names)
        return tuple(end if end in KINDS else None for end in ends)

    def save(self, path: str | Path) -> None:
        """Writes all into one `.npz` file, whole or not at all.

        Raises:
            UserError: The file cannot be written.
        """
        path = Path(path)
        temporary = path.with_name(f"{path.name}.partial")
        described = {"names": self.names, "settings": dict(self.settings), "origin": dict(self.origin)}
        measures = {f"measures/{name}": values for name, values in self.measures.items()}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                np.savez_compressed(file, described=np.array(json.dumps(described)), images=self.images, **measures)
            temporary.replace(path)
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error}).", "Choose a folder you can write to.") from None

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads what `save` wrote.

        Raises:
            UserError: The file is missing, damaged, or something else, or memory cannot hold it.
        """
        remedy = "Remove the file, and evaluate again."
        try:
            with np.load(path, allow_pickle=False) as file:
                check_memory(f"{path}", sum(member.file_size for member in file.zip.infolist()), remedy)
                described = parse_json(str(file["described"]))
                arrays = {name: file[name] for name in file.files if name != "described"}
        except UserError:
            raise
        except Exception as error:  # numpy and zipfile raise many types on damaged bytes, and no list is complete
            raise UserError(f"{path}: not an evaluation ({reason(error)}).", remedy) from None
        conform(described, _Described, f"{path}: not an evaluation: described", remedy)
        images = arrays.pop("images", None)
        measures = {name.partition("/")[2]: x for name, x in arrays.items() if name.startswith("measures/")}
        if problem := _array_problem(measures, images, len(described["names"])):
            raise UserError(f"{path}: not an evaluation: {problem}.", remedy)
        return cls(tuple(described["names"]), measures, images, described["settings"], described.get("origin", {}))


def _array_problem(measures: Mapping[str, np.ndarray], images: np.ndarray | None, count: int) -> str:
    """What is wrong with the arrays of a file that names so many examples; empty if nothing."""
    for name, values in measures.items():
        if values.dtype != np.float32 or values.shape != (count,) or np.isinf(values).any():
            return f"{name}: {values.dtype} {list(values.shape)} found; finite or NaN float32 [{count}] was wanted"
    if images is None:
        return "no images found"
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or len(images) not in (0, count):
        return f"images: {images.dtype} {list(images.shape)} found; uint8 [{count}, H, W, 3], or 0 of these, was wanted"
    return ""


def evaluate(
    editor: Editor,
    source: Source,
    indices: Sequence[int],
    *,
    num_steps: int = 28,
    guidance: float = 2.5,
    seed: int = 0,
    lora: dict | None = None,
    batch: int = 8,
    size: tuple[int, int] | None = None,
    mesh: Mesh | None = None,
    progress: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Edits examples from unperturbed noise, and measures the edits.

    The measures are `success` and `overall`, `psnr`, `ssim` and `lpips` (`evaluation.metrics`) and `caption`
    (`evaluation.caption`), all of the 8-bit pictures, and `acd`: R_acd (Eq. 18) of the same rollout, over all text
    tokens and the last `acd_layers` blocks of the editor, or as many as it has. LPIPS is left out where its weights
    are not installed, and the caption where the source is not scenes in their own size.

    An example's noise depends on the seed and its index alone, so that different models can be compared in pairs.

    Args:
        editor: The model.
        source: Examples with targets.
        indices: Which of them.
        num_steps: K.
        guidance: Guidance scale.
        seed: Of the noise.
        lora: Adapter with its scale folded in (`models.lora.scale_adapter`); None is the base.
        batch: Examples at a time; rounded up to what the mesh divides. Memory depends on it, results do not.
        size: (height, width) that images are brought to; that of the first example by default.
        mesh: Where the editor's parameters lie; one device by default.
        progress: Called for each example, after its batch.

    Returns:
        One value a measure and example, in the order of the indices.

    Raises:
        UserError: An example has no target or one that is flawed, or cannot be read.
        UsageError: There are no examples, their targets are flawed on purpose, or the size is not a whole number of
            tokens.
    """
    if not len(indices):
        raise UsageError("evaluate: no examples found; at least one was wanted.", "Name more examples.")
    if isinstance(source, Scenes) and source.flaws:
        raise UsageError(
            f"evaluate: scenes with {source.flaws:.0%} flawed targets found; right targets were wanted.",
            "Leave the share of flaws out.",
        )
    size = source[indices[0]].image.shape[:2] if size is None else size
    check_size(editor, size)
    mesh = make_mesh({}, jax.devices()[:1]) if mesh is None else mesh
    spread = int(np.prod([mesh.shape[axis] for axis in SAMPLE_AXES]))
    batch = -(-min(batch, len(indices)) // spread) * spread
    weights = load_weights()
    has_captions = isinstance(source, Scenes) and size == (source.size, source.size)
    names, images, measures, digest = [], [], [], hashlib.sha256()
    with jax.set_mesh(mesh):
        for start in range(0, len(indices), batch):
            chunk = list(indices[start : start + batch])
            rows = np.array(chunk + chunk[-1:] * (batch - len(chunk)))  # one shape, so one compilation
            examples = [_check(source[index]) for index in rows]
            pixels, targets = (
                np.stack([resize_image(getattr(x, field), size) for x in examples]) for field in ("image", "target")
            )
            mask = np.stack([resize_mask(x.mask, size) for x in examples])
            instructions = [x.instruction for x in examples]
            for row in zip(pixels[: len(chunk)], targets, mask, instructions, strict=False):
                digest.update(b"".join(x.encode() if isinstance(x, str) else x.tobytes() for x in row))
            edited, acd = _edit(editor, pixels, mask, instructions, rows, num_steps, guidance, seed, lora or {}, mesh)
            found = {"acd": acd, **_measure(pixels, edited, mask, targets, weights)}
            if has_captions:
                regions = [read_region(source, index) for index in rows]
                found["caption"] = caption_scores(_unit(edited), jax.tree.map(lambda *x: np.stack(x), *regions))
            names += [x.name for x in examples[: len(chunk)]]
            images.append(edited[: len(chunk)])
            measures.append({name: np.asarray(x, np.float32)[: len(chunk)] for name, x in found.items()})
            for _ in chunk:
                progress()
    attention = editor.transformer.attention
    settings = {
        "steps": num_steps, "guidance": float(guidance), "seed": seed, "size": list(size),
        "acd_layers": min(attention.acd_layers, editor.transformer.config.num_blocks),
        "acd_reference_keys": attention.acd_reference_keys, "text_tokens": editor.max_text_tokens,
        "dtype": str(jnp.dtype(editor.dtype)), "quantization": editor.quantization,
        "model": editor.folder.whole_fingerprint(), "data": digest.hexdigest(),
    }  # fmt: skip
    joined = {name: np.concatenate([part[name] for part in measures]) for name in measures[0]}
    return Evaluation(tuple(names), joined, np.concatenate(images), settings)


def check_size(editor: Editor, size: tuple[int, int]) -> None:
    """Refuses a (height, width) that is not a whole number of the editor's tokens."""
    side = 2 * editor.vae.config.downscale
    if any(x % side or x < side for x in size):
        height, width = (max(x // side, 1) * side for x in size)
        raise UsageError(
            f"evaluate: images of {size[1]} x {size[0]} pixels found; multiples of {side} were wanted.",
            f"Choose a size for them, for example {width}x{height}.",
        )


def _check(example: EditExample) -> EditExample:
    check_needs(example, Needs(right_target="the measure of success"))
    return example


def _edit(
    editor: Editor, pixels: UInt8[np.ndarray, "P H W 3"], mask: Float[np.ndarray, "P H W"], instructions: list[str],
    indices: np.ndarray, num_steps: int, guidance: float, seed: int, lora: dict, mesh: Mesh,
) -> tuple[UInt8[np.ndarray, "P H W 3"], Float[Array, " P"]]:  # fmt: skip
    """The edits of a batch, and R_acd of each."""
    grid = editor.grid(*pixels.shape[1:3])
    encoding, reference = editor.encode_text(instructions), editor.encode_image(pixels)
    condition = Condition(encoding.text, encoding.pooled, reference, jnp.full(len(pixels), guidance, jnp.float32))
    inputs = (condition, jnp.asarray(mask), initial_noise(np.uint32(seed), indices, reference.shape[1:]))
    sigmas = editor.sigmas(num_steps, grid[0] * grid[1])
    tokens, acd = _rollout(editor.transformer, editor.transformer_params, lora, inputs, sigmas, grid, mesh)
    return editor.decode(tokens, grid), acd


# Compiled by module, as those of `editor`: parameters and adapter are arguments, and all adapters share one program.


@partial(jax.jit, static_argnums=2)
def initial_noise(seed: np.uint32, indices: Array, shape: tuple[int, int]) -> Float[Array, "P N C"]:
    """The noise from which the examples of these indices are edited, of shape (N, C) each."""
    return jax.vmap(lambda index: jax.random.normal(jax.random.fold_in(jax.random.key(seed), index), shape))(indices)


@partial(jax.jit, static_argnums=(0, 5, 6))
def _rollout(
    transformer: MMDiT, params: dict, lora: dict, inputs: tuple, sigmas: Array, grid: tuple[int, int], mesh: Mesh
) -> tuple[Float[Array, "P N C"], Float[Array, " P"]]:
    """The last state of each rollout (Eq. 12) and its R_acd (Eq. 17, 18)."""

    def one(condition: Condition, mask: Array, noise: Array) -> tuple[Array, Array]:
        tokens = region.token_mask(mask, grid)

        def velocity_and_density(x: Array, sigma: Array) -> tuple[Array, Array]:
            v, sown = transformer.apply(
                {"params": params, "lora": lora}, x, sigma, condition, grid, tokens, mutable=["intermediates"]
            )
            return v, sown_density(sown["intermediates"], transformer.attention.acd_layers, tokens)

        states, densities = rollout.integrate_with_aux(velocity_and_density, noise, sigmas)
        return states[-1], concentration.reward(densities)

    return map_samples(one, inputs, 0, mesh)


@jax.jit
def _scores(source: Array, edited: Array, mask: Array, target: Array, lpips_weights: Any) -> dict[str, Array]:
    scores = edit_scores(source, edited, mask, target)
    return scores | background_scores(source, edited, mask, lpips_weights)


def _measure(
    source: UInt8[np.ndarray, "P H W 3"], edited: UInt8[np.ndarray, "P H W 3"], mask: Float[np.ndarray, "P H W"],
    target: UInt8[np.ndarray, "P H W 3"], lpips_weights: Any,
) -> dict[str, Float[Array, " P"]]:  # fmt: skip
    return _scores(_unit(source), _unit(edited), jnp.asarray(mask), _unit(target), lpips_weights)


def _unit(pixels: UInt8[np.ndarray, "P H W 3"]) -> Float[Array, "P H W 3"]:
    return jnp.asarray(pixels, jnp.float32) / 255
