"""`rcgrpo convert` keeps every value, in little memory."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import bfl_layout
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from rcgrpo_jax.cli.main import main
from rcgrpo_jax.errors import UserError
from rcgrpo_jax.models.config import MMDiTConfig
from rcgrpo_jax.parallel.mesh import make_mesh
from rcgrpo_jax.parallel.sharding import parameter_sharding
from rcgrpo_jax.weights.convert import ASSETS, convert
from rcgrpo_jax.weights.load import ModelFolder
from rcgrpo_jax.weights.networks import NETWORKS
from rcgrpo_jax.weights.random_folder import SMALL, build


def assert_same(found: dict, wanted: dict, dtype=None) -> None:
    found, wanted = flatten_dict(found), flatten_dict(wanted)
    assert found.keys() == wanted.keys()
    for path, array in wanted.items():
        assert found[path].dtype == (dtype or array.dtype)
        np.testing.assert_array_equal(
            np.asarray(found[path]), np.asarray(array).astype(found[path].dtype), err_msg="/".join(path)
        )


@pytest.mark.parametrize("name", NETWORKS)
def test_a_converted_network_is_bitwise_that_of_the_folder(folder, converted, name):
    assert_same(ModelFolder(converted).load(name), ModelFolder(folder).load(name))
    assert ModelFolder(converted).config(name) == ModelFolder(folder).config(name)
    assert ModelFolder(converted).fingerprint(name) == ModelFolder(folder).fingerprint(name)


def test_tokenizers_and_schedule_come_along(folder, converted):
    for asset in ASSETS:
        files = sorted(path.name for path in (folder / asset).iterdir())
        assert sorted(path.name for path in (converted / asset).iterdir()) == files
        assert all((folder / asset / f).read_bytes() == (converted / asset / f).read_bytes() for f in files)
    assert ModelFolder(converted).schedule_options() == ModelFolder(folder).schedule_options()


def test_the_command_counts_parameters(folder, tmp_path, capsys):
    assert main(["convert", str(folder), str(tmp_path / "out"), "--dtype=bfloat16"]) == 0
    out = capsys.readouterr().out
    for name in NETWORKS:
        size = sum(array.size for array in load_file(next((folder / name).glob("*.safetensors"))).values())
        assert any(line.split() == [name, f"{size:,}", "parameters"] for line in out.splitlines()), out
    for name in NETWORKS:
        assert_same(ModelFolder(tmp_path / "out").load(name), ModelFolder(folder).load(name), jnp.bfloat16)
        assert ModelFolder(tmp_path / "out").fingerprint(name) != ModelFolder(folder).fingerprint(name)
    assert json.loads((tmp_path / "out" / "rcgrpo.json").read_text())["dtype"] == "bfloat16"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.fixture(scope="module")
def sharded(folder, tmp_path_factory) -> Path:
    """The folder as converted on a mesh."""
    target = tmp_path_factory.mktemp("sharded") / "model"
    convert(str(folder), target, sharding_of=parameter_sharding(make_mesh({"fsdp": 4, "tensor": 2})))
    return target


@pytest.mark.parametrize("source", ["folder", "converted", pytest.param("sharded", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param({"fsdp": 1, "data": 8}, marks=pytest.mark.slow),
        pytest.param({"fsdp": 8}, marks=pytest.mark.slow),
        {"fsdp": 4, "tensor": 2},
    ],
)
def test_every_kind_of_model_loads_onto_every_mesh(folder, source, sizes, request):
    sharding_of = parameter_sharding(make_mesh(sizes))
    for name in ("transformer", "text_encoder_2"):
        loaded = ModelFolder(request.getfixturevalue(source)).load(name, sharding_of=sharding_of)
        assert_same(loaded, ModelFolder(folder).load(name))
        for path, array in flatten_dict(loaded).items():
            assert array.sharding == sharding_of(path, array.shape), path


def test_a_bundle_with_a_base_is_the_folder_it_came_from(folder, converted, tmp_path, caplog):
    tensors = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    tensors = bfl_layout.from_diffusers(tensors, SMALL["transformer"])
    bundle = {f"model.diffusion_model.{key}": tensor for key, tensor in tensors.items()}
    save_file(bundle | {"vae.encoder.conv_in.bias": np.zeros(8)}, tmp_path / "flux.safetensors")
    convert(str(tmp_path / "flux.safetensors"), tmp_path / "out", base=str(folder))
    assert "left out: vae.* (1)" in caplog.text
    for name in NETWORKS:
        assert_same(ModelFolder(tmp_path / "out").load(name), ModelFolder(converted).load(name))
        assert ModelFolder(tmp_path / "out").config(name) == ModelFolder(folder).config(name)
    assert (tmp_path / "out" / "tokenizer_2" / "tokenizer.json").is_file()


def test_a_single_file_without_base_gives_the_transformer_alone(tmp_path):
    config = MMDiTConfig(
        num_layers=1, num_single_layers=1, num_attention_heads=1, joint_attention_dim=8, pooled_projection_dim=8
    )
    rng = np.random.default_rng(0)
    tensors = {key: rng.standard_normal(shape, np.float32) for key, shape in bfl_layout.shapes(config).items()}
    save_file(tensors, tmp_path / "flux.safetensors")
    counts = convert(str(tmp_path / "flux.safetensors"), tmp_path / "out")
    assert counts == {"transformer": sum(tensor.size for tensor in tensors.values())}
    model = ModelFolder(tmp_path / "out")
    assert model.config("transformer") == config
    value = model.load("transformer")["single_transformer_blocks"]["attn"]["to_v"]["bias"]
    np.testing.assert_array_equal(np.asarray(value)[0], tensors["single_blocks.0.linear1.bias"][256:384])
    with pytest.raises(UserError, match="holds no vae"):
        model.load("vae")


MEASURE = """
import sys, threading, time
from pathlib import Path
from rcgrpo_jax.weights import convert as module

module.SAVED_AT_ONCE = 2**20
small, large, out = map(Path, sys.argv[1:])

def megabytes():
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024

def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, megabytes())

module.convert(str(small), out / "small")  # what JAX and Orbax need for themselves
baseline = peak = megabytes()
done = threading.Event()
thread = threading.Thread(target=watch)
thread.start()
module.convert(str(large), out / "large")
done.set()
thread.join()
print(peak - baseline)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.slow
def test_memory_stays_near_the_largest_leaf(folder, tmp_path):
    config = replace(SMALL["transformer"], num_layers=4, num_single_layers=4, num_attention_heads=16)
    large = build(tmp_path / "large", configs={**SMALL, "transformer": config})
    sizes = [leaf.nbytes / 2**20 for leaf in jax.tree.leaves(ModelFolder(large).load("transformer"))]
    assert sum(sizes) > 200  # MiB
    assert sum(sizes) > 8 * max(sizes)
    # Freed blocks go back to the system at once: what is measured is what conversion holds, not what malloc keeps.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "XLA_FLAGS": ""}
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-c", MEASURE, str(folder), str(large), str(tmp_path / "out")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 0.6 * sum(sizes), f"{result.stdout} MiB of {sum(sizes):.0f} MiB"


def test_a_relative_path_is_as_good_as_an_absolute_one(converted, monkeypatch):
    monkeypatch.chdir(converted.parent)
    assert_same(ModelFolder(converted.name).load("vae"), ModelFolder(converted).load("vae"))
