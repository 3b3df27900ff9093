"""Every tensor of a released file has its place in our trees: at full size by name, at small size by value."""

import json
from collections import Counter, defaultdict
from functools import cache, partial
from pathlib import Path

import bfl_layout
import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from references import Reference, diffusers, torch, transformers
from safetensors.numpy import load_file, save_file

from rcgrpo_jax.errors import UserError
from rcgrpo_jax.models.config import MMDiTConfig
from rcgrpo_jax.weights import keymap
from rcgrpo_jax.weights.export import diffusers_tensors
from rcgrpo_jax.weights.files import TensorFiles
from rcgrpo_jax.weights.load import ModelFolder
from rcgrpo_jax.weights.networks import NETWORKS, abstract_params
from rcgrpo_jax.weights.random_folder import SMALL, build

FLUX_VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
CLIP_VIT_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
T5_XXL = {
    "vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip
RELEASED = {
    "transformer": lambda: diffusers.FluxTransformer2DModel(guidance_embeds=True),
    "vae": lambda: diffusers.AutoencoderKL(**FLUX_VAE),
    "text_encoder": lambda: transformers.CLIPTextModel(transformers.CLIPTextConfig(**CLIP_VIT_L)),
    "text_encoder_2": lambda: transformers.T5EncoderModel(transformers.T5Config(**T5_XXL)),
}


@cache
def released_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Key and shape of every tensor of a full-size network, from the library that released it."""
    with torch.device("meta"):
        state = RELEASED[name]().state_dict()
    prefix = "text_model." if name == "text_encoder" else ""  # in released files, not in what transformers 5 saves
    return {prefix + key: tuple(value.shape) for key, value in state.items()}


def tensors_of(folder: Path, name: str) -> dict[str, np.ndarray]:
    return load_file(folder / name / f"{NETWORKS[name].file}.safetensors")


def network_folder(path: Path, folder: Path, name: str, tensors: dict[str, np.ndarray]) -> ModelFolder:
    """A model folder with one network, of the config of `folder` and these tensors."""
    (path / name).mkdir(parents=True)
    (path / "model_index.json").write_text("{}")
    (path / name / "config.json").write_text((folder / name / "config.json").read_text())
    save_file(tensors, path / name / f"{NETWORKS[name].file}.safetensors")
    return ModelFolder(path)


def assert_same(found: dict, wanted: dict) -> None:
    found, wanted = flatten_dict(found), flatten_dict(wanted)
    assert found.keys() == wanted.keys()
    for path, array in wanted.items():
        assert found[path].dtype == array.dtype
        np.testing.assert_array_equal(np.asarray(found[path]), np.asarray(array), err_msg="/".join(path))


@pytest.mark.parametrize("name", NETWORKS)
def test_every_tensor_of_the_released_network_fills_one_place_of_ours(name):
    network = NETWORKS[name]
    leaves = keymap.leaves(abstract_params(name, network.config()))
    wanted = {key: shape for key, shape in released_shapes(name).items() if key not in network.ignored}
    assert keymap.expected_tensors(leaves) == wanted
    assert set(Counter(source.key for leaf in leaves for source in leaf.sources).values()) == {1}


def test_the_full_transformer_has_its_published_number_of_parameters():
    params = abstract_params("transformer", MMDiTConfig())
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 11_901_408_320


def test_shapes_are_the_caller_s_own():
    params = abstract_params("transformer", MMDiTConfig())
    del params["x_embedder"]
    assert "x_embedder" in abstract_params("transformer", MMDiTConfig())


@pytest.mark.parametrize("guidance", [True, False])
def test_every_row_of_the_single_file_fills_one_place_of_ours(guidance):
    config = MMDiTConfig(guidance_embeds=guidance)
    leaves = keymap.leaves(abstract_params("transformer", config), partial(keymap.bfl_source, width=config.width))
    wanted = bfl_layout.shapes(config)
    assert keymap.expected_tensors(leaves) == wanted
    rows = defaultdict(list)
    for leaf in leaves:
        for source in leaf.sources:
            stop = source.stop or leaf.tensor_shape[0]
            assert stop - source.start == leaf.tensor_shape[0]
            rows[source.key].append((source.start, stop))
    for key, parts in rows.items():
        starts, stops = zip(*sorted(parts), strict=True)
        assert (0, *stops) == (*starts, wanted[key][0]), key


def test_the_single_file_is_read_as_diffusers_reads_it():
    config = MMDiTConfig(num_layers=2, num_single_layers=3)  # the width is fixed in diffusers' converter
    rng = np.random.default_rng(0)
    shapes = {key: (rows, *(2 for _ in rest)) for key, (rows, *rest) in bfl_layout.shapes(config).items()}
    tensors = {key: rng.standard_normal(shape, np.float32) for key, shape in shapes.items()}
    single_files = Reference("diffusers.loaders.single_file_utils")
    theirs = single_files.convert_flux_transformer_checkpoint_to_diffusers(
        {key: torch.from_numpy(tensor) for key, tensor in tensors.items()}
    )
    for key, tensor in theirs.items():
        source = keymap.bfl_source(key, config.width)
        np.testing.assert_array_equal(source.cut(tensors[source.key]), tensor.numpy(), err_msg=key)
    assert set(theirs) == set(keymap.expected_tensors(keymap.leaves(abstract_params("transformer", config))))


def test_fused_rows_are_split_in_the_order_of_the_release():
    width = 3
    fused = np.arange(7 * width)
    parts = {
        name: keymap.bfl_source(f"single_transformer_blocks.5.{name}.bias", width)
        for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    }
    assert {source.key for source in parts.values()} == {"single_blocks.5.linear1.bias"}
    assert [source.cut(fused).tolist() for source in parts.values()] == [
        [0, 1, 2], [3, 4, 5], [6, 7, 8], list(range(9, 21)),
    ]  # fmt: skip
    value = keymap.bfl_source("transformer_blocks.0.attn.add_v_proj.weight", width)
    assert (value.key, value.start, value.stop) == ("double_blocks.0.txt_attn.qkv.weight", 6, 9)
    shift_and_scale = keymap.bfl_source("norm_out.linear.bias", width).cut(np.array([1, 2, 3, 10, 20, 30]))
    assert shift_and_scale.tolist() == [10, 20, 30, 1, 2, 3]


@pytest.mark.parametrize("name", NETWORKS)
def test_export_is_the_inverse_of_loading(folder, name):
    tensors = tensors_of(folder, name)
    exported = diffusers_tensors(ModelFolder(folder).load(name))
    assert exported.keys() == tensors.keys()
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(exported[key], tensor, err_msg=key)


def test_kernels_are_transposed_and_layers_stacked(folder):
    params, tensors = ModelFolder(folder).load("transformer"), tensors_of(folder, "transformer")
    kernel = np.asarray(params["single_transformer_blocks"]["proj_mlp"]["kernel"])
    np.testing.assert_array_equal(kernel[3], tensors["single_transformer_blocks.3.proj_mlp.weight"].T)
    params, tensors = ModelFolder(folder).load("vae"), tensors_of(folder, "vae")
    kernel = np.asarray(params["encoder"]["conv_in"]["kernel"])
    np.testing.assert_array_equal(kernel[2, 0], tensors["encoder.conv_in.weight"][:, :, 2, 0].T)


def test_diffusers_loads_the_small_folder(folder):
    theirs = diffusers.FluxTransformer2DModel.from_pretrained(folder / "transformer").state_dict()
    ours = tensors_of(folder, "transformer")
    assert theirs.keys() == ours.keys()
    assert all(np.array_equal(tensor, theirs[key].numpy()) for key, tensor in ours.items())


@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
def test_half_precision_is_kept_or_cast_on_request(folder, tmp_path, stored):
    dtype = jax.numpy.dtype(stored)
    tensors = {key: tensor.astype(dtype) for key, tensor in tensors_of(folder, "text_encoder").items()}
    model = network_folder(tmp_path, folder, "text_encoder", tensors)
    kept = model.load("text_encoder")
    assert {leaf.dtype for leaf in jax.tree.leaves(kept)} == {dtype}
    assert_same(model.load("text_encoder", np.float32), jax.tree.map(lambda x: np.asarray(x, np.float32), kept))


def test_clip_loads_with_and_without_its_prefix_and_with_the_old_buffer(folder, tmp_path):
    tensors = tensors_of(folder, "text_encoder")
    wanted = ModelFolder(folder).load("text_encoder")
    bare = {key.removeprefix("text_model."): tensor for key, tensor in tensors.items()}
    assert not bare.keys() & tensors.keys()
    assert_same(network_folder(tmp_path / "bare", folder, "text_encoder", bare).load("text_encoder"), wanted)
    buffer = {"text_model.embeddings.position_ids": np.arange(77)[None]}
    old = network_folder(tmp_path / "old", folder, "text_encoder", tensors | buffer)
    assert_same(old.load("text_encoder"), wanted)


def test_t5_loads_with_the_second_copy_of_its_embedding(folder, tmp_path):
    tensors = tensors_of(folder, "text_encoder_2")
    tied = tensors | {"encoder.embed_tokens.weight": tensors["shared.weight"]}
    model = network_folder(tmp_path, folder, "text_encoder_2", tied)
    assert_same(model.load("text_encoder_2"), ModelFolder(folder).load("text_encoder_2"))


PLAIN = ("diffusion_pytorch_model-{:05}-of-{:05}.safetensors", "diffusion_pytorch_model.safetensors.index.json")
FP16 = "diffusion_pytorch_model.safetensors.index.fp16.json"
BF16 = "diffusion_pytorch_model.safetensors.index.bf16.json"


def shard(path: Path, tensors: dict[str, np.ndarray], count: int, names: tuple[str, str] = PLAIN) -> None:
    """Writes tensors round robin into `count` files, with the index of diffusers; `names` are of both."""
    files = [names[0].format(i + 1, count) for i in range(count)]
    for i, name in enumerate(files):
        save_file(dict(list(tensors.items())[i::count]), path / name)
    weight_map = {key: files[i % count] for i, key in enumerate(tensors)}
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (path / names[1]).write_text(json.dumps(index))


@pytest.mark.parametrize(
    "names",
    [
        PLAIN,
        ("diffusion_pytorch_model.fp16-{:05}-of-{:05}.safetensors", FP16),
        ("diffusion_pytorch_model-{:05}-of-{:05}.fp16.safetensors", FP16),
        ("diffusion_pytorch_model.bf16-{:05}-of-{:05}.safetensors", BF16),
    ],
)
def test_a_sharded_set_loads_as_one_file_does(folder, tmp_path, names):
    tensors = tensors_of(folder, "vae")
    shard(tmp_path, tensors, 3, names)
    files = TensorFiles(tmp_path)
    assert files.shapes == {key: tensor.shape for key, tensor in tensors.items()}
    assert all(np.array_equal(files.read(key), tensor) for key, tensor in tensors.items())


ONE = {"weight": np.ones(2, np.float32)}
OTHER = {"weight": np.zeros(2, np.float16)}


@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model"])
def test_a_variant_that_is_alone_is_read(tmp_path, stem):
    save_file(OTHER, tmp_path / f"{stem}.bf16.safetensors")
    assert TensorFiles(tmp_path).dtypes == {"weight": "F16"}


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("variants", [("fp16",), ("bf16", "fp16")])
def test_of_several_variants_the_plain_one_is_read(tmp_path, sharded, variants):
    for variant in variants:
        save_file(OTHER, tmp_path / f"diffusion_pytorch_model.{variant}.safetensors")
    shard(tmp_path, OTHER, 1, ("diffusion_pytorch_model.fp16-{:05}-of-{:05}.safetensors", FP16))
    if sharded:
        shard(tmp_path, ONE, 1)
    else:
        save_file(ONE, tmp_path / "diffusion_pytorch_model.safetensors")
    assert TensorFiles(tmp_path).dtypes == {"weight": "F32"}


def test_of_several_variants_none_is_guessed(tmp_path):
    for variant in ("fp16", "bf16"):
        save_file(OTHER, tmp_path / f"model.{variant}.safetensors")
    with pytest.raises(UserError, match=r"holds model.bf16.safetensors, model.fp16.safetensors; one") as error:
        TensorFiles(tmp_path)
    assert "Keep the one to read" in error.value.remedy


def test_shards_without_their_index_are_called_so(tmp_path):
    shard(tmp_path, ONE, 1)
    (tmp_path / PLAIN[1]).unlink()
    with pytest.raises(UserError, match="one of several parts"):
        TensorFiles(tmp_path)


def test_every_missing_shard_is_named(folder, tmp_path):
    shard(tmp_path, tensors_of(folder, "vae"), 3)
    gone = ["diffusion_pytorch_model-00001-of-00003.safetensors", "diffusion_pytorch_model-00003-of-00003.safetensors"]
    for name in gone:
        (tmp_path / name).unlink()
    with pytest.raises(UserError) as error:
        TensorFiles(tmp_path)
    assert all(name in error.value.problem for name in gone)
    assert "00002-of" not in error.value.problem


@pytest.mark.parametrize(
    "index", ["{", "[]", "{}", *(json.dumps({"weight_map": found}) for found in (["a"], "a", {"a": 1}, {"a": "../b"}))]
)
def test_a_damaged_index_is_named(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json: "):
        TensorFiles(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", "model.bin"])
def test_a_git_lfs_pointer_is_called_by_its_name(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 1042301\n")
    with pytest.raises(UserError, match=rf"{name}: .*a Git LFS pointer") as error:
        TensorFiles(tmp_path)
    assert "git lfs pull" in error.value.remedy


def test_an_endlessly_nested_header_is_called_damaged(tmp_path):
    header = b'{"a": ' + b"[" * 10**5 + b"]" * 10**5 + b"}"
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(UserError, match="the header of this safetensors file is damaged"):
        TensorFiles(tmp_path)


def test_a_page_that_was_saved_for_a_file_is_called_so(tmp_path):
    (tmp_path / "model.safetensors").write_text("<!DOCTYPE html><html>Access denied</html>")
    with pytest.raises(UserError, match=r"model\.safetensors: an HTML page, no safetensors"):
        TensorFiles(tmp_path)


def test_a_folder_without_the_network_asks_for_it(folder, tmp_path):
    model = network_folder(tmp_path, folder, "vae", tensors_of(folder, "vae"))
    with pytest.raises(UserError, match="holds no text_encoder_2"):
        model.load("text_encoder_2")


def test_the_fingerprint_is_that_of_the_weights_and_their_config(folder, tmp_path):
    tensors = tensors_of(folder, "vae")
    wanted = ModelFolder(folder).fingerprint("vae")
    same = network_folder(tmp_path / "same", folder, "vae", tensors)
    save_file(tensors, tmp_path / "same/vae/diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    assert same.fingerprint("vae") == wanted
    tensors["decoder.conv_in.bias"][0] += 1e-6
    assert network_folder(tmp_path / "other", folder, "vae", tensors).fingerprint("vae") != wanted
    config = json.loads((tmp_path / "same/vae/config.json").read_text()) | {"shift_factor": 0.0}
    (tmp_path / "same/vae/config.json").write_text(json.dumps(config))
    assert same.fingerprint("vae") != wanted


def test_equal_seeds_give_equal_folders(folder, tmp_path):
    again, other = build(tmp_path / "again"), build(tmp_path / "other", seed=1)
    for name in SMALL:
        wanted = ModelFolder(folder).fingerprint(name)
        assert ModelFolder(again).fingerprint(name) == wanted != ModelFolder(other).fingerprint(name)
