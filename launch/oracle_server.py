"""A judge of synthetic scenes at a chat endpoint: EditScore's questions, answered by the oracle. It ends with Ctrl-C.

    python launch/oracle_server.py --data scenes:train:600 --port 8000
    rcgrpo train --config configs/small_editor.py --workdir runs/judged \
        --config.rewards.oracle=0 --config.rewards.editscore=1 --config.reward_options.editscore.model=oracle \
        --config.reward_options.editscore.urls=http://localhost:8000/v1

For trying what asks a judge without a GPU for one. It knows a scene by the pixels of its source, so both questions must
show it (`quality_of=both`, the default), at the size at which the scenes were drawn.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
from functools import partial
from typing import Any

import jax
import numpy as np
from aiohttp import web
from jaxtyping import UInt8
from PIL import Image

from rcgrpo_jax.data.example import Needs, Source
from rcgrpo_jax.data.sources import open_source
from rcgrpo_jax.rewards.oracle import FULL, oracle_scores

QUALITY = "naturalness"  # a word of the question about quality, and of no other
SUB_SCORES = {True: ("naturalness", "artefacts"), False: ("success", "preservation")}


def digest(picture: UInt8[np.ndarray, "H W 3"]) -> str:
    return hashlib.sha256(picture.tobytes()).hexdigest()


def read_question(body: dict[str, Any]) -> tuple[str, list[UInt8[np.ndarray, "H W 3"]]]:
    """The text and the pictures of a request's one message."""
    parts = body["messages"][-1]["content"]
    urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    pictures = [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in urls]
    text = "".join(part["text"] for part in parts if part["type"] == "text")
    return text, [np.asarray(picture.convert("RGB")) for picture in pictures]


async def answer(request: web.Request, source: Source, indices: dict[str, int]) -> web.Response:
    """Two sub-scores from 0 to 25, in whole numbers as EditScore gives them."""
    text, pictures = read_question(await request.json())
    names = SUB_SCORES[QUALITY in text.lower()]
    index = indices.get(digest(pictures[0])) if len(pictures) == 2 else None
    if index is not None:
        example = source[index]
        before, after, target = (picture[None].astype(np.float32) / 255 for picture in (*pictures, example.target))
        scores = jax.jit(oracle_scores)(before, after[:, None], example.mask[None], target)
        found = [round(float(scores[name][0, 0])) for name in names]
    elif len(pictures) == 2 and np.array_equal(*pictures):  # as a run asks before its first step
        found = [0 if name == "success" else round(FULL) for name in names]
    else:
        problem = f"{len(pictures)} pictures found, the first no scene's source; a source and its edit were wanted"
        return web.json_response({"error": {"message": problem, "code": 400}}, status=400)
    said = json.dumps({"reasoning": "compared with the right result", "score": found})
    return web.json_response({"choices": [{"index": 0, "message": {"role": "assistant", "content": said}}]})


def make_app(source: Source) -> web.Application:
    """The server for examples with targets, whose sources are drawn once to know them by."""
    indices = {digest(source[i].image): i for i in range(len(source))}
    app = web.Application(client_max_size=64 * 2**20)
    app.router.add_post("/v1/chat/completions", partial(answer, source=source, indices=indices))
    return app


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", default="scenes:train:600", help="examples with targets, as data.path names them")
    parser.add_argument("--port", type=int, default=8000)
    flags = parser.parse_args()
    web.run_app(make_app(open_source(flags.data, needs=Needs(target="the oracle"))), host="127.0.0.1", port=flags.port)
