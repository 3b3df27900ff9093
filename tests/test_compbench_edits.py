"""A model edits a benchmark, each edit once, whoever stops it, and stands in a table with other editors."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_run
from compbench_data import IDS, TASKS, Examples, write_results
from PIL import Image

from rcgrpo_jax.cli import benchmark as benchmark_command
from rcgrpo_jax.cli import evaluate as command
from rcgrpo_jax.editors.flux_kontext import FluxKontext, FluxKontextEditor
from rcgrpo_jax.errors import UserError
from rcgrpo_jax.evaluation import edit
from rcgrpo_jax.evaluation.benchmarks import BENCHMARKS
from rcgrpo_jax.evaluation.benchmarks.entries import list_entries
from rcgrpo_jax.evaluation.benchmarks.rows import MISSING
from rcgrpo_jax.experiments.benchmark import in_turn
from rcgrpo_jax.models.lora import LoRAConfig, init_adapter
from rcgrpo_jax.study.build import build
from rcgrpo_jax.weights.lora import save_lora

SMALL = 32  # pixels that pictures are edited and measured in


@pytest.fixture(autouse=True)
def made(monkeypatch) -> list[int]:
    """The indices that are edited from now on; an edit is the negative of its source."""
    indices: list[int] = []
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)

    def negative(editor, batch, *_):
        indices.extend(int(index) for index in batch.indices[: batch.count])
        return 255 - batch.pixels, jnp.zeros(len(batch.indices))

    monkeypatch.setattr(edit, "_edit", negative)
    monkeypatch.setattr(FluxKontextEditor, "load_encoders", lambda self: None)
    monkeypatch.setattr(FluxKontextEditor, "params", {})
    monkeypatch.setattr(benchmark_command, "open_source", lambda *_, **__: Examples())
    small = BENCHMARKS["compbench"]._replace(side=SMALL, measures=("psnr",))
    monkeypatch.setitem(BENCHMARKS, "compbench", small)
    return indices


def run(tmp_path, *argv: str, adapters: Sequence[str] = ()) -> None:
    given = ["--benchmark=compbench", "--data=nine", f"--model={small_run.model_folder()}", "--dtype=float32"]
    given += ["--steps=2", "--text_tokens=16", "--batch=2", f"--out={tmp_path / 'out'}"]
    command.run([*small_run.last_of_each(*given, *argv), *(f"--adapter={text}" for text in adapters)])


def psnr_of(tmp_path, editor: str) -> list[float]:
    return [json.loads(line)["psnr"] for line in (tmp_path / "out" / f"{editor}.jsonl").read_text().splitlines()]


def test_a_model_edits_every_task_in_the_size_of_the_benchmark_and_is_measured(tmp_path, made):
    run(tmp_path, f"--results={write_results(tmp_path / 'other', 9)}")
    assert made == [*range(9)]
    edits = tmp_path / "out" / "edits" / "base"
    wanted = {f"{task}-{name.replace('/', '%2F')}.png" for task in TASKS for name in IDS}
    assert {file.name for file in edits.glob("*.png")} == wanted  # each task has the same ids
    assert Image.open(edits / min(wanted)).size == (SMALL, SMALL)
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| other | measured | 9 |" in table
    assert "| base | measured | 9 |" in table
    assert "| other - base | mean | 9 |" in table


def test_several_loras_edit_beside_the_base_and_another_published_table(tmp_path, made):
    model = FluxKontext(small_run.model_folder())
    adapter = init_adapter(jax.random.key(0), model.param_shapes, LoRAConfig(2, 4.0))
    for name in ("one", "two"):
        save_lora(tmp_path / name, adapter, LoRAConfig(2, 4.0), model.param_shapes)
    loras = [f"{name}={tmp_path / name}" for name in ("one", "two")]
    run(tmp_path, f"--edits={tmp_path / 'edits'}", adapters=loras[:1])
    assert made == [*range(9)] * 2
    made.clear()
    table_2 = ("--published=table-2", "--measures=official_psnr")
    run(tmp_path, f"--edits={tmp_path / 'edits'}", *table_2, adapters=loras)
    assert made == [*range(9)]  # of the second alone
    table = (tmp_path / "out" / "table.md").read_text()
    assert "Table 2" in table
    assert table.index("| base | measured | 9 |") < table.index("| one | measured | 9 |")
    assert all(f"| {name} - base | mean | 9 |" in table for name in ("one", "two"))


@pytest.mark.parametrize("torn", [b"", b'{"name": "add'])
def test_a_run_that_was_killed_goes_on_and_has_the_table_of_one_that_was_not(tmp_path, made, monkeypatch, torn):
    run(tmp_path / "whole")
    negative, calls = edit._edit, []

    def killed(*args):
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return negative(*args)

    monkeypatch.setattr(edit, "_edit", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    (log,) = (tmp_path / "out" / "edits" / "base").glob("*.jsonl")
    with log.open("ab") as file:
        file.write(torn)
    made.clear()
    run(tmp_path)
    assert made == [*range(4, 9)]
    for name in ("table.md", "table.csv", "base.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / "out" / name).read_bytes()
    made.clear()
    run(tmp_path)
    assert not made


def test_edits_of_other_settings_in_the_folder_are_refused(tmp_path):
    run(tmp_path)
    with pytest.raises(UserError, match="steps: there 2, now 3"):
        run(tmp_path, "--steps=3")


def test_an_edit_that_was_damaged_is_a_failure_with_its_name(tmp_path):
    run(tmp_path)
    (tmp_path / "out" / "edits" / "base" / f"add-{IDS[0].replace('/', '%2F')}.png").write_bytes(b"torn")
    run(tmp_path)
    (failed,) = json.loads((tmp_path / "out" / "failures.json").read_text())["base"]["failed"]
    assert (failed["task"], failed["id"]) == ("add", IDS[0])
    assert failed["reason"] != MISSING
    assert np.isfinite(psnr_of(tmp_path, "base")[1:]).all()


def test_the_edits_are_those_that_studies_and_evaluate_take_of_the_same_data(tmp_path):
    run(tmp_path)
    folders = {"one": tmp_path / "out" / "edits" / "base"}
    folders["two"] = Path(shutil.copytree(folders["one"], tmp_path / "two"))
    assert build(Examples(), folders, tmp_path / "study.html", size=(SMALL, SMALL)).examples == 9


def test_the_grid_shows_all_tasks_before_a_second_example_of_one():
    entries = list_entries(Examples(), BENCHMARKS["compbench"]).entries
    assert [entry.index for entry in in_turn(entries)] == [0, 3, 6, 1, 4, 7, 2, 5, 8]
    assert [entry.index for entry in in_turn(entries[:5])] == [0, 3, 1, 4, 2]
