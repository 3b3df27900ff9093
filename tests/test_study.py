"""The page of a study is blind and balanced, and what cannot be shown is refused before a voter sees it."""

import base64
import io
import json
import re
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import small_run
import study_site
from PIL import Image

from rcgrpo_jax.data.images import save_image
from rcgrpo_jax.errors import UserError
from rcgrpo_jax.study import build as module
from rcgrpo_jax.study.build import balanced_orders, build, data_url, key_file
from rcgrpo_jax.study.records import read_key


@pytest.mark.parametrize(("examples", "makers"), [(12, 3), (8, 2), (9, 9), (11, 4), (1, 5)])
def test_each_maker_is_in_each_place_equally_often(examples, makers):
    orders = balanced_orders(examples, makers, np.random.default_rng(0))
    assert orders.shape == (examples, makers)
    np.testing.assert_array_equal(np.sort(orders, axis=1), np.tile(np.arange(makers), (examples, 1)))
    counts = np.array([[np.sum(orders[:, place] == maker) for maker in range(makers)] for place in range(makers)])
    assert set(np.unique(counts)) <= {examples // makers, -(-examples // makers)}


def test_a_place_tells_nothing_of_the_next_one():
    """A maker follows every other one, which a fixed cycle would not allow."""
    orders = balanced_orders(300, 4, np.random.default_rng(0))
    after = Counter(pair for order in orders.tolist() for pair in pairwise(order))
    assert len(after) == 12
    assert min(after.values()) > 0.5 * max(after.values())


def test_the_seed_makes_the_page_and_pictures_make_its_ids(tmp_path):
    folders = study_site.write_folders(tmp_path)
    names = ("a", "b", "c", "d")
    for name, seed in zip(names, (1, 1, 2, 1), strict=True):
        if name == "d":
            file = next(folders["tealstone"].glob("*.png"))
            save_image(file, 255 - np.asarray(Image.open(file)))
        build(study_site.examples(), folders, tmp_path / f"{name}.html", seed=seed)
    pages = [(tmp_path / f"{name}.html").read_text() for name in names]
    keys = [read_key(tmp_path / f"{name}.key.json") for name in names]
    assert pages[0] == pages[1]
    assert keys[0] == keys[1]
    assert len({key["study"] for key in keys}) == 3
    orders = [[[*example["edits"].values()] for example in key["examples"].values()] for key in keys]
    assert orders[0] == orders[3]
    assert len({edit for key in keys[1:] for example in key["examples"].values() for edit in example["edits"]}) > 9


def test_without_a_seed_nobody_can_guess_the_order(tmp_path):
    seeds = set()
    for name in ("a", "b"):
        build(study_site.examples(), study_site.write_folders(tmp_path), tmp_path / f"{name}.html")
        seeds.add(read_key(tmp_path / f"{name}.key.json")["seed"])
    assert len(seeds) == 2


def test_the_page_tells_nothing_of_makers_and_asks_nothing_of_the_network(tmp_path):
    page, key = study_site.write_study(tmp_path, seed=123456789)
    text = page.read_text()
    secrets = [*study_site.MAKERS, str(key["seed"]), str(tmp_path), *(x["name"] for x in key["examples"].values())]
    assert not [secret for secret in secrets if secret in text]
    assert all(edit in text for example in key["examples"].values() for edit in example["edits"])
    assert "default-src 'none'" in text
    assert not re.search(r"https?:|//[a-z]|@import|url\(", re.sub(r"data:image/webp;base64,[^\"]*", "", text))
    pictures = [base64.b64decode(x) for x in re.findall(r"data:image/webp;base64,([^\"]*)", text)]
    assert len(pictures) == 3 * 4
    opened = [Image.open(io.BytesIO(picture)) for picture in pictures]
    assert {(image.format, image.size, image.mode) for image in opened} == {("WEBP", (48, 48), "RGB")}
    assert not any(chunk in picture for picture in pictures for chunk in (b"EXIF", b"XMP ", b"ICCP"))


def test_pictures_are_what_the_folders_have(tmp_path):
    page, key = study_site.write_study(tmp_path)
    found = re.findall(r'id="e(\w{16})">(.*?)</script>', page.read_text())
    for own, content in found:
        shown, example = json.loads(content), key["examples"][own]
        for url, maker in zip(shown["edits"], example["edits"].values(), strict=True):
            picture = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
            np.testing.assert_array_equal(picture, Image.open(tmp_path / maker / f"{example['name']}.png"))
    assert {own for own, _ in found} == set(key["examples"])


@pytest.mark.parametrize(("side", "size"), [(None, (600, 300)), (200, (200, 100)), (1000, (600, 300))])
def test_large_pictures_shrink_to_the_side_that_is_asked_for(side, size):
    picture = np.random.default_rng(0).integers(0, 256, (300, 600, 3), np.uint8)
    assert Image.open(io.BytesIO(base64.b64decode(data_url(picture, side).partition(",")[2]))).size == size


def test_what_a_user_wrote_stays_text(tmp_path):
    hostile = "</script><script>alert(1)</script><!--"
    page, _ = study_site.write_study(tmp_path, questions=[hostile])
    text = page.read_text()
    assert "alert(1)" in text
    assert hostile not in text
    assert text.count("</script>") == text.count("<script") == 3 + 2  # examples; the study and its program


def test_edits_that_are_alike_are_counted(tmp_path):
    folders = study_site.write_folders(tmp_path)
    name = study_site.examples()[1].name
    twin = folders["tealstone"] / f"{name}.png"
    twin.write_bytes((folders["kontext-base"] / f"{name}.png").read_bytes())
    assert build(study_site.examples(), folders, tmp_path / "a.html").alike == [name]


def test_a_number_of_examples_is_drawn(tmp_path):
    folders = study_site.write_folders(tmp_path, 12)
    drawn = set()
    for seed in range(8):
        page = tmp_path / f"{seed}.html"
        build(study_site.examples(12), folders, page, count=2, seed=seed)
        drawn |= {example["name"] for example in read_key(key_file(page))["examples"].values()}
        assert len(read_key(key_file(page))["examples"]) == 2
    assert len(drawn) > 5


# Mistakes


def test_folders_that_lack_a_picture_are_named_with_it(tmp_path):
    folders = study_site.write_folders(tmp_path)
    name = study_site.examples()[2].name
    file = folders["kontext-lora"] / f"{name}.png"
    file.unlink()
    with pytest.raises(UserError, match=rf"kontext-lora/{name}\.png: no such file"):
        build(study_site.examples(), folders, tmp_path / "a.html")
    save_image(file, np.zeros((32, 48, 3), np.uint8))
    with pytest.raises(UserError, match=rf"kontext-lora/{name}\.png: 48x32 pixels found; 48x48 were wanted"):
        build(study_site.examples(), folders, tmp_path / "a.html")
    assert not list(tmp_path.glob("a.*"))


def test_a_key_is_never_replaced(tmp_path):
    page, key = study_site.write_study(tmp_path)
    before = page.read_bytes()
    with pytest.raises(UserError, match=r"study\.key\.json: the key of a study found"):
        study_site.write_study(tmp_path)
    assert (page.read_bytes(), read_key(key_file(page))) == (before, key)


def test_a_page_is_never_replaced_whosever_it_is(tmp_path):
    page, _ = study_site.write_study(tmp_path)
    before = page.read_bytes()
    key_file(page).unlink()  # to be kept elsewhere
    with pytest.raises(UserError, match=r"study\.html: a page found, which voters may have"):
        study_site.write_study(tmp_path)
    assert page.read_bytes() == before


def test_of_two_builds_at_once_the_first_key_stays(tmp_path, monkeypatch):
    page, key = study_site.write_study(tmp_path)
    before = page.read_bytes()
    monkeypatch.setattr(module, "_check_new", lambda page: None)  # the other one was not done then
    with pytest.raises(UserError, match=r"study\.key\.json: the key of a study found"):
        study_site.write_study(tmp_path)
    assert (page.read_bytes(), read_key(key_file(page))) == (before, key)
    assert {file.name for file in tmp_path.glob("*study*")} == {"study.html", "study.key.json"}


def test_names_that_are_no_text_are_told_apart(tmp_path):
    makers = ("b\udcfe", "b\udcff")
    build(study_site.examples(), study_site.write_folders(tmp_path, makers=makers), tmp_path / "a.html")
    assert read_key(tmp_path / "a.key.json")["makers"] == [r"b\udcfe", r"b\udcff"]


def test_a_page_that_no_browser_opens_is_refused_with_the_number_that_fits(tmp_path):
    with pytest.raises(UserError, match=r"MB found after 2 of 3 examples") as error:
        study_site.write_study(tmp_path, most_bytes=50_000)
    assert re.search(r"--count 1\b", error.value.remedy)
    assert "--side" in error.value.remedy
    assert not list(tmp_path.glob("study*"))


@pytest.mark.parametrize(
    ("makers", "options", "problem"),
    [
        (("a",), {}, "--pictures: 1 folders found; 2 to 9 were wanted"),
        (tuple("abcdefghij"), {}, "--pictures: 10 folders found"),
        (("a", "b"), {"count": 4}, "--data: 3 examples found; 4 at least were wanted"),
        (("a", "b"), {"questions": ["Best?", "Best? "]}, "--question: 'Best?', 'Best? ' found"),
        (("a", "Not sure"), {}, "--pictures: a folder called Not sure found"),
        (("a", "b"), {"size": (10**6, 10**6)}, "size: 1000000 x 1000000 pixels, 3 pictures at a time, takes"),
    ],
)
def test_studies_that_cannot_be_are_refused(tmp_path, makers, options, problem):
    with pytest.raises(UserError, match=re.escape(problem)):
        build(study_site.examples(), dict.fromkeys(makers, tmp_path), tmp_path / "a.html", **options)


@pytest.mark.parametrize(
    ("argv", "code", "problem"),
    [
        ([], 2, "'' found; build or score was wanted."),
        (["biuld"], 2, "'biuld' found; build or score was wanted. Did you mean 'build'?"),
        (["build"], 2, "missing --data, --pictures, --out."),
        (["score", "--votes=a"], 2, "missing --key."),
        (["build", "--data=scenes:heldout:3", "--pictures=a", "--pictures=b/a", "--out=s.html"], 2,
         "--pictures: a, b/a found; folders of different names were wanted."),
        (["build", "--data=scenes:heldout:3", "--pictures=a", "--pictures=b", "--out=s.htm"], 1,
         "--out: s.htm: the suffix is '.htm'; '.html' was wanted."),
        (["build", "--data=scenes:heldout:3", "--pictures=a", "--pictures=b", "--out=s.html"], 1,
         "a: no such folder; one with pictures was wanted."),
        (["score", "--key=none.json", "--votes=a"], 1, "none.json: no such file."),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)  # fmt: skip
def test_the_command_tells_mistakes(tmp_path, capsys, monkeypatch, argv, code, problem):
    monkeypatch.chdir(tmp_path)
    assert small_run.fail(capsys, "study", *argv)[:2] == (code, problem)


def test_the_command_builds(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study_site, "SIZE", 128)  # as scenes are
    study_site.write_folders(tmp_path)
    folders = [f"--pictures={maker}" for maker in study_site.MAKERS]
    questions = ["--question=Which follows best?", "--question=Which keeps the rest best?"]
    code, out, _ = small_run.run_command(
        capsys, "study", "build", "--data=scenes:heldout:3", *folders, "--out=s.html", "--count=2", *questions
    )
    assert code == 0
    key = read_key(tmp_path / "s.key.json")
    assert re.search(rf"page  s\.html \(0\.\d MB\): study {key['study']}, 2 examples", out)
    assert [*key["questions"].values()] == ["Which follows best?", "Which keeps the rest best?"]
    assert key["makers"] == [*study_site.MAKERS]


def test_colours_have_enough_contrast():
    """WCAG's ratios: 4.5 for text, 3 for the borders of controls."""
    css = (small_run.ROOT / "rcgrpo_jax/study/study.css").read_text()
    pairs = (("ink", "paper"), ("ink", "wash"), ("faint", "paper"), ("faint", "wash"), ("on-mark", "mark"))
    schemes = [dict(re.findall(r"--([\w-]+): (#\w+)", block)) for block in re.findall(r":root \{(.*?)\}", css)]
    assert len(schemes) == 2
    for scheme in schemes:
        for one, other in pairs:
            assert contrast(scheme[one], scheme[other]) >= 4.5, (one, other)
        for one in ("line", "mark"):
            assert contrast(scheme[one], scheme["paper"]) >= 3, one


def contrast(one: str, other: str) -> float:
    low, high = sorted(map(luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


def luminance(colour: str) -> float:
    digits = colour[1:] if len(colour) == 7 else "".join(2 * x for x in colour[1:])
    values = np.array([int(digits[i : i + 2], 16) for i in (0, 2, 4)]) / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def test_no_page_is_left_where_its_key_cannot_be_written(tmp_path, monkeypatch):
    def refuse(path, key):
        path.write_text("half")
        raise OSError("no space left")

    monkeypatch.setattr(module, "write_key", refuse)
    with pytest.raises(UserError, match="no space left"):
        build(study_site.examples(), study_site.write_folders(tmp_path), tmp_path / "a.html")
    assert not list(tmp_path.glob("a.*"))
