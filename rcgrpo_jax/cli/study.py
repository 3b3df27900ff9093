"""`rcgrpo study build` and `rcgrpo study score`: which edits people prefer, without knowing whose they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from absl import flags

from rcgrpo_jax.cli.arguments import parse, parse_size
from rcgrpo_jax.cli.devices import leave_devices_alone
from rcgrpo_jax.cli.paths import PathParser, check_file, name_folders, path_flag
from rcgrpo_jax.data.example import NOTHING
from rcgrpo_jax.data.kinds import forms
from rcgrpo_jax.data.sources import open_source
from rcgrpo_jax.errors import UsageError, nearest
from rcgrpo_jax.evaluation.tables import latex, markdown, markdown_line, plain
from rcgrpo_jax.progress import Jobs, count_steps
from rcgrpo_jax.runs.workdir import write_text
from rcgrpo_jax.study.build import MOST_MAKERS, QUESTION, build
from rcgrpo_jax.study.records import read_key, read_votes
from rcgrpo_jax.study.score import as_json, notes, score, tables

BUILD = """Writes one HTML page that asks people which edit is the best. It shows each source with its instruction, and
the edits of all folders without names, in places that change from example to example. It works without a network, and
saves the votes as a file. Whose edit is whose stands in a second file, NAME.key.json, which voters must not get.

--pictures DIR is a folder of edits as `rcgrpo evaluate` takes it: a PNG for each example, NAME.png."""
SCORE = """Says how often the edits of each folder were preferred, by voter and pooled, with 95 % intervals, and how
often one won over another. With --out NAME.json it writes the numbers, and beside them the tables as NAME.md and
NAME.tex."""


def _build_flags(values: flags.FlagValues) -> None:
    path_flag("data", forms(), values)
    flags.DEFINE_enum("polarity", "white", ["white", "black"], "colour of the region in a folder's masks", values)
    flags.DEFINE_string("mask_value", "", "what its masks hold in the region instead: 15, or 2,5, or #800000", values)
    about = f"folder of edits, NAME.png for each example; 2 to {MOST_MAKERS} of them"
    flags.DEFINE_multi(PathParser("pictures"), flags.ArgumentSerializer(), "pictures", None, about, values)
    path_flag("out", "page to write, HTML; its key is written beside it", values)
    about = "asked of each example; may be given again"
    flags.DEFINE_multi_string("question", [QUESTION], about, values)
    flags.DEFINE_integer("count", None, "examples, drawn at random; all by default", 1, flag_values=values)
    about = "of places, ids and that draw; a new one by default, which the key tells"
    flags.DEFINE_integer("seed", None, about, 0, flag_values=values)
    about = "WIDTHxHEIGHT of all edits in pixels; that of the edits where `evaluate` made them, else of the first image"
    flags.DEFINE_string("size", None, about, values)
    about = "longer side that larger pictures get on the page, pixels; they stay as they are by default"
    flags.DEFINE_integer("side", None, about, 16, flag_values=values)


def _score_flags(values: flags.FlagValues) -> None:
    path_flag("key", "the .key.json of the study", values)
    about = "file that the page saved, one of each voter; may be given again"
    flags.DEFINE_multi(PathParser("votes"), flags.ArgumentSerializer(), "votes", None, about, values)
    path_flag("out", "file to write the numbers to, JSON; tables come beside it", values)


def run(argv: list[str]) -> None:
    name = argv[0] if argv else ""
    if name in ("--help", "-h", "-help"):
        print("usage: rcgrpo study build|score [--FLAG=VALUE ...]\n\n" + "\n\n".join((BUILD, SCORE)))
        return
    if name not in ACTIONS:
        near = nearest(name, ACTIONS)
        raise UsageError(
            f"{name!r} found; build or score was wanted." + (f" Did you mean {near!r}?" if near else ""),
            "`rcgrpo study --help` describes them.",
        )
    ACTIONS[name](argv[1:])


def _build(argv: list[str]) -> None:
    values, _ = parse("study build", BUILD, argv, _build_flags, required=("data", "pictures", "out"))
    size, page = parse_size(values.size) if values.size else None, Path(values.out)
    folders = name_folders("pictures", values.pictures)
    leave_devices_alone()
    check_file("out", page, ".html")
    source = open_source(values.data, values.polarity, values.mask_value, NOTHING)
    with Jobs(lines=10) as progress:
        done = count_steps(progress, "study", min(values.count or len(source), len(source)))
        built = build(
            source, folders, page, questions=values.question, count=values.count, seed=values.seed, size=size,
            side=values.side, progress=done,
        )  # fmt: skip
    print(f"page  {page} ({built.size / 1e6:.1f} MB): study {built.study}, {built.examples} examples")
    print(f"key   {built.key}: keep it from the voters")
    if built.alike:
        shown = ", ".join(built.alike[:3]) + (", ..." if len(built.alike) > 3 else "")
        print(f"alike: of {len(built.alike)} examples two edits are the same in every pixel ({shown})")


def _score(argv: list[str]) -> None:
    values, _ = parse("study score", SCORE, argv, _score_flags, required=("key", "votes"))
    outputs = {}
    if values.out:
        outputs = {suffix: Path(values.out).with_suffix(suffix) for suffix in (".md", ".tex")}
        outputs = {".json": Path(values.out)} | outputs
        inputs = {"--key": values.key} | {f"--votes {path}": path for path in values.votes}
        for suffix, path in outputs.items():
            check_file("out", path, suffix, inputs)
    key = read_key(Path(values.key))
    scores = score(key, read_votes(key, [Path(path) for path in values.votes]))
    found, remarks = tables(scores), notes(scores)
    texts = {
        ".json": json.dumps(as_json(scores), indent=2, ensure_ascii=False) + "\n",
        ".md": f"{markdown(found)}\n" + "\n\n".join(map(markdown_line, remarks)) + "\n",
        ".tex": latex(found),
    }
    for suffix, path in outputs.items():
        write_text(path, texts[suffix])
    print("\n".join([plain(found), *remarks, *(f"written  {path}" for path in outputs.values())]))


ACTIONS: dict[str, Callable[[list[str]], None]] = {"build": _build, "score": _score}
