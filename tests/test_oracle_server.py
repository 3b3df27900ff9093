"""The oracle behind a chat endpoint is the oracle, in whole numbers."""

import asyncio
import base64
import io
import json
import runpy
import socket
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import small_run
from aiohttp import web
from PIL import Image

from rcgrpo_jax import rewards
from rcgrpo_jax.data.scenes.source import Scenes
from rcgrpo_jax.errors import UserError
from rcgrpo_jax.rewards import RewardInputs
from rcgrpo_jax.rewards.oracle import oracle_scores

PACKAGE = Path(sys.prefix, "editscore")  # where launch/test.sh puts it
SCENES = Scenes("train", 3, 32)
SCRIPT = runpy.run_path(str(small_run.ROOT / "launch" / "oracle_server.py"))


@pytest.fixture(scope="module")
def url():
    """A server of three scenes."""
    loop, runner = asyncio.new_event_loop(), web.AppRunner(SCRIPT["make_app"](SCENES))
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


def ask(url: str, body: bytes) -> tuple[int, str]:
    """Status and message, or content, of the answer."""
    try:
        with urllib.request.urlopen(f"{url}/chat/completions", body) as response:
            return response.status, json.load(response)["choices"][0]["message"]["content"]
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)["error"]["message"]


def question(*pictures: np.ndarray | bytes, text: object = "success") -> bytes:
    """A request with pictures, or with what stands for the content of their files."""
    parts = [{"type": "text", "text": text}]
    for picture in pictures:
        if not isinstance(content := picture, bytes):
            Image.fromarray(picture).save(file := io.BytesIO(), "PNG")
            content = file.getvalue()
        url = f"data:image/png;base64,{base64.b64encode(content).decode()}"
        parts.append({"type": "image_url", "image_url": {"url": url}})
    return json.dumps({"messages": [{"role": "user", "content": parts}]}).encode()


SOURCE = SCENES[0].image


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b"", "cannot be read"),
        (b"\xff\xfe\0", "cannot be read"),
        (b'{"messages": ' + b"[" * 10**5, "nested too deeply"),
        (b"[]", "an object wanted"),
        (b'{"messages": []}', "at least 1 item"),
        (b'{"messages": [{"content": null}]}', "the last message"),
        (b'{"messages": [{"content": [{"type": "image_url", "image_url": {"url": 5}}]}]}', "a valid string wanted"),
        (question(SOURCE, SOURCE).replace(b"base64,", b"base64,!"), "cannot be read"),
        (question(SOURCE, b"no picture"), "not an image"),
        (question(SOURCE, SOURCE[:16]), "another size"),
        (question(SOURCE, SOURCE, text=5), "a valid string wanted"),
        (question(SOURCE), "1 pictures found"),
    ],
)  # fmt: skip
def test_what_is_no_question_is_a_bad_request_and_the_next_is_answered(url, body, problem):
    status, message = ask(url, body)
    assert status == 400
    assert problem in message
    status, said = ask(url, question(SOURCE, SCENES[0].target))
    assert (status, json.loads(said)["score"]) == (200, [25, 25])


def test_a_port_that_is_taken_and_examples_without_targets_are_told(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for port in (taken.getsockname()[1], 10**6):
            with pytest.raises(UserError, match=f"--port: {port} cannot be had"):
                SCRIPT["serve"]("scenes:train:1", port)
    with pytest.raises(UserError, match="the oracle needs one"):
        SCRIPT["serve"](str(small_run.data_folder()), 8000)
