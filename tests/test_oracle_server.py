"""The oracle behind a chat endpoint is the oracle, in whole numbers."""

import asyncio
import runpy
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import small_run
from aiohttp import web

from rcgrpo_jax import rewards
from rcgrpo_jax.data.scenes.source import Scenes
from rcgrpo_jax.rewards import RewardInputs
from rcgrpo_jax.rewards.oracle import oracle_scores

PACKAGE = Path(sys.prefix, "editscore")  # where launch/test.sh puts it
SCENES = Scenes("train", 3, 32)


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """A server of three scenes."""
    script = runpy.run_path(str(small_run.ROOT / "launch" / "oracle_server.py"))
    loop, runner = asyncio.new_event_loop(), web.AppRunner(script["make_app"](SCENES))
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    run = lambda work: asyncio.run_coroutine_threadsafe(work, loop).result()  # noqa: E731
    run(runner.setup())
    site = web.TCPSite(runner, "127.0.0.1", 0)
    run(site.start())
    yield "http://{}:{}/v1".format(*runner.addresses[0])
    run(runner.cleanup())
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.fixture
def judge(url, monkeypatch):
    monkeypatch.syspath_prepend(PACKAGE)
    return rewards.make("editscore", model="oracle", urls=url, attempts=1)


@pytest.mark.skipif(not PACKAGE.is_dir(), reason="launch/test.sh installs editscore")
def test_editscore_asks_it_and_gets_the_oracles_rating(judge):
    judge.check()
    examples = [SCENES[i] for i in range(3)]
    source, target = (np.stack([getattr(x, name) for x in examples]) / np.float32(255) for name in ("image", "target"))
    edited = np.stack([source, source / 2 + target / 2, target], axis=1)
    edited = np.round(edited * 255).astype(np.float32) / 255  # as a PNG has them
    mask = np.stack([x.mask for x in examples])
    found = judge.start(RewardInputs(source, edited, mask, tuple(x.instruction for x in examples))).result()
    scores = {name: np.round(x) for name, x in oracle_scores(source, edited, mask, target).items() if name != "overall"}
    consistency = np.minimum(scores["success"], scores["preservation"]) / 25
    quality = np.minimum(scores["naturalness"], scores["artefacts"]) / 25
    np.testing.assert_allclose(found, np.sqrt(consistency * quality), rtol=1e-5)
    assert (found[:, 2] > found[:, 1]).all()
    assert (found[:, 0] == 0).all()


@pytest.mark.skipif(not PACKAGE.is_dir(), reason="launch/test.sh installs editscore")
def test_what_is_no_scene_has_no_score(judge):
    grey, other = np.full((1, 32, 32, 3), 0.5, np.float32), np.full((1, 1, 32, 32, 3), 0.75, np.float32)
    with pytest.raises(rewards.Unscored, match="no scene's source"):
        judge.start(RewardInputs(grey, other, np.ones((1, 32, 32), np.float32), ("Do it.",))).result()
