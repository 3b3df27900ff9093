"""The tables of a benchmark: published rows above ours in Markdown, LaTeX and CSV."""

import re

import numpy as np
import pytest
from compbench_data import TASKS

from rcgrpo_jax.evaluation.benchmarks import BENCHMARKS
from rcgrpo_jax.evaluation.benchmarks.rows import Row
from rcgrpo_jax.evaluation.benchmarks.tables import Edits, compute_values, make_tables, to_csv
from rcgrpo_jax.evaluation.measures import choose
from rcgrpo_jax.evaluation.tables import latex, markdown

COMPBENCH = BENCHMARKS["compbench"]


@pytest.fixture(scope="module")
def laid_out() -> tuple:
    rng, names = np.random.default_rng(0), ("region_psnr", "official_psnr", "official_ssim")
    rows = {
        editor: [Row(i, f"{i}", TASKS[i % 3], {x: rng.normal() for x in names}) for i in range(30)]
        for editor in ("base_50%", "lora")
    }
    editors = {name: Edits(x) for name, x in rows.items()}
    values = compute_values(COMPBENCH, editors)
    return make_tables(COMPBENCH, editors, values), values


def test_published_rows_stand_above_ours_in_every_form(laid_out):
    tables, values = laid_out
    first = tables[0].lines
    assert first[0] == ["editor", "kind", "edits", "PSNR ↑", "SSIM ↑"]
    names = ["InstructPix2Pix", "GoT", "Step1X-Edit", "FLUX.1-Kontext-dev", "RC-GRPO-Editing", "base_50%", "lora"]
    assert [line[0] for line in first[1:]] == names
    assert [line[1] for line in first[1:]] == ["published"] * 5 + ["measured"] * 2
    assert first[5][2:] == ["", "24.952", "0.897"]
    assert re.fullmatch(r"(-?\d+\.\d{3}) \[-?\d+\.\d{3}, -?\d+\.\d{3}\]", first[6][3])
    assert "| RC-GRPO-Editing | published |  | 24.952 | 0.897 |" in markdown(tables)
    assert "RC-GRPO-Editing & published &  & 24.952 & 0.897 \\\\" in latex(tables)
    assert "RC-GRPO-Editing,published,mean,official_psnr,24.952,,,\n" in to_csv(values)
    assert "base\\_50\\% & measured & 30 &" in latex(tables)


def test_measures_of_another_form_have_tables_without_published_rows(laid_out):
    (table,) = [x for x in laid_out[0] if "region measures: unweighted mean" in x.title]
    assert [line[0] for line in table.lines] == ["editor", "base_50%", "lora"]


def test_latex_has_its_columns_braces_and_no_bare_sign(laid_out):
    text = latex(laid_out[0])
    assert text.count("{") == text.count("}")
    assert text.count("\\begin{") == text.count("\\end{") == 2 * len(laid_out[0])
    for block in text.split("\\begin{tabular}")[1:]:
        columns = len(re.match(r"\{(l+)\}", block)[1])
        lines = [line for line in block.split("\\end{tabular}")[0].splitlines() if line.endswith("\\\\")]
        assert len(lines) > 1
        assert {len(re.findall(r"(?<!\\)&", line)) for line in lines} == {columns - 1}
        assert not any(re.search(r"(?<!\\)[%_#]|[↑↓~^]|\\\\ *\[", line) for line in lines)


def test_published_rows_are_those_of_the_paper():
    (ours,) = [row for row in COMPBENCH.published.rows if row.editor == "RC-GRPO-Editing"]
    assert [*ours.values.values()] == [0.822, 21.548, 24.952, 0.897, 0.068]
    assert sum(COMPBENCH.tasks.values()) == 2465
    rows = {name: [row.values for row in table.rows] for name, table in COMPBENCH.tables.items()}
    assert {name: len(found) for name, found in rows.items()} == {"table-1": 5, "table-2": 4, "table-3": 4}
    assert rows["table-1"][3:] == [rows["table-2"][0], rows["table-2"][3]]  # the base and the method
    assert rows["table-3"][1] == rows["table-2"][3]
    assert {tuple(row) for found in rows.values() for row in found} == {tuple(x.name for x in choose(["official"]))}
