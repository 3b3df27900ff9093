"""Training from Python: a configuration, one call, and a picture of what the LoRA changed.

Three steps on the small editor that ships with the package, and one held-out edit with the LoRA and without it, from
the same noise. It takes about two minutes on two cores. Called again with the same folder, the training goes on from
its last checkpoint.

    python examples/train_in_python.py runs/python
"""

import sys
from pathlib import Path

import jax
import numpy as np

from rcgrpo_jax.data.images import save_image
from rcgrpo_jax.data.scenes.source import Scenes
from rcgrpo_jax.editors.model import EditorOptions
from rcgrpo_jax.editors.open import open_model
from rcgrpo_jax.experiments.export import export
from rcgrpo_jax.rl.recipes import small_editor
from rcgrpo_jax.rl.trainer import train
from rcgrpo_jax.weights.lora import load_loras

workdir = Path(sys.argv[1])

# 1. The configuration. `rl/options.py` says what each field means; `train` names every mistake before it loads weights.
config = small_editor()
config.data.path = "scenes:train:8"  # your own: a folder with a metadata.jsonl
config.rollout.prompts, config.rollout.group_size = 2, 4  # 8 candidates a step; the recipe has 96
config.train.num_steps = config.optimizer.decay_steps = 3

# 2. The training. The folder gets metrics.jsonl, checkpoints/, images/ and tensorboard/.
state = train(config, workdir, devices=jax.devices()[:1])
print(f"trained {int(state.step)} steps")

# 3. The LoRA, as `pipe.load_lora_weights` of diffusers reads it.
lora = export(workdir, workdir / "lora")
print(f"LoRA: {lora}")

# 4. One edit with it and without it.
editor = open_model(config.model.path).open(EditorOptions())
scene = Scenes("heldout", 1, config.data.size[0])[0]
rows, columns = editor.grid(*config.data.size)
noise = jax.random.normal(jax.random.key(0), (1, rows * columns, editor.model.sizes.channels))
adapters = ({}, load_loras([lora], [1.0], editor.params))
edits = [editor.edit(scene.image[None], [scene.instruction], noise, num_steps=8, lora=x)[0] for x in adapters]
save_image(workdir / "edits.png", np.concatenate([scene.image, *edits], axis=1))
print(f"source, edit without and with the LoRA: {workdir / 'edits.png'} ({scene.instruction})")
