"""A transformer in one file is the folder's, whatever its layout, prefix and neighbours, in float8 too."""

import json
import logging
from pathlib import Path

import bfl_layout
import ml_dtypes
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file
from safetensors.torch import save_file

from rcgrpo_jax.errors import UserError
from rcgrpo_jax.models.config import MMDiTConfig
from rcgrpo_jax.weights import keymap
from rcgrpo_jax.weights.files import TensorFiles
from rcgrpo_jax.weights.load import ModelFolder, on_default_device
from rcgrpo_jax.weights.random_folder import SMALL
from rcgrpo_jax.weights.single_file import open_single_file, read_sizes
from rcgrpo_jax.weights.stored import StoredNetwork

TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
COMFY = "model.diffusion_model."
WEIGHT = "double_blocks.0.img_attn.qkv.weight"
FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.fixture(scope="module")
def layouts(folder) -> dict[str, dict[str, torch.Tensor]]:
    """The small transformer's tensors in both layouts."""
    theirs = load_file(folder / TRANSFORMER)
    ours = bfl_layout.from_diffusers(theirs, SMALL["transformer"])
    return {
        name: {key: torch.from_numpy(np.ascontiguousarray(tensor)) for key, tensor in tensors.items()}
        for name, tensors in (("bfl", ours), ("diffusers", theirs))
    }


def under(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + key: tensor for key, tensor in tensors.items()}


def read(file: Path, folder: Path, dtype=None) -> dict:
    """All leaves of the transformer in a file, by path."""
    reader, _ = open_single_file(file, ModelFolder(folder))
    reader.check()
    found = {leaf.path: np.asarray(reader.read(leaf, dtype, on_default_device)) for leaf in reader.leaves}
    reader.check_finite()
    return found


def assert_is_the_folders(found: dict, folder: Path) -> None:
    wanted = flatten_dict(ModelFolder(folder).load("transformer"))
    assert found.keys() == wanted.keys()
    for path, array in found.items():
        np.testing.assert_array_equal(array, wanted[path], err_msg="/".join(path))


@pytest.mark.parametrize("prefix", ["", COMFY, "diffusion_model.", "transformer.", "net.module."])
@pytest.mark.parametrize("layout", ["bfl", "diffusers"])
def test_every_layout_and_prefix_is_read(layouts, folder, tmp_path, layout, prefix):
    save_file(under(prefix, layouts[layout]), tmp_path / "flux.safetensors")
    assert_is_the_folders(read(tmp_path / "flux.safetensors", folder), folder)


def test_norms_by_their_newer_name_are_read(layouts, folder, tmp_path):
    renamed = {key.replace("_norm.scale", "_norm.weight"): tensor for key, tensor in layouts["bfl"].items()}
    assert renamed.keys() != layouts["bfl"].keys()
    save_file(renamed, tmp_path / "flux.sft")
    assert_is_the_folders(read(tmp_path / "flux.sft", folder), folder)


@pytest.mark.parametrize("prefix", ["", COMFY])
def test_what_lies_beside_the_transformer_is_named_and_left_out(layouts, folder, tmp_path, caplog, prefix):
    beside = {
        "vae.encoder.conv_in.bias": torch.zeros(8),
        "vae.encoder.conv_in.weight": torch.zeros(8, 3, 3, 3),
        "text_encoders.clip_l.logit_scale": torch.zeros(()),
        "text_encoders.t5xxl.shared.weight": torch.zeros(2, 2, dtype=torch.int8),  # not read, whatever it is
    }
    save_file(under(prefix, layouts["bfl"]) | beside, tmp_path / "bundle.safetensors")
    with caplog.at_level(logging.WARNING):
        assert_is_the_folders(read(tmp_path / "bundle.safetensors", folder), folder)
    assert "bundle.safetensors: the transformer is read" in caplog.text
    assert "left out: text_encoders.* (2), vae.* (2)" in caplog.text


def test_of_several_transformers_the_one_that_comfyui_runs_is_read(layouts, folder, tmp_path, caplog):
    averaged = {key: torch.zeros_like(tensor) for key, tensor in layouts["bfl"].items()}
    save_file(under(COMFY, layouts["bfl"]) | under("model_ema.", averaged), tmp_path / "flux.safetensors")
    assert_is_the_folders(read(tmp_path / "flux.safetensors", folder), folder)
    assert f"model_ema.* ({len(averaged)})" in caplog.text
    save_file(under("a.", layouts["bfl"]) | under("b.", averaged), tmp_path / "two.safetensors")
    with pytest.raises(UserError, match=r"holds 2 transformers, a\., b\."):
        open_single_file(tmp_path / "two.safetensors", ModelFolder(folder))


def test_a_tensor_of_no_known_network_is_refused(layouts, folder, tmp_path):
    save_file(layouts["bfl"] | {"adapter.weight": torch.zeros(2)}, tmp_path / "flux.safetensors")
    with pytest.raises(UserError, match=r"unexpected  adapter\.weight"):
        read(tmp_path / "flux.safetensors", folder)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["vae.encoder.conv_in.weight"], "no FLUX transformer"),
        (["double_blocks.0.img_attn.qkv.lora_A.weight"], "a LoRA and no transformer"),
        (["img_in.weight"], "no whole FLUX transformer"),
        (["img_in.weight._data"], "few bits of optimum-quanto"),
    ],
)
def test_other_files_are_called_what_they_are(tmp_path, keys, message):
    save_file({key: torch.zeros(2, 2) for key in keys}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=message):
        open_single_file(tmp_path / "other.safetensors", None)


@pytest.mark.parametrize("config", [MMDiTConfig(), MMDiTConfig(guidance_embeds=False, num_layers=5)])
def test_the_sizes_of_flux_are_read_off_its_tensors(config):
    shapes = bfl_layout.shapes(config)
    assert read_sizes(shapes, keymap.bfl_source, Path("flux.safetensors")) == config


# Float8


def in_float8(
    tensors: dict[str, torch.Tensor], dtype: torch.dtype, name: str, by_row: bool = False
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Matrices in float8 with scales called `name` ("" for none) and all that comes with them; and what they mean."""
    stored, meant = {}, {}
    for key, value in tensors.items():
        stored[key] = meant[key] = value
        if value.ndim < 2:
            continue
        limits = value.abs().amax(dim=1) if by_row else value.abs().max()
        scale = (limits / torch.finfo(dtype).max).float() if name else torch.ones(())
        wide = scale[:, None] if by_row else scale
        stored[key] = (value / wide).to(dtype)
        meant[key] = stored[key].float() * wide
        if name:
            module = key.removesuffix(".weight")
            stored[f"{module}.{name}"] = scale
            stored[f"{module}.{'input_scale' if name == 'weight_scale' else 'scale_input'}"] = torch.ones(())
    return stored, meant


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize(("dtype", "name"), [(FLOAT8[0], "scale_weight"), (FLOAT8[1], "weight_scale")])
def test_float8_weights_are_multiplied_by_their_scales(layouts, folder, tmp_path, dtype, name, by_row):
    stored, meant = in_float8(layouts["bfl"], dtype, name, by_row)
    note = {"format": str(dtype).removeprefix("torch."), "full_precision_matrix_mult": True}
    layer = torch.frombuffer(bytearray(json.dumps(note).encode()), dtype=torch.uint8)
    marks = {"scaled_fp8": torch.zeros(2, dtype=dtype), WEIGHT.replace("weight", "comfy_quant"): layer}
    save_file(under(COMFY, stored | marks), tmp_path / "scaled.safetensors")
    found = StoredNetwork(TensorFiles(tmp_path / "scaled.safetensors"), COMFY)
    assert found.shapes.keys() == meant.keys()
    for key, tensor in meant.items():
        np.testing.assert_array_equal(found.read(key), tensor.numpy(), err_msg=key)
        assert found.dtype(key) == (np.float32 if tensor.ndim < 2 else ml_dtypes.bfloat16)


def test_products_are_rounded_once_to_the_dtype_that_is_stored(layouts, folder, tmp_path):
    stored, meant = in_float8(layouts["bfl"], torch.float8_e4m3fn, "scale_weight")
    save_file(stored, tmp_path / "flux.safetensors")
    found = read(tmp_path / "flux.safetensors", folder)["x_embedder", "kernel"]
    assert found.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(found.astype(np.float32), meant["img_in.weight"].bfloat16().float().numpy().T)


@pytest.mark.parametrize("dtype", FLOAT8)
def test_every_network_of_a_folder_may_be_in_float8(folder, tmp_path, dtype):
    name = "text_encoder_2"
    tensors = {key: torch.from_numpy(value) for key, value in load_file(folder / name / "model.safetensors").items()}
    stored, meant = in_float8(tensors, dtype, "")
    (tmp_path / name).mkdir()
    (tmp_path / name / "config.json").write_bytes((folder / name / "config.json").read_bytes())
    (tmp_path / "model_index.json").write_text("{}")
    save_file(stored, tmp_path / name / "model.safetensors")
    found = ModelFolder(tmp_path).load(name)["shared"]["embedding"]
    assert found.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(np.asarray(found, np.float32), meant["shared.weight"].float().numpy())


@pytest.mark.parametrize("dtype", FLOAT8)
def test_all_codes_of_float8_are_read_as_torch_reads_them(tmp_path, dtype):
    codes = torch.arange(256, dtype=torch.uint8).view(dtype)
    save_file(
        {"before": torch.zeros(3, dtype=torch.uint8), "codes": codes.reshape(2, 128)}, tmp_path / "f8.safetensors"
    )
    found = TensorFiles(tmp_path / "f8.safetensors").read("codes")
    np.testing.assert_array_equal(found.astype(np.float32), codes.float().numpy().reshape(2, 128))


def test_a_scale_that_is_nan_is_found(layouts, folder, tmp_path):
    stored, _ = in_float8(layouts["bfl"], torch.float8_e4m3fn, "scale_weight")
    stored["img_in.scale_weight"] = torch.tensor(float("nan"))
    save_file(stored, tmp_path / "flux.safetensors")
    with pytest.raises(UserError, match=r"NaN or inf   img_in\.weight"):
        read(tmp_path / "flux.safetensors", folder)


def test_a_scale_without_its_weight_is_refused(layouts, folder, tmp_path):
    save_file(layouts["bfl"] | {"final_layer.scale_weight": torch.ones(())}, tmp_path / "flux.safetensors")
    with pytest.raises(UserError, match=r"unexpected  final_layer\.scale_weight"):
        read(tmp_path / "flux.safetensors", folder)


CODES = torch.zeros(4, 4, dtype=torch.uint8)
NOTE = torch.frombuffer(bytearray(b'{"format": "float8_e4m3fn", "convrot": true}'), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("tensors", "kind"),
    [
        ({"img_in.weight": CODES, "img_in.weight.absmax": torch.ones(4)}, "NF4 of bitsandbytes"),
        ({"img_in.weight.quant_state.bitsandbytes__nf4": CODES}, "NF4 of bitsandbytes"),
        ({"img_in.weight": CODES.to(torch.int8), "img_in.SCB": torch.ones(4)}, "int8 of bitsandbytes"),
        ({"img_in.weight": CODES.to(torch.int8), "img_in.weight_scale": torch.ones(())}, "int8"),
        ({"img_in.qweight": CODES, "img_in.wscales": torch.ones(4)}, r"SVDQuant \(nunchaku\)"),
        ({"img_in.qweight": CODES, "img_in.g_idx": torch.ones(4)}, "few bits of GPTQ"),
        ({"img_in.weight": CODES, "img_in.weight_scale_2": torch.ones(())}, "NVFP4"),
        ({"img_in.weight": CODES.to(torch.float8_e4m3fn), "img_in.weight_scale": CODES}, "MXFP8"),
        ({"img_in.weight": CODES.to(torch.float8_e4m3fn), "img_in.weight_scale": torch.ones(2, 2)}, "scales of blocks"),
        ({"img_in.weight._data": CODES, "img_in.weight._scale": torch.ones(())}, "optimum-quanto"),
        ({"img_in._weight_qdata": CODES, "img_in._weight_scale": torch.ones(())}, "torchao"),
        ({"img_in.weight": CODES.to(torch.float8_e4m3fn), "img_in.comfy_quant": NOTE}, "convrot"),
        ({"img_in.weight": CODES.to(torch.float8_e4m3fn), "img_in.comfy_quant": CODES}, "img_in.comfy_quant"),
    ],
)
def test_weights_in_few_bits_of_other_kinds_are_refused_by_name(tmp_path, tensors, kind):
    save_file(tensors, tmp_path / "flux.safetensors")
    with pytest.raises(UserError, match=f"flux.safetensors: weights are stored in .*{kind}") as error:
        StoredNetwork(TensorFiles(tmp_path / "flux.safetensors"))
    assert "bfloat16" in error.value.remedy


def test_a_kind_that_the_header_alone_tells_is_refused(tmp_path):
    note = {"layers": {"img_in": {"format": "int8_tensorwise"}}}
    metadata = {"_quantization_metadata": json.dumps(note)}
    save_file({"img_in.weight": torch.zeros(4, 4)}, tmp_path / "flux.safetensors", metadata)
    with pytest.raises(UserError, match="int8_tensorwise"):
        StoredNetwork(TensorFiles(tmp_path / "flux.safetensors"))
    note["layers"]["img_in"]["format"] = "float8_e4m3fn"
    save_file(
        {"img_in.weight": torch.zeros(4, 4)},
        tmp_path / "flux.safetensors",
        {"_quantization_metadata": json.dumps(note)},
    )
    assert StoredNetwork(TensorFiles(tmp_path / "flux.safetensors")).shapes == {"img_in.weight": (4, 4)}


def test_gguf_is_called_by_its_name(tmp_path):
    (tmp_path / "flux1-kontext-dev-Q4_K_M.gguf").write_bytes(b"GGUF\3\0\0\0")
    with pytest.raises(UserError, match="a GGUF file") as error:
        TensorFiles(tmp_path / "flux1-kontext-dev-Q4_K_M.gguf")
    assert "bfloat16" in error.value.remedy
