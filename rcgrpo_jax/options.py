"""The options that all trainings share, by group, with defaults and units; and options from a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar, get_type_hints

from ml_collections import ConfigDict

T = TypeVar("T")


@dataclass(frozen=True)
class ModelOptions:
    """The model that is trained."""

    path: str = ""  # diffusers folder or converted directory
    dtype: str = "bfloat16"  # of the frozen base and of activations; LoRA, states and losses are float32
    quantization: str = "none"  # of the base's kernels: none, int8 (by output channel), nf4 (QLoRA's 4 bits)
    max_text_tokens: int = 0  # length the T5 sequence is padded to; 0: the model's own, 512 in FLUX.1-Kontext-dev
    guidance: float = 2.5  # scale given to the distilled model
    attention: str = "auto"  # a name of models.attention.IMPLEMENTATIONS; auto: the fastest of the platform
    remat: str = "full"  # a name of models.mmdit.REMAT_POLICIES, in the update


@dataclass(frozen=True)
class DataOptions:
    """The examples."""

    path: str = ""  # folder, .jsonl file, tfds:DATASET[@SPLIT], or scenes:SPLIT[/KINDS][:COUNT[:FLAWS]]
    polarity: str = "white"  # colour of the edit region in the masks: white or black
    mask_value: str = ""  # what masks hold there instead: class numbers or colours, such as 15, or 2,5, or #800000
    size: tuple[int, int] = (512, 512)  # (height, width) in pixels, multiples of 16
    buckets: str = "none"  # none: that size, whatever a picture's shape; kontext: its area, in the nearest of 17 shapes
    cache: str = ""  # folder of encoder results; empty: WORKDIR/cache


@dataclass(frozen=True)
class OptimizerOptions:
    """AdamW."""

    learning_rate: float = 1e-4  # after the warm-up
    warmup_steps: int = 0  # updates of linear warm-up from 0
    decay_steps: int = 0  # updates of cosine decay to 0 after the warm-up; 0: none
    weight_decay: float = 1e-4  # decoupled
    b1: float = 0.9  # decay of the first moment
    b2: float = 0.999  # decay of the second moment
    eps: float = 1e-8  # in Adam's denominator; gradients of distance=mean at full size, by scaling, are 3e-8 to 1e-7
    max_grad_norm: float = 1.0  # global-norm clip
    ema_decay: float = 0.0  # of an average of the LoRA, exported if kept, warmed up; 0: none


@dataclass(frozen=True)
class TrainOptions:
    """The length of a run, and what it writes."""

    num_steps: int = 100  # training steps; in post-training one rollout and `objective.updates` updates each
    save_every: int = 10  # steps between checkpoints
    keep: int = 2  # checkpoints kept
    image_every: int = 10  # steps between image grids
    writers: str = "tensorboard"  # of metrics, beside metrics.jsonl, with commas: tensorboard, wandb; empty: none
    profile_steps: int = 0  # steps that jax.profiler traces into WORKDIR/profile, from the second of a start on


@dataclass(frozen=True)
class MeshOptions:
    """The devices along each axis of the mesh."""

    data: int = -1  # devices that spread samples and replicate weights; -1: what is left
    fsdp: int = 1  # devices that spread samples and weights
    tensor: int = 1  # devices that split heads and MLP


def read_options(kind: type[T], config: Mapping[str, Any]) -> T:
    """Options, frozen and hashable but for groups of free fields, from a configuration with every field of theirs.

    Args:
        kind: A dataclass whose groups are dataclasses.
        config: A ConfigDict or a dictionary, checked before (`runs.fields.check_fields`).
    """
    hints = get_type_hints(kind)

    def read(name: str) -> Any:
        value = config[name]
        if is_dataclass(hints[name]):
            return read_options(hints[name], value)
        if isinstance(value, ConfigDict):
            return value.to_dict()
        return tuple(value) if isinstance(value, list) else value

    return kind(**{field.name: read(field.name) for field in fields(kind)})


def with_changes(options: T, changes: Mapping[str, Any]) -> T:
    """Options with other values.

    Args:
        options: A dataclass whose groups are dataclasses.
        changes: Dotted field -> value.
    """
    for field, value in changes.items():
        name, _, rest = field.partition(".")
        options = replace(options, **{name: with_changes(getattr(options, name), {rest: value}) if rest else value})
    return options
