"""Scenes are what they say: the same every time, exact in mask and target, in words that fit one object alone."""

import pickle
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from rcgrpo_jax.cli import data as data_command
from rcgrpo_jax.cli.data import run
from rcgrpo_jax.data import EditFolder, check_example
from rcgrpo_jax.data.scenes import flaws, wording
from rcgrpo_jax.data.scenes.backgrounds import TEXTURES
from rcgrpo_jax.data.scenes.composition import HELD_OUT, SEEN
from rcgrpo_jax.data.scenes.shapes import (
    COLOURS,
    SHAPES,
    SIZES,
    SceneObject,
    coverage,
    footprint,
    render,
    signed_distance,
)
from rcgrpo_jax.data.scenes.source import KINDS, SPLITS, Scenes, parse_scenes
from rcgrpo_jax.data.tfds import TfdsSource
from rcgrpo_jax.errors import UsageError, UserError
from rcgrpo_jax.rewards.colour import named_colour

FIELDS = ("image", "mask", "target", "instruction", "caption", "flawed")


def look(thing: SceneObject) -> tuple[str, str]:
    return thing.shape, thing.colour


def assert_same(one, other) -> None:
    for field in FIELDS:
        np.testing.assert_array_equal(getattr(one, field), getattr(other, field))


# Shapes


@pytest.mark.parametrize("shape", SHAPES)
def test_coverage_is_the_share_of_a_pixel_inside(shape):
    """Against 32 x 32 samples a pixel; corners, where the distance is that of a line, may be off by a fifth."""
    thing = SceneObject(shape, "red", "large", 0.513, 0.489)
    inside = signed_distance(thing, 64 * 32) < 0
    sampled = inside.reshape(64, 32, 64, 32).mean(axis=(1, 3))
    error = np.abs(coverage(thing, 64) - sampled)
    assert error.max() < 0.35
    assert error[sampled * (1 - sampled) > 0].mean() < 0.06
    assert 0.01 < inside.mean() < np.pi * thing.radius**2


@pytest.mark.parametrize("shape", SHAPES)
def test_signed_distances_have_unit_slope_at_the_edge(shape):
    distance = signed_distance(SceneObject(shape, "red", "large", 0.5, 0.5), 256)
    slope = np.hypot(*np.gradient(distance))[np.abs(distance) < 1]
    assert np.median(slope) == pytest.approx(1, abs=0.01)


def test_an_object_at_the_edge_of_its_window_is_whole():
    background = np.full((128, 128, 3), 128.0)
    for shape in SHAPES:
        for size in SIZES:
            thing = SceneObject(shape, "white", size, 0.31, 0.67)
            drawn = (render([thing], background) != 128).any(-1)
            assert (drawn <= (coverage(thing, 128) > 0)).all()
            assert (footprint(thing, (), 128) == (coverage(thing, 128) > 0)).all()
            assert (footprint(thing, (), 128, margin=3) == (signed_distance(thing, 128) < 3.5)).all()


def test_colours_are_the_ones_css_names():
    background = np.full((128, 128, 3), 128.0)
    for colour in COLOURS:
        thing = SceneObject("square", colour, "large", 0.5, 0.5)
        mean = render([thing], background)[footprint(thing, (), 128)].mean(axis=0)
        distances = {other: np.linalg.norm(mean - SceneObject("square", other, "large", 0, 0).rgb) for other in COLOURS}
        assert min(distances, key=distances.get) == colour


# Determinism


@pytest.mark.parametrize("split", SPLITS)
def test_tasks_follow_from_their_index_alone(split):
    first = [Scenes(split, 20)[i] for i in range(6)]
    other = pickle.loads(pickle.dumps(Scenes(split, 7)))  # as a data worker gets it
    for i in (5, 0, 3, 1, 4, 2):
        assert_same(other[i], first[i])
        assert other[i].name == first[i].name
    assert_same(other[-1], other[6])
    for index in (7, -8):
        with pytest.raises(IndexError):
            other[index]


def test_seeds_splits_and_indices_give_other_tasks():
    pictures = [Scenes(split, 2, seed=seed)[i].image for split in SPLITS for seed in (0, 1) for i in (0, 1)]
    assert len({picture.tobytes() for picture in pictures}) == len(pictures)


def test_a_larger_picture_shows_the_same_task():
    small, large = Scenes(size=64, count=6), Scenes(size=256, count=6)
    for i in range(6):
        assert small.scene(i) == large.scene(i)
        shrunk = np.asarray(Image.fromarray(large[i].target).resize((64, 64), Image.Resampling.BOX), np.float64)
        assert np.abs(shrunk - small[i].target).mean() < 5
        assert abs(large[i].mask.mean() - small[i].mask.mean()) < 0.02


# Splits


def test_a_quarter_is_held_out_two_of_each_shape_and_colour():
    assert len(HELD_OUT) == 16
    assert not set(HELD_OUT) & set(SEEN)
    assert set(HELD_OUT) | set(SEEN) == {(shape, colour) for shape in SHAPES for colour in COLOURS}
    for axis in (0, 1):
        assert set(Counter(combination[axis] for combination in HELD_OUT).values()) == {2}


@pytest.mark.parametrize("split", SPLITS)
def test_splits_differ_in_combinations(split):
    source = Scenes(split, 600)
    scenes = [source.scene(i) for i in range(600)]
    edited = {look(thing) for scene in scenes for thing in (scene.old, scene.new) if thing}
    around = {
        look(thing) for scene in scenes for thing in (*scene.below, *scene.above)
        if not (scene.old and look(thing) == look(scene.old))
    }  # fmt: skip
    assert edited == set(SEEN if split in ("train", "validation") else HELD_OUT)  # all of them, in 600 tasks
    assert around == set(SEEN)


# Exactness


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("size", [128, 96])
def test_the_mask_holds_all_that_changes_and_little_else(split, size):
    source = Scenes(split, 60, size)
    for i in range(60):
        example = check_example(source[i])
        assert example.image.shape == example.target.shape == (size, size, 3)
        assert example.image.dtype == example.target.dtype == np.uint8
        assert set(np.unique(example.mask)) == {0, 1}
        changed = (example.image != example.target).any(axis=-1)
        assert not (changed & (example.mask == 0)).any()
        assert changed.sum() > 0.35 * example.mask.sum()  # a small ring, with the margin that add has, is the least


def test_the_mask_leaves_out_what_lies_hidden():
    source, hidden = Scenes("train", 300), 0
    for scene in map(source.scene, range(300)):
        covered = np.any([coverage(thing, 128) == 1 for thing in scene.above] or np.zeros((1, 128, 128)), axis=0)
        assert not (scene.mask(128) & covered).any()
        hidden += (covered & footprint(scene.old or scene.new, (), 128)).any()
    assert hidden > 20


def test_an_object_under_the_removed_one_comes_to_light():
    source = Scenes("train", 300)
    seen = 0
    for i in range(1, 300, 3):
        scene = source.scene(i)
        hidden = footprint(scene.old, scene.above, 128) & (coverage(scene.old, 128) == 1)
        for thing in scene.below:
            plain = footprint(thing, [*scene.below[scene.below.index(thing) + 1 :], *scene.above], 128)
            shown = plain & (coverage(thing, 128) == 1) & hidden
            seen += shown.any()
            alone = render([thing], np.zeros((128, 128, 3)))
            np.testing.assert_array_equal(source[i].target[shown], alone[shown])
    assert seen >= 5


def test_objects_lie_inside_and_stay_visible():
    for split in ("train", "heldout"):
        source = Scenes(split, 300)
        for scene in map(source.scene, range(300)):
            for objects in (scene.before, scene.after):
                assert 1 <= len(objects) <= 6
                for level, thing in enumerate(objects):
                    assert thing.radius <= min(thing.x, thing.y, 1 - thing.x, 1 - thing.y)
                    shown, whole = (footprint(thing, above, 64).sum() for above in (objects[level + 1 :], ()))
                    assert shown > 0.5 * whole


def test_every_background_is_textured_and_leaves_black_and_white_to_objects():
    for split in ("train", "photo"):
        source = Scenes(split, 80)
        kinds = set()
        for i in range(80):
            scene = source.scene(i)
            pixels = render((), source.background(i)).astype(float)
            kinds.add(scene.background)
            assert pixels.std(axis=(0, 1)).max() > 2
            assert 30 < pixels.min() <= pixels.max() < 226
        assert len(kinds) == (len(TEXTURES) if split == "train" else 6)


# Words


def fitting(name: str, objects) -> list[SceneObject]:
    """The objects that a name such as "small red circle on the left" fits, read anew from its words."""
    size, colour, shape, place = re.fullmatch(
        rf"(?:({'|'.join(SIZES)}) )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})(?: (?:on|at) the (\w+))?", name
    ).groups()
    alike = [thing for thing in objects if look(thing) == (shape, colour) and size in (None, thing.size)]
    order = {"left": lambda t: t.x, "right": lambda t: -t.x, "top": lambda t: t.y, "bottom": lambda t: -t.y}
    return sorted(alike, key=order[place])[:1] if place else alike


@pytest.mark.parametrize("split", SPLITS)
def test_instructions_name_one_object_and_what_becomes_of_it(split):
    thing = rf"((?:(?:{'|'.join(SIZES)}) )?(?:{'|'.join(COLOURS)}) (?:{'|'.join(SHAPES)})"
    thing += r"(?: on the left| on the right| at the top| at the bottom)?)"
    source, ways = Scenes(split, 600), Counter()
    for i in range(600):
        scene = source.scene(i)
        assert scene.kind == KINDS[i % 3]
        text = scene.instruction
        assert text[0].isupper()
        assert text.endswith(".")
        if scene.kind == "add":
            assert f" a {scene.new.size} {scene.new.colour} {scene.new.shape}" in text
            assert scene.old is None
            assert scene.above == ()
        else:
            (named,) = fitting(re.search(f"the {thing}", text)[1], scene.before)
            assert named == scene.old
            ways[" ".join(re.findall(r"small|medium-sized|large|on the|at the", text))] += 1
        if scene.kind == "replace":
            assert (scene.new.x, scene.new.y, scene.new.size) == (scene.old.x, scene.old.y, scene.old.size)
            assert look(scene.new) != look(scene.old)
            if scene.new.shape != scene.old.shape:
                assert scene.new.shape in text.split("the ", 1)[1].split(scene.old.shape, 1)[1]
        if scene.new:
            assert named_colour(text) == scene.new.colour  # so that the colour reward scores it too
            assert scene.caption == f"a {scene.new.size} {scene.new.colour} {scene.new.shape}"
        else:
            assert "background" in scene.caption or "photograph" in scene.caption
    assert all(ways[way] >= 5 for way in ("", "small", "medium-sized", "large", "on the", "at the")), ways


def test_added_objects_are_where_the_instruction_says():
    source, places = Scenes(count=600), Counter()
    for i in range(0, 600, 3):
        scene = source.scene(i)
        text, new = scene.instruction.lower(), scene.new
        for place, middle in wording.PLACES.items():
            if place in text:
                places[place] += 1
                assert np.abs(np.subtract((new.x, new.y), middle)).max() < 0.05
        for direction, (dx, dy) in wording.DIRECTIONS.items():
            if match := re.match(rf"{direction} the ([\w-]+ \w+), ", text):
                places[direction] += 1
                (anchor,) = fitting(match[1], scene.before)
                step = new.radius + anchor.radius
                assert (new.x - anchor.x) * dx + (new.y - anchor.y) * dy > step
                assert abs((new.x - anchor.x) * dy + (new.y - anchor.y) * dx) < 1e-9
    assert places.total() == 200
    assert set(places) == {*wording.PLACES, *wording.DIRECTIONS}


def test_wording_varies():
    source = Scenes(count=600)
    names = "|".join([*SIZES, *COLOURS, *SHAPES])
    templates = {re.sub(rf"\b({names})\b", "_", source.scene(i).instruction) for i in range(600)}
    assert len(templates) > 60
    assert len({text.split()[0] for text in templates}) > 15


def test_alike_objects_are_told_apart_by_size_then_place():
    red = SceneObject("circle", "red", "small", 0.2, 0.5)
    blue = replace(red, colour="blue")
    assert wording.describe(red, [blue]) == "the red circle"
    assert wording.describe(red, [blue, replace(red, size="large")]) == "the small red circle"
    assert wording.describe(red, [replace(red, x=0.6)]) == "the red circle on the left"
    assert wording.describe(replace(red, x=0.6), [red]) == "the red circle on the right"
    assert wording.describe(replace(red, y=0.9), [red]) == "the red circle at the bottom"
    assert wording.describe(red, [replace(red, x=0.3, y=0.6)]) is None


# Flaws


def test_flaws_change_targets_alone_at_the_stated_shares():
    clean, flawed = Scenes("train", 1800), Scenes("train", 1800, flaws=0.4)
    found = Counter((KINDS[i % 3], flawed.flaw(i)) for i in range(1800))
    for kind in KINDS:
        share = (600 - found[kind, None]) / 600
        assert abs(share - 0.4) < 4 * (0.4 * 0.6 / 600) ** 0.5
        other = "ghost" if kind == "remove" else "wrong"
        spills, others = found[kind, "spill"], found[kind, other]
        assert spills + others + found[kind, None] == 600
        assert abs(spills - others) < 4 * (spills + others) ** 0.5
    assert {clean.flaw(i) for i in range(50)} == {None}
    for i in range(45):
        one, other, flaw = clean[i], flawed[i], flawed.flaw(i)
        assert other.flawed == (flaw is not None)
        assert_same(replace(one, target=None), replace(other, target=None, flawed=False))
        changed = (one.target != other.target).any(axis=-1)
        assert changed.any() == (flaw is not None)
        if flaw == "ghost":
            assert not (changed & (one.mask == 0)).any()
        if flaw == "spill":
            assert (changed & (one.mask == 0)).sum() > 30


def test_wrong_edits_never_show_a_combination_of_the_other_splits(monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "rcgrpo_jax.data.scenes.source.render", lambda objects, background: drawn.append(objects) or source
    )
    source = np.zeros((32, 32, 3), np.uint8)
    scenes, wrong = Scenes("train", 300, 32, flaws=1.0), 0
    for i in range(300):
        if scenes.flaw(i) == "wrong":
            scenes[i]
            scene, shown = scenes.scene(i), drawn[-1][len(scenes.scene(i).below)]
            assert look(shown) in SEEN
            assert (shown.shape == scene.new.shape) != (shown.colour == scene.new.colour)
            assert scene.old is None or look(shown) != look(scene.old)
            wrong += 1
    assert wrong > 60


def test_ghosts_and_spills_have_their_closed_forms():
    source, target = np.full((32, 32, 3), 200, np.uint8), np.full((32, 32, 3), 100, np.uint8)
    mask = np.zeros((32, 32), bool)
    mask[:4] = True
    ghost = flaws.ghost(source, target, mask, 0.25)
    assert (ghost[:4] == 125).all()
    assert (ghost[4:] == 100).all()
    distance = np.broadcast_to(np.arange(32.0) - 8, (32, 32))
    spill = flaws.spill(target, distance, np.array([200.0, 100, 0]), 0.5)
    assert (spill[:, :9] == 100).all()
    np.testing.assert_array_equal(spill[0, 10], np.rint([100 + 50 / np.e, 100, 100 - 50 / np.e]))


# Errors, and the command line


@pytest.mark.parametrize(("options", "problem", "remedy"), [
    ({"split": "heldot"}, "the split 'heldot' found; one of train, heldout, photo", "Did you mean 'heldout'"),
    ({"count": 0}, "count 0 found; at least 1", "Raise"),
    ({"size": 16}, "size 16 found; at least 32", "Raise"),
    ({"seed": -1}, "seed -1 found", "Raise"),
    ({"flaws": 1.5}, r"flaws 1\.5 found", "40 %"),
])  # fmt: skip
def test_bad_options_are_refused(options, problem, remedy):
    with pytest.raises(UsageError, match=problem) as caught:
        Scenes(**options)
    assert remedy in caught.value.remedy


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("photo", ("photo", 1000, 0)),
        ("heldout:12", ("heldout", 12, 0)),
        ("train:12:0.4", ("train", 12, 0.4)),
        ("train:12:.4", ("train", 12, 0.4)),
        ("train:12:1", ("train", 12, 1)),
    ],
)
def test_scenes_are_named_by_split_count_and_flaws(text, wanted):
    scenes = parse_scenes(text)
    assert (scenes.split, len(scenes), scenes.flaws) == wanted


def test_kinds_come_in_turn_as_often_as_they_are_named():
    scenes = parse_scenes("heldout/add+add+remove:300:0.4")
    kinds = ["add", "add", "remove"]
    assert [scenes.scene(i).kind for i in range(7)] == [*kinds, *kinds, "add"]
    assert {scenes.flaw(i) for i in range(2, 300, 3)} == {None, "spill", "ghost"}
    assert {scenes.flaw(i) for i in range(0, 300, 3)} == {None, "spill", "wrong"}
    assert_same(scenes[0], Scenes("heldout", 1, flaws=0.4)[0])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        *((text, r"found; SPLIT\[/KINDS\]\[:COUNT\[:FLAWS\]\] was wanted") for text in (
            "", ":5", "train:", "train:many", "train:-3", "train::0.4", "train:5:", "train:5:some", "train:5:-0.4",
            "train:5:40%", "train:5:nan", "train:5:0.4:1", "/add", "train/add/remove",
        )),
        ("train/ad:5", "the kind 'ad' found; one of add, remove, replace was wanted"),
        ("train/:5", "the kind '' found"),
        ("trian:5:0.4", "the split 'trian' found"),
        ("train:0:0.4", "count 0 found; at least 1"),
        ("train:5:40", r"flaws 40\.0 found; a share in \[0, 1\]"),
    ],
)  # fmt: skip
def test_names_of_scenes_that_cannot_be_read(text, problem):
    with pytest.raises(UsageError, match=problem):
        parse_scenes(text)


@pytest.mark.parametrize("flags", [(), ("--split=photo", "--size=64", "--seed=3", "--flaws=0.5", "--kinds=remove,add")])
def test_the_written_folder_reads_back_the_same(tmp_path, capsys, flags):
    out = tmp_path / "new" / "folder"
    run(["scenes", f"--out={out}", "--count=4", *flags])
    wanted = Scenes("photo", 4, 64, 3, 0.5, ("remove", "add")) if flags else Scenes("train", 4)
    folder = EditFolder(out)
    assert len(folder) == 4
    for i in range(4):
        assert_same(folder[i], wanted[i])
        assert folder[i].name == f"{i + 1:05d}-{wanted[i].name}"
    shown = capsys.readouterr()
    assert "step 4/4" in shown.err
    assert f"4 tasks ({wanted.split}, {wanted.size} x {wanted.size}): {out}" in shown.out


def test_the_layout_of_compbench_is_read_as_compbench(tmp_path):
    run(["scenes", f"--out={tmp_path / 'in'}", "--count=6", "--size=32", "--layout=compbench"])
    run(["prepare", "compbench", f"--from={tmp_path / 'in'}", f"--out={tmp_path / 'out'}"])
    found = {example.instruction: example for example in TfdsSource(str(tmp_path / "out"))}
    wanted = [*Scenes("train", 6, 32)]
    assert len(found) == 6
    for example in wanted:
        assert_same(found[example.instruction], example)
        assert found[example.instruction].task == example.task == example.name.rpartition("-")[2]
    with pytest.raises(UserError, match="flawed, which the layout of CompBench cannot say"):
        run(["scenes", f"--out={tmp_path / 'in'}", "--size=32", "--layout=compbench", "--flaws=1"])
    (tmp_path / "in/tasks/add/mask/photograph.png").touch()
    with pytest.raises(UserError, match=r"holds another data set \(.*photograph.png"):
        run(["scenes", f"--out={tmp_path / 'in'}", "--size=32", "--layout=compbench"])


@pytest.mark.parametrize(("argv", "problem"), [
    ([], "no command; scenes.* was wanted"),
    (["scene", "--out=x"], "unknown command 'scene'.*Did you mean 'scenes'"),
    (["scenes"], "missing --out"),
    (["--out=x"], "unknown command '--out=x'"),
    (["scenes", "--out=x", "--split=test"], "split"),
    (["scenes", "--out=x", "--count=0"], "count"),
    (["scenes", "--out=x", "--size=8"], "size"),
    (["scenes", "--out=x", "--kinds="], "no kinds of edits found"),
    (["scenes", "--out=x", "--flaw=1"], "Did you mean --flaws"),
])  # fmt: skip
def test_usage_errors_of_the_command(argv, problem, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=problem):
        run(argv)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--out: .*file/folder cannot be written"):
        data_command.run(["scenes", f"--out={tmp_path / 'file' / 'folder'}", "--count=1"])
