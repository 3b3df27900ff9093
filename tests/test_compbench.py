"""A benchmark, from any editor's pictures to tables: what is there is measured, what is not is counted and named."""

import csv
import json
import unicodedata
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path

import compbench_data
import numpy as np
import pyarrow.parquet
import pytest
from compbench_data import IDS, SIDE, TASKS, Examples, write_results
from PIL import Image

from rcgrpo_jax.cli import benchmark as benchmark_command
from rcgrpo_jax.cli import evaluate as command
from rcgrpo_jax.data.example import EditExample
from rcgrpo_jax.errors import UsageError, UserError
from rcgrpo_jax.evaluation.benchmarks import BENCHMARKS
from rcgrpo_jax.evaluation.benchmarks import results as reader
from rcgrpo_jax.evaluation.benchmarks.entries import list_entries
from rcgrpo_jax.evaluation.benchmarks.results import extra_pictures, measure_results, open_results
from rcgrpo_jax.evaluation.benchmarks.rows import MISSING, Row
from rcgrpo_jax.evaluation.benchmarks.tables import Edits, compute_values, remarks
from rcgrpo_jax.evaluation.judge import scores_of
from rcgrpo_jax.evaluation.measures import choose
from rcgrpo_jax.experiments import benchmark as experiment
from rcgrpo_jax.rewards.base import Reward, Unscored

COMPBENCH = BENCHMARKS["compbench"]
MEASURES = ("psnr", "ssim")
SMALL = 32  # pixels that pictures are measured in


@pytest.fixture(autouse=True)
def source(monkeypatch) -> Examples:
    """Measures in a small size what needs no weights, and opens the nine examples whatever the --data."""
    source = Examples()
    monkeypatch.setitem(BENCHMARKS, "compbench", COMPBENCH._replace(side=SMALL, measures=MEASURES))
    monkeypatch.setattr(benchmark_command, "open_source", lambda *_, **__: source)
    return source


def run(tmp_path: Path, *argv: str) -> Path:
    command.run(["--benchmark=compbench", "--data=nine", f"--out={tmp_path / 'out'}", "--batch=2", *argv])
    return tmp_path / "out"


def rows_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def numbers(out: Path) -> dict[tuple[str, ...], dict]:
    """The lines of table.csv by editor, task and measure."""
    with (out / "table.csv").open() as file:
        return {tuple(line[x] for x in ("editor", "task", "measure")): line for line in csv.DictReader(file)}


def counts(out: Path, editor: str) -> dict[str, list[str]]:
    """Task -> the numbers of the table of examples and their edits."""
    *_, table = (out / "table.md").read_text().split("**\n")
    lines = [[x.strip() for x in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")]
    return {line[1]: line[2:] for line in lines if line[0] == editor}


# Results of editors


def test_every_example_is_measured_as_its_picture_is_in_the_size_of_the_benchmark(tmp_path, source):
    out = run(tmp_path, f"--results={write_results(tmp_path / 'a', 9)}")
    rows = rows_of(out / "a.jsonl")
    assert [(row["task"], row["id"], row["failure"]) for row in rows] == [(x, y, None) for x in TASKS for y in IDS]
    for index, row in enumerate(rows):
        example = source[index]
        edited = np.asarray(Image.open(compbench_data.result_file(tmp_path / "a", example)))
        image, edited = (
            np.asarray(Image.fromarray(x).resize((SMALL, SMALL), Image.Resampling.BICUBIC), np.float64) / 255
            for x in (example.image, edited)
        )
        mask = Image.fromarray(np.uint8(example.mask * 255)).resize((SMALL, SMALL), Image.Resampling.NEAREST)
        error = np.square((image - edited) * (1 - np.asarray(mask) / 255)[..., None]).mean()
        assert row["psnr"] == pytest.approx(-10 * np.log10(error), abs=1e-3)
    assert pyarrow.parquet.read_table(out / "a.parquet").to_pylist() == rows


def test_the_mean_is_that_of_the_tasks_and_differences_are_those_of_pairs(tmp_path, source):
    folders = [write_results(tmp_path / name, noise) for name, noise in (("a", 3), ("b", 9))]
    for index in (1, 2):
        compbench_data.result_file(folders[0], source[index]).unlink()  # one edit is left of the first task
    out = run(tmp_path, *(f"--results={folder}" for folder in folders))
    a, b = (np.array([np.nan if row["failure"] else row["psnr"] for row in rows_of(out / f"{x}.jsonl")]) for x in "ab")
    found = numbers(out)

    def mean(editor: str, task: str) -> float:
        return float(found[editor, task, "psnr"]["mean"])

    for name, values in (("a", a), ("b", b), ("b - a", b - a)):
        tasks = np.nanmean(values.reshape(3, 3), axis=1)
        assert [mean(name, task) for task in TASKS] == pytest.approx(tasks)
        assert mean(name, "mean") == pytest.approx(tasks.mean())
    assert abs(mean("a", "mean") - np.nanmean(a)) > 0.1  # the tasks have different numbers of edits
    assert [found[name, "mean", "psnr"]["edits"] for name in ("a", "b", "b - a")] == ["7", "9", "7"]
    line = found["b - a", "remove", "psnr"]
    assert float(line["low"]) < mean("b - a", "remove") < float(line["high"]) < 0


def test_what_is_missing_unreadable_or_of_no_example_is_counted_and_named_and_the_run_goes_on(tmp_path, source, capsys):
    folder = write_results(tmp_path / "a", 9)
    whole = rows_of(run(tmp_path, f"--results={folder}") / "a.jsonl")
    files = [compbench_data.result_file(folder, source[index]) for index in range(9)]
    files[1].unlink()
    files[4].write_bytes(files[4].read_bytes()[:200])
    files[5].write_text("text")
    Image.fromarray(np.zeros((SIDE, SIDE, 3), np.uint8)).save(files[0].with_name("more.png"))
    files[0].with_name("notes.txt").write_text("no picture")
    capsys.readouterr()
    out = run(tmp_path, f"--results={folder}")
    printed, rows = capsys.readouterr().out, rows_of(out / "a.jsonl")
    assert [i for i, row in enumerate(rows) if row["failure"]] == [1, 4, 5]
    for i, row in enumerate(rows):
        assert row == whole[i] or (row["failure"] and row["psnr"] is None)
    assert counts(out, "a") == {
        "add": ["982", "3", "2", "1", "0", "1"],
        "remove": ["1,331", "3", "1", "0", "2", "0"],
        "replace": ["152", "3", "3", "0", "0", "0"],
    }
    failures = json.loads((out / "failures.json").read_text())["a"]
    assert [(x["task"], x["id"], x["file"]) for x in failures["failed"]] == [
        (TASKS[i // 3], IDS[i % 3], str(files[i])) for i in (1, 4, 5)
    ]
    assert failures["failed"][0]["reason"] == MISSING
    assert "not an image" in failures["failed"][2]["reason"]
    assert failures["of no example"]["add"] == [str(files[0].with_name("more.png").relative_to(folder))]
    assert f"a: add/{IDS[1]}: {MISSING}" in printed
    assert "1 pictures of no example" in printed


def test_a_picture_of_another_size_is_measured_in_that_of_the_benchmark(tmp_path, source):
    for name, side in (("small", 32), ("same", SIDE)):
        folder = write_results(tmp_path / name)
        for index in range(9):
            picture = Image.fromarray(source[index].target).resize((32, 32), Image.Resampling.BICUBIC)
            if side == 32:
                picture.save(compbench_data.result_file(folder, source[index]))
    out = run(tmp_path, *(f"--results={tmp_path / name}" for name in ("small", "same")))
    assert rows_of(out / "small.jsonl") == rows_of(out / "same.jsonl")


LAST = 8  # example, after which there is nothing to wait for


@pytest.mark.parametrize(
    ("change", "argv", "problem"),
    [
        ({"instruction": "Go."}, ["--judge=colour"], "instruction 'Go.': no colour is named"),
        ({"flawed": True}, [], "its target is flawed on purpose"),
        ({"target": None}, ["--measures=psnr,success"], "no target image; 1 of 9 examples have none, and edit success"),
        ({}, ["--results={empty}"], "empty: no picture of any of 9 examples found; the first would be .*00000.png"),
    ],
    ids=["judge", "flawed", "target", "no picture"],
)
def test_what_cannot_be_measured_is_said_before_anything_is(tmp_path, source, monkeypatch, change, argv, problem):
    examples = [replace(x, instruction="Make it red.") for x in source]
    examples[LAST] = replace(examples[LAST], **change)
    monkeypatch.setattr(benchmark_command, "open_source", lambda *_, **__: examples)
    monkeypatch.setattr(benchmark_command, "measure_editor", lambda *_: pytest.fail("it was measured"))
    (tmp_path / "empty" / "empty_local" / "add").mkdir(parents=True)
    with pytest.raises(UserError, match=problem):
        run(tmp_path, f"--results={write_results(tmp_path / 'a')}", *(x.format(empty=tmp_path / "empty") for x in argv))


def test_a_run_that_can_measure_nothing_is_an_error(tmp_path):
    folder = write_results(tmp_path / "a")
    for file in folder.rglob("*.png"):
        file.write_text("text")
    with pytest.raises(UserError, match=r"a: none of 9 edits could be measured; the first: .*00000.png: the file is"):
        run(tmp_path, f"--results={folder}")
    assert not list((tmp_path / "out").glob("table.*"))


def test_a_folder_of_another_layout_is_refused_with_the_one_that_is_meant(tmp_path):
    write_results(tmp_path / "results" / "a")
    with pytest.raises(UserError, match="no folder results_local/add or the like in it") as error:
        run(tmp_path, f"--results={tmp_path / 'results'}")
    assert str(tmp_path / "results" / "a") in error.value.remedy
    with pytest.raises(UserError, match="none: no such folder"):
        run(tmp_path, f"--results={tmp_path / 'none'}")


@pytest.mark.parametrize("name", ["../../secret.png", "/etc/secret.png"])
def test_an_id_that_leads_out_of_the_folder_is_a_failure(tmp_path, name):
    folder = write_results(tmp_path / "a")
    entries = list_entries([*Examples(name=name)][:1], COMPBENCH).entries
    found = measure_results(Examples(), entries, open_results(folder, COMPBENCH), choose(MEASURES), SMALL)
    assert "leads out of the folder" in found.rows[0].failure


def test_a_picture_whose_name_is_in_another_normal_form_is_that_of_its_example(tmp_path, source):
    written, wanted = (unicodedata.normalize(form, "é.png") for form in ("NFD", "NFC"))
    folder = write_results(tmp_path / "a", 9)
    file = compbench_data.result_file(folder, source[0])
    file = file.rename(file.parents[2] / written)
    listed = list_entries([replace(source[0], name=wanted)], COMPBENCH)
    locate = open_results(folder, COMPBENCH)
    found = measure_results(source, listed.entries, locate, choose(MEASURES), SMALL)
    assert found.rows[0].values["psnr"] > 20
    assert str(file.relative_to(folder)) not in extra_pictures(folder, COMPBENCH, listed.entries)["add"]
    file.write_text("text")
    assert "not an image" in measure_results(source, listed.entries, locate, choose(MEASURES), SMALL).rows[0].failure


@pytest.mark.parametrize("name", ["b\udcff", "new\nline", "<b>a|b", "\x1b[31mred"], ids=ascii)
def test_an_editor_of_any_name_is_a_line_of_the_tables(tmp_path, name):
    out = run(tmp_path, f"--results={write_results(tmp_path / name, 9)}")
    assert len(rows_of(out / f"{name}.jsonl")) == 9
    text = (out / "table.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert {line.replace(r"\|", "").count("|") for line in lines} == {6, 9}  # of five cells and of eight
    assert "<b>" not in text
    assert "\x1b" not in text + (out / "table.tex").read_text()


@pytest.mark.parametrize("count", [3, 9])
def test_memory_holds_a_batch_whatever_the_number_of_examples(tmp_path, monkeypatch, count):
    source = Examples(count)
    folder = write_results(tmp_path / "a", source=source)
    entries = list_entries(source, COMPBENCH).entries
    alive, most, make = weakref.WeakSet(), 0, EditExample.__init__

    def counted(self, *args, **kwargs) -> None:
        nonlocal most
        make(self, *args, **kwargs)
        alive.add(self)
        most = max(most, len(alive))

    monkeypatch.setattr(EditExample, "__init__", counted)
    found = measure_results(source, entries, open_results(folder, COMPBENCH), choose(MEASURES), SMALL, batch=4)
    assert len(found.rows) == 9 * count
    assert len(found.pictures) == 8  # for people
    assert 4 <= most <= 16  # four batches, read, resized and measured


# Examples


def test_examples_of_other_tasks_are_left_out_and_counted(tmp_path):
    examples = [*Examples(), *Examples(task="view")]
    listed = list_entries(examples, COMPBENCH)
    assert [entry.index for entry in listed.entries] == [*range(9)]
    edits = {"a": Edits([Row(*entry[:3], {"official_psnr": 20.0}) for entry in listed.entries[:6]])}
    said = remarks(COMPBENCH, edits, listed.others)
    assert "Left out, as of tasks that are none of the benchmark: 9 of view." in said
    assert "The data have no example of replace: the mean is of the other tasks." in said
    partial = "The data have {} of 2,465 published examples: the published rows are of other edits."
    assert partial.format(6) in said
    whole = [Row(0, "", task, {"official_psnr": 20.0}) for task, count in COMPBENCH.tasks.items() for _ in range(count)]
    assert partial.format("2,464") in remarks(COMPBENCH, {"a": Edits(whole[1:])})
    assert not any("published examples" in line for line in remarks(COMPBENCH, {"a": Edits(whole)}))
    with pytest.raises(UsageError, match="examples of 9 of no task found; some of the tasks add, remove, replace"):
        list_entries(Examples(task=""), COMPBENCH)
    with pytest.raises(UserError, match=f"add/{IDS[0]}: the examples 0 and 9 have this name"):
        list_entries([*Examples(), *Examples()], COMPBENCH)
    with pytest.raises(UserError, match=f"add/./{IDS[0]}: the examples 0 and 1 have this name"):  # one picture of two
        list_entries([Examples()[0], replace(Examples()[0], name=f"./{IDS[0]}")], COMPBENCH)


@pytest.mark.parametrize("fields", [{"name": "%s"}, {"name": "add/%s"}, {"name": "safe", "id": "add-%s"}], ids=str)
def test_the_id_is_that_of_the_results_however_the_data_name_it(fields):
    examples = Examples(**{field: text.replace("%s", IDS[0]) for field, text in fields.items()})
    (entry,) = list_entries([examples[0]], COMPBENCH).entries
    assert entry == (0, IDS[0], "add", examples[0].name)
    assert entry.key == f"add/{IDS[0]}"


def test_without_targets_what_needs_none_is_measured_and_the_rest_is_noted(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark_command, "open_source", lambda *_, **__: Examples(target=None))
    out = run(tmp_path, f"--results={write_results(tmp_path / 'a', 9)}", "--measures=psnr,success")
    assert all(row["psnr"] > 20 and "success" not in row for row in rows_of(out / "a.jsonl"))
    assert "edit success is not measured" in capsys.readouterr().out
    assert "edit success is not measured" in (out / "table.md").read_text()


def test_measures_without_their_weights_are_left_out_unless_they_were_asked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(BENCHMARKS, "compbench", COMPBENCH._replace(side=SMALL, measures=("official",)))
    folder = write_results(tmp_path / "a", 9)
    out = run(tmp_path, f"--results={folder}")
    assert {*rows_of(out / "a.jsonl")[0]} == {"id", "task", "failure", "official_psnr", "official_ssim"}
    said = capsys.readouterr().out
    assert "Not measured, since their weights are not given: official LPIPS. Give --lpips_squeeze FILE" in said
    assert "Give --clip FOLDER" in said
    assert "| RC-GRPO-Editing | published |  | 24.952 | 0.897 |" in (out / "table.md").read_text()
    with pytest.raises(UserError, match="official_lc_i: its weights were not found") as error:
        run(tmp_path, f"--results={folder}", "--measures=official")
    assert "--clip FOLDER" in error.value.remedy


def test_a_value_that_could_not_be_measured_is_null_and_counted():
    rows = [Row(i, f"{i}", "add", {"psnr": value}) for i, value in enumerate((20.0, np.nan, 30.0))]
    (line,) = [x for x in remarks(COMPBENCH, {"a": Edits(rows)}) if x.startswith("a:")]
    assert line == "a: psnr could not be measured of 1 edits that are there; they are left out."
    found = {value.task: value for value in compute_values(COMPBENCH, {"a": Edits(rows)}) if value.editor == "a"}
    assert (found["add"].interval.mean, found["add"].count) == (25, 2)


def test_a_task_of_few_edits_or_none_and_rows_that_are_not_beside_are_said():
    rows = [Row(i, f"{i}", "add", {"psnr": 20.0}) for i in range(30)]
    rows += [Row(30 + i, f"{i}", "remove", {"psnr": 20.0}) for i in range(29)]
    rows += [Row(59, "59", "replace", {}, MISSING)]
    said = remarks(COMPBENCH, {"a": Edits(rows)})
    assert said[0] == "a: no edit of replace was measured, so that there is no mean of the tasks."
    assert said[1].startswith("Fewer than 30 edits: a remove 29. ")
    (mean,) = [x for x in compute_values(COMPBENCH, {"a": Edits(rows)}) if (x.editor, x.task) == ("a", "mean")]
    assert np.isnan(mean.interval.mean)
    assert not any("Published" in line for line in said)
    official = [row._replace(values={"official_psnr": 20.0}) for row in rows[:-1]]
    assert remarks(COMPBENCH, {"a": Edits(official)})[0] == "Published rows: arXiv 2604.09386, Table 1."


def test_what_the_official_script_would_do_otherwise_is_said():
    rows = [
        Row(i, f"{i}", "add", {"official_psnr": psnr, "official_lc_t": 20.0}) for i, psnr in enumerate((100.0, 30.0))
    ]
    said = remarks(COMPBENCH, {"a": Edits(rows)}, {}, list_entries(Examples(caption=" "), COMPBENCH).uncaptioned)
    assert any(line.startswith("9 examples have no caption") for line in said)
    assert any(line.startswith("a: 1 edits have a background that is equal") for line in said)
    assert not any("caption" in line for line in remarks(COMPBENCH, {"a": Edits(rows)}))


# Judges


def test_a_judge_scores_every_edit_in_a_table_of_its_own(tmp_path):
    folder = write_results(tmp_path / "a", 9)
    out = run(tmp_path, f"--results={folder}", "--judge=preservation")
    scores = [row["preservation"] for row in rows_of(out / "a.jsonl")]
    assert all(0 < score < 1 for score in scores)
    assert len(set(scores)) == 9
    assert float(numbers(out)["a", "mean", "preservation"]["mean"]) == pytest.approx(np.mean(scores))
    assert "CompBench, local edits, judge measures" in (out / "table.md").read_text()


def test_a_judge_without_an_answer_leaves_gaps_and_says_why(tmp_path, source, caplog):
    class Mute(Reward):
        def start(self, inputs):
            raise Unscored("no server")

    entries = list_entries(source, COMPBENCH).entries
    locate, score = open_results(write_results(tmp_path / "a", 9), COMPBENCH), partial(scores_of, "mute", Mute())
    found = measure_results(source, entries, locate, choose(MEASURES), SMALL, batch=9, score=score)
    assert all(np.isnan(row.values["mute"]) and not row.failure for row in found.rows)
    assert "mute: no scores of 9 edits: no server" in caplog.text
    (line,) = [x for x in remarks(COMPBENCH, {"a": Edits(found.rows)}) if "mute" in x]
    assert line == "a: mute could not be measured of 9 edits that are there; they are left out."


# Processes


def test_processes_measure_their_shares_and_all_get_all_rows(tmp_path, source, monkeypatch):
    locate = open_results(write_results(tmp_path / "a", 9), COMPBENCH)
    entries, how = list_entries(source, COMPBENCH).entries, experiment.Measuring(choose(MEASURES), None, 2)
    benchmark, sent = BENCHMARKS["compbench"], []
    whole, _ = experiment.measure_editor("a", locate, benchmark, source, entries, how)

    def gathered(text: str) -> list[str]:
        sent.append(text)
        return sent

    monkeypatch.setattr(experiment.distributed, "gather_texts", gathered)
    for process in (1, 0):
        monkeypatch.setattr(experiment.distributed, "local_job_range", lambda n, k=process: range(k, n, 2))
        shared, _ = experiment.measure_editor("a", locate, benchmark, source, entries, how)
    assert [row.index for row in shared] == [*range(9)]
    assert [len(json.loads(text)) for text in sent] == [4, 5]
    for row, other in zip(shared, whole, strict=True):
        assert row.values == pytest.approx(other.values, rel=1e-5)


# The command


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        ([], "neither --model nor --results found"),
        (["--results={a}", "--results={b}/a"], "editors of the names a, a found"),
        (["--results={b}/base", "--model=small-editor"], "editors of the names base, base, lora found"),
        (["--model=small-editor", "--adapter=lora"], "--adapter: 'lora' found; NAME=PATH was wanted"),
        (["--model=small-editor", "--adapter=../a=x"], "--adapter: '../a=x' found"),
        (["--model=small-editor", "--adapter=base=x"], "editors of the names base, lora, base found"),
        (["--results={a}", "--adapter=b=x"], "--adapter: found with --results alone"),
        (["--results={a}", "--published=table-4"], "table-4"),
        (["--results={a}", "--steps=4"], "--steps: found with --results alone"),
        (["--results={a}", "--pictures={a}"], "--pictures: found with --benchmark"),
        (["--results={a}", "--judge_option=seed=1"], "--judge_option: found without --judge"),
        (["--results={a}", "--judge=editscor"], "editscor"),
        (["--results={a}", "--measures=psnrr"], "'psnrr' found"),
        (["--results={a}", "--judge=oracle", "--judge_option=noise=much"], "--judge_option oracle.noise"),
        (["--results={a}", "--size=64x64"], "--size: found with --results alone"),
        (["--results={a}", "--clip=x"], "--clip: found, and none of the measures psnr, ssim reads it"),
        (["--results={a}", "--out={a}/out"], "which is read"),
        (["--benchmark=compbenchh", "--results={a}"], "compbenchh"),
    ],
    ids=str,
)
def test_the_command_says_what_is_wrong(tmp_path, argv, problem):
    places = {"a": write_results(tmp_path / "a"), "b": tmp_path / "b"}
    for name in ("a", "base"):
        write_results(tmp_path / "b" / name)
    given = ["--benchmark=compbench", "--data=nine", f"--out={tmp_path / 'out'}"]
    changed = [x.format(**places) for x in argv]
    given = [x for x in given if x.split("=")[0] not in {change.split("=")[0] for change in changed}]
    with pytest.raises(UsageError) as error:
        command.run([*given, *changed])
    assert problem in error.value.problem
    assert not list(tmp_path.rglob("table.*"))


@pytest.mark.parametrize("flag", ["--results=a", "--judge=colour", "--num_processes=2"])
def test_flags_of_a_benchmark_are_refused_without_one(tmp_path, flag):
    with pytest.raises(UsageError, match=f"{flag.split('=')[0]}: found without --benchmark"):
        command.run(["--data=nine", f"--out={tmp_path}", "--pictures=b", flag])


def test_pictures_are_read_once_for_each_example(tmp_path, monkeypatch):
    files, read = [], reader.read_image
    monkeypatch.setattr(reader, "read_image", lambda file: (files.append(file), read(file))[1])
    run(tmp_path, f"--results={write_results(tmp_path / 'a')}")
    assert len(files) == len(set(files)) == 9
