"""GEdit-Bench and ImgEdit-Bench, from the files of their authors to tables: a judge scores what has no masks."""

import csv
import json
import math
from pathlib import Path
from types import SimpleNamespace

import gedit_data
import numpy as np
import pytest
from gedit_data import GEDIT, GEDIT_SCORES, IMGEDIT, IMGEDIT_SCORES, said, shown
from judge_server import JudgeServer, be_quick, message, serving
from PIL import Image

from rcgrpo_jax import rewards
from rcgrpo_jax.cli import data_prepare
from rcgrpo_jax.cli import evaluate as command
from rcgrpo_jax.data.sources import open_source
from rcgrpo_jax.errors import UsageError, UserError
from rcgrpo_jax.evaluation.benchmarks.rows import MISSING
from rcgrpo_jax.rewards.imgedit import read_ratings
from rcgrpo_jax.rl.setup import make_rewards


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    be_quick(monkeypatch)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Both benchmarks as `data prepare` leaves them, and the files that their judges need."""
    place = tmp_path_factory.mktemp("benchmarks")
    for name, folder in (
        ("gedit", gedit_data.gedit_arrow(place / "g")),
        ("imgedit", gedit_data.imgedit_folder(place / "i")),
    ):
        data_prepare.run([name, f"--from={folder}", f"--out={place / name}", "--workers=1"])
    gedit_data.gedit_prompts(place / "vie_prompts.py")
    return place


def evaluate(place: Path, out: Path, name: str, server: JudgeServer, *argv: str) -> Path:
    judge, prompts = ("imgedit", "i/Benchmark/singleturn/judge_prompt.json") if name == "imgedit" else (
        "viescore", "vie_prompts.py")  # fmt: skip
    given = [f"--benchmark={name}", f"--data=tfds:{place / name.partition('-')[0]}", f"--out={out}", f"--judge={judge}"]
    options = [f"urls={server.url}", "model=tiny", f"prompts={place / prompts}"]
    command.run([*given, *(f"--judge_option={option}" for option in options), *argv])
    return out


def numbers(out: Path) -> dict[tuple[str, ...], float]:
    """The numbers of table.csv by editor, task and measure."""
    with (out / "table.csv").open() as file:
        return {tuple(x[key] for key in ("editor", "task", "measure")): float(x["mean"]) for x in csv.DictReader(file)}


# Data


def test_gedit_is_read_from_arrow_with_whole_masks_in_both_languages(place):
    source = open_source(f"tfds:{place / 'gedit'}")
    assert len(source) == 6
    for index, (task, key, there) in enumerate(GEDIT):
        example = source[index]
        np.testing.assert_array_equal(example.image, gedit_data.picture(index))
        assert (example.task, example.instruction) == (task, f"en {key}")
        assert example.id == f"en-{str(there).lower()}-{key}"
        assert example.mask.min() == 1
        assert source[3 + index].id.startswith("cn-")
    report = json.loads((place / "gedit" / "prepare.json").read_text())
    assert report["published_by_task"]["text_change"] == 2 * 99
    assert any("there are no masks" in line for line in report["warnings"])


def test_imgedit_is_read_from_its_folder(place):
    source = open_source(f"tfds:{place / 'imgedit'}")
    found = [(source[i].id, source[i].task, source[i].instruction) for i in range(len(source))]
    assert found == [(key, kind, f"Edit {key}.") for key, (_, kind) in IMGEDIT.items()]


# Results


def test_gedit_scores_are_those_of_its_script_by_task_and_as_mean_of_the_tasks(place, tmp_path):
    folder = gedit_data.gedit_results(tmp_path / "mine", scale=2)
    with serving(gedit_data.gedit_answer) as server:
        out = evaluate(place, tmp_path / "out", "gedit-en", server, f"--results={folder}")
        bodies = server.bodies
    overall = {key: math.sqrt(sc * pq) for key, (sc, pq) in GEDIT_SCORES.items()}
    colour = (overall["4c309b59"] + overall["0-a"]) / 2
    found = numbers(out)
    assert found["mine", "color_alter", "G_SC"] == pytest.approx((9 + 1) / 2)
    assert found["mine", "color_alter", "G_O"] == pytest.approx(colour, rel=1e-6)
    assert found["mine", "mean", "G_O"] == pytest.approx((colour + overall["77ee0001"]) / 2, rel=1e-6)
    assert found["mine", "mean (intersection)", "G_O"] == pytest.approx((6 + overall["77ee0001"]) / 2, rel=1e-6)
    assert found["FLUX.1-Kontext-dev", "mean", "G_O"] == 6.00
    table = (out / "table.md").read_text()
    assert "2 of color_alter (Chinese), 1 of text_change (Chinese)" in table
    assert "There are no masks" in table
    assert json.loads((out / "failures.json").read_text())["mine"]["of no example"]["color_alter"] == []

    edits = [body for body in bodies if "en " in said(body)]  # not the check before, about grey pictures
    assert len(edits) == 3
    for body in edits:
        index = next(i for i, (_, key, _) in enumerate(GEDIT) if key in said(body))
        kinds = [part["type"] for part in body["messages"][0]["content"]]
        assert kinds == ["image_url", "image_url", "text"]
        assert said(body).endswith(f"Two pictures.\nWas it edited? en {GEDIT[index][1]}")
        before, after = shown(body)
        np.testing.assert_array_equal(before, gedit_data.picture(index))
        large = Image.open(folder / f"fullset/{GEDIT[index][0]}/en/{GEDIT[index][1]}.png")
        np.testing.assert_array_equal(after, np.asarray(large.resize(before.shape[1::-1])))


def test_what_is_missing_or_unscored_is_counted_and_in_no_mean(place, tmp_path):
    folder = gedit_data.gedit_results(tmp_path / "mine")
    (folder / "fullset/color_alter/en/0-a.png").unlink()
    Image.new("RGB", (9, 9)).save(folder / "fullset/text_change/en/stray.png")

    def reply(body, attempt):
        return message("fine") if "4c309b59" in said(body) else gedit_data.gedit_answer(body)

    with serving(reply) as server:
        out = evaluate(place, tmp_path / "out", "gedit-en", server, f"--results={folder}")
    rows = [json.loads(line) for line in (out / "mine.jsonl").read_text().splitlines()]
    assert [row["failure"] for row in rows] == [None, MISSING, None]
    assert [row["G_O"] for row in rows] == [None, None, 6]
    table = (out / "table.md").read_text()
    assert "G_O could not be measured of 1 edits that are there" in table
    assert json.loads((out / "failures.json").read_text())["mine"]["of no example"]["text_change"] == [
        "fullset/text_change/en/stray.png"
    ]


def test_imgedit_asks_by_the_kind_of_edit_and_stands_beside_published_kinds(place, tmp_path):
    folder = gedit_data.imgedit_results(tmp_path / "mine")
    Image.new("RGB", (9, 9)).save(folder / "stray.png")
    with serving(gedit_data.imgedit_answer) as server:
        out = evaluate(place, tmp_path / "out", "imgedit", server, f"--results={folder}", "--published=edit-r1")
        texts = sorted(said(body) for body in server.bodies if "Edit" in said(body))
        orders = {tuple(part["type"] for part in body["messages"][0]["content"]) for body in server.bodies}
    assert texts == ["Rate adjust: Edit 1082.", "Rate adjust: Edit 97.", "Rate style: Edit 673."]
    assert orders == {("text", "image_url", "image_url")}
    found = numbers(out)
    means = {key: np.mean(ratings) for key, ratings in IMGEDIT_SCORES.items()}
    adjust = (means["1082"] + means["97"]) / 2
    assert found["mine", "adjust", "ImgEdit"] == pytest.approx(adjust)
    assert found["mine", "mean", "ImgEdit"] == pytest.approx((adjust + means["673"]) / 2)
    assert found["FLUX.1-Kontext-dev", "style", "ImgEdit"] == 4.51
    table = (out / "table.md").read_text()
    assert "| FLUX.1-Kontext-dev, published | style |  | 4.510 |" in table
    assert "| mine | all |  |  |  |  |  | 1 |" in table


@pytest.mark.parametrize(
    ("name", "argv", "problem"),
    [
        ("gedit-en", [], "--judge: none found.* no masks"),
        ("imgedit", ["--measures=psnr"], "--measures: found; measures need masks"),
        ("imgedit", ["--clip=x"], "--clip: found; measures need masks"),
        ("gedit-cn", ["--published=edit-r1"], "--published: edit-r1 found; gedit-cn has bagel"),
        ("gedit-en", ["--buckets=kontext"], "--buckets: found with --results alone"),
        ("gedit-en", ["--judge_option=prompts=none.py"], "prompts: 'none.py' cannot be read"),
    ],
)
def test_what_cannot_be_scored_is_refused_before_anything_is_read(tmp_path, name, argv, problem):
    folder = gedit_data.gedit_results(tmp_path / "mine")
    given = [f"--benchmark={name}", "--data=nowhere", f"--out={tmp_path / 'out'}", f"--results={folder}"]
    with pytest.raises((UsageError, UserError), match=problem):
        command.run([*given, *(["--judge=viescore", "--judge_option=model=tiny"] if argv else []), *argv])
    assert not (tmp_path / "out" / "table.md").exists()


# Judges


def test_gedit_prompts_are_read_and_not_run_and_text_may_come_first(tmp_path):
    file = gedit_data.gedit_prompts(tmp_path / "vie_prompts.py")
    edit, quality = rewards.make("viescore", model="m", prompts=str(file), text_first=True).questions()
    assert edit.template.endswith("Was it edited? {instruction}{source}{edited}")
    assert quality.template == 'Answer {"score" : [...]}.\nHow good is it?{edited}'
    file.write_text("_context_no_delimit = 'x'")
    with pytest.raises(UsageError, match="has no text _prompts_0shot_two_image_edit_rule, "):
        rewards.make("viescore", model="m", prompts=str(file))


def test_a_reward_of_several_passes_is_the_mean_of_the_roots(tmp_path):
    file = gedit_data.gedit_prompts(tmp_path / "vie_prompts.py")
    judge = rewards.make("viescore", model="m", prompts=str(file), num_pass=2)
    answers = np.array([[9.0, 4.0], [4.0, 1.0]])
    assert judge.details(answers) == (6.5, 2.5, 4.0)
    assert judge.combine(answers) == 0.4


@pytest.mark.parametrize(
    "text",
    ["", "A: 3\nB: 4", "A: 3\nB: 4\nC: 6", "A: 3\nB: 4\nC: 0", "A: 3\nB: 4\nC: 4\nD: 1", "A: 3\nB: 4\nC: 4.5"],
)
def test_ratings_are_three_from_one_to_five(text):
    assert read_ratings({"message": {"content": "Brief reasoning: 3 of 4.\nA: 5\n B: 3 \nC & D: 1"}}) == 0.5
    with pytest.raises(ValueError, match="3 lines NAME: NUMBER"):
        read_ratings({"message": {"content": text}})


def test_the_kind_of_edit_is_needed(tmp_path):
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps(gedit_data.imgedit_prompts()))
    judge = rewards.make("imgedit", model="m", prompts=str(file))
    with pytest.raises(UserError, match="none of the kind of edit 'add' found; there are those of adjust, style"):
        judge.questions_of("add")
    assert judge.details(np.array([[0.25], [0.75]])) == (3.0,)


def test_a_training_refuses_a_judge_that_asks_by_the_kind_of_edit(tmp_path):
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps(gedit_data.imgedit_prompts()))
    given = {"imgedit": {"model": "m", "prompts": str(file)}}
    options = SimpleNamespace(plugins={}, rewards={"imgedit": 1.0}, watch="", reward_options=given)
    with pytest.raises(UsageError, match=r"rewards\.imgedit: it rates by the kind of edit, which a training"):
        make_rewards(options)
