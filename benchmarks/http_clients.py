"""CPU time that an HTTP client takes per request: aiohttp, by which responses are asked for, beside httpx.

    python benchmarks/http_clients.py [--requests 3000] [--in-flight 256]

The server is a process of its own that answers at once, with a response of 30 tokens. httpx has a client per worker,
as it was used: its shared connection pool looks at every connection for every request. Two turns of each.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import aiohttp
import httpx
import uvicorn

PROMPT = {"token_ids": list(range(60)), "sampling_params": {"max_tokens": 64, "seed": 1, "logprobs": 0}}
CONTENT = [{"token_id": token, "logprob": -0.1234567} for token in range(30)]
ANSWER = json.dumps({"choices": [{"token_ids": list(range(30)), "logprobs": {"content": CONTENT}}]}).encode()
HEADERS = [(b"content-type", b"application/json"), (b"content-length", str(len(ANSWER)).encode())]


async def _answer(scope: Any, receive: Callable[[], Any], send: Callable[[Any], Any]) -> None:
    if scope["type"] != "http":
        return
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
    await send({"type": "http.response.body", "body": ANSWER})


def _serve(port: int) -> None:
    uvicorn.run(_answer, port=port, log_level="error")


async def by_httpx(url: str, numbers: Iterator[int], in_flight: int) -> None:
    async def worker() -> None:
        async with httpx.AsyncClient(timeout=60, trust_env=False) as client:
            for _ in numbers:
                json.loads((await client.post(url, json=PROMPT)).content)

    await asyncio.gather(*(worker() for _ in range(in_flight)))


async def by_aiohttp(url: str, numbers: Iterator[int], in_flight: int) -> None:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as client:

        async def worker() -> None:
            for _ in numbers:
                async with client.post(url, json=PROMPT) as response:
                    json.loads(await response.read())

        await asyncio.gather(*(worker() for _ in range(in_flight)))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--in-flight", type=int, default=256)
    options = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = multiprocessing.get_context("spawn").Process(target=_serve, args=(port,), daemon=True)
    server.start()
    while socket.socket().connect_ex(("127.0.0.1", port)):
        time.sleep(0.1)
    print("| client | CPU ms per request | requests per second |\n|---|---|---|")
    for name, ask in 2 * [("httpx", by_httpx), ("aiohttp", by_aiohttp)]:
        cpu, start = time.process_time(), time.perf_counter()
        asyncio.run(ask(f"http://127.0.0.1:{port}/", iter(range(options.requests)), options.in_flight))
        spent, took = time.process_time() - cpu, time.perf_counter() - start
        print(f"| {name} | {1e3 * spent / options.requests:.2f} | {options.requests / took:.0f} |")
    server.terminate()


if __name__ == "__main__":
    main()
