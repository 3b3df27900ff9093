"""The strength alpha / r of each layer of a LoRA: from a tensor, or from PEFT's settings in the header or a file."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Gt

from rcgrpo_jax.borders import STRICT, conform, parse_json, read_object, shorten
from rcgrpo_jax.errors import UserError

DIFFUSERS_KEY = "lora_adapter_metadata"  # of a safetensors header: PEFT's settings, each name after "transformer."
OUR_KEY = "rcgrpo_jax"  # the rank and alpha of the training, whose scale is folded into B
PEFT_FILE = "adapter_config.json"  # the same settings in a file beside, as PEFT saves them
PEFT_ALPHA = 8.0  # PEFT's alpha where its settings name none
AGAIN = "Export the LoRA again."
Positive = Annotated[float, Gt(0)]
_HARMLESS = {  # settings that do not change what the LoRA computes, or that the tensors show as well
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "lora_dropout", "fan_in_fan_out", "layers_to_transform", "layers_pattern",
    "megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying", "loftq_config", "eva_config",
}  # fmt: skip
# These begin with A B = 0 and the base as it is; others (PiSSA, OLoRA, CorDA, LoftQ, ...) change the base.
_STARTS = (True, False, "gaussian", "eva", "orthogonal")
_NAMES = {"use_dora": "DoRA", "pissa": "PiSSA", "olora": "OLoRA", "corda": "CorDA", "loftq": "LoftQ",
          "lora_ga": "LoRA-GA"}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """The settings of PEFT that say how strong a layer is."""

    __pydantic_config__ = STRICT
    r: Annotated[int, Gt(0)] | None = None  # None: they are absent, and the tensors say it
    lora_alpha: Positive | None = None
    rank_pattern: dict[str, Annotated[int, Gt(0)]] = field(default_factory=dict)
    alpha_pattern: dict[str, Positive] = field(default_factory=dict)
    use_rslora: bool = False


@dataclass(frozen=True)
class Trained:
    """What our own files say of the training: its scale alpha / r is folded into B."""

    __pydantic_config__ = STRICT
    rank: Annotated[int, Gt(0)]
    alpha: Positive
    targets: str  # as in `LoRAConfig`


_STRENGTH = {setting.name for setting in fields(Settings)}


def read_settings(file: Path, header: Mapping[str, str]) -> Settings:
    """PEFT's settings of a LoRA file; empty where it has none.

    Raises:
        UserError: If they are damaged, or ask for what is not done here.
    """
    beside = file.parent / PEFT_FILE
    if DIFFUSERS_KEY in header:
        where, found = f"the metadata of {file}", _parse(file, header[DIFFUSERS_KEY])
        if found and not any(key.startswith("transformer.") for key in found):
            raise UserError(f"lora: {where} names no setting of the transformer: {shorten(found)}.", AGAIN)
        found = {key.removeprefix("transformer."): x for key, x in found.items() if key.startswith("transformer.")}
    elif beside.is_file() and file.name.startswith("adapter_model"):
        where, found = str(beside), read_object(beside, AGAIN)
    else:
        return Settings()
    _check_supported(where, found)
    if missing := {"r", "lora_alpha"} & {name for name, value in found.items() if value is None}:
        raise UserError(f"lora: {where}: {missing.pop()} is null; a number above 0 was wanted.", AGAIN)
    defaults = {"lora_alpha": PEFT_ALPHA} if found else {}
    known = defaults | {name: found[name] for name in _STRENGTH if found.get(name) is not None}
    return conform(known, Settings, f"lora: {where}", AGAIN)


def read_trained(file: Path, header: Mapping[str, str]) -> Trained | None:
    """What a file of our own says of its training; None for others."""
    if OUR_KEY not in header:
        return None
    return conform(_parse(file, header[OUR_KEY]), Trained, f"lora: the metadata of {file}", AGAIN)


def _parse(file: Path, text: str) -> dict[str, Any]:
    try:
        found = parse_json(text)
        if not isinstance(found, dict):
            raise ValueError("no object")
        return found
    except ValueError as error:
        raise UserError(f"lora: the metadata of {file} is damaged: {shorten(text)} ({error}).", AGAIN) from None


def _check_supported(where: str, settings: Mapping[str, Any]) -> None:
    start = settings.get("init_lora_weights", True)
    asked = {"init_lora_weights": start} if not (start in _STARTS and isinstance(start, bool | str)) else {}
    asked |= {"bias": settings["bias"]} if settings.get("bias", "none") != "none" else {}
    kind = settings.get("peft_type", "LORA")
    asked |= {"peft_type": kind} if kind != "LORA" else {}
    others = settings.keys() - _HARMLESS - _STRENGTH - {"init_lora_weights", "bias"}
    asked |= {name: settings[name] for name in sorted(others) if settings[name]}
    if not asked:
        return
    listed = ", ".join(f"{name} = {shorten(value)}" for name, value in asked.items())
    kinds = ", ".join(name for sign, name in _NAMES.items() if re.search(rf"\b{sign}", listed))
    raise UserError(
        f"lora: {where} asks for {kinds or 'more than plain LoRA'} ({listed}); plain LoRA was wanted.",
        "Convert it to plain LoRA with the program that trained it (in PEFT, save_pretrained with "
        "path_initial_model_for_weight_conversion), or merge it into the base.",
    )


def check_patterns(file: Path, name: str, modules: Collection[str], settings: Settings) -> None:
    """Refuses a rank or an alpha that diffusers would find for a layer by its own names, and the file's name hides.

    Args:
        file: For the message.
        name: Of the layer, in the file.
        modules: What diffusers calls it; several, if it is fused.
        settings: Of `read_settings`.
    """
    if name in modules:
        return
    for pattern in (*settings.rank_pattern, *settings.alpha_pattern):
        if not _matches(pattern, name) and any(_matches(pattern, module) for module in modules):
            raise UserError(
                f"lora: {file}: its settings give {pattern!r} a rank or alpha of its own, by diffusers' names; the "
                f"file calls that layer {name}.",
                "Save the LoRA in diffusers' form, with the program that trained it.",
            )


def scale_of(file: Path, name: str, rank: int, alpha: float | None, settings: Settings) -> float:
    """The number that a layer's A B is multiplied by: alpha / r, or 1 where nothing gives an alpha.

    Args:
        file: For messages.
        name: Of the layer, diffusers'.
        rank: Of its tensors.
        alpha: Its tensor `.alpha`, if there is one.
        settings: Of `read_settings`.

    Raises:
        UserError: For an alpha that is not finite or not above 0, a rank other than that of the settings, or a tensor
            and settings that contradict each other.
    """
    if alpha is not None and not (math.isfinite(alpha) and alpha > 0):
        raise UserError(f"lora: {name}.alpha in {file} is {alpha}; a number above 0 was wanted.", AGAIN)
    by_tensor = None if alpha is None else alpha / rank
    if (wanted := _by_pattern(settings.rank_pattern, name, settings.r or rank)) != rank:
        raise UserError(f"lora: {file}: {name} has rank {rank}; its settings say {wanted}.", AGAIN)
    if (given := _by_pattern(settings.alpha_pattern, name, settings.lora_alpha)) is None:
        return 1.0 if by_tensor is None else by_tensor
    scale = given / (math.sqrt(rank) if settings.use_rslora else rank)
    if by_tensor is not None and not math.isclose(scale, by_tensor, rel_tol=1e-3):
        raise UserError(
            f"lora: {file} says two things of {name}: alpha / r is {by_tensor:g} by its tensor, {scale:g} by its "
            "settings.",
            "Remove the one that is wrong, or export the LoRA again.",
        )
    return scale


def _by_pattern(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """The value of the first pattern that a module's name ends with, as PEFT looks it up."""
    return next((x for pattern, x in patterns.items() if _matches(pattern, name)), default)


def _matches(pattern: str, name: str) -> bool:
    return _compile(pattern).match(name) is not None


@cache  # there may be one for each layer, more than `re` remembers
def _compile(pattern: str) -> re.Pattern:
    try:
        return re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(f"lora: a pattern of the settings is no regular expression ({error}).", AGAIN) from None
