"""A plan counts the networks of rewards, which every program has beside it."""

import json
from pathlib import Path

import jax
import pytest
import small_run
from ml_collections import ConfigDict

from rcgrpo_jax.options import read_options
from rcgrpo_jax.plan import rewards
from rcgrpo_jax.plan.programs import NAMES, Workload, open_flux
from rcgrpo_jax.plan.text import reward_bytes, table
from rcgrpo_jax.plan.topology import Topology
from rcgrpo_jax.rl.config import validate
from rcgrpo_jax.rl.options import Options

VIT_L_14 = {
    "model_type": "clip", "projection_dim": 768,
    "text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
    "vision_config": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "patch_size": 14,
    },
}  # fmt: skip


@pytest.fixture
def clip(tmp_path) -> Path:
    """A folder with the `config.json` of ViT-L/14 alone."""
    (tmp_path / "config.json").write_text(json.dumps(VIT_L_14))
    return tmp_path


def workload(path: Path | str = "", weight: float = 0.0, watch: str = "") -> Workload:
    config = small_run.make_config(mesh__fsdp=2, watch=watch)
    with config.unlocked():
        config.rewards.clip_text = weight
        config.reward_options.update(
            {name: ConfigDict({"path": str(path)}) for name in ("clip_text", "clip_direction")}
        )
    validate(config, 2)
    topology = Topology("local", tuple(jax.devices()[:2]), None, None)
    return Workload(read_options(Options, config), open_flux(config.model.path), topology)


@pytest.mark.parametrize(("weight", "watch"), [(1.0, ""), (0.0, "clip_direction"), (1.0, "clip_direction")])
def test_a_clip_is_whole_on_every_device_and_held_once_by_every_program(clip, weight, watch):
    planned, without, size = workload(clip, weight, watch), workload(clip), 4 * 427_616_512
    assert {name: planned.held(name) - without.held(name) for name in NAMES} == dict.fromkeys(NAMES, size)
    assert reward_bytes(planned) == {str(clip): size}
    assert reward_bytes(without) == {}
    assert f"rewards   {clip}: 1.59 GiB on every device, in what is held" in table(planned, [], None)


def test_a_clip_that_is_not_on_this_machine_is_said_not_to_be_counted(tmp_path):
    planned = workload(tmp_path / "gone", 1.0)
    assert reward_bytes(planned) == {str(tmp_path / "gone"): None}
    (line,) = (line for line in table(planned, [], None).splitlines() if line.startswith("rewards"))
    assert line == f"rewards   not counted: {tmp_path}/gone: no such folder; that of a CLIP model was wanted."
    assert planned.held("update") == workload().held("update")


def test_no_weights_of_a_clip_on_the_hub_are_asked_for(clip, monkeypatch):
    asked = []
    monkeypatch.setattr("rcgrpo_jax.weights.clip.local_path", lambda path, files: asked.append((path, files)) or clip)
    rewards._shapes("somebody/clip")
    assert asked == [("somebody/clip", ("config.json",))]
