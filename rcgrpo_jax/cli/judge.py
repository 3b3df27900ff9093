"""`rcgrpo judge`: whether a reward can tell good edits from bad, on pictures that are there."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from rcgrpo_jax.borders import parse_json
from rcgrpo_jax.cli.arguments import parse, parse_size
from rcgrpo_jax.cli.devices import open_devices
from rcgrpo_jax.cli.paths import PathParser, check_file, path_flag
from rcgrpo_jax.data.kinds import forms
from rcgrpo_jax.data.sources import open_source
from rcgrpo_jax.errors import UsageError
from rcgrpo_jax.evaluation import judge
from rcgrpo_jax.evaluation.pictures import size_of_edits
from rcgrpo_jax.evaluation.statistics import Interval
from rcgrpo_jax.progress import Jobs, count_steps
from rcgrpo_jax.rewards import Reward, check_all, default_options, known_rewards, make, option_problems, try_reward
from rcgrpo_jax.rewards.base import Factory
from rcgrpo_jax.runs.workdir import write_text

ABOUT = """Scores pictures that are there with a reward, several times, before a run learns from it.

--edits DIR are edits, a PNG for each example, NAME.png; --targets the right results; --sources the pictures as they
were. Of two of these it says how often the reward prefers the first. A repeat moves the reward's seed, where it has
one. The spread of repeats is the reward's noise: it should be well below the differences that shall be learned."""


def _flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("reward", None, "its name; with --plugin the name that options and messages use", values)
    flags.DEFINE_multi_string("option", [], "NAME=VALUE of the reward; may be given again", values)
    flags.DEFINE_string("plugin", None, "MODULE:FUNCTION of a reward of your own", values)
    path_flag("data", forms(), values)
    flags.DEFINE_enum("polarity", "white", ["white", "black"], "colour of the region in a folder's masks", values)
    flags.DEFINE_string("mask_value", "", "what its masks hold in the region instead: 15, or 2,5, or #800000", values)
    about = "folder of edits, NAME.png for each example; may be given again"
    flags.DEFINE_multi(PathParser("edits"), flags.ArgumentSerializer(), "edits", None, about, values)
    flags.DEFINE_bool("targets", False, "score the examples' targets", values)
    flags.DEFINE_bool("sources", False, "score the examples' sources: the edit that does nothing", values)
    flags.DEFINE_integer("repeats", 3, "scores of each picture", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("limit", None, "examples, from the first; all by default", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("batch", 32, "examples at a time", lower_bound=1, flag_values=values)
    about = "WIDTHxHEIGHT in pixels; that of the edits where `evaluate` made them, else of the first image"
    flags.DEFINE_string("size", None, about, values)
    path_flag("json", "file to write the numbers to, with every score", values)


def run(argv: list[str]) -> None:
    values, _ = parse("judge", ABOUT, argv, _flags, required=("reward", "data"))
    pictures, folders = _pictures(values)
    size = parse_size(values.size) if values.size else size_of_edits(folders)
    if values.json:
        check_file("json", Path(values.json), ".json")
    known = known_rewards({values.reward: values.plugin} if values.plugin else {})
    options = read_options(values.reward, values.option, known)
    rewards = make_repeats(values.reward, options, values.repeats, known)
    open_devices()
    source = open_source(values.data, values.polarity, mask_value=values.mask_value)
    count = min(values.limit or len(source), len(source))
    if not count:
        raise UsageError(f"--data: {values.data}: no examples found; at least one was wanted.", "Name more examples.")
    size = size or source[0].image.shape[:2]
    if values.plugin:
        try_reward(values.reward, rewards[0], size)
    check_all({values.reward: rewards[0]})
    with Jobs(lines=10) as progress:
        done = count_steps(progress, values.reward, count)
        found = judge.judge(rewards, source, range(count), pictures, size, batch=values.batch, progress=done)
    if values.json:
        write_text(Path(values.json), json.dumps(_report(values.reward, rewards[0], options, found), indent=2) + "\n")
    print(_table(values.reward, found))


def _pictures(values: flags.FlagValues) -> tuple[dict[str, judge.Pictures], list[Path]]:
    """What is scored, by name, and the folders among it.

    Raises:
        UsageError: Nothing is named, or two things have one name.
    """
    folders = [Path(folder) for folder in values.edits or ()]
    named = [(folder.absolute().name, judge.folder_pictures(folder)) for folder in folders]
    named += [(judge.TARGETS, judge.target_pictures)] * values.targets
    named += [(judge.SOURCES, judge.source_pictures)] * values.sources
    if not named:
        raise UsageError(
            "none of --edits, --targets and --sources found; one at least was wanted.",
            "Name what the reward shall score; two of them are compared.",
        )
    if len(dict(named)) < len(named):
        raise UsageError(
            f"--edits: the names {', '.join(name for name, _ in named)} found; different ones were wanted.",
            "Rename a folder: the names stand in the table.",
        )
    return dict(named), folders


def read_options(
    name: str, texts: Sequence[str], known: Mapping[str, Factory], flag: str = "--option"
) -> dict[str, Any]:
    """The options of a reward, of `NAME=VALUE` each; `flag` has them.

    A value is text where the option's default is, and otherwise JSON if it can be read so.

    Raises:
        UsageError: A text has another form, an option comes twice, there is none of the name or it has another type.
    """
    defaults, options = default_options(known).get(name, {}), {}
    for text in texts:
        option, equals, value = text.partition("=")
        if not equals or not option or option in options:
            problem = "a second value" if option in options else f"{text!r}"
            raise UsageError(f"{flag} {option}: {problem} found; NAME=VALUE was wanted, once a name.", "Correct it.")
        options[option] = value
        if not isinstance(defaults.get(option), str):
            try:
                options[option] = parse_json(value)
            except ValueError:  # text
                continue
    if problems := option_problems(name, options, known) if name in known else ():
        raise UsageError(f"{flag} {problems[0]}.", "Correct it; docs/rewards.md and docs/judges.md list the options.")
    return options


def make_repeats(name: str, options: Mapping[str, Any], repeats: int, known: Mapping[str, Factory]) -> list[Reward]:
    """One reward a repeat; where it has an option `seed`, each with seeds of its own.

    Raises:
        UserError: As `rewards.make`.
    """
    seed = options.get("seed", default_options(known).get(name, {}).get("seed"))
    moves = range(repeats) if isinstance(seed, int) else ()
    moved = [{"seed": (seed + judge.APART * r) % 2**32} for r in moves] or [{}] * repeats
    return [make(name, known, **{**options, **x}) for x in moved]


def _table(reward: str, found: judge.Judged) -> str:
    """The scores in words, a line each."""
    some = next(iter(found.scores.values()))
    width = max(map(len, ("pictures", *found.scores)))
    lines = [f"{reward}: {len(some)} examples, {some.shape[1]} scores of each picture"]
    lines += [f"{'pictures':<{width}}  mean   95 % interval    spread of repeats  of examples  ratio  unscored"]
    for name, scores in found.scores.items():
        x = judge.summarise(scores)
        spreads = f"{x.repeats:<17.3f}  {x.examples:<11.3f}  {x.noise:<5.2f}"
        lines.append(f"{name:<{width}}  {x.mean.mean:.3f}  {_bounds(x.mean, '.3f'):<15}  {spreads}  {x.unscored:.1%}")
    for (one, other), rate in judge.win_rates(found.scores).items():
        lines.append(f"{one} preferred to {other}: {rate.mean:.0%}, 95 % interval {_bounds(rate, '.0%')}")
    lines.append(f"{found.seconds:.3f} s a score")
    return "\n".join([*lines, *([f"without scores: {found.cause}"] if found.cause else [])])


def _bounds(interval: Interval, form: str) -> str:
    return f"{interval.low:{form}} to {interval.high:{form}}"


def _report(name: str, reward: Reward, options: Mapping[str, Any], found: judge.Judged) -> dict[str, Any]:
    """The numbers as JSON, null for what is not known."""

    def number(x: float) -> float | None:
        return float(x) if math.isfinite(x) else None

    def numbers(interval: Interval) -> dict[str, float | None]:
        return {field: number(x) for field, x in interval._asdict().items()}

    summaries = {kind: judge.summarise(scores) for kind, scores in found.scores.items()}
    return {
        "reward": name,
        "options": {option: value for option, value in options.items() if option not in reward.incidental},
        "seconds": found.seconds,
        "cause": found.cause,
        "pictures": {
            kind: {
                "mean": numbers(x.mean), "repeats": number(x.repeats), "examples": number(x.examples),
                "ratio": number(x.noise), "unscored": x.unscored,
                "scores": [[number(y) for y in row] for row in found.scores[kind]],
            }
            for kind, x in summaries.items()
        },
        "preferred": [
            {"one": one, "other": other, "rate": numbers(rate)}
            for (one, other), rate in judge.win_rates(found.scores).items()
        ],
    }  # fmt: skip
