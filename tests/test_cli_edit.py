"""`rcgrpo edit`: what it makes of its arguments, and what it refuses before the model is loaded."""

from pathlib import Path

import jax
import numpy as np
import pytest
import small_run
from PIL import Image

from rcgrpo_jax.data.images import read_image, resize_image
from rcgrpo_jax.editors.flux_kontext import FluxKontextEditor
from rcgrpo_jax.editors.open import open_model
from rcgrpo_jax.models.lora import LoRAConfig, init_adapter
from rcgrpo_jax.weights.load import ModelFolder
from rcgrpo_jax.weights.lora import save_lora


@pytest.fixture
def edit_argv(tmp_path, monkeypatch):
    """`edit_argv(image=..., ...)`: the arguments of an edit that works, but for the changes; None leaves one out."""
    monkeypatch.chdir(tmp_path)
    Image.effect_noise((80, 60), 50).convert("RGB").save("image.png")

    def make(**changes: str | None) -> list[str]:
        flags = {
            "model": str(small_run.model_folder()), "image": "image.png", "instruction": "Make it red.",
            "out": "out.png", "size": "64x64", "steps": "2", "dtype": "float32", "text_tokens": "16",
        }  # fmt: skip
        return ["edit", *(f"--{name}={value}" for name, value in (flags | changes).items() if value is not None)]

    return make


@pytest.mark.parametrize(
    ("changes", "code", "problem"),
    [
        ({"image": "nothing.png"}, 1, "nothing.png: there is no such file"),
        ({"image": "text.png"}, 1, "text.png: the file is not an image"),
        ({"image": "."}, 1, ".: the file cannot be read to its end"),
        ({"size": "64"}, 2, "--size: '64' found; WIDTHxHEIGHT in pixels was wanted."),
        ({"size": "0x64"}, 2, "--size: '0x64' found"),
        ({"size": "64x65"}, 2, "--size: 64x65 found; multiples of 16 pixels were wanted."),
        ({"solver": "hein"}, 2, "flag --solver=hein: "),
        ({"solver": "heun", "steps": "1"}, 2, "--steps: 1 with --solver heun found; 2 or more were wanted"),
        ({"solver": "dpmpp_2m"}, 2, "--steps: 2 with --solver dpmpp_2m found; 3 or more were wanted"),
        ({"noise": "nothing.npy"}, 1, "--noise: nothing.npy cannot be read as .npy"),
        ({"noise": "text.png"}, 1, "--noise: text.png cannot be read as .npy"),
        ({"noise": "shape.npy"}, 1, "--noise: shape.npy is float32 [15, 64]; finite float32 [16, 64] was wanted."),
        ({"noise": "dtype.npy"}, 1, "--noise: dtype.npy is float64 [16, 64]"),
        ({"noise": "nan.npy"}, 1, "--noise: nan.npy is float32 [16, 64]; finite"),
        ({"noise": "archive.npz"}, 1, "--noise: archive.npz is an archive of arrays; one was wanted."),
        ({"instruction": " \t"}, 2, "--instruction: blank"),
        ({"guidance": "nan"}, 2, "--guidance: nan found; a number was wanted."),
        ({"lora": "nothing"}, 1, "lora: nothing does not exist."),
        ({"lora": "text.png"}, 1, "text.png: "),
        ({"model": "nothing"}, 1, "model: nothing is not a folder."),
        ({"model": "."}, 1, "model: . holds neither model_index.json (diffusers) nor rcgrpo.json"),
        ({"out": "out.jpg"}, 1, "--out: out.jpg: the suffix is '.jpg'; '.png' was wanted."),
        ({"out": "text.png/out.png"}, 1, "--out: text.png/out.png cannot be written"),
        ({"out": "/proc/out.png"}, 1, "--out: /proc/out.png cannot be written"),
        ({"out": "folder.png"}, 1, "--out: folder.png cannot be written"),
    ],
    ids=lambda x: "-".join(f"{name}={value.strip()}" for name, value in x.items()) if isinstance(x, dict) else "",
)
def test_edit_refuses_before_it_loads_the_model(capsys, monkeypatch, edit_argv, changes, code, problem):
    monkeypatch.setattr(ModelFolder, "load", lambda *_: pytest.fail("the model was loaded"))
    Path("text.png").write_text("text")
    Path("folder.png").mkdir()
    np.save("shape.npy", np.zeros((15, 64), np.float32))
    np.save("dtype.npy", np.zeros((16, 64)))
    np.save("nan.npy", np.full((16, 64), np.nan, np.float32))
    np.savez("archive.npz", np.zeros((16, 64), np.float32))
    found = small_run.fail(capsys, *edit_argv(**changes))
    assert found[0] == code
    assert found[1].startswith(problem)
    assert not Path("out.png").exists()


def save_test_image(kind: str) -> None:
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (60, 80), np.uint8)
    colour = rng.integers(0, 256, (60, 80, 3), np.uint8)
    match kind:
        case "RGBA":
            Image.fromarray(np.dstack([colour, grey])).save("image.png")
        case "16-bit":
            Image.fromarray(grey.astype(np.uint16) * 257).save("image.png")
        case "EXIF":
            exif = Image.Exif()
            exif[0x0112] = 6  # turn by a quarter
            Image.fromarray(colour).save("image.png", exif=exif)
        case "1-pixel":
            Image.new("RGB", (1, 1), "teal").save("image.png")


@pytest.mark.parametrize("kind", ["RGBA", "16-bit", "EXIF", "1-pixel"])
def test_edit_takes_any_image(capsys, monkeypatch, edit_argv, kind):
    """The model itself is left out: what it is given is what is written."""
    monkeypatch.setattr(FluxKontextEditor, "edit", lambda self, images, *_: images)
    save_test_image(kind)
    code, out, err = small_run.run_command(capsys, *edit_argv(size="32x64", out="made/here/out.PNG"))
    assert (code, err) == (0, "")
    assert out == "edited image: made/here/out.PNG (32 x 64)\n"
    np.testing.assert_array_equal(read_image("made/here/out.PNG"), resize_image(read_image("image.png"), (64, 32)))


def test_the_size_is_kontexts_by_default(capsys, monkeypatch, edit_argv):
    monkeypatch.setattr(FluxKontextEditor, "edit", lambda self, images, *_: images)
    assert small_run.run_command(capsys, *edit_argv(size=None))[0] == 0
    assert Image.open("out.png").size == (1184, 880)


def edit(capsys, argv: list[str]) -> np.ndarray:
    code, _, err = small_run.run_command(capsys, *argv)
    assert (code, err) == (0, "")
    return read_image("out.png")


def test_edit_follows_its_arguments(capsys, edit_argv, caplog):
    plain = edit(capsys, edit_argv())
    assert plain.shape == (64, 64, 3)
    np.save("noise.npy", np.asarray(jax.random.normal(jax.random.key(7), (16, 64))))
    seeded = edit(capsys, edit_argv(seed="7"))
    np.testing.assert_array_equal(seeded, edit(capsys, edit_argv(noise="noise.npy")))
    params = open_model(small_run.model_folder()).param_shapes
    adapter = init_adapter(jax.random.key(0), params, LoRAConfig(2, 4.0))
    save_lora(Path("zero"), adapter, LoRAConfig(2, 4.0), params)
    np.testing.assert_array_equal(plain, edit(capsys, edit_argv(lora="zero")))
    save_lora(Path("lora"), jax.tree.map(lambda x: x + 0.1, adapter), LoRAConfig(2, 4.0), params)
    assert not caplog.records

    for other in (
        seeded,
        edit(capsys, edit_argv(lora="lora")),
        edit(capsys, edit_argv(instruction="Füge einen Regenbogen hinzu 🌈 彩虹")),
        edit(capsys, edit_argv(guidance="5")),
    ):
        assert np.any(other != plain)


def test_a_long_instruction_is_cut_with_a_warning(capsys, edit_argv, caplog):
    words = "Make the big red ball small and the small blue cube very big."
    cut = edit(capsys, edit_argv(instruction=f"{words} {words} {words}"))
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "T5 tokens is cut to max_text_tokens = 16" in record.getMessage()
    assert cut.shape == (64, 64, 3)
