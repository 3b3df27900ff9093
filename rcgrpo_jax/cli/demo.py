"""`rcgrpo demo --out DIR`: photographs and a small random editor in, a trained LoRA and edited pictures out."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from rcgrpo_jax.cli.arguments import parse
from rcgrpo_jax.cli.export import export
from rcgrpo_jax.data.folder import EditFolder
from rcgrpo_jax.data.images import resize_image, resize_mask, save_image
from rcgrpo_jax.data.photographs import write_photographs
from rcgrpo_jax.editor import Editor
from rcgrpo_jax.models.lora import scale_adapter
from rcgrpo_jax.training.config import default_config
from rcgrpo_jax.training.grid import GridRow, comparison_grid
from rcgrpo_jax.training.loop import train
from rcgrpo_jax.weights.convert import convert
from rcgrpo_jax.weights.export import load_lora
from rcgrpo_jax.weights.load import ModelFolder
from rcgrpo_jax.weights.random_folder import build

ABOUT = """Goes the whole way on photographs: build a small Kontext folder, convert, train, export, edit with the LoRA.

The editor has random weights: this shows the way, not what RC-GRPO does to a trained model. Run again on the same
directory, it resumes the training and repeats the rest."""
EDIT_STEPS = 8
GUIDANCE = 2.5


def demo_config(model: str, data: str) -> ConfigDict:
    """A run of a minute on two cores, with 1.8 GiB of memory at its peak."""
    config = default_config()
    config.model.path, config.data.path = model, data
    config.model.dtype, config.model.remat, config.model.max_text_tokens = "float32", "none", 64
    config.data.size = (128, 128)
    config.lora.rank, config.lora.alpha = 8, 16.0
    config.rollout.prompts, config.rollout.group_size, config.rollout.num_steps = 2, 8, 6
    config.surrogate.anchors, config.surrogate.steps = 3, "early"
    config.acd.layers = 4
    config.optimizer.learning_rate = 1e-3
    config.train.num_steps, config.train.save_every, config.train.image_every = 12, 4, 6
    return config


def _flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("out", None, "directory to write", values)
    flags.DEFINE_integer("steps", 12, "training steps", lower_bound=1, flag_values=values)


def run(argv: list[str]) -> None:
    values, _ = parse("demo", ABOUT, argv, _flags, required=("out",))
    out = Path(values.out)
    data, released, model = out / "photographs", out / "kontext-small", out / "model"
    print(f"1/5 photographs, masks and instructions -> {write_photographs(data)}", flush=True)
    print(f"2/5 small Kontext folder -> {build(released)}; converted -> {model}", flush=True)
    if not model.exists():
        convert(str(released), model)
    config = demo_config(str(model), str(data))
    config.train.num_steps = values.steps
    print(f"3/5 {values.steps} steps of RC-GRPO -> {out / 'run'}", flush=True)
    train(config, out / "run", devices=jax.devices()[:1])
    lora = export(out / "run", out / "lora")
    print(f"4/5 LoRA in diffusers format -> {lora}", flush=True)
    print("5/5 the photographs, edited without and with the LoRA", flush=True)
    edit_photographs(config, lora, out / "edits")
    print(f"\nLoRA         {lora}")
    print(f"metrics      {out / 'run' / 'metrics.jsonl'}  (tensorboard --logdir {out / 'run' / 'tensorboard'})")
    print(f"candidates   {out / 'run' / 'images'}")
    print(f"edits        {out / 'edits'}")


def edit_photographs(config: ConfigDict, lora_file: Path, out: Path) -> None:
    """Edits every example by the base and by the LoRA from the same noise: a PNG each, and one picture of all."""
    editor = Editor(ModelFolder(config.model.path), jnp.dtype(config.model.dtype), config.model.max_text_tokens)
    examples = list(EditFolder(config.data.path))
    size = tuple(config.data.size)
    pixels = np.stack([resize_image(example.image, size) for example in examples])
    grid = editor.grid(*size)
    shape = (1, grid[0] * grid[1], editor.transformer.config.in_channels)
    noise = jnp.repeat(jax.random.normal(jax.random.key(0), shape), len(examples), axis=0)
    adapter, lora = load_lora(lora_file, editor.transformer_params)
    instructions = [example.instruction for example in examples]
    edited = {
        "base": editor.edit(pixels, instructions, noise, EDIT_STEPS, GUIDANCE),
        "lora": editor.edit(pixels, instructions, noise, EDIT_STEPS, GUIDANCE, scale_adapter(adapter, lora.scale)),
    }
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for i, example in enumerate(examples):
        for name, images in edited.items():
            save_image(out / f"{example.name}_{name}.png", images[i])
        pair = np.stack([images[i] for images in edited.values()])
        rows.append(GridRow(example.instruction, pixels[i], resize_mask(example.mask, size), pair, list(edited)))
    save_image(
        out / "comparison.png", comparison_grid(rows, f"{EDIT_STEPS} solver steps, guidance {GUIDANCE}, one noise")
    )
