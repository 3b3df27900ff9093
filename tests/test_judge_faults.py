"""Whole runs whose judge fails in every way: they end as if it had not, or say what they lack."""

import itertools
from pathlib import Path

import jax
import numpy as np
import pytest
import small_run
from judge_server import JudgeServer, Reply, be_quick, digest, message, serving
from ml_collections import ConfigDict

from rcgrpo_jax.rl.trainer import train
from rcgrpo_jax.runs.metrics import read_metrics

pytestmark = pytest.mark.slow
CANDIDATES = 8  # of a step


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    be_quick(monkeypatch)


def rate(body: dict, attempt: int = 1) -> Reply:
    """A score that depends on the pictures, and not on the seed: an answer that is asked for again is the same."""
    return message(f'{{"score": {digest({**body, "seed": 0}, 1001) / 100}}}')


FAULTS = {
    "time-out": lambda fine: fine._replace(delay=2.0),
    "closed": lambda fine: Reply(absent=True),
    "full": lambda fine: Reply(b"slow down", 429, {"Retry-After": "1"}),
    "error": lambda fine: Reply(b"oh", 500),
    "proxy": lambda fine: Reply(b"<html>Bad Gateway</html>", 502),
    "truncated": lambda fine: fine._replace(cut=True),
    "no JSON": lambda fine: Reply(b"<html>Welcome</html>"),
    "no score": lambda fine: message("I'm sorry, I can't."),
    "out of range": lambda fine: message('{"score": 11}'),
}


def judged(tmp_path: Path, urls: str, num_steps: int, **options) -> ConfigDict:
    """A run that learns from a judge alone."""
    (tmp_path / "prompt.txt").write_text("How good is {edited}?")
    config = small_run.make_config(train__num_steps=num_steps, train__save_every=100, acd__weight=0.0)
    config.rewards = ConfigDict({"rubric": 1.0})
    config.reward_options.rubric = ConfigDict(
        {"urls": urls, "model": "tiny", "template": str(tmp_path / "prompt.txt"), **options}
    )
    return config


def exported(capsys, config: ConfigDict, workdir: Path) -> dict[str, np.ndarray]:
    """The LoRA of a whole run."""
    train(config, workdir, jax.devices()[:1])
    out = workdir / "lora"
    code, _, err = small_run.run_command(capsys, "export", f"--workdir={workdir}", f"--out={out}", "--dtype=float32")
    assert code == 0, err
    return small_run.tensors(out)


def test_a_run_ends_with_the_same_lora_if_a_fifth_of_all_requests_fail_in_every_way(tmp_path, capsys):
    number, failed = itertools.count(), []

    def failing(body: dict, attempt: int) -> Reply:
        if next(number) % 5 < 4:  # the first is the check
            return rate(body)
        failed.append([*FAULTS][len(failed) % len(FAULTS)])
        return FAULTS[failed[-1]](rate(body))

    def dying(body: dict, attempt: int) -> Reply:
        if len(other.bodies) == 8:
            other.die()
        return rate(body)

    other: JudgeServer
    options = {"num_pass": 4, "attempts": 20, "asks": 20, "timeout": 1.0}
    with serving(rate) as whole, serving(failing) as one, serving(dying) as other:
        wanted = exported(capsys, judged(tmp_path, whole.url, 2, **options), tmp_path / "whole")
        found = exported(capsys, judged(tmp_path, f"{one.url},{other.url}", 2, **options), tmp_path / "failing")
    assert set(failed) == set(FAULTS)
    assert wanted.keys() == found.keys()
    assert sum(np.any(x) for x in wanted.values()) == len(wanted)
    for name, x in wanted.items():
        assert found[name].tobytes() == x.tobytes(), name
    before, after = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "failing"))
    assert sum(line["judge/rubric/retries"] + line["judge/rubric/asked_again"] for line in after) >= len(failed)
    assert [line["reward/rubric"] for line in after] == [line["reward/rubric"] for line in before]
    assert {line["reward_failed/rubric"] for line in after} == {0}


def test_a_run_that_lacks_a_twentieth_of_its_scores_ends_and_says_how_many(tmp_path, caplog):
    lost: dict[str, bool] = {}  # picture -> whether it is never answered: the 10th, the 30th, ... of the candidates

    def failing(body: dict, attempt: int) -> Reply:
        picture = body["messages"][0]["content"][1]["image_url"]["url"]
        return Reply(status=500) if lost.setdefault(picture, len(lost) % 20 == 10) else rate(body)

    with serving(failing) as server:
        config = judged(tmp_path, server.url, 5, attempts=2)
        assert int(train(config, tmp_path / "run", jax.devices()[:1]).step) == 5
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert sum(lost.values()) == 2 == 5 * CANDIDATES / 20
    assert [line["candidates/missing"] for line in lines] == [0, 1, 0, 1, 0]
    assert [line["judge/rubric/unscored"] for line in lines] == [0, 1, 0, 1, 0]
    assert sum("1 of 8 candidates have no score: http://" in line for line in caplog.messages) == 2
