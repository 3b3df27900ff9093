"""Files are found under the names that people give them: in any normal form of Unicode, and not all of them text."""

import json
import os
import unicodedata

import numpy as np
import pytest
from PIL import Image

from rcgrpo_jax.data import EditFolder
from rcgrpo_jax.data.images import read_image
from rcgrpo_jax.errors import UserError

FORMS = [("NFC", "NFD"), ("NFD", "NFC"), ("NFC", "NFC"), ("NFD", "NFD")]
NAME = "größe é가"


def named(form: str, name: str = NAME) -> str:
    return unicodedata.normalize(form, name)


def save_pair(folder, image: str, mask: str):
    for name, picture in ((image, Image.new("RGB", (32, 32), (9, 0, 0))), (mask, Image.new("L", (32, 32), 255))):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture.save(folder / name)


def write_line(folder, image: str, mask: str, **changes):
    row = {"image": image, "mask": mask, "instruction": "Make it red.", **changes}
    (folder / "metadata.jsonl").write_text(json.dumps(row), encoding="utf-8")


@pytest.mark.parametrize(("written", "on_disk"), FORMS)
def test_a_table_and_its_files_may_differ_in_their_normal_form(tmp_path, written, on_disk):
    data = tmp_path / named(on_disk, "Ordner ü")
    save_pair(data, f"{named(on_disk)}/{named(on_disk)}.png", f"{named(on_disk)}/m.png")
    write_line(
        data, f"{named(written)}/{named(written)}.png", f"{named(written)}/m.png", target=f"./{named(written)}/m.png"
    )
    example = EditFolder(tmp_path / named(written, "Ordner ü"))[0]
    assert (example.image == (9, 0, 0)).all()
    assert (example.target == 255).all()


@pytest.mark.parametrize(("one", "other"), FORMS)
def test_images_masks_and_instructions_may_too(tmp_path, one, other):
    save_pair(tmp_path, f"images/{named(one)}.png", f"masks/{named(other)}.png")
    (tmp_path / "instructions").mkdir()
    (tmp_path / "instructions" / f"{named(one)}.txt").write_text("Make it red.")
    source = EditFolder(tmp_path)
    assert len(source) == 1
    assert source[0].name == named("NFC")


def test_names_that_differ_in_their_normal_form_alone_are_refused(tmp_path):
    for form in ("NFC", "NFD"):
        save_pair(tmp_path, f"images/{named(form)}.png", f"masks/{named(form)}.png")
    write_line(tmp_path, f"images/{named('NFC')}.png", f"masks/{named('NFC')}.png")
    with pytest.raises(UserError, match=r"2 names are .* in different normal forms of Unicode \('gr\\xf6"):
        EditFolder(tmp_path)
    (tmp_path / "metadata.jsonl").unlink()
    with pytest.raises(UserError, match=r"both 'gro\\u0308.* and 'gr\\xf6.* found; one file a name"):
        EditFolder(tmp_path)


def test_a_single_picture_is_found_too(tmp_path):
    Image.new("RGB", (16, 16), (1, 2, 3)).save(tmp_path / f"{named('NFD')}.png")
    assert (read_image(tmp_path / f"{named('NFC')}.png") == (1, 2, 3)).all()


def test_a_missing_file_is_named_as_it_was_written(tmp_path):
    write_line(tmp_path, "images/é.png", "m.png")
    with pytest.raises(UserError, match=r"2 of the files .* do not exist: .*images/é\.png, .*m\.png"):
        EditFolder(tmp_path)


def test_names_that_are_not_utf8_have_printable_examples_and_messages(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    save_pair(tmp_path, f"images/{name}.png", f"masks/{name}.png")
    (tmp_path / "instructions").mkdir()
    (tmp_path / "instructions" / f"{name}.txt").write_text("Make it red.")
    assert EditFolder(tmp_path)[0].name == r"caf\udce9"
    write_line(tmp_path, f"images/{name}.png", f"masks/{name}.png")
    assert EditFolder(tmp_path)[0].name == r"00001-caf\udce9"
    Image.fromarray(np.full((32, 32), 7, np.uint8)).save(tmp_path / "masks" / f"{name}.png")
    with pytest.raises(UserError, match=r"caf\\udce9\.png: .* label map"):
        EditFolder(tmp_path)[0]
