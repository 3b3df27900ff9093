"""A judge of synthetic scenes at a chat endpoint: EditScore's questions, answered by the oracle. It ends with Ctrl-C.

    python launch/oracle_server.py --data scenes:train:600 --port 8000
    rcgrpo train --config configs/small_editor.py --workdir runs/judged \
        --config.rewards.oracle=0 --config.rewards.editscore=1 --config.reward_options.editscore.model=oracle \
        --config.reward_options.editscore.urls=http://localhost:8000/v1

For trying what asks a judge without a GPU for one. It knows a scene by the pixels of its source, so both questions must
show it (`quality_of=both`, the default), at the size at which the scenes were drawn.
"""

import argparse
import base64
import hashlib
import io
import json
import sys
from functools import partial
from typing import Annotated, Any, NotRequired

import jax
import numpy as np
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from annotated_types import MinLen
from jaxtyping import UInt8
from typing_extensions import TypedDict

from rcgrpo_jax.borders import STRICT, conform, parse_json
from rcgrpo_jax.data.example import Needs, Source, check_needs
from rcgrpo_jax.data.images import as_rgb, open_image
from rcgrpo_jax.data.sources import open_source
from rcgrpo_jax.errors import UserError
from rcgrpo_jax.rewards.oracle import FULL, oracle_scores

QUALITY = "naturalness"  # a word of the question about quality, and of no other
SUB_SCORES = {True: ("naturalness", "artefacts"), False: ("success", "preservation")}


def digest(picture: UInt8[np.ndarray, "H W 3"]) -> str:
    return hashlib.sha256(picture.tobytes()).hexdigest()


class _Url(TypedDict):
    url: str


class _Part(TypedDict):
    type: str
    text: NotRequired[str]
    image_url: NotRequired[_Url]


class _Message(TypedDict):
    content: Any  # earlier messages are not read


class _Request(TypedDict):
    __pydantic_config__ = STRICT
    messages: Annotated[list[_Message], MinLen(1)]


def read_question(body: bytes) -> tuple[str, list[UInt8[np.ndarray, "H W 3"]]]:
    """The text and the pictures of a request's last message.

    Raises:
        UserError: The request is none of a chat with pictures as data URLs.
    """
    try:
        request = conform(parse_json(body), _Request, "the request", "")
        parts = conform(request["messages"][-1]["content"], list[_Part], "the last message", "")
        urls = [part["image_url"]["url"] for part in parts if "image_url" in part]
        contents = [base64.b64decode(url.partition("base64,")[2], validate=True) for url in urls]
    except ValueError as error:  # of JSON or Base64
        raise UserError(f"the request cannot be read ({error})", "") from None
    pictures = [as_rgb(open_image(io.BytesIO(content), "picture"), "picture") for content in contents]
    return "".join(part.get("text", "") for part in parts), pictures


def rate(body: bytes, source: Source, indices: dict[str, int]) -> list[int]:
    """Two sub-scores from 0 to 25, in whole numbers as EditScore gives them.

    Raises:
        UserError: As `read_question`, or the pictures are no scene's source and an edit of it.
    """
    text, pictures = read_question(body)
    names = SUB_SCORES[QUALITY in text.lower()]
    index = indices.get(digest(pictures[0])) if len(pictures) == 2 else None
    if index is not None and pictures[0].shape == pictures[1].shape:
        example = source[index]
        before, after, target = (picture[None].astype(np.float32) / 255 for picture in (*pictures, example.target))
        scores = jax.jit(oracle_scores)(before, after[:, None], example.mask[None], target)
        return [round(float(scores[name][0, 0])) for name in names]
    if len(pictures) == 2 and np.array_equal(*pictures):  # as a run asks before its first step
        return [0 if name == "success" else round(FULL) for name in names]
    found = "another size for the edit" if index is not None else "the first no scene's source"
    raise UserError(f"{len(pictures)} pictures found, {found}; a source and its edit were wanted", "")


async def answer(request: web.Request, source: Source, indices: dict[str, int]) -> web.Response:
    """What a chat endpoint answers; the status 400 for what cannot be rated."""
    try:
        score = rate(await request.read(), source, indices)
    except (UserError, HttpProcessingError, web.RequestPayloadError) as error:
        problem = error.problem if isinstance(error, UserError) else f"the request cannot be read ({error})"
        return web.json_response({"error": {"message": problem, "code": 400}}, status=400)
    said = json.dumps({"reasoning": "compared with the right result", "score": score})
    return web.json_response({"choices": [{"index": 0, "message": {"role": "assistant", "content": said}}]})


def make_app(source: Source) -> web.Application:
    """The server for examples with targets, whose sources are drawn once to know them by.

    Raises:
        UserError: An example cannot be read or has no target.
    """
    indices = {}
    for i in range(len(source)):
        example = source[i]
        check_needs(example, Needs(target="the oracle"))
        indices[digest(example.image)] = i
    app = web.Application(client_max_size=64 * 2**20)
    app.router.add_post("/v1/chat/completions", partial(answer, source=source, indices=indices))
    return app


def serve(data: str, port: int) -> None:
    """Answers until the process is told to end.

    Raises:
        UserError: As `make_app`, or the port is not to be had.
    """
    app = make_app(open_source(data))
    try:
        web.run_app(app, host="127.0.0.1", port=port)
    except (OSError, OverflowError) as error:
        raise UserError(f"--port: {port} cannot be had ({error}).", "Name another port, from 1024 to 65535.") from None


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", default="scenes:train:600", help="examples with targets, as data.path names them")
    parser.add_argument("--port", type=int, default=8000)
    try:
        serve(**vars(parser.parse_args()))
    except UserError as error:
        sys.exit(f"launch/oracle_server.py: error: {error.problem}\n  {error.remedy}")
