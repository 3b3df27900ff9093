"""LoRA files at the borders: what float32 does not hold, dtypes of no use, settings that miss, odd paths."""

import json
import struct
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from test_lora import random_adapter
from test_lora_files import FOUND_FORMS, Q0, SHAPES, assert_equal, deltas

from rcgrpo_jax.errors import UsageError, UserError
from rcgrpo_jax.models.lora import LoRAConfig, init_adapter, start_from, target_kernels
from rcgrpo_jax.weights.lora import load_lora, load_loras, save_lora


def settings(**values) -> dict[str, str]:
    return {"lora_adapter_metadata": json.dumps({f"transformer.{name}": value for name, value in values.items()})}


def ours(alpha: float) -> dict[str, str]:
    return {"rcgrpo_jax": json.dumps({"rank": 4, "alpha": alpha, "targets": "attention"})}


@pytest.mark.parametrize(
    "header", [settings(r=4, lora_alpha=1e308), ours(1e300), ours(1e-300), ours(1e-38)], ids=lambda header: str(header)
)
def test_a_scale_that_float32_does_not_hold_is_refused(tmp_path, header):
    save_file(FOUND_FORMS.peft()[0], tmp_path / "a.safetensors", header)
    with pytest.raises(UserError, match="is not finite at a scale of"):
        load_lora(tmp_path, SHAPES)


@pytest.mark.parametrize("strength", [1e300, 3e38])
def test_a_strength_that_float32_does_not_hold_is_refused(tmp_path, strength):
    save_file(FOUND_FORMS.peft()[0], tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"is not finite at a scale of (1e\+300|3e\+38)"):
        load_loras([tmp_path], [strength], SHAPES)


def save_raw(file: Path, tensors: dict[str, np.ndarray], more: tuple[str, str, bytes]) -> None:
    """A file with one tensor more, (key, dtype, bytes), of a dtype that numpy may not have."""
    save_file(tensors, file)
    content = file.read_bytes()
    start = 8 + struct.unpack("<Q", content[:8])[0]
    header, end = json.loads(content[8:start]), len(content) - start
    key, dtype, data = more
    shape = [2] if dtype == "F4" else [1]
    header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(data)]}
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[start:] + data)


@pytest.mark.parametrize(("dtype", "size"), [("BOOL", 1), ("C64", 8), ("F8_E8M0", 1), ("F8_E4M3FNUZ", 1), ("F4", 1)])
@pytest.mark.parametrize(("name", "message"), [("alpha", "alpha in .* is {}; one of"), ("diff_b", "full change")])
def test_dtypes_that_are_no_real_numbers_are_refused(tmp_path, name, message, dtype, size):
    save_raw(tmp_path / "a.safetensors", FOUND_FORMS.peft()[0], (f"{Q0}.{name}", dtype, b"\0" * size))
    with pytest.raises(UserError, match=message.format(dtype)):
        load_lora(tmp_path, SHAPES)


def test_a_whole_number_is_an_alpha(tmp_path):
    tensors, _, wanted = FOUND_FORMS.with_alphas()
    tensors = {key: x.astype(np.int64) if key.endswith("alpha") else x for key, x in tensors.items()}
    save_file(tensors, tmp_path / "a.safetensors")
    adapter, config = load_lora(tmp_path, SHAPES)
    assert_equal(deltas(adapter, config.scale), wanted)


@pytest.mark.parametrize("known", [{"r": 4}, {"r": 4, "use_rslora": True}])
def test_settings_without_an_alpha_have_that_of_peft(tmp_path, known):
    tensors, _, wanted = FOUND_FORMS.peft()
    save_file(tensors, tmp_path / "a.safetensors", settings(**known))
    scale = 8 / (2 if "use_rslora" in known else 4)
    adapter, config = load_lora(tmp_path, SHAPES)
    assert_equal(deltas(adapter, config.scale), {module: scale * x for module, x in wanted.items()})


@pytest.mark.parametrize("setting", ["rank_pattern", "alpha_pattern"])
def test_patterns_for_names_that_the_file_does_not_have_are_refused(tmp_path, setting):
    tensors, _, _ = FOUND_FORMS.bfl("lora_unet_{}", "lora_down.weight", "lora_up.weight", dots=False)
    save_file(tensors, tmp_path / "a.safetensors", settings(r=4, lora_alpha=4, **{setting: {"attn.to_q": 8}}))
    with pytest.raises(UserError, match=r"'attn.to_q' a rank or alpha of its own.* lora_unet_double_blocks_0_img_attn"):
        load_lora(tmp_path, SHAPES)


@pytest.mark.parametrize("pattern", ["a{99999999999999999999}", "(" * 3000 + ")" * 3000])
def test_a_pattern_that_python_does_not_compile_is_refused(tmp_path, pattern):
    save_file(FOUND_FORMS.peft()[0], tmp_path / "a.safetensors", settings(alpha_pattern={pattern: 8}))
    with pytest.raises(UserError, match="no regular expression"):
        load_lora(tmp_path, SHAPES)
    with pytest.raises(UsageError, match="is not a regular expression"):
        target_kernels(SHAPES, pattern)


@pytest.mark.parametrize("form", ["kohya", "comfyui"])
def test_our_own_file_is_read_whole_after_another_program_changed_it(tmp_path, form):
    """Such as one that merges LoRAs and keeps the header: fused layers have no columns of their own any more."""
    config = LoRAConfig(4, 8.0)
    file = save_lora(tmp_path / "ours", random_adapter(SHAPES, config), config, SHAPES, form, "float32")
    rng = np.random.default_rng(0)
    tensors = {k: rng.standard_normal(x.shape, np.float32) if "up" in k else x for k, x in load_file(file).items()}
    with safe_open(file, framework="np") as handle:
        save_file(tensors, tmp_path / "ours.safetensors", handle.metadata())
    save_file(tensors, tmp_path / "plain.safetensors")
    found, wanted = (load_loras([tmp_path / f"{name}.safetensors"], [1.0], SHAPES) for name in ("ours", "plain"))
    assert_equal(deltas(found), deltas(wanted))


def test_fused_layers_of_zeros_change_nothing(tmp_path):
    tensors, _, _ = FOUND_FORMS.bfl("diffusion_model.{}", "lora_A.weight", "lora_B.weight", chosen=lambda n: "qkv" in n)
    save_file({key: x * ("lora_A" in key) for key, x in tensors.items()}, tmp_path / "a.safetensors")
    given = load_loras([tmp_path], [1.0], SHAPES)
    assert deltas(given) == {}
    config = LoRAConfig(4, 8.0)
    fresh = init_adapter(jax.random.key(0), SHAPES, config)
    assert deltas(start_from(fresh, given, config)) == {}


def test_odd_paths_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"cannot be read .File name too long"):
        load_lora("a" * 5000, SHAPES)
    (tmp_path / "a.safetensors").mkdir()
    save_file(FOUND_FORMS.peft()[0], tmp_path / "a.safetensors" / "b.safetensors")
    with pytest.raises(UserError, match=r"nor another .safetensors file in that folder"):
        load_lora(tmp_path, SHAPES)
    load_lora(tmp_path / "a.safetensors", SHAPES)


def test_two_adapters_in_one_file_are_refused_by_their_keys(tmp_path):
    tensors = FOUND_FORMS.peft("{}.lora_{}.one.weight")[0] | FOUND_FORMS.peft("{}.lora_{}.two.weight")[0]
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"under two names, '.*to_k.lora_A.one.weight' and '.*to_k.lora_A.two.weight'"):
        load_lora(tmp_path, SHAPES)
