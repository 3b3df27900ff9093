"""`rcgrpo evaluate --benchmark NAME`: its flags, and what they ask for."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path

from absl import flags

from rcgrpo_jax.cli.arguments import parse_size
from rcgrpo_jax.cli.devices import open_devices
from rcgrpo_jax.cli.edit import editor_options
from rcgrpo_jax.cli.judge import make_repeats, read_options
from rcgrpo_jax.cli.lora_flags import read_lora
from rcgrpo_jax.cli.paths import PathParser, check_apart, check_file, expand_home
from rcgrpo_jax.data.buckets import KINDS, KONTEXT_SIDE
from rcgrpo_jax.data.example import NOTHING, REGION
from rcgrpo_jax.data.sources import open_source
from rcgrpo_jax.editors.model import Model
from rcgrpo_jax.editors.open import open_model
from rcgrpo_jax.errors import UsageError
from rcgrpo_jax.evaluation.benchmarks import BENCHMARKS, Benchmark
from rcgrpo_jax.evaluation.benchmarks.entries import check_listed, list_entries
from rcgrpo_jax.evaluation.benchmarks.results import open_results
from rcgrpo_jax.evaluation.judge import check_scorable, scores_of
from rcgrpo_jax.evaluation.measures import Measure, MeasureOptions, choose, load_weights
from rcgrpo_jax.evaluation.measures.clip import load_model
from rcgrpo_jax.evaluation.measures.official import load_squeeze_weights
from rcgrpo_jax.experiments.benchmark import (
    FILES,
    Measuring,
    edit_adapters,
    measure_editor,
    summary,
    write_benchmark,
)
from rcgrpo_jax.flow.solvers import choose_solver
from rcgrpo_jax.parallel import distributed
from rcgrpo_jax.parallel.slurm import launched_processes
from rcgrpo_jax.progress import Jobs, count_steps, no_progress
from rcgrpo_jax.rewards import check_all, known_rewards
from rcgrpo_jax.weights.lora import load_loras

_MAKE = (  # flags that say how a model edits
    "adapter", "lora", "lora_scale", "edits", "seed", "steps", "solver", "guidance", "acd_layers", "text_tokens",
    "dtype", "quantization", "buckets",
)  # fmt: skip
_WEIGHTS = {"clip": load_model, "lpips_squeeze": load_squeeze_weights}  # flag -> what reads it
_OWN = ("results", "published", "adapter", "judge", "judge_option", "buckets")  # of a benchmark


def define_benchmark(values: flags.FlagValues) -> None:
    """The flags that say which benchmark, whose results, and which judge."""
    flags.DEFINE_enum("benchmark", None, [*BENCHMARKS], "benchmark that the examples of --data are", values)
    about = "folder of an editor's results, in the benchmark's layout; may be given again"
    flags.DEFINE_multi(PathParser("results"), flags.ArgumentSerializer(), "results", None, about, values)
    tables = dict.fromkeys(name for benchmark in BENCHMARKS.values() for name in benchmark.tables)
    flags.DEFINE_enum("published", None, [*tables], "published table to stand beside; the main one by default", values)
    about = "kontext: edits in the nearest of Kontext's shapes, of --size's area; by default as the benchmark wants"
    flags.DEFINE_enum("buckets", None, KINDS, about, values)
    about = "a further LoRA, NAME=PATH, that edits beside base and --lora; may be given again"
    flags.DEFINE_multi_string("adapter", [], about, values)
    flags.DEFINE_string("judge", None, "reward that scores the edits of a benchmark too, such as editscore", values)
    flags.DEFINE_multi_string("judge_option", [], "NAME=VALUE of --judge; may be given again", values)
    several = "; of a benchmark, with several processes, where neither a TPU nor Slurm tells"
    flags.DEFINE_string("coordinator", None, f"HOST:PORT of process 0{several}", values)
    flags.DEFINE_string("num_processes", None, f"how many there are{several}", values)
    flags.DEFINE_string("process_id", None, f"number of this one, from 0{several}", values)


def check_no_benchmark(values: flags.FlagValues) -> None:
    """Refuses what a benchmark alone takes, where there is none.

    Raises:
        UsageError: A flag of a benchmark is given, or several processes are at work.
    """
    if given := [name for name in (*_OWN, *distributed.VARIABLES) if values[name].present]:
        raise UsageError(
            f"--{given[0]}: found without --benchmark.", f"Name one ({', '.join(BENCHMARKS)}), or leave it out."
        )
    if (count := launched_processes(os.environ)) > 1:
        raise UsageError(
            f"one of {count} processes; `evaluate` spreads its work over several with --benchmark alone.",
            "Run it once, in a single process.",
        )


def check_nothing_edits(values: flags.FlagValues, beside: str, names: Sequence[str] = _MAKE) -> None:
    """Refuses flags that say how a model edits, where none does.

    Raises:
        UsageError: Naming the first, and the flag that it is found with.
    """
    if given := [name for name in names if values[name].present]:
        raise UsageError(
            f"--{given[0]}: found with {beside}; it says how a model edits, and these edits are made.",
            f"Leave --{given[0]} out.",
        )


def measure_options(values: flags.FlagValues, measures: Sequence[Measure]) -> MeasureOptions:
    """Where the weights of measures are.

    Raises:
        UsageError: Weights are named that no measure reads.
    """
    for flag, load in _WEIGHTS.items():
        if values[flag].present and all(one.load is not load for one in measures):
            raise UsageError(
                f"--{flag}: found, and none of the measures {', '.join(one.name for one in measures)} reads it.",
                f"Name measures that do, as in --measures official,region, or leave --{flag} out.",
            )
    return MeasureOptions(**{flag: values[flag].value or "" for flag in _WEIGHTS})


def run_benchmark(values: flags.FlagValues) -> None:
    """Edits, measures and compares; several processes share the work, and the first one writes and prints."""
    benchmark, out = _chosen(values), Path(values.out)
    loras = _adapter_paths(values)
    folders = _result_folders(values, loras)
    size = parse_size(values.size) if values.size else (benchmark.side or KONTEXT_SIDE,) * 2
    edits = Path(values.edits) if values.edits else out / "edits"
    located = {name: open_results(folder, benchmark) for name, folder in folders.items()}
    read = {"--data": values.data, "--model": values.model}
    for folder in folders.values():
        for flag, written in (("--out", out), ("--edits", edits)):
            check_apart(flag, written, {"--results": folder})
    check_apart("--out", out, read, FILES)
    check_apart("--edits", edits, read if values.model else {})
    check_file("out", out / "grid.png", ".png")
    choose_solver(values.solver, values.steps)
    distributed.initialize({name: values[name].value for name in distributed.VARIABLES})
    open_devices()
    with distributed.raise_together():
        how = _measuring(values, benchmark)
        model = open_model(values.model) if values.model else None
        adapters = _read_adapters(values, loras, model) if model else {}
        needs = NOTHING if benchmark.side is None else REGION
        source = open_source(values.data, values.polarity, mask_value=values.mask_value, needs=needs)
    with Jobs(lines=10) as jobs, distributed.report_lost_process():
        progress = jobs if distributed.is_main() else no_progress
        with distributed.raise_together():
            done = count_steps(progress, "read the examples", len(source))
            listed = list_entries(source, benchmark, done, how.check)
            check_listed(listed, how.measures, located)
        if model:
            edited = edit_adapters(
                model, source, listed.entries, adapters, edits, size, buckets=values.buckets or benchmark.buckets,
                steps=values.steps, solver=values.solver, guidance=values.guidance, seed=values.seed,
                batch=values.batch, acd_layers=values.acd_layers, progress=progress, **editor_options(values),
            )  # fmt: skip
            located = edited | located  # differences are from the base
        measured = {
            name: measure_editor(name, locate, benchmark, source, listed.entries, how, progress)
            for name, locate in located.items()
        }
        with distributed.raise_together():  # the others stay until all is written
            if distributed.is_main():
                found = write_benchmark(benchmark, source, listed, measured, folders, how, out)
    if distributed.is_main():
        print(summary(found, out))


def _chosen(values: flags.FlagValues) -> Benchmark:
    """The benchmark, with the published table to stand beside.

    Raises:
        UsageError: It has no such table; or has no masks, and measures or their weights are named, or no judge is.
    """
    benchmark = BENCHMARKS[values.benchmark]
    if values.published and values.published not in benchmark.tables:
        raise UsageError(
            f"--published: {values.published} found; {benchmark.name} has {', '.join(benchmark.tables)}.",
            "Name one of these, or leave it out.",
        )
    given = [flag for flag in ("measures", *_WEIGHTS) if values[flag].present]
    if benchmark.side is None and (given or not values.judge):
        found = f"--{given[0]}: found; measures need masks" if given else "--judge: none found"
        raise UsageError(
            f"{found}. The examples of {benchmark.name} have no masks; a judge scores them alone.",
            f"Name a judge by --judge; the benchmark's own is {benchmark.judge} (docs/benchmarks.md).",
        )
    return benchmark._replace(published=benchmark.tables[values.published]) if values.published else benchmark


def _adapter_paths(values: flags.FlagValues) -> dict[str, str]:
    """Name -> path of each `--adapter`.

    Raises:
        UsageError: One is not NAME=PATH, or its name is not one of a file.
    """
    paths = {}
    for text in values.adapter:
        name, equals, path = text.partition("=")
        if not (equals and path and re.fullmatch(r"[\w.+-]*\w", name)) or name in paths:
            raise UsageError(
                f"--adapter: {text!r} found; NAME=PATH was wanted, each with a name of letters, digits and -._+.",
                "Write --adapter rdp=runs/rdp/lora.",
            )
        paths[name] = expand_home("--adapter", path)
    return paths


def _read_adapters(values: flags.FlagValues, paths: Mapping[str, str], model: Model) -> dict[str, dict | None]:
    """What edits: the base, the LoRA of `--lora`, and those of `--adapter`, with their scales folded in."""
    lora = read_lora(values, model)
    further = {name: load_loras([path], [1.0], model.param_shapes) for name, path in paths.items()}
    return {"base": None} | ({"lora": lora} if lora else {}) | further


def _result_folders(values: flags.FlagValues, adapters: Collection[str]) -> dict[str, Path]:
    """The folders of `--results` by their own names.

    Raises:
        UsageError: There is nothing to measure, two editors have one name, or a flag asks for something else.
    """
    folders = [Path(os.path.abspath(folder)) for folder in values.results or ()]  # "." has a name, too
    if values.pictures:
        raise UsageError("--pictures: found with --benchmark.", "Name the folder of an editor with --results.")
    if not (folders or values.model):
        raise UsageError(
            "neither --model nor --results found; one of them, or both, were wanted.",
            "Name the model that shall edit, or the folder of an editor's results.",
        )
    if not values.model:
        check_nothing_edits(values, "--results alone", (*_MAKE, "size"))
    names = [folder.name for folder in folders]
    names += ["base", "lora", *adapters] if values.model else []
    if len(set(names)) < len(names):
        raise UsageError(
            f"--results, --adapter: editors of the names {', '.join(names)} found; different names were wanted.",
            "Rename one (of a folder, the one in it too): the names stand in the table.",
        )
    return {folder.name: folder for folder in folders}


def _measuring(values: flags.FlagValues, benchmark: Benchmark) -> Measuring:
    """The measures, with what they load, and the judge: what they lack is said before hours of edits."""
    measures = [] if benchmark.side is None else choose(values.measures or benchmark.measures)
    if not values.measures:  # what was not asked for by name is left out where its weights are not given
        measures = [one._replace(required=False) for one in measures]
    options = measure_options(values, measures)
    weights = load_weights(measures, options)
    without = [one for one in measures if one.load is not None and weights[one.load] is None]
    measures = [one for one in measures if one not in without]
    if not values.judge:
        if values.judge_option:
            raise UsageError("--judge_option: found without --judge.", "Name the judge, or leave it out.")
        return Measuring(measures, options, values.batch, without=without)
    known = known_rewards({})
    chosen = read_options(values.judge, values.judge_option, known, "--judge_option")
    (reward,) = make_repeats(values.judge, chosen, 1, known)
    check_all({values.judge: reward})
    score, check = partial(scores_of, values.judge, reward), lambda example: check_scorable([example], reward)
    return Measuring(measures, options, values.batch, score, check, without)
