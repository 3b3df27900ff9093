"""A client of servers that speak OpenAI's chat protocol: balanced, bounded, and patient with servers that fail."""

from __future__ import annotations

import asyncio
import json
import threading
import time
import weakref
from collections import Counter
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import aiohttp
import numpy as np
from annotated_types import MinLen
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt
from tenacity.wait import wait_random_exponential
from typing_extensions import TypedDict

from rcgrpo_jax.borders import STRICT, conform, parse_json
from rcgrpo_jax.errors import UserError, reason
from rcgrpo_jax.rewards.endpoint import Busy, Fault, Unanswered

LARGEST = 4 << 20  # bytes of an answer
CONNECT = 10.0  # seconds to open a connection
KEPT_ALIVE = 4.0  # seconds that an idle connection is kept; common servers close it after 5
REST = 0.5  # seconds in which a server that has failed is asked only if all others have failed too
_BACKOFF = wait_random_exponential(multiplier=0.25, max=30)  # seconds: a random time below 0.25, 0.5, 1, ...
_BUSY = (429, 502, 503)  # too many requests; nothing behind a proxy; not ready

T = TypeVar("T")


class Completion(TypedDict):
    """What is read of an answer."""

    __pydantic_config__ = STRICT

    choices: Annotated[list[dict[str, Any]], MinLen(1)]


@dataclass
class Server:
    """One of the servers."""

    url: str
    outstanding: int = 0  # requests under way
    rests_until: float = 0.0  # of `time.monotonic`


class Chat:
    """Sends chat requests, from one background thread, each to the server with the fewest under way.

    A request is the same at every attempt, and any server may answer it. What comes back therefore does not depend on
    which of them failed. Redirects are not followed, and neither proxy variables nor `.netrc` are read.

    Args:
        urls: Of the servers, up to and with `/v1`.
        token: Sent as the bearer token; "" for none. It stands in no message.
        in_flight: Most requests under way.
        timeout: Seconds that one attempt may take.
        attempts: How often a request is sent to servers that fail at it.
        patience: Seconds without any answer after which the servers count as gone. Until then a request waits for one
            that is there and has room.
    """

    def __init__(
        self, urls: Sequence[str], token: str, *, in_flight: int, timeout: float, attempts: int, patience: float
    ):
        self.servers = [Server(url) for url in urls]
        self.counts: Counter[str] = Counter()  # of events since `metrics` was called, as their numbers
        self._seconds: list[float] = []  # that each answer took, since then
        self._token, self._slots = token, asyncio.Semaphore(in_flight)
        self._timeout, self._attempts, self._patience = timeout, attempts, patience
        self._answered = float("-inf")  # when a server last answered, of `time.monotonic`
        self._loop = asyncio.new_event_loop()
        thread = threading.Thread(target=_run, args=[self._loop], name="chat", daemon=True)
        thread.start()
        self._session = self.run(self._open()).result()
        weakref.finalize(self, _close, self._session, self._loop, thread)

    async def _open(self) -> aiohttp.ClientSession:
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        return aiohttp.ClientSession(
            headers=headers | ({"Authorization": f"Bearer {self._token}"} if self._token else {}),
            timeout=aiohttp.ClientTimeout(total=self._timeout, sock_connect=min(CONNECT, self._timeout)),
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEPT_ALIVE),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
        )

    def run(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Starts a coroutine in the background thread, where all requests are made."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def metrics(self, events: Sequence[str]) -> dict[str, float]:
        """Answers, the seconds that each took, and how often each event was counted, since the last call."""
        seconds, counts = np.array(self._seconds or [np.nan]), self.counts
        found = {"answers": len(self._seconds)} | {event: counts[event] for event in events}
        found |= {f"seconds_{name}": np.percentile(seconds, q) for name, q in (("p50", 50), ("p95", 95), ("max", 100))}
        self._seconds, self.counts = [], Counter()
        return {name: float(x) for name, x in found.items()}

    async def complete(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The first choice of the answer to a request.

        Raises:
            Unanswered: Servers have failed at it `attempts` times.
            UserError: No server has answered anything for `patience` seconds.
        """
        start = time.monotonic()

        def gone(state: RetryCallState | None = None) -> bool:
            return time.monotonic() - max(start, self._answered) >= self._patience

        shared: Any = {"wait": self._wait, "before_sleep": self._count, "reraise": True}
        patient = AsyncRetrying(retry=retry_if_exception_type(Busy), stop=gone, **shared)
        tries = AsyncRetrying(retry=retry_if_exception_type(Fault), stop=stop_after_attempt(self._attempts), **shared)

        async def wait_for_room() -> dict[str, Any]:
            return await patient(self._send, body)

        try:
            return await tries(wait_for_room)
        except Unanswered as cause:
            if not gone():
                raise
            raise UserError(
                f"no server has answered for {self._patience:g} s; the last cause: {cause}.",
                "Start the servers again; the same command goes on from the last checkpoint.",
            ) from None

    async def _send(self, body: Mapping[str, Any]) -> dict[str, Any]:
        async with self._slots:
            now = time.monotonic()
            server = min(self.servers, key=lambda server: (server.rests_until > now, server.outstanding))
            return await self.send_to(server, body)

    async def send_to(self, server: Server, body: Mapping[str, Any]) -> dict[str, Any]:
        """One attempt at one server.

        Returns:
            The first choice of the answer.

        Raises:
            Unanswered: There is none.
        """
        start, rest, content = time.monotonic(), REST, b""
        server.outstanding += 1
        try:
            content, status, retry_after = await self._post(f"{server.url}/chat/completions", json.dumps(body).encode())
            if status != 200:
                rest = max(REST, min(retry_after, self._patience))
                kind = Busy if status in _BUSY else Fault
                raise kind(f"{server.url}: status {status}: {self._excerpt(content)}", status)
            choice = conform(parse_json(content), Completion, "answer", "")["choices"][0]
            rest, self._answered = 0.0, time.monotonic()
            self._seconds.append(self._answered - start)
            return choice
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise Busy(f"{server.url}: no connection: {reason(error)}") from None
        except TimeoutError:
            raise Fault(f"{server.url}: no whole answer in {self._timeout:g} s") from None
        except aiohttp.ClientError as error:
            raise Fault(f"{server.url}: {type(error).__name__}: {self._excerpt(str(error).encode())}") from None
        except (UserError, ValueError):
            raise Fault(f"{server.url}: no chat completion: {self._excerpt(content)}", 404) from None
        finally:
            server.outstanding -= 1
            server.rests_until = time.monotonic() + rest

    async def _post(self, url: str, content: bytes) -> tuple[bytes, int, float]:
        """Content and status of an answer, and the seconds of its `Retry-After`; 0 where it names none, or a date."""
        async with self._session.post(url, data=content, allow_redirects=False) as response:
            received = bytearray()
            async for chunk in response.content.iter_any():
                received += chunk
                if len(received) > LARGEST:
                    raise Fault(f"{url}: an answer of more than {LARGEST} bytes", response.status)
            after = response.headers.get("Retry-After", "")
            return bytes(received), response.status, float(after) if after.isdecimal() else 0.0

    def _wait(self, state: RetryCallState) -> float:
        """Seconds to the next attempt: a back-off, after the first server has rested."""
        awake = min(server.rests_until for server in self.servers)
        return _BACKOFF(state) + max(0.0, awake - time.monotonic())

    def _count(self, state: RetryCallState) -> None:
        self.counts["retries"] += 1

    def redact(self, text: str) -> str:
        """A text that may come from a server, without the token, which servers may repeat."""
        return text.replace(self._token, "***") if self._token else text

    def _excerpt(self, content: bytes, length: int = 200) -> str:
        """The start of an answer in one line."""
        text = self.redact(content.decode(errors="replace"))
        return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:length] or "an empty answer"


def _run(loop: asyncio.AbstractEventLoop) -> None:
    """Runs a loop until it is stopped. A `sys.exit` in a task is that task's result, and does not end the others."""
    while True:
        try:
            return loop.run_forever()
        except SystemExit:
            continue


def _close(session: aiohttp.ClientSession, loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    """Ends the background thread, at the latest when the interpreter ends."""

    async def close() -> None:
        await session.close()
        loop.stop()

    asyncio.run_coroutine_threadsafe(close(), loop)
    if thread is not threading.current_thread():
        thread.join(CONNECT)
