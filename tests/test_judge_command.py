"""`rcgrpo judge`: what it asks, what it makes of the scores, and what it refuses."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
import small_run
from judge_server import Reply, be_quick, message, serving
from PIL import Image
from scipy import stats

from rcgrpo_jax.data.images import save_image
from rcgrpo_jax.data.sources import open_source
from rcgrpo_jax.evaluation import judge
from rcgrpo_jax.evaluation.pictures import picture_file
from rcgrpo_jax.evaluation.statistics import share_interval

pytestmark = pytest.mark.usefixtures("one_device")
NAN = float("nan")


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    be_quick(monkeypatch)
    Path("rubric.txt").write_text('{source}{edited}{instruction} Answer {"score": NUMBER}.')


# What the numbers mean


def test_the_two_spreads_are_those_that_the_scores_were_drawn_with():
    rng = np.random.default_rng(0)
    scores = 0.5 + 0.3 * rng.standard_normal((4000, 1)) + 0.2 * rng.standard_normal((4000, 3))
    found = judge.summarise(scores)
    assert found.repeats == pytest.approx(0.2, rel=0.03)
    assert found.examples == pytest.approx(0.3, rel=0.03)
    assert found.noise == pytest.approx(2 / 3, rel=0.05)
    assert found.mean.low < 0.5 < found.mean.high


def test_scores_that_are_missing_are_counted_and_nothing_else():
    whole, torn = np.array([[1.0, 3.0], [5.0, 7.0]]), np.array([[1.0, 3.0, NAN], [5.0, NAN, 7.0], [NAN, NAN, NAN]])
    assert judge.summarise(torn).unscored == pytest.approx(5 / 9)
    assert judge.summarise(torn)[:3] == judge.summarise(whole)[:3]
    alone = judge.summarise(np.array([[1.0], [2.0]]))
    assert np.isnan([alone.repeats, alone.examples, alone.noise]).tolist() == [True, True, True]
    assert alone.mean.mean == 1.5


def test_a_preference_is_over_pairs_of_one_repeat_with_ties_as_halves():
    one, other = np.array([[2.0, 2.0], [1.0, 1.0], [NAN, 3.0]]), np.array([[1.0, 3.0], [1.0, 0.0], [9.0, 1.0]])
    assert judge.win_rate(one, other).mean == pytest.approx((0.5 + 0.75 + 1) / 3)
    assert [*judge.win_rates({"a": one, "b": other, "c": one})] == [("a", "b"), ("a", "c"), ("b", "c")]


@pytest.mark.parametrize(("won", "count"), [(0, 5), (5, 5), (13, 40)])
def test_the_interval_of_a_share_is_wilsons(won, count):
    found = share_interval(np.array([1.0] * won + [0.0] * (count - won) + [NAN]))
    wanted = stats.binomtest(won, count).proportion_ci(method="wilson")
    assert found == pytest.approx((won / count, wanted.low, wanted.high))


# The command


def brightness(body: dict, attempt: int) -> Reply:
    """How bright the second picture is, from 0 to 100, and more for a later seed."""
    _, edited = (part["image_url"]["url"] for part in body["messages"][0]["content"] if part["type"] == "image_url")
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(edited.partition(",")[2]))))
    return message(json.dumps({"score": float(picture.mean() / 255 * 90) + (body["seed"] - 42) / 1000}))


def rubric(server, *more: str) -> list[str]:
    options = {
        "urls": server.url,
        "model": "tiny",
        "template": "rubric.txt",
        "lowest": 0,
        "highest": 100,
        "attempts": 1,
    }
    given = [f"--option={name}={value}" for name, value in options.items()]
    return ["judge", "--reward=rubric", f"--data={small_run.data_folder()}", *given, *more]


def write_edits(name: str, level: int) -> None:
    """A grey picture for each example."""
    source = open_source(str(small_run.data_folder()))
    Path(name).mkdir()
    for i in range(len(source)):
        save_image(picture_file(Path(name), source[i].name), np.full((64, 64, 3), level, np.uint8))


def test_two_folders_are_compared_by_a_judge_on_a_server(capsys):
    write_edits("bright", 200)
    write_edits("dark", 20)
    with serving(brightness) as server:
        argv = rubric(server, "--edits=bright", "--edits=dark", "--sources", "--batch=2", "--json=found.json")
        code, out, _ = small_run.run_command(capsys, *argv)
        asked = server.bodies[1:]  # the first is the check
    assert code == 0
    assert len(asked) == 3 * 3 * 3  # examples, pictures, repeats
    assert {body["seed"] for body in asked} == {42, 1042, 2042}
    found = json.loads(Path("found.json").read_text())
    bright, dark = found["pictures"]["bright"], found["pictures"]["dark"]
    assert bright["mean"]["mean"] == pytest.approx((200 / 255 * 90 + 1) / 100, abs=1e-3)
    assert bright["repeats"] == pytest.approx(0.01, abs=1e-4)  # of scores that differ by 1 of 100 from seed to seed
    assert bright["examples"] == pytest.approx(0, abs=1e-4)
    assert dark["mean"]["mean"] < bright["mean"]["mean"]
    assert np.shape(dark["scores"]) == (3, 3)
    rates = {(x["one"], x["other"]): x["rate"]["mean"] for x in found["preferred"]}
    assert rates == {("bright", "dark"): 1, ("bright", "sources"): 1, ("dark", "sources"): 0}
    assert "urls" not in found["options"]
    assert "bright preferred to dark: 100%, 95 % interval 44% to 100%" in out


def test_answers_that_do_not_come_are_said(capsys):
    write_edits("bright", 200)
    write_edits("dark", 20)

    def failing(body: dict, attempt: int) -> Reply:
        answer = brightness(body, attempt)
        return Reply(status=500) if body["seed"] == 1042 else answer

    with serving(failing) as server:
        argv = rubric(server, "--edits=bright", "--edits=dark", "--limit=2", "--json=found.json")
        code, out, _ = small_run.run_command(capsys, *argv)
    assert code == 0
    assert "without scores: " in out
    found = json.loads(Path("found.json").read_text())["pictures"]["bright"]
    assert found["unscored"] == pytest.approx(1 / 3)
    assert [row[1] for row in found["scores"]] == [None, None]


def test_a_reward_that_is_computed_here_knows_targets_from_sources(capsys):
    argv = ["judge", "--reward=change", "--data=scenes:heldout:6", "--targets", "--sources", "--option=scale=10"]
    code, out, _ = small_run.run_command(capsys, *argv)
    assert code == 0
    assert "targets preferred to sources: 100%" in out


def test_a_plugin_gets_its_options_as_they_are_meant(capsys):
    Path("mine.py").write_text(
        "def light(inputs, scale, limit=0.9, word='x'):\n"
        "    assert (scale, limit, word) == (2, 0.5, '7')\n"
        "    return inputs.edited.mean((2, 3, 4))\n"
    )
    options = ["--option=scale=2", "--option=limit=0.5", "--option=word=7"]
    argv = ["judge", "--reward=light", "--plugin=mine:light", "--data=scenes:heldout:2", "--sources", *options]
    code, out, _ = small_run.run_command(capsys, *argv)
    assert (code, out.splitlines()[0]) == (0, "light: 2 examples, 3 scores of each picture")


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        ([], "none of --edits, --targets and --sources found"),
        (["--edits=a/x", "--edits=b/x"], "--edits: the names x, x found"),
        (["--edits=nowhere"], "nowhere: no such folder"),
        (["--sources", "--option=noise"], "--option noise: 'noise' found; NAME=VALUE"),
        (["--sources", "--option=noise=1", "--option=noise=2"], "--option noise: a second value found"),
        (["--sources", "--option=noise=much"], "--option oracle.noise: 'much' found; float was wanted"),
        (["--sources", "--option=nois=1"], "--option oracle.nois: no such option; did you mean noise?"),
        (["--sources", "--reward=orcle"], "reward: 'orcle' found"),
        (["--sources", "--plugin=nowhere"], "plugins.oracle: a name of its own"),
        (["--sources", "--json=a.txt"], "--json: a.txt: the suffix is '.txt'"),
        (["--targets", "--reward=change", "--data=edits"], "00001-0: no target image; --targets needs one"),
        (["--targets", "--data=edits"], "00001-0: no target image; the reward needs one"),
    ],
    ids=lambda x: " ".join(x)[:40] if isinstance(x, list) else "",
)
def test_mistakes_are_said_in_two_lines(capsys, argv, problem):
    for name in ("a", "b"):
        Path(name, "x").mkdir(parents=True)
    Path("edits").symlink_to(small_run.data_folder())
    common = {"--reward": "oracle", "--data": "scenes:heldout:2"}
    absent = [f"{flag}={value}" for flag, value in common.items() if not any(x.startswith(f"{flag}=") for x in argv)]
    assert small_run.fail(capsys, "judge", *absent, *argv)[1].startswith(problem)
