"""A new kind of data set is one class under a prefix; what examples lack is refused by name, with who needs it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import small_run

from rcgrpo_jax.cli.paths import check_apart, expand_home
from rcgrpo_jax.data import EditExample, Needs, kinds
from rcgrpo_jax.data.example import check_needs
from rcgrpo_jax.data.kinds import SourceKind, forms, register, split_prefix
from rcgrpo_jax.data.sources import folder_of, open_source, same_examples
from rcgrpo_jax.errors import UsageError, UserError

EXAMPLE = EditExample("one", np.zeros((16, 16, 3), np.uint8), np.ones((16, 16), np.float32), "Make it red.")


@pytest.fixture
def toy(monkeypatch):
    """A kind of its own: `toy:FILE:COUNT`, examples without pixels to read."""
    monkeypatch.setattr(kinds, "_KINDS", {**kinds._KINDS})

    @register("toy")
    class Toy(SourceKind):
        form = "toy:FILE:COUNT"

        def open(self, path, marking, needs):
            return [replace(EXAMPLE, caption=str((marking, needs)))] * int(path.rpartition(":")[2])

        def folder(self, path):
            return Path(path.rpartition(":")[0]).parent


@pytest.mark.usefixtures("toy")
def test_a_new_kind_is_known_wherever_paths_are_read(tmp_path, monkeypatch):
    path, needs = f"toy:{tmp_path}/edits.bin:3", Needs(mask="a judge")
    source = open_source(path, "black", "15", needs)
    assert len(source) == 3
    assert source[0].caption == str((("black", "15"), needs))
    assert same_examples(path, path)
    assert not same_examples(path, f"toy:{tmp_path}/edits.bin:4")
    assert not same_examples(path, f"{tmp_path}/edits.bin:3")

    monkeypatch.setenv("HOME", "/home/anna")
    assert expand_home("--data", "toy:~/edits.bin:3") == "toy:/home/anna/edits.bin:3"
    with pytest.raises(UsageError, match=r"--out: .* is --data toy:.*, which is read"):
        check_apart("--out", tmp_path, {"--data": path})


@pytest.mark.usefixtures("toy")
def test_messages_and_help_name_every_kind(capsys, tmp_path):
    wanted = (
        "a folder, a .jsonl file (JSON Lines), scenes:SPLIT[/KINDS][:COUNT[:FLAWS]], tfds:DATASET[@SPLIT] or "
        "toy:FILE:COUNT"
    )
    assert forms() == wanted
    with pytest.raises(UserError) as caught:
        open_source(str(tmp_path / "tyo:x"))
    assert wanted in caught.value.remedy
    (tmp_path / "edits.csv").write_text("image,mask\n")
    with pytest.raises(UserError, match="a table of separated values") as caught:
        open_source(str(tmp_path / "edits.csv"))
    assert wanted in caught.value.problem
    _, out, _ = small_run.run_command(capsys, "evaluate", "--help")
    assert wanted in " ".join(out.split())


def test_a_prefix_is_registered_once():
    with pytest.raises(ValueError, match="'tfds' is registered twice"):
        register("tfds")(SourceKind)


def test_paths_without_a_known_prefix_are_files():
    assert split_prefix("scenes:train:6") == ("scenes", "train:6")
    for path in ("edits", "/data/a:b", "tfds", "other:edits"):
        assert split_prefix(path) == ("", path)
    assert folder_of("edits/x.jsonl") == Path("edits")
    assert folder_of("scenes:train") is None


TARGET = replace(EXAMPLE, target=EXAMPLE.image)


@pytest.mark.parametrize(
    ("example", "needs", "problem"),
    [
        (EXAMPLE, Needs(mask="a judge"), None),
        (EXAMPLE, Needs(target="a judge"), "one: no target image; a judge needs one."),
        (EXAMPLE, Needs(right_target="a judge"), "one: no target image; a judge needs one."),
        (TARGET, Needs(right_target="a judge"), None),
        (replace(TARGET, flawed=True), Needs(target="a judge"), None),
        (
            replace(TARGET, flawed=True),
            Needs(target="training", right_target="a judge"),
            "one: its target is flawed on purpose; a judge needs a right one.",
        ),
        (EXAMPLE, Needs(caption="a judge"), "one: no caption; a judge needs one."),
        (replace(EXAMPLE, caption=" "), Needs(caption="a judge"), "one: no caption; a judge needs one."),
        (replace(EXAMPLE, caption="A cup."), Needs(caption="a judge"), None),
    ],
)
def test_a_target_or_caption_is_asked_for_by_who_needs_it(example, needs, problem):
    if problem is None:
        check_needs(example, needs)
        return
    with pytest.raises(UserError) as caught:
        check_needs(example, needs)
    assert caught.value.problem == problem
