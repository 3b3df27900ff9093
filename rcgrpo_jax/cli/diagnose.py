"""`rcgrpo diagnose layers`: which blocks' attention tells good edits from bad, and so what `acd.layers` should be."""

from __future__ import annotations

from pathlib import Path

from absl import flags

from rcgrpo_jax.cli.arguments import parse, parse_size
from rcgrpo_jax.cli.devices import open_devices
from rcgrpo_jax.cli.edit import editor_options
from rcgrpo_jax.cli.judge import read_options
from rcgrpo_jax.cli.lora_flags import define_lora, read_lora
from rcgrpo_jax.cli.paths import check_apart, path_flag
from rcgrpo_jax.data.kinds import forms
from rcgrpo_jax.data.sources import open_source
from rcgrpo_jax.editors.open import open_model
from rcgrpo_jax.errors import UsageError, nearest
from rcgrpo_jax.evaluation.edit import EditOptions
from rcgrpo_jax.evaluation.measure_rewards import measure_rewards
from rcgrpo_jax.experiments.layer_rollouts import Success
from rcgrpo_jax.experiments.layers import MEDIAN, parse_threshold
from rcgrpo_jax.models.quantization import NONE, QUANTIZATIONS
from rcgrpo_jax.progress import Jobs
from rcgrpo_jax.report.layers import WRITTEN, diagnose_layers
from rcgrpo_jax.rewards import check_all, known_rewards, make, try_reward

ABOUT = """layers: edits examples from several noises each, and says how well the ACD of each block tells good edits
from bad, and what acd.layers should be (Appendix D.1 of the paper).

--success says what good is: a reward, or a measure of `rcgrpo evaluate` such as success. Rollouts are kept as they are
made: the same command goes on where it was stopped, and more --examples or --seeds add to them."""
SUBJECTS = ("layers",)


def _flags(values: flags.FlagValues) -> None:
    path_flag("model", "diffusers folder, converted directory, or small-editor", values)
    define_lora(values)
    path_flag("data", forms(), values)
    flags.DEFINE_enum("polarity", "white", ["white", "black"], "colour of the region in a folder's masks", values)
    flags.DEFINE_string("mask_value", "", "what its masks hold in the region instead: 15, or 2,5, or #800000", values)
    path_flag("out", "directory to write", values)
    flags.DEFINE_integer("examples", 48, "examples, from the first", lower_bound=2, flag_values=values)
    flags.DEFINE_integer("seeds", 8, "noises of each example", lower_bound=2, flag_values=values)
    flags.DEFINE_integer("seed", 0, "the first noise's seed; the others follow", 0, 2**31 - 1, flag_values=values)
    about = (
        "what a good edit scores high on: a reward, or a measure of `rcgrpo evaluate`; with --plugin your name for it"
    )
    flags.DEFINE_string("success", "oracle", about, values)
    flags.DEFINE_multi_string("option", [], "NAME=VALUE of the reward; may be given again", values)
    flags.DEFINE_string("plugin", None, "MODULE:FUNCTION of a reward of your own", values)
    flags.DEFINE_string("threshold", MEDIAN, "a score of so much is a success; median: of all scores", values)
    flags.DEFINE_enum("acd_text", "all", ["all", "instruction"], "text tokens that count, as acd.text", values)
    flags.DEFINE_integer("steps", 28, "solver steps", lower_bound=1, flag_values=values)
    flags.DEFINE_float("guidance", 2.5, "guidance scale", flag_values=values)
    flags.DEFINE_integer("batch", 8, "edits at a time", lower_bound=1, flag_values=values)
    flags.DEFINE_string("size", None, "WIDTHxHEIGHT in pixels; that of the first image by default", values)
    flags.DEFINE_integer("text_tokens", 0, "length of the T5 sequence; 0: the model's", 0, 512, flag_values=values)
    flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "compute dtype", values)
    flags.DEFINE_enum("quantization", NONE, QUANTIZATIONS, "of the transformer's kernels", values)


def run(argv: list[str]) -> None:
    values, (subject,) = parse(
        "diagnose", ABOUT, argv, _flags, positional=("subject",), required=("model", "data", "out")
    )
    if subject not in SUBJECTS:
        near = nearest(subject, SUBJECTS)
        raise UsageError(
            f"unknown subject {subject!r}; {', '.join(SUBJECTS)} was wanted."
            + (f" Did you mean {near!r}?" if near else ""),
            "`rcgrpo diagnose --help` describes them.",
        )
    size, out, threshold = (
        parse_size(values.size) if values.size else None,
        Path(values.out),
        parse_threshold(values.threshold),
    )
    check_apart("--out", out, {"--data": values.data, "--model": values.model}, WRITTEN)
    known = measure_rewards() | known_rewards({values.success: values.plugin} if values.plugin else {})
    options = read_options(values.success, values.option, known)
    reward = make(values.success, known, **options)
    model = open_model(values.model)
    devices = open_devices()
    lora = read_lora(values, model)
    source = open_source(values.data, values.polarity, mask_value=values.mask_value)
    if values.plugin and len(source):
        try_reward(values.success, reward, size or source[0].image.shape[:2])
    check_all({values.success: reward})
    with Jobs(lines=10) as progress:
        text = diagnose_layers(
            model, lora, source, Success(values.success, reward, options), out, threshold=threshold,
            examples=values.examples, seeds=range(values.seed, values.seed + values.seeds),
            options=EditOptions(values.steps, values.guidance, values.seed), batch=values.batch, size=size,
            instruction_only=values.acd_text == "instruction", **editor_options(values), devices=devices,
            progress=progress,
        )  # fmt: skip
    print(text)
