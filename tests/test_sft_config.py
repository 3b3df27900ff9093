"""A configuration of supervised training that cannot run is refused by name."""

import functools

import pytest
from ml_collections import ConfigDict

from rcgrpo_jax.errors import UsageError
from rcgrpo_jax.sft.config import MAY_DIFFER, default_config, validate


def make_config(stage: str, **changes) -> ConfigDict:
    """One that can run on one device; `__` stands for dots."""
    config = default_config()
    config.stage = stage
    config.model.update(path="somewhere", dtype="float32")
    config.data.update(path="scenes:train:8", size=(32, 32))
    config.batch.size = 8
    for name, value in changes.items():
        *groups, field = name.split("__")
        functools.reduce(getattr, groups, config)[field] = value
    return config


def problems(devices: int = 1, stage: str = "vae", **changes) -> list[str]:
    """The lines of the refusal; none if there is none."""
    try:
        validate(make_config(stage, **changes), devices)
    except UsageError as error:
        return error.problem.removeprefix("config: ").split("\n        ")
    return []


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"stage": "vea"}, "stage: 'vea' found; one of vae, flow, lora was wanted"),
        ({"data__path": ""}, "data.path: empty; a path was wanted"),
        ({"vae__crop": 48}, "vae.crop: 48; a multiple of 16 up to 32 was wanted"),
        ({"vae__crop": 24}, "vae.crop: 24; a multiple of 16 up to 32 was wanted"),
        ({"vae__crop": -16}, "vae.crop: -16 found; a whole number, 0 to 65536, was wanted"),
        ({"batch__size": 0}, "batch.size: 0 found; a whole number, 1 to 1048576, was wanted"),
        ({"batch__micro_batch": 3}, "batch.size: 8 in micro-batches of 3 does not divide over data x fsdp = 1 devices"),
        ({"data__size": (40, 32)}, "data.size: (40, 32); two multiples of 16 pixels were wanted, 65536 at most"),
        ({"flow__region_weight": -1.0}, "flow.region_weight: -1.0 found; 0 to 1e+09 was wanted"),
        ({"flow__picture_steps": 0}, "flow.picture_steps: 0 found; a whole number, 1 to 10000, was wanted"),
        (
            {"model__quantization": "int8"},
            "model.quantization: 'int8' found; stage vae trains the kernels: none",
        ),
        ({"vae__kl_weight": -1.0}, "vae.kl_weight: -1.0 found; 0 to 1e+09 was wanted"),
        ({"batch__sise": 8}, "batch.sise: no such field; did you mean batch.size?"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_a_configuration_that_cannot_run_is_refused(changes, line):
    assert problems(**changes) == [line]


def test_what_is_right_is_not_refused():
    assert problems() == []
    assert problems(vae__crop=32, batch__micro_batch=2) == []
    assert problems(devices=8, mesh__fsdp=2, mesh__tensor=2, batch__micro_batch=4) == []
    assert problems(devices=8, batch__micro_batch=4) == [
        "batch.size: 8 in micro-batches of 4 does not divide over data x fsdp = 8 devices"
    ]


@pytest.mark.parametrize("stage", ["vae", "flow", "lora"])
def test_a_model_is_needed_but_for_a_new_autoencoder(stage):
    config = make_config(stage, model__path="")
    if stage == "vae":
        validate(config, 1)
    else:
        with pytest.raises(UsageError, match=f"model.path: empty; stage {stage} starts from a model folder"):
            validate(config, 1)


def test_fields_that_may_differ_on_resume_exist():
    for name in MAY_DIFFER:
        functools.reduce(lambda value, part: value[part], name.split("."), default_config())
