"""What a run has saved about itself is checked where it is read: every value of its type, none missing for its age."""

import json
from pathlib import Path

import numpy as np
import pytest

from rcgrpo_jax.errors import UserError
from rcgrpo_jax.experiments.saved_runs import read_saved_config
from rcgrpo_jax.models.lora import LoRAConfig
from rcgrpo_jax.report.run_record import config_script, facts, read_run
from rcgrpo_jax.rl import config as rl_config
from rcgrpo_jax.rl.config import default_config
from rcgrpo_jax.runs.checkpoint import Checkpointer
from rcgrpo_jax.runs.differences import ADDED, check_same_config
from rcgrpo_jax.runs.metrics import read_metrics
from rcgrpo_jax.runs.run import restore
from rcgrpo_jax.sft import config as sft_config

NESTED = "[" * 100_000 + "]" * 100_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint with the defaults; its description is what the tests change."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    with Checkpointer(folder, save_every=1, keep=1) as checkpointer:
        checkpointer.save(1, {"x": np.zeros(1)}, default_config().to_dict() | {"data_digest": "d"})
    return folder


@pytest.fixture
def described(folder):
    """Writes another configuration into the checkpoint's description."""
    file = folder / "1" / "_CHECKPOINT_METADATA"
    before = file.read_text()

    def write(config) -> Checkpointer:
        found = json.loads(before)
        found["custom_metadata"]["config"] = config
        file.write_text(json.dumps(found).replace('"NESTED"', NESTED))
        return Checkpointer(folder, save_every=1, keep=1)

    yield write
    file.write_text(before)


def with_value(field: str, value) -> dict:
    """The defaults as JSON, with another value."""
    config = json.loads(json.dumps(default_config().to_dict()))
    *groups, name = field.split(".")
    group = config
    for part in groups:
        group = group[part]
    group[name] = value
    return config


def test_what_was_saved_comes_back(described):
    saved = json.loads(json.dumps(default_config().to_dict())) | {"data_digest": "d"}
    assert read_saved_config(described(saved)) == saved


WRONG = {
    "lora.rank": (0, -1, 4.5, True, "4", None, [4], {}, {"a": 1}),
    "lora.alpha": (0, -1.0, True, "4", None, [4], {"a": 1}, float("nan"), float("inf")),
    "model.path": (1, None, [], {"a": "b"}),
    "data.size": (512, "512", [512], [512, 0], [512, 512.0], {"0": 1}),
    "explore.kind": ("regoin", None, 1, {}),
    "acd.reference_keys": (0, "no", None),
    "rewards.colour": (True, "1", None),
    "train.num_steps": (0, 1.5, "many"),
    "lora": (None, 1, "text", [1]),
    "rewards": (None, 1),
    "seed": (-1, 0.5, {"a": {"b": 1}}),
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in WRONG.items() for value in values])
def test_a_value_that_is_none_of_its_field_is_named(described, field, value):
    with pytest.raises(UserError) as refused:
        read_saved_config(described(with_value(field, value)))
    assert f"checkpoints/1: its configuration: {field}: " in refused.value.problem
    assert " wanted" in refused.value.problem


@pytest.mark.parametrize("config", [with_value("seed", "NESTED"), None, 1, [], "text"])
def test_a_description_that_is_none_is_named(described, config):
    with pytest.raises(UserError, match=r"checkpoints/1: the checkpoint cannot be read"):
        read_saved_config(described(config))


def test_a_run_that_is_older_than_a_field_has_its_default(described):
    old = with_value("seed", 3)
    del old["optimizer"]["ema_decay"], old["surrogate"]["weighting"], old["acd"], old["reward_options"]["oracle"]
    old["objective"]["background_weight"] = old["lora"]["dropout"] = 0.5  # which are no more
    found = read_saved_config(described(old))
    now = default_config().to_dict()
    assert found["optimizer"]["ema_decay"] == now["optimizer"]["ema_decay"]
    assert found["acd"] == now["acd"]
    assert found["rewards"] == now["rewards"]
    del found["objective"]["background_weight"]
    assert LoRAConfig(**found["lora"]) == LoRAConfig(**now["lora"])
    check_same_config(found, now | {"seed": 3}, ("reward_options",))


def test_a_run_that_is_older_than_a_field_has_what_runs_did_then(described, monkeypatch):
    """Whatever the default is today."""
    monkeypatch.setitem(ADDED, "optimizer.eps", 1e-6)
    old = with_value("seed", 3)
    del old["optimizer"]["eps"]
    assert read_saved_config(described(old))["optimizer"]["eps"] == 1e-6


def test_an_older_run_goes_on(described):
    old = json.loads(json.dumps(default_config().to_dict()))
    del old["optimizer"]["ema_decay"], old["rollout"]["solver"]
    for name in ("change", "lpips", "clip_text", "clip_direction"):
        del old["reward_options"][name]
    checkpointer = described(old)
    assert restore(checkpointer, {"x": np.ones(1)}, default_config().to_dict(), rl_config, ())["x"] == 0


def test_rewards_are_those_of_the_run(described):
    """A file that replaces them, or a program that registers its own, leaves others."""
    saved = read_saved_config(described(with_value("rewards", {"mine": 1})))
    assert saved["rewards"] == {"mine": 1}
    assert "mine (weight 1)" in facts(read_run(described(saved).directory.parent))["Rewards"]


def test_supervised_training_has_its_own_fields(described):
    old = json.loads(json.dumps(sft_config.default_config().to_dict()))
    del old["save_dtype"]
    checkpointer = described(old)
    assert read_saved_config(checkpointer)["save_dtype"] == "float32"
    assert "from rcgrpo_jax.sft.config import" in config_script(read_saved_config(checkpointer))
    with pytest.raises(UserError, match=r"its configuration: stage: 'vea' found; one of vae, flow, lora"):
        read_saved_config(described(old | {"stage": "vea"}))


# metrics.jsonl


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("step", '"1"', "line 2.step: '1' found, "),
        ("step", "1.5", "line 2.step: 1.5 found, "),
        ("step", "true", "line 2.step: True found, "),
        ("step", "-1", "line 2.step: -1 found, greater than or equal to 0 wanted"),
        ("step", "null", "line 2.step: None found, "),
        ("time", "null", "line 2.time: None found, "),
        ("time", "1e30", "line 2.time: 1e+30 found, "),
        ("loss", '"low"', "line 2.loss: 'low' found, a valid number wanted"),
        ("loss", "false", "line 2.loss: False found, "),
        ("loss", "[1]", "line 2.loss: [1] found, "),
        ("loss", "1e999", "line 2.loss: inf found, "),
        ("loss", "{}", "line 2.loss: {} found, "),
    ],
)
@pytest.mark.parametrize("last", [False, True])
def test_a_metric_that_is_no_number_is_named_with_its_line(tmp_path, field, value, wanted, last):
    """Also in the last line, which is whole: a kill would have torn it off."""
    values = {"step": "2", "time": "1.5", "loss": "0.5"} | {field: value}
    line = ", ".join(f'"{name}": {x}' for name, x in values.items())
    file = tmp_path / "metrics.jsonl"
    file.write_text(f'{{"step": 1}}\n{{{line}}}\n' + ('{"step": 3}\n' if not last else ""))
    with pytest.raises(UserError, match=r"metrics\.jsonl:") as refused:
        read_metrics(file)
    assert wanted in refused.value.problem


def test_a_line_that_is_nested_without_end_is_named(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text(f'{{"step": 1}}\n{{"step": {NESTED}}}\n{{"step": 3}}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: not a JSON object with a step"):
        read_metrics(file)


def test_metrics_may_be_null_and_whole(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time": 5, "loss": null, "count": 3}\n')
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "time": 5, "loss": None, "count": 3}]
