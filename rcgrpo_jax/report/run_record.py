"""What the directory of a run says about it: settings in words, and what gives the run again."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from rcgrpo_jax.data.buckets import NONE
from rcgrpo_jax.data.images import read_image
from rcgrpo_jax.errors import UserError
from rcgrpo_jax.experiments.saved_runs import read_saved_config, schema_of
from rcgrpo_jax.rl.reward_fields import FREE
from rcgrpo_jax.runs.checkpoint import Checkpointer
from rcgrpo_jax.runs.metrics import read_metrics
from rcgrpo_jax.runs.run import FILES, GALLERY, GRID, SAMPLES

_CAPTIONS = {GRID: "", GALLERY: "Best and worst candidates, ", SAMPLES: "Held-out samples, "}
SCRIPT = "run.py"  # name of the configuration file in the commands
_SHARED = {
    "Model": "{model[path]}, {model[dtype]}, quantization {model[quantization]}, guidance {model[guidance]}",
    "Data": "{data[path]}, {data[size][1]} x {data[size][0]} pixels",
    "Seed": "{seed}",
    "LoRA": "rank {lora[rank]}, alpha {lora[alpha]}, on {lora[targets]}",
    "Optimizer": "AdamW, learning rate {optimizer[learning_rate]}",
}
_POST_TRAINING = {
    "Method": "post-training",
    **_SHARED,
    "Rollouts": "{rollout[prompts]} prompts x {rollout[group_size]} candidates, "
    "{rollout[num_steps]} steps of {rollout[solver]}",
    "ACD": "weight {acd[weight]}, last {acd[layers]} blocks",
}
_POLICY = {
    "neighbour": {
        "Method": "RC-GRPO post-training",
        "Surrogate": "{surrogate[distance]} distance, {surrogate[anchors]} anchors, {surrogate[anchor_mode]} of "
        "{surrogate[steps]} steps, clip {objective[clip]}",
    },
    "gaussian": {
        "Method": "post-training by a stochastic sampler",
        "Random steps": "{sde[kind]}, level {sde[level]}, {sde[noise]} noise, window {sde[window]} (0: all but the "
        "last), {sde[place]}, clip {objective[clip]}",
    },
    "nft": {
        "Method": "DiffusionNFT post-training",
        "Matching": "beta {nft[beta]}, {nft[time_fraction]} of the times, decay {nft[decay]}, weight of the base "
        "{nft[base_weight]}",
        "Penalty by region": "weight {nft[keep_weight]} outside the mask, kept to the {nft[keep_to]}; "
        "{nft[change_weight]} inside",
    },
}
_EXPLORATION = {
    "region": "region-decoupled, {explore[alpha_edit]} inside and {explore[alpha_base]} outside the mask",
    "global": "global, {explore[sigma]}",
    "mixed": "half region-decoupled, {explore[alpha_edit]} inside and {explore[alpha_base]} outside the mask; half "
    "global, {explore[sigma]}",
}
_SUPERVISED = {"Method": "supervised training, stage {stage}", **_SHARED, "Batch": "{batch[size]} examples"}


class RunRecord(NamedTuple):
    """What was found in the directory of a run."""

    config: dict[str, Any]  # as saved with the latest checkpoint; empty before the first one
    metrics: list[dict[str, Any]]
    pictures: dict[str, UInt8[np.ndarray, "_ _ 3"]]  # caption -> the last picture of each kind


def read_run(workdir: Path) -> RunRecord:
    """Reads a run, one that still goes on too.

    Raises:
        UserError: There is no such directory, nothing of a run in it, or something damaged.
    """
    if not workdir.is_dir():
        raise UserError(f"--workdir: {workdir} is no directory; that of a run was wanted.", "Correct the path.")
    file, checkpointer = workdir / "metrics.jsonl", Checkpointer(workdir / "checkpoints", save_every=1, keep=1)
    metrics = read_metrics(file) if file.exists() else []
    config = read_saved_config(checkpointer) if checkpointer.latest_step() is not None else {}
    if not metrics and not config:
        raise UserError(
            f"--workdir: {workdir} has neither steps in metrics.jsonl nor a checkpoint; a run was wanted.",
            "Name the --workdir of `rcgrpo train` or `rcgrpo sft`, after its first step.",
        )
    return RunRecord(config, metrics, dict(_last_pictures(workdir)))


def _last_pictures(workdir: Path) -> Iterator[tuple[str, UInt8[np.ndarray, "_ _ 3"]]]:
    for kind, start in FILES.items():
        files = {}
        for path in workdir.glob(f"images/{start}_*.png"):
            if number := re.fullmatch(rf"{start}_([0-9]+)", path.stem):  # and not "step_000009 (1).png"
                files[int(number[1])] = path
        for step in sorted(files, reverse=True):
            with suppress(UserError):  # it is being written
                picture = read_image(files[step])
                yield f"{_CAPTIONS[kind]}step {step}", picture
                break


def facts(record: RunRecord) -> dict[str, str]:
    """The run in a few lines, name -> value."""
    config, found = record.config, {}
    if config:
        lines = _SUPERVISED if "stage" in config else _POST_TRAINING | _POLICY.get(config["policy"], {})
        if config.get("stage") in ("vae", "flow"):
            lines = {name: line for name, line in lines.items() if name != "LoRA"}
        found |= {name: line.format(**config) for name, line in lines.items()}
        if config["data"]["buckets"] != NONE:
            found["Data"] += f" or that area in the shapes of {config['data']['buckets']}"
    if "explore" in config:
        found["Exploration"] = _EXPLORATION[config["explore"]["kind"]].format(**config)
        weights = {name: weight for name, weight in config["rewards"].items() if weight}
        schedules = {name: f" x {text}" for name, text in config["reward_schedules"].items()}
        found["Rewards"] = ", ".join(f"{name} (weight {x}{schedules.get(name, '')})" for name, x in weights.items())
        if config["watch"]:
            found["Watched"] = config["watch"]
    if record.metrics:
        first, last = record.metrics[0], record.metrics[-1]
        found["Steps"] = f"{last['step']} of {config['train']['num_steps']}" if config else str(last["step"])
        times = [datetime.fromtimestamp(entry["time"], UTC) for entry in (first, last) if "time" in entry]
        found["Time"] = " to ".join(f"{time:%Y-%m-%d %H:%M}" for time in times) + " UTC"
    return found


def config_script(config: Mapping[str, Any]) -> str:
    """A configuration file that gives a saved configuration again; it names what differs from the defaults.

    What was saved beside the configuration, such as a digest of the data, is left out.
    """
    module = schema_of(config)
    changes = _changes(config, json.loads(json.dumps(module.default_config().to_dict())), "config")
    body = "".join(f"    {line}\n" for line in changes)
    return (
        f"from ml_collections import ConfigDict\n\nfrom {module.__name__} import default_config\n\n\n"
        f"def get_config() -> ConfigDict:\n    config = default_config()\n{body}    return config\n"
    )


def _changes(config: Mapping[str, Any], default: Mapping[str, Any], name: str) -> Iterator[str]:
    for field, value in config.items():
        if field not in default or default[field] == value:
            continue
        if isinstance(value, Mapping) and field not in FREE:  # whose fields a user names
            yield from _changes(value, default[field], f"{name}.{field}")
        elif isinstance(value, Mapping):
            yield f"{name}.{field} = ConfigDict({dict(value)!r})"
        else:
            yield f"{name}.{field} = {tuple(value) if isinstance(value, list) else value!r}"


def commands(
    config: Mapping[str, Any],
    data: str = "",
    settings: Mapping[str, Any] | None = None,
    polarity: str = "white",
    mask_value: str = "",
) -> list[str]:
    """The commands that train with that file, export, and, with the `settings` of an evaluation, evaluate on `data`.

    `polarity` and `mask_value` are those of the masks of `data`; without `data`, the run's own stand there.
    """
    train, workdir = "sft" if "stage" in config else "train", "again"
    lines = [["rcgrpo", train, f"--config={SCRIPT}", f"--workdir={workdir}"]]
    if train == "train":
        lines.append(["rcgrpo", "export", f"--workdir={workdir}", f"--out={workdir}/lora"])
    if settings:
        height, width = settings["size"]
        if config.get("stage", "lora") == "lora":
            result = {"model": config["model"]["path"], "lora": f"{workdir}/lora"}
        else:  # which trains networks
            result = {"model": f"{workdir}/model"}
        options = result | {
            "data": data or "DATA", "steps": settings["steps"], "solver": settings["solver"],
            "guidance": settings["guidance"], "seed": settings["seed"], "size": f"{width}x{height}",
            "acd_layers": settings["acd_layers"],
            "text_tokens": settings["text_tokens"], "dtype": settings["dtype"], "out": f"{workdir}/evaluation",
            "quantization": settings["quantization"], "polarity": polarity if data else config["data"]["polarity"],
        }  # fmt: skip
        if value := mask_value if data else config["data"].get("mask_value"):
            options["mask_value"] = value
        lines.append(["rcgrpo", "evaluate", *(f"--{name}={value}" for name, value in options.items())])
    return [shlex.join(line) for line in lines]
