"""The options of supervised training: every field with its default and unit. Groups of all: `rcgrpo_jax/options.py`."""

from __future__ import annotations

from dataclasses import dataclass, field

from rcgrpo_jax.models.lora import LoRAConfig
from rcgrpo_jax.options import DataOptions, MeshOptions, ModelOptions, OptimizerOptions, TrainOptions


@dataclass(frozen=True)
class BatchOptions:
    """The examples of a step."""

    size: int = 16  # examples a step
    micro_batch: int = 0  # examples differentiated at a time over the whole mesh; 0: all


@dataclass(frozen=True)
class VAEOptions:
    """Stage vae."""

    crop: int = 0  # side of the random crop that is trained on, pixels; 0: the whole image
    kl_weight: float = 1e-6  # of the KL to N(0, I), a mean over latent numbers


@dataclass(frozen=True)
class FlowOptions:
    """Stages flow and lora."""

    region_weight: float = 1.0  # of the mean error inside the mask, added to the mean over the image
    extra_shift: float = 0.0  # added to the schedule's shift mu for the times of training: above 0, noisier ones
    picture_steps: int = 8  # solver steps of the pictures


@dataclass(frozen=True)
class Options:
    """A run of supervised training."""

    stage: str = "lora"  # vae: the autoencoder; flow: transformer and text encoders; lora: an adapter alone
    save_dtype: str = "float32"  # of the files that a run ends with: float32, float16 or bfloat16
    seed: int = 0  # of new parameters, the order of the data, times and noise
    # model.path may be empty for vae: a new small editor is drawn from the seed.
    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    batch: BatchOptions = field(default_factory=BatchOptions)
    vae: VAEOptions = field(default_factory=VAEOptions)
    flow: FlowOptions = field(default_factory=FlowOptions)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    train: TrainOptions = field(default_factory=TrainOptions)
    mesh: MeshOptions = field(default_factory=MeshOptions)
