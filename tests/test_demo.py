"""The main job from end to end: a run, its LoRA, a comparison, a page; diffusers makes the same edits."""

import contextlib
import io
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from references import diffusers, torch

from rcgrpo_jax.cli.main import main
from rcgrpo_jax.data.scenes.source import Scenes
from rcgrpo_jax.evaluation.result import Evaluation
from rcgrpo_jax.experiments.compare import Comparison
from rcgrpo_jax.report import demo as demo_report
from rcgrpo_jax.rl.recipes import small_editor
from rcgrpo_jax.rl.trainer import Trainer
from rcgrpo_jax.runs.metrics import read_metrics
from rcgrpo_jax.weights.load import SMALL_EDITOR

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_device")]

ARGUMENTS = ["--steps=2", "--examples=1"]


def short_recipe() -> ConfigDict:
    """The recipe, with a few of its candidates."""
    config = small_editor()
    config.rollout.update(prompts=2, group_size=4)
    config.surrogate.anchors = 2
    return config


@pytest.fixture(scope="module")
def demo(tmp_path_factory, one_device) -> tuple[Path, str]:
    """A demo of two steps, each of two groups, and one edit: its folder, and what it printed."""
    path, printed = tmp_path_factory.mktemp("demo"), io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_report, "small_editor", short_recipe)
        assert main(["demo", f"--out={path}", *ARGUMENTS]) == 0
    return path, printed.getvalue()


@pytest.fixture
def out(demo) -> Path:
    return demo[0]


def test_leaves_what_it_promises(out):
    assert (out / "lora" / "pytorch_lora_weights.safetensors").is_file()
    assert [line["step"] for line in read_metrics(out / "run" / "metrics.jsonl")] == [1, 2]
    page = (out / "report.html").read_text()
    sections = set(re.findall(r'<section id="(\w+)">', page))
    assert sections == {"facts", "results", "examples", "attention", "curves", "grids", "reproduce"}
    assert page.count("data:image/webp") >= 4 + 2  # source, base, LoRA and target; maps of both
    assert Scenes("heldout", 1)[0].instruction in page


def test_says_where_everything_is(demo):
    out, printed = demo
    for path in ("lora/pytorch_lora_weights.safetensors", "evaluation/table.md", "report.html"):
        assert str(out / path) in printed


def test_run_again_it_trains_nothing_and_compares_again(out, monkeypatch):
    ran = []
    monkeypatch.setattr(demo_report, "small_editor", short_recipe)

    def compared(found, source, folder, title):
        ran.append("evaluate")
        return Comparison({}, [], [], np.zeros((1, 1, 3), np.uint8))

    monkeypatch.setattr(Trainer, "step", lambda *_: pytest.fail("trained"))
    monkeypatch.setattr(demo_report, "compare", compared)
    monkeypatch.setattr(demo_report, "describe_run", lambda *_, **__: ran.append("report"))
    monkeypatch.setattr(demo_report, "write_report", lambda *_: None)
    assert main(["demo", f"--out={out}", *ARGUMENTS]) == 0
    assert ran == ["evaluate", "report"]


def test_another_length_on_the_same_folder_is_refused(out, capsys):
    assert main(["demo", f"--out={out}", "--steps=3"]) == 2
    assert f"--steps: 3 found; {out} holds a run of 2." in capsys.readouterr().err


def test_diffusers_makes_the_same_edits_with_the_exported_lora(out):
    example = Scenes("heldout", 1)[0]
    base, ours = (Evaluation.load(out / "evaluation" / f"{name}.npz") for name in ("base", "lora"))
    noise = np.array(jax.random.normal(jax.random.fold_in(jax.random.key(0), 0), (1, 64, 64)))
    pipe = diffusers.FluxKontextPipeline.from_pretrained(SMALL_EDITOR, dtype=torch.float32)
    pipe.load_lora_weights(out / "lora")
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        image=Image.fromarray(example.image), prompt=example.instruction, latents=torch.from_numpy(noise),
        height=128, width=128, num_inference_steps=28, guidance_scale=2.5, max_sequence_length=24,
        max_area=128 * 128, _auto_resize=False, output_type="np",
    ).images[0]  # fmt: skip
    theirs = np.round(theirs * 255)
    assert psnr(ours.images[0], theirs) >= 50
    assert psnr(base.images[0], theirs) < psnr(ours.images[0], theirs)  # the LoRA did something, and it is in both


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(np.square(a.astype(np.float64) - b).mean(), 1e-6)))
