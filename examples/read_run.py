"""Reading a run: the metrics of its steps, the state in a checkpoint, and the LoRA in that.

It takes a few seconds, and reads a run that still goes on too. The folder is that of any `rcgrpo train`, for example
of `examples/train_in_python.py`.

    python examples/read_run.py runs/python
"""

import sys
from pathlib import Path

import jax
import numpy as np

from rcgrpo_jax.editors.open import open_model
from rcgrpo_jax.experiments.saved_runs import read_saved_config
from rcgrpo_jax.options import read_options
from rcgrpo_jax.rl.options import Options
from rcgrpo_jax.runs.checkpoint import Checkpointer
from rcgrpo_jax.runs.metrics import read_metrics
from rcgrpo_jax.runs.state import init_state
from rcgrpo_jax.weights.lora import save_lora

workdir = Path(sys.argv[1])

# 1. metrics.jsonl has one JSON object for each step. A value is null where there was nothing to measure. Runs with
# `train.samples` have a step 0, of their scores alone.
for line in read_metrics(workdir / "metrics.jsonl"):
    if line["step"] == 0:
        continue
    rewards = {name.removeprefix("reward/"): x for name, x in line.items() if name.startswith("reward/")}
    print(f"step {line['step']}: loss {line['loss']:.3g}, " + ", ".join(f"{k} {v:.3f}" for k, v in rewards.items()))

# 2. A checkpoint has the configuration of the run, and the state: LoRA, optimizer, average, random key, step.
checkpoints = Checkpointer(workdir / "checkpoints", save_every=1, keep=1)  # reading deletes nothing
options = read_options(Options, read_saved_config(checkpoints))  # with today's fields, also of an older run
params = open_model(options.model.path).param_shapes  # shapes alone
state = checkpoints.restore(jax.eval_shape(lambda: init_state(options.lora, options.optimizer, options.seed, params)))
print(f"checkpoints of steps {checkpoints.steps()}; the last has seen {int(state.step)}")

# 3. The LoRA is a tree of factors A and B; `averaged` is the moving average where the run kept one.
for path, x in jax.tree_util.tree_leaves_with_path(state.averaged)[:4]:
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    print(f"{name}: {x.dtype}{list(x.shape)}, norm {np.linalg.norm(x):.3f}")
file = save_lora(workdir / "lora", state.averaged, options.lora, params)
print(f"LoRA: {file}")
