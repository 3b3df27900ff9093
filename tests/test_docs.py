"""What the documents name is there: files, headings, configurations."""

import re

import pytest
import small_run

from rcgrpo_jax.cli.config_file import load_config

ROOT = small_run.ROOT
TOP = ("README.md", "CONTRIBUTING.md")  # the CHANGELOG names what is gone
DOCUMENTS = [*(ROOT / name for name in TOP), *ROOT.glob("benchmarks/*.md"), *ROOT.glob("docs/*.md")]
PLACES = (ROOT, ROOT / "rcgrpo_jax", ROOT / "docs", ROOT / "benchmarks")  # that a path in a document is relative to
each_document = pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))


def anchors(text: str) -> set[str]:
    """The anchors of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_document
def test_links_lead_to_files_and_headings(file):
    for path, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", file.read_text()):
        target = file.parent / path if path else file
        assert target.exists(), path
        assert not anchor or anchor in anchors(target.read_text()), f"{path}#{anchor}"


@each_document
def test_paths_in_code_type_are_there(file):
    for path in re.findall(r"`([\w.*-]+/[\w./*-]*?\.(?:py|sh|md))(?::\w+)?`", file.read_text()):
        assert re.search("NAME|FILE", path) or any(any(place.glob(path)) for place in PLACES), path


@each_document
def test_functions_that_are_named_beside_their_file_are_in_it(file):
    for path, name in re.findall(r"`(\w[\w/]*\.py)` `(\w+)`", file.read_text()):
        (found,) = (place / path for place in PLACES if (place / path).is_file())
        assert re.search(rf"\b(def|class) {name}\b", found.read_text()), f"{path} {name}"


def test_every_configuration_that_a_document_names_loads():
    named = {x for file in DOCUMENTS for x in re.findall(r"\bconfigs/[a-z]\w+\.py(?::\w+)?", file.read_text())}
    assert "configs/kontext_512.py:v5e_16" in named
    for name in named:
        load_config(ROOT / name, "")
