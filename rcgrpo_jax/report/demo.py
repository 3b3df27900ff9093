"""The whole way on the small editor: a run, its LoRA, a comparison with the base, and a page about it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from ml_collections import ConfigDict

from rcgrpo_jax.data.sources import open_source
from rcgrpo_jax.editors.open import open_model
from rcgrpo_jax.errors import UsageError
from rcgrpo_jax.experiments.compare import Comparison, compare, evaluate_adapters, summary
from rcgrpo_jax.experiments.export import export
from rcgrpo_jax.experiments.saved_runs import read_saved_config
from rcgrpo_jax.progress import ProgressCallback, no_progress
from rcgrpo_jax.report.page import write_report
from rcgrpo_jax.report.run_page import describe_run
from rcgrpo_jax.report.run_record import read_run
from rcgrpo_jax.rl.recipes import small_editor
from rcgrpo_jax.rl.trainer import train_to_end
from rcgrpo_jax.runs.checkpoint import Checkpointer
from rcgrpo_jax.weights.lora import load_loras

SOLVER_STEPS, SEED, BATCH = 28, 0, 8  # of the comparison


def run_demo(
    out: Path,
    steps: int = 28,
    examples: int = 60,
    *,
    devices: Sequence[jax.Device] | None = None,
    say: Callable[[str], None] = lambda text: None,
    progress: ProgressCallback = no_progress,
) -> Comparison:
    """Post-trains the small editor, exports the LoRA, compares it with the base, and writes `report.html`.

    Args:
        out: Gets `run`, `lora`, `evaluation` and `report.html`; a run that was stopped in it goes on.
        steps: Of the training, which is on one device.
        examples: Held-out edits to compare on.
        devices: Where the edits are made; all by default.
        say: Is given what is done, and each result as text.
        progress: Told of each edit.

    Returns:
        Base and LoRA side by side.

    Raises:
        UsageError: The folder holds a run of another length.
        UserError: A file cannot be written, or the training was stopped.
    """
    devices = jax.devices() if devices is None else devices
    config, data = demo_config(steps), f"scenes:heldout:{examples}"
    _check_length(out, steps)
    say(f"1/4 {steps} steps of RC-GRPO on {config.data.path} -> {out / 'run'}")
    train_to_end(config, out / "run", devices=devices[:1])
    file = export(out / "run", out / "lora")
    say(f"2/4 LoRA in diffusers format -> {file}")
    say(f"3/4 {examples} held-out edits, by the base and with the LoRA, from the same noise")
    model, source = open_model(config.model.path), open_source(data)
    lora = load_loras([str(file)], [1.0], model.param_shapes)
    found = evaluate_adapters(
        model, source, {"base": None, "lora": lora}, steps=SOLVER_STEPS, guidance=config.model.guidance, seed=SEED,
        batch=BATCH, dtype=config.model.dtype, acd_layers=config.acd.layers, devices=devices, progress=progress,
    )  # fmt: skip
    title = f"{SOLVER_STEPS} solver steps, guidance {config.model.guidance}, one noise"
    comparison = compare(found, source, out / "evaluation", title)
    say(summary(comparison, out / "evaluation"))
    say("4/4 all of it on a page")
    report = describe_run(
        out / "run", read_run(out / "run"), evaluation=str(out / "evaluation"), data=data, attention=4,
        loras=[str(file)], strengths=[1.0], devices=devices,
    )  # fmt: skip
    write_report(out / "report.html", report)
    return comparison


def demo_config(steps: int) -> ConfigDict:
    """The configuration of the demo's run: the small editor's recipe with fewer steps, and larger ones."""
    config = small_editor()
    config.train.num_steps = config.optimizer.decay_steps = steps
    config.optimizer.learning_rate *= 2
    # One at a time of each group: attention's logits then stay in a CPU's cache.
    config.rollout.micro_batch = config.rollout.prompts
    config.rollout.decode_micro_batch = config.surrogate.micro_batch = 4
    config.data.path = f"scenes:train:{steps * config.rollout.prompts}"  # each is seen once
    return config


def _check_length(out: Path, steps: int) -> None:
    found = Checkpointer(out / "run" / "checkpoints", save_every=1, keep=1)
    if found.latest_step() is not None and (before := read_saved_config(found)["train"]["num_steps"]) != steps:
        raise UsageError(
            f"--steps: {steps} found; {out} holds a run of {before}.",
            f"Write --steps={before}, or another --out.",
        )
