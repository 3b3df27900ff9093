"""`lora.init`: a run that starts from a LoRA computes what that LoRA does, and can learn the rest."""

from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import small_run
from flax.traverse_util import flatten_dict, unflatten_dict
from test_lora_files import assert_equal, deltas

from rcgrpo_jax.editors.open import open_model
from rcgrpo_jax.errors import UsageError, UserError
from rcgrpo_jax.models.lora import LoRAConfig, init_adapter, start_from
from rcgrpo_jax.rl import trainer as rl_trainer
from rcgrpo_jax.rl.setup import Setup
from rcgrpo_jax.sft import train as sft
from rcgrpo_jax.sft.config import default_config
from rcgrpo_jax.sft.stages import LoRAStage
from rcgrpo_jax.weights.lora import save_lora


def shapes() -> dict:
    return open_model(small_run.model_folder()).param_shapes


def given(rank: int, targets: str) -> dict:
    """An adapter that does something, its scale folded in."""
    rng = np.random.default_rng(rank)
    fresh = flatten_dict(init_adapter(jax.random.key(1), shapes(), LoRAConfig(rank, rank, targets)))
    return unflatten_dict({path: rng.standard_normal(x.shape).astype(np.float32) for path, x in fresh.items()})


@pytest.mark.parametrize(("rank", "targets"), [(4, "attention"), (2, "attention"), (4, ".*/attn/to_q")])
def test_the_update_is_the_given_one_and_what_is_free_can_learn(rank, targets):
    config = LoRAConfig(4, 10.0, "attention")
    fresh, other = init_adapter(jax.random.key(0), shapes(), config), given(rank, targets)
    started = start_from(fresh, other, config)
    assert_equal(deltas(started, config.scale), deltas(other))
    flat, before = flatten_dict(started), flatten_dict(fresh)
    assert flat.keys() == before.keys()
    for path, x in flat.items():
        assert x.shape == before[path].shape
        if path[-1] == "A":
            assert np.all(np.any(x != 0, axis=-2))  # else B would have no gradient


def test_a_layer_without_factors_keeps_its_fresh_ones():
    config = LoRAConfig(4, 8.0, "attention")
    fresh, other = init_adapter(jax.random.key(0), shapes(), config), given(4, "attention")
    for factor in other["single_transformer_blocks"]["attn"]["to_q"].values():
        factor[0] = 0
    started = start_from(fresh, other, config)
    path = ("single_transformer_blocks", "attn", "to_q", "A")
    np.testing.assert_array_equal(flatten_dict(started)[path][0], flatten_dict(fresh)[path][0])
    assert_equal(deltas(started, 2.0), deltas(other))


@pytest.mark.parametrize(
    ("rank", "targets", "problem"),
    [
        (4, "attention+mlp", r"adapts \d kernels outside lora.targets = 'attention': .*proj_mlp"),
        (8, "attention", "has rank 8; lora.rank is 4"),
    ],
)
def test_what_does_not_fit_is_refused(rank, targets, problem):
    config = LoRAConfig(4, 8.0, "attention")
    with pytest.raises(UsageError, match=problem):
        start_from(init_adapter(jax.random.key(0), shapes(), config), given(rank, targets), config)


def saved(folder: Path) -> Path:
    config = LoRAConfig(4, 8.0, "attention")
    return save_lora(folder, given(4, "attention"), config, shapes(), dtype="float32")


def test_training_starts_from_it_and_a_resumed_run_needs_it_no_more(tmp_path, monkeypatch):
    file = saved(tmp_path / "lora")
    config = small_run.make_config(lora__init=str(file), optimizer__ema_decay=0.9)

    def save_at_once(state, step, config, described, workdir, checkpointer, *rest):
        checkpointer.save(2, state, described, force=True)
        checkpointer.wait()
        return state

    for owner, name in ((Setup, "encode"), (Setup, "load_editor"), (rl_trainer, "Trainer")):  # which take a step
        monkeypatch.setattr(owner, name, lambda *_: SimpleNamespace(source=SimpleNamespace(digest="0")))
    monkeypatch.setattr(rl_trainer, "run_steps", save_at_once)
    state = rl_trainer.train(config, tmp_path / "run", jax.devices()[:1])
    for adapter in (state.params, state.ema):
        assert_equal(deltas(adapter, 2.0), deltas(given(4, "attention"), 2.0))
    file.unlink()
    resumed = rl_trainer.train(config, tmp_path / "run", jax.devices()[:1])
    jax.tree.map(np.testing.assert_array_equal, resumed.params, state.params)
    with pytest.raises(UserError, match="does not exist"):
        rl_trainer.train(config, tmp_path / "another", jax.devices()[:1])


def test_supervised_training_starts_from_it_too(tmp_path, monkeypatch):
    config, ours = default_config(), small_run.make_config(lora__init=str(saved(tmp_path / "lora")))
    config.stage, config.model, config.lora, config.data = "lora", ours.model, ours.lora, ours.data
    config.data.path, config.batch.size = "scenes:train:4", 2
    monkeypatch.setattr(LoRAStage, "batches", lambda self: SimpleNamespace(source=SimpleNamespace(digest="0")))
    monkeypatch.setattr(sft, "make_step", lambda *_: None)
    monkeypatch.setattr(sft, "run_steps", lambda state, *_: state.replace(step=np.int32(100)))
    monkeypatch.setattr(sft, "_save", lambda stage, state, batches: state)
    state = sft.train_supervised(config, tmp_path / "run", jax.devices()[:1])
    assert_equal(deltas(state.params, 2.0), deltas(given(4, "attention"), 2.0))


def test_a_stage_without_a_lora_refuses_it():
    config = default_config()
    config.stage, config.lora.init, config.data.path = "vae", "a.safetensors", "scenes:train:4"
    with pytest.raises(UsageError, match=r"lora.init: 'a.safetensors' found; stage vae trains no LoRA"):
        sft.validate(config, 1)
