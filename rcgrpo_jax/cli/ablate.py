"""`rcgrpo ablate --config C --out O`: variants of a run against each other, with intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from rcgrpo_jax.cli.config_file import keep_compilations, parse_with_config
from rcgrpo_jax.cli.devices import open_devices
from rcgrpo_jax.cli.paths import (
    check_apart,
    check_name,
    expand_fields,
    expand_home,
    is_path_field,
    path_fields,
    path_flag,
)
from rcgrpo_jax.errors import UsageError
from rcgrpo_jax.experiments.ablation import COMPONENTS, TAUS, EvaluationSettings, Variant, parse_variant
from rcgrpo_jax.experiments.baselines import at_equal_evaluations, baselines, with_learning_rates
from rcgrpo_jax.progress import Jobs
from rcgrpo_jax.report.ablation import WRITTEN, ablate

ABOUT = """Trains variants of one configuration, several seeds each, and evaluates all on the same held-out edits.

Runs and evaluations are kept: the same command goes on where it was stopped, and more seeds or variants add to it.
All are on the configuration's mesh."""
TABLES = {"components": lambda _: COMPONENTS, "taus": lambda _: TAUS, "baselines": baselines}  # of the configuration


def _flags(values: flags.FlagValues) -> None:
    path_flag("out", "directory of runs, evaluations and tables", values)
    flags.DEFINE_enum(
        "table", None, [*TABLES],
        "variants of the paper, Table 2 (components) or 3 (taus); or the methods that it compares with (baselines), at "
        "equal model evaluations", flag_values=values,
    )  # fmt: skip
    flags.DEFINE_multi_string("variant", [], "NAME: FIELD=VALUE ...; a further variant", values)
    flags.DEFINE_bool(
        "equal_evaluations", False, "each --variant has the training steps that the model evaluations of the "
        "configuration pay for", flag_values=values,
    )  # fmt: skip
    flags.DEFINE_list("learning_rates", [], "every variant is trained at each of these instead", flag_values=values)
    flags.DEFINE_integer(
        "seeds", 5, "training seeds, 0 .. seeds - 1; 0: no training, for --batches alone", 0, 1000, flag_values=values
    )
    path_flag("data", "held-out examples with targets", values, "scenes:heldout:500")
    flags.DEFINE_integer("steps", 28, "solver steps of the evaluation", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("eval_seed", 0, "seed of the evaluation's noise", 0, 2**32 - 1, flag_values=values)
    flags.DEFINE_integer(
        "batches", 0, "batches of groups explored before training by each variant (Fig. 5); 0: none", 0, 100_000,
        flag_values=values,
    )  # fmt: skip


def run(argv: list[str]) -> None:
    values = parse_with_config("ablate", ABOUT, argv, _flags, ("out",), "rcgrpo_jax.rl.config")
    config, out = values.config, Path(values.out)
    check_name("--out", values.out)
    expand_fields(config)
    check_apart("--out", out, {"--data": values.data, **path_fields(config), "data.cache": None}, WRITTEN)
    devices = open_devices()
    if values.equal_evaluations and not values.variant:
        raise UsageError("--equal_evaluations: found without --variant, whose budget it is.", "Leave it out.")
    named = map(read_variant, values.variant)
    variants = [
        *(TABLES[values.table](config) if values.table else ()),
        *(at_equal_evaluations(config, named) if values.equal_evaluations else named),
    ]
    if values.learning_rates:
        variants = with_learning_rates(variants, read_rates(values.learning_rates))
    protocol = EvaluationSettings(values.data, values.steps, values.eval_seed)
    keep_compilations(out)  # seeds share their programs
    with Jobs(lines=5) as progress:
        ablate(
            config, variants, out, protocol, seeds=values.seeds, batches=values.batches, devices=devices, say=print,
            progress=progress,
        )  # fmt: skip


def read_variant(text: str) -> Variant:
    """A variant of `--variant`, with `~` in its paths replaced."""
    name, changes = parse_variant(text)
    return Variant(
        name,
        {
            field: expand_home(f"--variant: {field}", x) if is_path_field(field) and isinstance(x, str) else x
            for field, x in changes.items()
        },
    )


def read_rates(texts: Sequence[str]) -> list[float]:
    """The numbers of `--learning_rates`.

    Raises:
        UsageError: One is none, or is not above 0.
    """
    try:
        rates = [float(text) for text in texts]
        if all(0 < rate < math.inf for rate in rates):
            return rates
    except ValueError:
        pass
    raise UsageError(
        f"--learning_rates: {','.join(texts)} found; numbers above 0, with commas between them, were wanted.",
        "Write --learning_rates=3e-4,1e-3.",
    )
