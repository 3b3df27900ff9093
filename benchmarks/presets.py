"""What is measured: the settings, the numbers that go in, and weights by a formula that both frameworks evaluate."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from ml_collections import ConfigDict

from rcgrpo_jax.errors import UsageError
from rcgrpo_jax.models.config import MMDiTConfig
from rcgrpo_jax.rl.config import default_config, validate
from rcgrpo_jax.rl.policy.neighbour import num_compared_steps
from rcgrpo_jax.runs.fields import get_field
from rcgrpo_jax.weights.load import SMALL_EDITOR, ModelFolder

Integers = TypeVar("Integers")  # int32 array of NumPy or JAX, or tensor of torch


# What the step in torch can do of the fields that have several values.
KNOWN = {
    "model.remat": ("none", "full"), "model.quantization": ("none",), "lora.targets": ("attention",),
    "surrogate.distance": ("region",), "surrogate.anchor_mode": ("replay",), "surrogate.weighting": ("uniform",),
    "surrogate.steps": ("all", "early"), "rollout.solver": ("euler",), "acd.text": ("all",),
    "acd.reference_keys": (False,), "objective.source_advantage": (0.0,),
}  # fmt: skip


@dataclass(frozen=True)
class Preset:
    """One benchmark: a model and the settings of a step."""

    name: str
    model: MMDiTConfig | None  # sizes of a model with weights by `pseudorandom`; None: the editor of the package
    changes: Mapping[str, Any]  # field -> value, where not the default configuration's
    tolerance: float  # largest relative error between the frameworks
    rounds: int  # turns of each framework
    repeats: int = 1  # steps a turn
    alone: bool = False  # whether the GPU has room for one framework at a time
    compile: bool | None = None  # torch.compile; None: on a GPU
    torch: Mapping[str, Any] = field(default_factory=dict)  # micro-batches of torch's step, where its best are others
    config: ConfigDict = field(init=False, compare=False)

    def __post_init__(self) -> None:
        config = default_config()
        config.model.path, config.data.path = self.name if self.model else SMALL_EDITOR.name, "none"
        config.surrogate.distance = "region"  # the mask-aware one
        config.update_from_flattened_dict(dict(self.changes))
        validate(config, 1)
        for name, values in KNOWN.items():
            if (found := get_field(config, name)) not in values:
                raise UsageError(
                    f"{name}: {found!r} found; torch's step knows {', '.join(map(str, values))}.", "Leave it as it is."
                )
        blocks = self.transformer.num_blocks
        if not (config.acd.weight and config.acd.layers <= blocks):
            raise UsageError(
                f"acd: weight {config.acd.weight}, layers {config.acd.layers} found; both steps compute the reward, of "
                f"at most the {blocks} blocks that there are.",
                "Set acd.layers within them, and no acd.weight of 0.",
            )
        if not config.model.max_text_tokens:
            raise UsageError("model.max_text_tokens: 0 found; a number of tokens was wanted.", "Leave it as it is.")
        object.__setattr__(self, "config", config)

    @property
    def torch_config(self) -> ConfigDict:
        """As `config`, with `torch`'s micro-batches."""
        config = self.config.copy_and_resolve_references()
        config.update_from_flattened_dict(dict(self.torch))
        return config

    @property
    def transformer(self) -> MMDiTConfig:
        return self.model or ModelFolder(SMALL_EDITOR).config("transformer")


_WIDE = MMDiTConfig(
    num_layers=2, num_single_layers=4, num_attention_heads=8, joint_attention_dim=512, pooled_projection_dim=256
)


def _full(side: int, rollout: int, update: int) -> Preset:
    """One prompt of the full model in bfloat16; `rollout` and `update` are the micro-batches."""
    changes = {
        "model.max_text_tokens": 512, "data.size": (side, side), "rollout.prompts": 1,
        "rollout.micro_batch": rollout, "surrogate.micro_batch": update,
    }  # fmt: skip
    return Preset(f"kontext-{side}", MMDiTConfig(), changes, tolerance=0.06, rounds=2, repeats=2, alone=True)


_CPU = {"model.dtype": "float32", "model.remat": "none", "surrogate.anchors": 2, "acd.layers": 4,
        "rollout.group_size": 4, "rollout.num_steps": 4}  # fmt: skip
_WHOLE = {"rollout.micro_batch": 0, "surrogate.micro_batch": 0}
PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            "small",
            None,
            {**_CPU, "model.max_text_tokens": 24, "data.size": (128, 128), "rollout.prompts": 2, "lora.rank": 16,
             "lora.alpha": 32.0, "surrogate.micro_batch": 2},
            tolerance=1e-4,
            rounds=40,
            torch=_WHOLE,
        ),
        Preset(
            "wide",
            _WIDE,
            {**_CPU, "model.max_text_tokens": 64, "data.size": (256, 256), "rollout.prompts": 1,
             "surrogate.micro_batch": 4},
            tolerance=1e-4,
            rounds=6,
            torch=_WHOLE,
        ),
        _full(512, rollout=6, update=4),
        _full(1024, rollout=3, update=2),
    )
}  # fmt: skip


def inputs(preset: Preset) -> dict[str, np.ndarray]:
    """Everything that a step reads besides weights, float32 or int32, by seed.

    Returns:
        `text` `[P, N_txt, D_txt]`, `pooled` `[P, D_pool]`, `reference` `[P, N, C]`, `region` `[P, N]` in {0, 1},
        `noise` `[P, G, N, C]` of Eq. 11, `states` `[P, G, K+1, N, C]` from noise towards the reference, `anchors`
        `[P, B]`, `steps` `[T]`, `advantages` `[P, G]`, and `log_old` `[U, 1, G]` of the units (prompt, anchor, step),
        which puts ratios on both sides of the clip.
    """
    config, sizes, rng = preset.config, preset.transformer, np.random.default_rng(preset.config.seed)
    prompts, group, steps = config.rollout.prompts, config.rollout.group_size, config.rollout.num_steps
    rows, columns = (side // 16 for side in config.data.size)
    text = (prompts, config.model.max_text_tokens, sizes.joint_attention_dim)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    region = np.zeros((prompts, rows, columns), np.float32)
    region[:, rows // 4 : rows - rows // 4, columns // 4 : columns // 2] = 1
    region = region.reshape(prompts, -1)
    alpha = (config.explore.alpha_edit * region + config.explore.alpha_base * (1 - region))[:, None, :, None]
    reference, start = (normal(prompts, rows * columns, sizes.in_channels) for _ in range(2))
    noise = np.sqrt(1 - alpha**2) * start[:, None] + alpha * normal(prompts, group, *start.shape[1:])
    noise[:, 0] = start
    sigmas = np.linspace(1, 0.2, steps + 1, dtype=np.float32)[:, None, None]
    anchors = [1 + rng.permutation(group - 1)[: config.surrogate.anchors] for _ in range(prompts)]
    trained = num_compared_steps(config)
    logits = 0.015 * normal(prompts * config.surrogate.anchors * trained, 1, group)
    return {
        "text": normal(*text),
        "pooled": normal(prompts, sizes.pooled_projection_dim),
        "reference": reference,
        "region": region,
        "noise": noise,
        "states": sigmas * noise[:, :, None] + (1 - sigmas) * reference[:, None, None],
        "anchors": np.stack(anchors).astype(np.int32),
        "steps": np.arange(1, trained + 1, dtype=np.int32),
        "advantages": normal(prompts, group),
        "log_old": logits - np.log(np.exp(logits).sum(-1, keepdims=True)),
    }


def pseudorandom(index: Integers, seed: int | Integers) -> Integers:
    """Whole numbers that look uniform in [-2^23, 2^23), by mixing the bits of int32, which wraps in every framework.

    Args:
        index: Position of an element in its tensor, row-major in diffusers' layout.
        seed: Of the tensor, `seed_of`.
    """
    x = index * 0x3C6EF373 + seed
    x = (x ^ (x >> 16 & 0xFFFF)) * 0x7FEB352D  # the masks clear the copies of the sign that >> shifts in
    x = (x ^ (x >> 15 & 0x1FFFF)) * 0x2C1B3C6D
    return (x ^ (x >> 16 & 0xFFFF)) >> 8


def seed_of(key: str) -> int:
    """Of a tensor by its key in diffusers' files (a LoRA's: `MODULE.lora_A.weight`)."""
    return zlib.crc32(key.encode()) >> 1


def offset_and_scale(key: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """(a, b) such that `a + b pseudorandom` keeps activations near unit variance; `shape` is `[out, in]` or `[out]`."""
    if len(shape) == 1:
        return float(key.endswith("weight")), 0.2 * 2.0**-23  # scales of norms about 1, biases about 0
    bound = 0.1 if ".lora_B." in key else shape[-1] ** -0.5 if ".lora_A." in key else (3 / shape[-1]) ** 0.5
    return 0.0, bound * 2.0**-23
