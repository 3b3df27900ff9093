"""Every number, switch and text in the JSON of a model folder is of its type and range, or is refused by name."""

import json
import math
import shutil
from dataclasses import fields
from pathlib import Path
from unittest.mock import Mock

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from rcgrpo_jax import borders
from rcgrpo_jax.errors import UserError
from rcgrpo_jax.flow import schedule
from rcgrpo_jax.models.config import CLIPTextConfig, MMDiTConfig, T5Config, VAEConfig
from rcgrpo_jax.orbax import ocp
from rcgrpo_jax.weights import load
from rcgrpo_jax.weights.folder_json import Manifest, ModelIndex, SchedulerConfig, TokenizerSettings
from rcgrpo_jax.weights.load import SMALL_EDITOR, ModelFolder
from rcgrpo_jax.weights.networks import abstract_params

DEEP = json.loads("[" * 300 + "]" * 300)
VALUES = ["x", "3", [], [1], None, {}, 1.5, True, 0, -1, 10**9, 10**400, math.nan, math.inf, DEEP]
KINDS = (MMDiTConfig, VAEConfig, CLIPTextConfig, T5Config, SchedulerConfig, ModelIndex)
# What these files say that changes nothing of what is computed here.
IGNORED = {
    "_diffusers_version", "feature_extractor", "image_encoder", "tokenizer", "tokenizer_2", "shift", "architectures",
    "model_type", "bos_token_id", "pad_token_id", "is_encoder_decoder", "force_upcast", "clean_up_tokenization_spaces",
    "tokenizer_class",
}  # fmt: skip


def outcome(call, *args: object) -> tuple[object, str]:
    """What a call gives, or the problem of the `UserError` that it raises; any other error is one of the test."""
    try:
        return call(*args), ""
    except UserError as error:
        return None, error.problem


def is_same(taken: object, value: object) -> bool:
    """Whether a dataclass holds a value of JSON as it is."""
    value = tuple(value) if isinstance(value, list) else value
    return taken == value and isinstance(taken, bool) == isinstance(value, bool)


@pytest.mark.parametrize("kind", KINDS)
def test_a_value_is_taken_as_it_is_or_refused_by_name(kind):
    content = json.loads((SMALL_EDITOR / kind.file).read_text())
    kind.from_json(content)
    known = {f.name for f in fields(kind)}
    for name in content.keys() - IGNORED:
        for value in VALUES:
            found, problem = outcome(kind.from_json, content | {name: value})
            if problem:
                assert name in problem, (name, value)
                assert kind.file in problem
            else:
                taken = getattr(found, name) if name in known else content[name]
                assert is_same(taken, value) or _is_none(kind, name, value), (name, value)


def _is_none(kind: type, name: str, value: object) -> bool:
    """Whether diffusers takes the value of a field for none: its own default, or a switch that is off."""
    defaults = name in ("out_channels", "shift_terminal") and kind is not VAEConfig
    return (defaults and not value) or (value is None and name.startswith("use_") and name != "use_dynamic_shifting")


@pytest.mark.parametrize("name", ["special_tokens_map.json", "tokenizer_config.json"])
def test_settings_of_tokenizers_are_taken_or_refused_by_name(tmp_path, name):
    content = json.loads((SMALL_EDITOR / "tokenizer_2" / name).read_text())
    for field in content.keys() - IGNORED:
        for value in VALUES:
            (tmp_path / name).write_text(json.dumps(content | {field: value}))
            found, problem = outcome(TokenizerSettings.read, tmp_path)
            if problem:
                assert name in problem
                assert field in problem
            elif field.endswith("_token"):
                assert isinstance(value, str) or (value is None and name == "tokenizer_config.json")
            else:
                assert is_same(getattr(found, field), value)


@pytest.mark.parametrize("value", [v for v in VALUES if v != {}])
def test_a_manifest_of_another_form_is_refused(value):
    for field in ("version", "fingerprints"):
        with pytest.raises(UserError, match=rf"rcgrpo\.json: {field}"):
            Manifest.from_json({"version": 1, "fingerprints": {}, field: value})


@pytest.mark.parametrize("value", [1e30, 10**30, 512, 512.0, None])
def test_a_tokenizer_without_a_length_has_fluxs(folder, tmp_path, value):
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model/tokenizer_2/tokenizer_config.json").write_text(json.dumps({"model_max_length": value}))
    assert ModelFolder(tmp_path / "model").max_text_tokens == 512


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scaling_factor": 0}, "scaling_factor: 0 found, greater than 0 wanted"),
        ({"scaling_factor": math.nan}, "scaling_factor: nan found, a finite number wanted"),
        ({"shift_factor": math.inf}, "shift_factor: inf found, a finite number wanted"),
        ({"scaling_factor": None}, "scaling_factor: None found"),
        ({"block_out_channels": []}, "block_out_channels"),
        ({"block_out_channels": [128, 100]}, r"block_out_channels is \(128, 100\); multiples of norm_num_groups 32"),
        ({"layers_per_block": 1000000}, "layers_per_block: 1000000 found"),
        ({"down_block_types": ["AttnDownBlock2D"] * 4}, "down_block_types"),
        ({"latents_mean": [0.1] * 16}, "latents_mean is .* only None is implemented"),
    ],
)
def test_a_vae_that_cannot_be_computed_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        VAEConfig.from_json(changes)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (MMDiTConfig, {"num_layers": 1000000}, "num_layers: 1000000 found, less than or equal to 1000 wanted"),
        (MMDiTConfig, {"num_layers": 0, "num_single_layers": 0}, "num_layers is 0; at least one block"),
        (CLIPTextConfig, {"num_attention_heads": 5}, "hidden_size is 768; a multiple of num_attention_heads 5"),
        (CLIPTextConfig, {"max_position_embeddings": 76}, "max_position_embeddings: 76 found"),
        (CLIPTextConfig, {"eos_token_id": 49408}, "eos_token_id is 49408; a token below vocab_size 49408"),
        (T5Config, {"relative_attention_num_buckets": 33}, "relative_attention_num_buckets is 33; an even number"),
        (T5Config, {"relative_attention_max_distance": 8}, "relative_attention_max_distance is 8; more than a quarter"),
    ],
)
def test_sizes_that_do_not_go_together_are_refused(kind, changes, message):
    with pytest.raises(UserError, match=message):
        kind.from_json(changes)


@pytest.mark.parametrize(
    "changes",
    [
        *({name: True} for name in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")),
        {"time_shift_type": "linear"}, {"stochastic_sampling": True}, {"invert_sigmas": True}, {"shift_terminal": 0.02},
        {"use_dynamic_shifting": False}, {"num_train_timesteps": 100}, {"_class_name": "DDIMScheduler"},
        {"base_shift": "a"}, {"max_shift": math.nan}, {"base_shift": None}, {"max_shift": 1000},
        {"base_image_seq_len": 0}, {"max_image_seq_len": 256},
    ],
)  # fmt: skip
def test_schedules_that_are_not_computed_are_refused_by_name(changes):
    with pytest.raises(UserError, match=rf"scheduler_config\.json: {next(iter(changes))}"):
        SchedulerConfig.from_json({"use_dynamic_shifting": True} | changes)


def test_shifts_beyond_float32_are_refused():
    options = {"base_tokens": 256, "max_tokens": 257, "base_shift": 0.5, "max_shift": 1.15}
    with pytest.raises(UserError, match="28 steps shifted by"):
        schedule.sigmas(28, 4096, **options)
    with pytest.raises(UserError, match="28 steps shifted by"):
        schedule.sigmas(28, 4096, **options | {"max_shift": -1.15})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", r"model_index\.json: \[1\] found; a JSON object"),
        ('{"_class_name": "StableDiffusionPipeline"}', r"model_index\.json: _class_name is 'StableDiffusionPipeline'"),
        ('{"scheduler": ["diffusers", "FlowMatchHeunDiscreteScheduler"]}', "scheduler is .*Heun"),
        ('{"vae": ["diffusers", "AutoencoderTiny"]}', "vae is .*AutoencoderTiny"),
    ],
)
def test_folders_of_other_pipelines_are_refused(tmp_path, content, message):
    (tmp_path / "model_index.json").write_text(content)
    with pytest.raises(UserError, match=message):
        ModelFolder(tmp_path)


# Whole folders


@pytest.fixture
def spoilt(folder, tmp_path):
    """Copies the folder with fields of a file changed."""

    def spoil(file: str, **changes: object) -> ModelFolder:
        for path in folder.rglob("*.json"):
            target = tmp_path / path.relative_to(folder)
            target.parent.mkdir(exist_ok=True)
            shutil.copy(path, target)
        shutil.copy(folder / "tokenizer/merges.txt", tmp_path / "tokenizer")
        content = json.loads((tmp_path / file).read_text())
        (tmp_path / file).write_text(json.dumps(content | changes))
        return ModelFolder(tmp_path)

    return spoil


@pytest.mark.parametrize(
    ("file", "field", "message"),
    [
        ("text_encoder_2/config.json", "d_model", "joint_attention_dim is 64; 96 was wanted, 1 x d_model"),
        ("text_encoder/config.json", "hidden_size", "pooled_projection_dim is 64; 96 was wanted, 1 x hidden_size"),
        ("vae/config.json", "latent_channels", "in_channels is 64; 384 was wanted, 4 x latent_channels"),
    ],
)
def test_networks_of_two_models_are_refused(spoilt, file, field, message):
    model = spoilt(file, **{field: 96})
    for name in ("transformer", Path(file).parent.name):
        with pytest.raises(UserError, match=rf"transformer/config\.json: {message}"):
            model.config(name)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("text_encoder_2/config.json", {"vocab_size": 1000}, "tokenizer_2: token .* vocab_size 1000"),
        ("text_encoder/config.json", {"eos_token_id": 7}, "eos_token_id is 7"),
    ],
)
def test_tokenizers_of_another_model_are_refused(spoilt, file, changes, message):
    with pytest.raises(UserError, match=message):
        spoilt(file, **changes).tokenizers()


def test_sizes_beyond_memory_are_refused_before_weights_are_opened(spoilt):
    model = spoilt("text_encoder/config.json", intermediate_size=10**9)
    with pytest.raises(UserError, match=r"text_encoder with .* parameters takes .* GiB at least"):
        model.load("text_encoder")


@pytest.mark.parametrize(("quantization", "bits"), [("none", 16), ("int8", 8), ("nf4", 4)])
def test_memory_is_counted_in_the_bits_that_parameters_take(folder, monkeypatch, quantization, bits):
    model = ModelFolder(folder)
    count = sum(leaf.size for leaf in jax.tree.leaves(abstract_params("transformer", model.config("transformer"))))
    monkeypatch.setattr(borders, "memory_bytes", lambda: bits * count // 8 - 1)
    with pytest.raises(UserError, match=f"transformer with {count:,} parameters takes"):
        model.load("transformer", jax.numpy.bfloat16, quantization=quantization)
    monkeypatch.setattr(borders, "memory_bytes", lambda: (bits + 1) * count // 8)
    monkeypatch.setattr(load, "TensorFiles", Mock(side_effect=UserError("opened", "")))
    with pytest.raises(UserError, match="opened"):
        model.load("transformer", jax.numpy.bfloat16, quantization=quantization)


# Converted directories


def rewrite(converted: Path, target: Path, change) -> ModelFolder:
    """A converted directory whose CLIP has other parameters."""
    shutil.copytree(converted, target)
    params = flatten_dict(ModelFolder(target).load("text_encoder"))
    change(params)
    shutil.rmtree(target / "text_encoder/params")
    ocp.save(target / "text_encoder/params", unflatten_dict(params))
    return ModelFolder(target)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_found_in_a_converted_directory(converted, tmp_path, bad):
    path = ("text_model", "final_layer_norm", "scale")
    model = rewrite(converted, tmp_path / "model", lambda params: params.update({path: params[path].at[3].set(bad)}))
    with pytest.raises(UserError, match="text_encoder/params: NaN or inf in text_model/final_layer_norm/scale"):
        model.load("text_encoder")


def test_what_the_config_does_not_want_is_found_in_a_converted_directory(converted, tmp_path):
    model = rewrite(converted, tmp_path / "model", lambda params: params.update({("more",): np.zeros(3, np.float32)}))
    with pytest.raises(UserError, match="text_encoder/params: holds more, which its config"):
        model.load("text_encoder")


def test_a_manifest_without_a_fingerprint_says_so(converted, tmp_path):
    shutil.copytree(converted, tmp_path / "model")
    (tmp_path / "model/rcgrpo.json").write_text("{}")
    with pytest.raises(UserError, match=r"rcgrpo\.json: no fingerprint of vae"):
        ModelFolder(tmp_path / "model").fingerprint("vae")
