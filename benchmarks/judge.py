"""How much longer than its servers a judge takes: `python -m benchmarks.judge` asks a server here about 1,000 edits.

The server answers each request 200 ms after it has a slot, of 64. What the benchmark prints is the time from `start` to
the scores, PNG encoding included, over the least time that such a server could need.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import multiprocessing
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection

import numpy as np

from rcgrpo_jax.rewards import RewardInputs, VLMDigits

SLOTS, SECONDS = 64, 0.2
_PLACE = {"top_logprobs": [{"token": "4", "logprob": -0.1}, {"token": "2", "logprob": -2.4}]}
_ANSWER = json.dumps({"choices": [{"logprobs": {"content": [_PLACE]}}]}).encode()


def serve(port: Connection) -> None:
    """Answers every POST alike on a port of 127.0.0.1, which is sent when it is open."""

    async def main() -> None:
        slots = asyncio.Semaphore(SLOTS)

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                while True:
                    head = (await reader.readuntil(b"\r\n\r\n")).lower()
                    await reader.readexactly(int(head.split(b"content-length:")[1].split(b"\r\n")[0]))
                    async with slots:
                        await asyncio.sleep(SECONDS)
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(_ANSWER), _ANSWER))
            except asyncio.IncompleteReadError:
                writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", limit=2**22)
        port.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(main())


def measure(judge: VLMDigits, prompts: int, candidates: int, side: int) -> float:
    """Seconds from `start` to the scores of pictures of noise, which no PNG makes smaller."""
    rng = np.random.default_rng(0)
    source, edited = (rng.random((*axes, side, side, 3), np.float32) for axes in ((prompts,), (prompts, candidates)))
    inputs = RewardInputs(source, edited, np.ones((prompts, side, side), np.float32), ("Make it red.",) * prompts)
    start = time.monotonic()
    scores = judge.start(inputs).result()
    if not np.isfinite(scores).all():
        raise RuntimeError("the server did not answer everything")
    return time.monotonic() - start


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.judge", description=__doc__)
    parser.add_argument("--side", type=int, default=64, help="pixels; 512 needs 3 GiB")
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--candidates", type=int, default=25, help="of each prompt")
    args = parser.parse_args(argv)
    receiver, sender = multiprocessing.Pipe(duplex=False)
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(sender,), daemon=True)
    server.start()
    judge = VLMDigits(urls=f"http://127.0.0.1:{receiver.recv()}/v1", model="any")
    measure(judge, 1, 1, args.side)  # threads and imports
    judge.metrics()
    count = args.prompts * args.candidates
    work = time.process_time()
    seconds = measure(judge, args.prompts, args.candidates, args.side)
    work = time.process_time() - work
    ideal = count / SLOTS * SECONDS
    waves = math.ceil(count / SLOTS) * SECONDS
    print(
        f"{count} candidates of {args.side} x {args.side}: {seconds:.2f} s, {seconds / ideal:.3f} x the ideal "
        f"{ideal:.3f} s (whole waves: {waves:.1f} s), {work:.2f} s of a processor"
    )
    print(", ".join(f"{name} {value:.3g}" for name, value in judge.metrics().items()))
    server.terminate()


if __name__ == "__main__":
    main()
