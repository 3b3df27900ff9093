"""A chat server in a thread, over real connections, that answers and fails as a test says, and a judge to ask it."""

import contextlib
import hashlib
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

import numpy as np
import pytest
from tenacity.wait import wait_random_exponential

from rcgrpo_jax.rewards import RewardInputs, chat
from rcgrpo_jax.rewards.editscore import read_score
from rcgrpo_jax.rewards.judge import Judge, Question, SampledJudge


class Reply(NamedTuple):
    """What is sent for a request."""

    content: bytes = b""
    status: int = 200
    headers: Mapping[str, str] = {}
    delay: float = 0.0  # seconds before it
    cut: bool = False  # whether the connection ends in the middle of the content
    endless: bool = False  # whether the content is repeated for ever
    absent: bool = False  # whether the connection ends without any


def message(text: Any) -> Reply:
    """A chat completion with a text."""
    return Reply(json.dumps({"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]}).encode())


def scores(*numbers: float) -> Reply:
    """An answer in EditScore's form."""
    return message(json.dumps({"reasoning": "fine", "score": numbers}))


def digest(body: Mapping[str, Any], count: int) -> int:
    """A number below `count` that depends on the whole request."""
    text = json.dumps(body, sort_keys=True)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % count


def rate(body: Mapping[str, Any], attempt: int = 1) -> Reply:
    """Two sub-scores that depend on the whole request, and on nothing else."""
    return scores(digest(body, 26), digest({"other": body}, 26))


class JudgeServer(ThreadingHTTPServer):
    """Answers `POST /v1/chat/completions`.

    Args:
        reply: Called with a request's body, and how often this body has come by now.
        port: 0 for any.
    """

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, reply: Callable[[dict[str, Any], int], Reply] = rate, port: int = 0):
        super().__init__(("127.0.0.1", port), Handler)
        self.reply, self.lock, self.seen = reply, threading.Lock(), Counter()
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.sockets: set[socket.socket] = set()
        self.outstanding = self.most = self.connections = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def die(self) -> None:
        """Ends at once, with the connections that are open."""
        self.shutdown()
        self.server_close()
        for connection in list(self.sockets):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, *_: object) -> None:
        """A client that has gone is no news."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: JudgeServer

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.server.sockets.add(self.connection)
        self.server.connections += 1

    def finish(self) -> None:
        self.server.sockets.discard(self.connection)
        super().finish()

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        raw, server = self.rfile.read(int(self.headers["Content-Length"])), self.server
        body = json.loads(raw)
        with server.lock:
            server.seen[raw] += 1
            attempt = server.seen[raw]
            server.bodies.append(body)
            server.headers.append(dict(self.headers))
            server.outstanding += 1
            server.most = max(server.most, server.outstanding)
        try:
            known = self.path == "/v1/chat/completions"
            self.send(server.reply(body, attempt) if known else Reply(b'{"detail": "Not Found"}', 404))
        finally:
            with server.lock:
                server.outstanding -= 1

    def do_GET(self) -> None:
        self.server.headers.append(dict(self.headers))
        self.send(Reply(b"{}"))

    def send(self, reply: Reply) -> None:
        time.sleep(reply.delay)
        if reply.absent:
            self.close_connection = True
            return
        self.send_response(reply.status)
        length = 1 << 40 if reply.endless else len(reply.content)
        for name, value in {"Content-Length": str(length), **reply.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        while reply.endless:
            self.wfile.write(reply.content)
        self.wfile.write(reply.content[: len(reply.content) // 2] if reply.cut else reply.content)
        if reply.cut:
            self.close_connection = True


@contextlib.contextmanager
def serving(reply: Callable[[dict[str, Any], int], Reply] = rate, port: int = 0) -> Iterator[JudgeServer]:
    """A server for the length of a block."""
    server = JudgeServer(reply, port)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield server
    finally:
        server.die()


def be_quick(patch: pytest.MonkeyPatch) -> None:
    """Cuts down what a server is given to recover."""
    patch.setattr(chat, "REST", 0.01)
    patch.setattr(chat, "_BACKOFF", wait_random_exponential(multiplier=0.005, max=0.05))


@dataclass(frozen=True)
class Pairs(SampledJudge):
    """EditScore's form without its prompts."""

    def questions(self):
        return Question("{source}{edited}Did it {instruction}?", read_score), Question(
            "{edited}How good is it?", read_score
        )


def make_judge(server: JudgeServer, cls: type[Judge] = Pairs, **options: Any) -> Judge:
    """A judge that asks the server."""
    return cls(**{"urls": server.url, "model": "tiny", "patience": 20.0, **options})


def batch(prompts: int = 2, candidates: int = 3, side: int = 8) -> RewardInputs:
    """Edits of noise."""
    rng = np.random.default_rng(0)
    source, edited = rng.random((prompts, side, side, 3)), rng.random((prompts, candidates, side, side, 3))
    mask = np.zeros((prompts, side, side), np.float32)
    mask[:, 2:4, 2:4] = 1
    instructions = tuple(f"edit {p}" for p in range(prompts))
    return RewardInputs(source.astype(np.float32), edited.astype(np.float32), mask, instructions)
