"""A run that no memory here could hold is refused by its field before anything is read."""

import jax
import pytest
import small_run

from rcgrpo_jax.editors.open import open_model
from rcgrpo_jax.errors import UserError
from rcgrpo_jax.models.lora import LoRAConfig, target_kernels
from rcgrpo_jax.options import OptimizerOptions, read_options
from rcgrpo_jax.rl.setup import check_sizes
from rcgrpo_jax.rl.trainer import train
from rcgrpo_jax.runs.sizes import adapter_numbers, candidate_bytes
from rcgrpo_jax.runs.state import init_state
from rcgrpo_jax.sft import config as sft_config
from rcgrpo_jax.sft.options import Options
from rcgrpo_jax.sft.sizes import check_stage


@pytest.fixture(autouse=True)
def sixteen_gib(monkeypatch):
    monkeypatch.setattr("rcgrpo_jax.borders.memory_bytes", lambda: 16 * 2**30)


def test_what_is_counted_of_a_lora_is_what_it_has():
    lora, params = LoRAConfig(rank=4), open_model(small_run.model_folder()).param_shapes
    adapter = jax.eval_shape(lambda: init_state(lora, OptimizerOptions(), 0, params)).params
    kernels = target_kernels(params, lora.targets).values()
    assert adapter_numbers(kernels, lora.rank) == sum(x.size for x in jax.tree.leaves(adapter))


def test_what_is_counted_of_a_candidate_is_states_and_picture():
    model = open_model(small_run.model_folder())
    assert candidate_bytes((64, 64), model, 4) == 4 * (5 * 16 * 64 + 64 * 64 * 3)


def test_what_fits_is_let_through():
    check_sizes(small_run.make_options(), open_model(small_run.model_folder()))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data__size": (65536, 65536)}, "data.size: a picture of 65536 x 65536 pixels takes"),
        ({"rollout__group_size": 2**20}, "rollout: 2 prompts x 1048576 candidates of 4 steps takes"),
        ({"rollout__prompts": 2**20}, "rollout: 1048576 prompts x 4 candidates of 4 steps takes"),
        ({"lora__rank": 2**16, "lora__targets": "all-linear", "optimizer__ema_decay": 0.9}, "lora.rank: 65536"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_post_training_that_cannot_fit_names_its_field(monkeypatch, tmp_path, changes, words):
    if "lora__rank" in changes:
        monkeypatch.setattr("rcgrpo_jax.borders.memory_bytes", lambda: 2**30)
    config = small_run.make_config(mesh__data=1, **changes)
    with pytest.raises(UserError, match=r"GiB at least; this machine has") as refused:
        train(config, tmp_path / "run", devices=jax.devices()[:1])
    assert refused.value.problem.startswith(words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch": {"size": 2**20}}, "batch.size: 1048576 sources and targets of 512 x 512 pixels takes"),
        ({"flow": {"picture_steps": 10_000}, "data": {"size": (8192, 8192)}}, "flow.picture_steps: 10000 of 8192"),
    ],
)
def test_supervised_training_too(changes, words):
    config = sft_config.default_config()
    for group, fields in changes.items():
        config[group].update(fields)
    with pytest.raises(UserError) as refused:
        check_stage(read_options(Options, config), open_model(small_run.model_folder()))
    assert refused.value.problem.startswith(words)
