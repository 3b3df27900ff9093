"""`rcgrpo convert` names whatever does not fit, and then writes nothing."""

import gc
import json
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import bfl_layout
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from rcgrpo_jax.cli.main import main
from rcgrpo_jax.errors import UserError
from rcgrpo_jax.weights import convert as convert_module
from rcgrpo_jax.weights.load import ModelFolder
from rcgrpo_jax.weights.random_folder import SMALL

TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"


@pytest.fixture
def damaged(folder, tmp_path) -> Path:
    """A copy of the folder, to be spoilt."""
    return Path(shutil.copytree(folder, tmp_path / "model"))


@pytest.fixture
def single_file(folder, tmp_path) -> Path:
    return bfl_layout.write_single_file(folder, tmp_path / "flux.safetensors", SMALL["transformer"])


@pytest.fixture
def refused(tmp_path, capsys) -> Callable[..., str]:
    """Runs the command, which must fail and leave nothing behind, and gives what it says."""

    def run(source: Path | str, *flags: str, to: Path | None = None, code: int = 1) -> str:
        target = to or tmp_path / "out"
        before = sorted(tmp_path.rglob("*"))
        assert main(["convert", str(source), str(target), *flags]) == code
        assert sorted(tmp_path.rglob("*")) == before
        captured = capsys.readouterr()
        said = captured.err[captured.err.index("rcgrpo convert: error: ") :]
        assert "Traceback" not in captured.err
        assert "not foreseen" not in said
        assert captured.out == ""
        problem, remedy = said.rstrip("\n").rsplit("\n", 1)
        assert problem
        assert remedy.startswith("  ")
        return said

    return run


def rewrite(file: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def lines(said: str, kind: str) -> list[str]:
    """The tensors that a report names under one kind of problem."""
    return sorted(line.split(kind, 1)[1].split()[0].rstrip(",:") for line in said.splitlines() if f"  {kind} " in line)


def test_tensors_that_do_not_fit_are_all_named(damaged, refused):
    def spoil_transformer(tensors):
        del tensors["transformer_blocks.1.attn.to_q.weight"], tensors["proj_out.bias"]
        tensors["single_transformer_blocks.4.proj_mlp.bias"] = np.zeros(512, np.float32)
        tensors["x_embedder.weight"] = tensors["x_embedder.weight"].T.copy()
        tensors["norm_out.linear.bias"] = tensors["norm_out.linear.bias"][:-1]

    def spoil_vae(tensors):
        del tensors["decoder.conv_in.weight"]
        tensors["quant_conv.weight"] = np.zeros((32, 32, 1, 1), np.float32)
        tensors["encoder.conv_in.bias"] = tensors["encoder.conv_in.bias"].astype(np.int32)

    rewrite(damaged / TRANSFORMER, spoil_transformer)
    rewrite(damaged / VAE, spoil_vae)
    said = refused(damaged)
    assert lines(said, "missing") == [
        "decoder.conv_in.weight", "proj_out.bias", "transformer_blocks.1.attn.to_q.weight",
    ]  # fmt: skip
    assert lines(said, "unexpected") == ["quant_conv.weight", "single_transformer_blocks.4.proj_mlp.bias"]
    assert lines(said, "mis-shaped") == ["norm_out.linear.bias", "x_embedder.weight"]
    assert lines(said, "mis-typed") == ["encoder.conv_in.bias"]
    assert "x_embedder.weight: found [64, 128], wanted [128, 64]" in said
    assert "found I32" in said


def test_every_tensor_with_a_nan_or_an_infinity_is_named(damaged, refused):
    def spoil(*places):
        def change(tensors):
            for key, value in places:
                tensors[key].flat[-1] = value

        return change

    rewrite(damaged / TRANSFORMER, spoil(("x_embedder.bias", np.nan), ("transformer_blocks.1.ff.net.2.weight", np.inf)))
    rewrite(damaged / VAE, spoil(("decoder.conv_norm_out.weight", -np.inf)))
    said = refused(damaged)
    assert lines(said, "NaN or inf") == [
        "decoder.conv_norm_out.weight", "transformer_blocks.1.ff.net.2.weight", "x_embedder.bias",
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"transformer_blocks\.1\.ff\.net\.2\.weight"):
        ModelFolder(damaged).load("transformer")


def test_every_tensor_that_a_truncated_file_cuts_is_named(damaged, refused):
    file = damaged / VAE
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    in_order = sorted((entry["data_offsets"], key) for key, entry in header.items() if key != "__metadata__")
    (first, _), _ = in_order[-3]
    file.write_bytes(content[: start + first + 1])
    said = refused(damaged)
    assert str(file) in said
    assert lines(said, "truncated") == sorted(key for _, key in in_order[-3:])
    file.write_bytes(content[: start + in_order[-1][0][1] - 1])
    assert lines(refused(damaged), "truncated") == [in_order[-1][1]]


@pytest.mark.parametrize("damage", [lambda c: c[:4], lambda c: c[:100], lambda c: c[:8] + b"x" + c[9:]])  # fmt: skip
def test_a_damaged_header_is_said_to_be_one(damaged, refused, damage):
    file = damaged / VAE
    file.write_bytes(damage(file.read_bytes()))
    said = refused(damaged)
    assert f"{file}: the header of this safetensors file is damaged" in said
    assert "Download the file again." in said


def test_bytes_after_the_last_tensor_are_refused(damaged, refused):
    with (damaged / VAE).open("ab") as file:
        file.write(b"more")
    assert f"{damaged / VAE}: not a valid safetensors file" in refused(damaged)


def test_pickles_are_refused(damaged, refused, tmp_path):
    (damaged / VAE).rename(damaged / "vae" / "diffusion_pytorch_model.bin")
    assert "diffusion_pytorch_model.bin: a pickle checkpoint" in refused(damaged)
    (tmp_path / "flux.ckpt").write_bytes(b"\x80\x04.")
    assert "flux.ckpt: a pickle checkpoint" in refused(tmp_path / "flux.ckpt")
    (damaged / "vae" / "diffusion_pytorch_model.bin").unlink()
    assert f"{damaged / 'vae'}: no .safetensors file found" in refused(damaged)


def test_what_is_no_model_is_refused(refused, tmp_path, converted):
    (tmp_path / "empty").mkdir()
    assert "holds neither model_index.json" in refused(tmp_path / "empty")
    assert "is not a folder" in refused(tmp_path / "nowhere" / "at" / "all")
    assert "already converted" in refused(converted)
    (tmp_path / "notes.txt").write_text("hello")
    assert "no .safetensors file found" in refused(tmp_path / "notes.txt")


def test_a_hub_name_without_the_hub_is_refused(refused, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    said = refused("black-forest-labs/FLUX.1-Kontext-dev")
    assert "black-forest-labs/FLUX.1-Kontext-dev: not a local path, and the hub did not give it" in said
    assert "hf auth login" in said
    assert len(said.splitlines()) == 2
    assert "not a local path" in refused("no--such/name")


def test_every_missing_part_of_a_folder_is_named(damaged, refused):
    shutil.rmtree(damaged / "vae")
    shutil.rmtree(damaged / "tokenizer_2")
    assert f"{damaged}: holds no vae, tokenizer_2." in refused(damaged)
    (damaged / "vae").mkdir()
    (damaged / "tokenizer_2").mkdir()
    assert f"{damaged}/vae/config.json: no such file" in refused(damaged)


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("tokenizer/vocab.json", "a Git LFS pointer, not the file of a tokenizer"),
        ("scheduler/scheduler_config.json", "not JSON (a Git LFS pointer)"),
        ("vae/diffusion_pytorch_model.safetensors", "a Git LFS pointer, not the weights themselves"),
    ],
)
def test_a_git_lfs_pointer_anywhere_is_called_by_its_name(damaged, refused, file, said):
    (damaged / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 1042301\n")
    assert f"{damaged / file}: {said}" in refused(damaged)


def set_config(folder: Path, **changes: object) -> None:
    file = folder / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_config_that_is_not_json_is_named(damaged, refused):
    file = damaged / "transformer" / "config.json"
    for text, said in (("{", "not JSON"), ("[1, 2]", "[1, 2] found"), ("", "not JSON (an empty file)")):
        file.write_text(text)
        assert f"{file}: {said}" in refused(damaged)


def test_a_config_of_another_network_is_refused(damaged, refused):
    set_config(damaged, patch_size=2)
    assert "transformer/config.json: patch_size is 2; only 1 is implemented" in refused(damaged)
    set_config(damaged, patch_size=1, axes_dims_rope=[8, 8, 8])
    assert "axes_dims_rope is (8, 8, 8)" in refused(damaged)
    set_config(damaged, _class_name="SD3Transformer2DModel")  # named before its other fields
    assert "_class_name is 'SD3Transformer2DModel'; only 'FluxTransformer2DModel' is implemented" in refused(damaged)


def test_a_config_that_does_not_match_its_tensors_names_them(damaged, refused):
    set_config(damaged, num_layers=3, guidance_embeds=False)
    said = refused(damaged)
    assert len(lines(said, "missing")) == sum(
        key.startswith("transformer_blocks.0.") for key in load_file(damaged / TRANSFORMER)
    )
    assert all("guidance_embedder" in key for key in lines(said, "unexpected"))
    assert len(lines(said, "unexpected")) == 4


def test_other_single_files_are_refused(folder, single_file, refused, tmp_path):
    said = refused(single_file)
    assert "head_dim is 32; rotary axes are known for 128 only" in said
    assert "--base" in said
    assert "no FLUX transformer (looked for img_in.weight of BFL's layout" in refused(folder / VAE)
    rewrite(single_file, lambda tensors: tensors.pop("double_blocks.1.img_attn.qkv.weight"))
    assert lines(refused(single_file, f"--base={folder}"), "missing") == ["double_blocks.1.img_attn.qkv.weight"]


def test_a_mistaken_command_line_is_a_usage_error(folder, refused, tmp_path, capsys):
    assert "--base" in refused(folder, f"--base={folder}", code=2)
    assert "Did you mean --base" in refused(folder, "--bas=x", code=2)
    assert "dtype" in refused(folder, "--dtype=float8", code=2)
    assert main(["convert", str(folder)]) == 2
    assert "usage: rcgrpo convert SRC DST" in capsys.readouterr().err


def test_what_is_already_there_is_not_touched(folder, refused, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    assert "taken: already exists" in refused(folder, to=tmp_path / "taken")
    assert "notes.txt: already exists" in refused(folder, to=tmp_path / "taken" / "notes.txt")
    assert (tmp_path / "taken" / "notes.txt").read_text() == "mine"


def test_the_source_is_not_written_into(damaged, refused):
    assert "already exists" in refused(damaged, to=damaged)
    assert f"lies inside the source {damaged}" in refused(damaged, to=damaged / "tokenizer" / "converted")


def test_a_destination_that_cannot_be_made_is_named(folder, refused, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused(folder, to=tmp_path / "file" / "model")


def test_a_disk_that_is_too_small_is_found_before_anything_is_read(folder, refused, monkeypatch):
    monkeypatch.setattr(convert_module.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2**30, 2**30, 2**20))
    said = refused(folder)
    assert "0.0 GiB free" in said
    assert "--dtype bfloat16" in said


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX limits")
def test_a_write_that_fails_half_way_leaves_nothing(folder, refused, monkeypatch):
    monkeypatch.setattr(convert_module, "SAVED_AT_ONCE", 2**18)  # several writes succeed before one fails
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**19, hard))
    try:
        said = refused(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot be written" in said
    assert "File too large" in said


def test_a_damaged_converted_model_is_two_lines(converted, tmp_path, capfd):
    model = Path(shutil.copytree(converted, tmp_path / "model"))
    blocks = max((model / "transformer" / "params").rglob("*"), key=lambda file: file.stat().st_size)
    blocks.write_bytes(blocks.read_bytes()[:1000])
    Image.new("RGB", (32, 32)).save(tmp_path / "in.png")
    files = [f"--image={tmp_path / 'in.png'}", f"--out={tmp_path / 'out.png'}"]
    assert main(["edit", f"--model={model}", "--instruction=Make it red.", "--size=32x32", "--steps=1", *files]) == 1
    gc.collect()  # of background tasks whose errors nobody has taken
    devices, *error = capfd.readouterr().err.strip().splitlines()
    assert devices.startswith("devices: ")
    assert "transformer/params: not a complete Orbax checkpoint" in error[0]
    assert len(error) == 2
