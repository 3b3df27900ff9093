"""`rcgrpo demo --out DIR`: the whole way on the small editor, from a run to a page about what it changed."""

from __future__ import annotations

from pathlib import Path

from absl import flags

from rcgrpo_jax.cli import evaluate, report
from rcgrpo_jax.cli.arguments import parse
from rcgrpo_jax.cli.devices import open_devices
from rcgrpo_jax.cli.export import export
from rcgrpo_jax.cli.paths import check_for_checkpoints, path_flag
from rcgrpo_jax.errors import UsageError
from rcgrpo_jax.experiments.saved_runs import read_saved_config
from rcgrpo_jax.rl.recipes import small_editor
from rcgrpo_jax.rl.trainer import train_to_end
from rcgrpo_jax.runs.checkpoint import Checkpointer

ABOUT = """Post-trains the editor that ships with the package on synthetic edits, exports the LoRA, compares it with the
base on held-out edits, and writes a page about it. Run again with the same flags, it resumes the training."""


def _flags(values: flags.FlagValues) -> None:
    path_flag("out", "directory to write", values)
    flags.DEFINE_integer("steps", 28, "training steps", 1, 100_000, flag_values=values)
    flags.DEFINE_integer("examples", 60, "held-out edits to compare on", 1, 100_000, flag_values=values)


def run(argv: list[str]) -> None:
    values, _ = parse("demo", ABOUT, argv, _flags, required=("out",))
    check_for_checkpoints("--out", values.out)
    out = Path(values.out)
    config = small_editor()
    config.train.num_steps = config.optimizer.decay_steps = values.steps
    config.optimizer.learning_rate *= 2  # fewer steps, and larger ones
    # One at a time of each group: attention's logits then stay in a CPU's cache.
    config.rollout.micro_batch = config.rollout.prompts
    config.rollout.decode_micro_batch = config.surrogate.micro_batch = 4
    config.data.path = f"scenes:train:{values.steps * config.rollout.prompts}"  # each is seen once
    data = f"scenes:heldout:{values.examples}"

    found = Checkpointer(out / "run" / "checkpoints", save_every=1, keep=1)
    if found.latest_step() is not None and (before := read_saved_config(found)["train"]["num_steps"]) != values.steps:
        raise UsageError(
            f"--steps: {values.steps} found; {out} holds a run of {before}.",
            f"Write --steps={before}, or another --out.",
        )
    devices = open_devices()
    print(f"1/4 {values.steps} steps of RC-GRPO on {config.data.path} -> {out / 'run'}", flush=True)
    train_to_end(config, out / "run", devices=devices[:1])
    lora = export(out / "run", out / "lora")
    print(f"2/4 LoRA in diffusers format -> {lora}", flush=True)
    print(f"3/4 {values.examples} held-out edits, by the base and with the LoRA, from the same noise", flush=True)
    model, shared = config.model, [f"--data={data}", f"--lora={lora}"]
    options = [f"--dtype={model.dtype}", f"--guidance={model.guidance}", f"--acd_layers={config.acd.layers}"]
    evaluate.run([f"--model={model.path}", *options, *shared, f"--out={out / 'evaluation'}"], devices)
    print("4/4 all of it on a page", flush=True)
    page = out / "report.html"
    report.run(
        [f"--workdir={out / 'run'}", f"--evaluation={out / 'evaluation'}", *shared, "--attention=4", f"--out={page}"],
        devices,
    )
    print(f"\nopen {page}")
