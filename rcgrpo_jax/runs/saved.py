"""The configuration that was saved with a run: its values checked, and today's fields for those it is older than."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ml_collections import ConfigDict

from rcgrpo_jax.borders import shorten
from rcgrpo_jax.errors import UserError
from rcgrpo_jax.runs.checkpoint import Checkpointer
from rcgrpo_jax.runs.differences import ADDED
from rcgrpo_jax.runs.fields import flatten


class Schema(Protocol):
    """What a kind of training says of its configuration: the modules `rl.config` and `sft.config` are such."""

    FREE: Sequence[str]  # groups whose fields the user names

    def default_config(self) -> ConfigDict: ...
    def saved_problems(self, values: Mapping[str, Any]) -> list[str]: ...


def saved_config(checkpointer: Checkpointer, schema: Schema, step: int | None = None) -> dict[str, Any]:
    """The configuration that was saved with a step, with every field that there is now.

    Fields newer than it have the value of `differences.ADDED`, which is what runs did before, or else their default.
    What was saved beside the configuration, such as a digest of the data, is kept. Fields of `lora` that no longer
    exist are left out.

    Args:
        checkpointer: Of the run.
        schema: Of its kind of training.
        step: Which; the latest by default.

    Raises:
        UserError: There is no such checkpoint, it is damaged, or a value is none of its field.
    """
    saved = checkpointer.saved_config(step)
    try:
        problems: list[str] = []
        config = _complete(saved, schema.default_config().to_dict(), "", schema.FREE, problems)
        problems = problems or schema.saved_problems(flatten(config))
    except RecursionError:
        problems = ["nested too deeply"]
    if problems:
        step = checkpointer.latest_step() if step is None else step
        raise UserError(
            f"{checkpointer.directory / str(step)}: its configuration: " + "\n        ".join(problems),
            "Put that directory back from a copy, or move it away: then the one before it counts.",
        )
    return config | {"lora": {field: config["lora"][field] for field in schema.default_config().lora}}


def _complete(
    saved: Any, default: Mapping[str, Any], name: str, free: Sequence[str], problems: list[str]
) -> dict[str, Any]:
    """A saved group with values for what it lacks; a group for a value is a problem, and the reverse."""
    if not isinstance(saved, Mapping):
        problems.append(f"{name}: {shorten(saved)} found; a group of fields was wanted")
        return dict(default)
    places = {field: f"{name}.{field}" if name else field for field in default}
    lacked = {} if name in free else {field: ADDED.get(places[field], x) for field, x in default.items()}
    whole = {**lacked, **saved}
    for field in default.keys() & whole.keys():
        if isinstance(default[field], Mapping):
            whole[field] = _complete(whole[field], default[field], places[field], free, problems)
        elif isinstance(whole[field], Mapping):
            problems.append(f"{places[field]}: {shorten(whole[field])} found; a value was wanted")
    return whole
