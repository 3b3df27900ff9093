"""What the JSON files of a model folder say beside the networks' shapes: schedule, parts, origin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from annotated_types import Ge, Le, MultipleOf

from rcgrpo_jax.borders import STRICT, conform, read_object, shorten
from rcgrpo_jax.errors import UserError
from rcgrpo_jax.models.config import Config, Size
from rcgrpo_jax.weights.networks import NETWORKS

SCHEDULER = "FlowMatchEulerDiscreteScheduler"
SPECIAL_TOKENS = {"bos_token", "eos_token", "pad_token", "unk_token"}
COPY_SETTINGS = "Correct the file, or copy the folder of the model's release again."
Shift = Annotated[float, Ge(-10), Le(10)]  # a logarithm: beyond, float32 tells the first or last times no longer apart


@dataclass(frozen=True)
class SchedulerConfig(Config):
    """FLUX's dynamic shift: linear in the image's tokens through two points; see `flow.schedule`."""

    file: ClassVar[str] = "scheduler/scheduler_config.json"
    remedy: ClassVar[str] = "Copy the scheduler folder of FLUX.1-Kontext-dev's release, or set the field so."

    base_image_seq_len: Size = 256
    max_image_seq_len: Size = 4096
    base_shift: Shift = 0.5
    max_shift: Shift = 1.15

    def __post_init__(self) -> None:
        if self.max_image_seq_len <= self.base_image_seq_len:
            self.refuse("max_image_seq_len", f"more than base_image_seq_len {self.base_image_seq_len}")

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> Self:
        cls.require(config, _class_name=SCHEDULER)
        found = super().from_json(config)
        off = dict.fromkeys(
            ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas", "stochastic_sampling"),
            False,
        )
        cls.require(
            {**config, "shift_terminal": config.get("shift_terminal") or None},  # 0 is none, as in diffusers
            use_dynamic_shifting=True, time_shift_type="exponential", num_train_timesteps=1000,
            shift_terminal=None, **off,
        )  # fmt: skip
        return found


@dataclass(frozen=True)
class TokenizerSettings:
    """What a tokenizer's folder says beside its vocabulary, as far as it counts here.

    Attributes:
        model_max_length: Tokens that sequences are padded to; 1e30 or null where none is set.
        extra_ids: T5's tokens of its own training, which FLUX never uses.
    """

    __pydantic_config__ = STRICT
    model_max_length: Annotated[float, Ge(1), MultipleOf(1)] | None = None
    extra_ids: Annotated[int, Ge(0), Le(1000)] = 100

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The settings of a folder; the files may be absent.

        Raises:
            UserError: For a file that holds no JSON object, a number out of range, and a special token that is no text.
        """
        settings = cls()
        for file in (folder / "special_tokens_map.json", folder / "tokenizer_config.json"):
            if file.is_file():
                content = read_object(file, COPY_SETTINGS)
                known = {f.name: content[f.name] for f in fields(cls) if f.name in content}
                settings = conform(known, cls, f"{file}", COPY_SETTINGS)
                _check_special_tokens(file, content)
        return settings


def _check_special_tokens(file: Path, content: Mapping[str, Any]) -> None:
    for token in sorted(SPECIAL_TOKENS & content.keys()):
        value = content[token]
        if value is None and file.name == "tokenizer_config.json":  # there null is none
            continue
        text = value.get("content") if isinstance(value, dict) else value
        if not isinstance(text, str):
            raise UserError(f"{file}: {token}: {shorten(value)} found, a text wanted.", COPY_SETTINGS)


@dataclass(frozen=True)
class Manifest(Config):
    """What `rcgrpo convert` notes of a directory that it made."""

    file: ClassVar[str] = "rcgrpo.json"  # marks a converted directory

    version: Annotated[int, Ge(1), Le(1)] = 1
    fingerprints: dict[str, str] = field(default_factory=dict)  # network -> hash


@dataclass(frozen=True)
class ModelIndex(Config):
    """Which classes diffusers makes the parts of a folder with."""

    file: ClassVar[str] = "model_index.json"

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> Self:
        parts = {name: list(network.library) for name, network in NETWORKS.items()}
        parts["scheduler"] = ["diffusers", SCHEDULER]
        saved = {name: value for name, value in config.items() if value != [None, None]}  # a pipeline without the part
        cls.require(saved, **parts)
        if not str(name := config.get("_class_name", "Flux")).startswith("Flux"):
            raise UserError(
                f"{cls.file}: _class_name is {shorten(name)}; a pipeline of FLUX was wanted.",
                "Give a folder of FLUX.1-Kontext: plan, convert and the stages vae and flow know no other family.",
            )
        return cls()
