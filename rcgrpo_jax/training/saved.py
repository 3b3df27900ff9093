"""The configuration that was saved with a run: its values checked, and today's fields for those it is older than."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from rcgrpo_jax.borders import shorten
from rcgrpo_jax.errors import UserError
from rcgrpo_jax.training import config as train_config
from rcgrpo_jax.training import pretrain_config
from rcgrpo_jax.training.checkpoint import ADDED, Checkpointer
from rcgrpo_jax.training.fields import flatten


def module_of(config: Mapping[str, Any]) -> ModuleType:
    """The module whose `default_config` a saved configuration started from."""
    return pretrain_config if "stage" in config else train_config


def saved_config(checkpointer: Checkpointer, step: int | None = None) -> dict[str, Any]:
    """The configuration that was saved with a step (the latest by default), with every field that there is now.

    Fields newer than it have the value of `checkpoint.ADDED`, which is what runs did before, or else their default.
    What was saved beside the configuration, such as a digest of the data, is kept. Fields of `lora` that no longer
    exist are left out, since `LoRAConfig` is made of that group.

    Raises:
        UserError: There is no such checkpoint, it is damaged, or a value is none of its field.
    """
    saved = checkpointer.saved_config(step)
    module = module_of(saved)
    try:
        problems: list[str] = []
        config = _complete(saved, module.default_config().to_dict(), "", problems)
        problems = problems or module.saved_problems(flatten(config))
    except RecursionError:
        problems = ["nested too deeply"]
    if problems:
        step = checkpointer.latest_step() if step is None else step
        raise UserError(
            f"{checkpointer.directory / str(step)}: its configuration: " + "\n        ".join(problems),
            "Put that directory back from a copy, or move it away: then the one before it counts.",
        )
    return config | {"lora": {field: config["lora"][field] for field in module.default_config().lora}}


def _complete(saved: Any, default: Mapping[str, Any], name: str, problems: list[str]) -> dict[str, Any]:
    """A saved group with values for what it lacks; a group for a value is a problem, and the reverse."""
    if not isinstance(saved, Mapping):
        problems.append(f"{name}: {shorten(saved)} found; a group of fields was wanted")
        return dict(default)
    places = {field: f"{name}.{field}" if name else field for field in default}
    lacked = {} if name in train_config.FREE else {field: ADDED.get(places[field], x) for field, x in default.items()}
    whole = {**lacked, **saved}
    for field in default.keys() & whole.keys():
        if isinstance(default[field], Mapping):
            whole[field] = _complete(whole[field], default[field], places[field], problems)
        elif isinstance(whole[field], Mapping):
            problems.append(f"{places[field]}: {shorten(whole[field])} found; a value was wanted")
    return whole
