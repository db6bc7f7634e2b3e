"""The server against the engine alone: what the wire costs, on the tiny model or on another one.

    python -m benchmarks.serve                 # some minutes on two CPU cores
    python -m benchmarks.serve --streams 8 --tokens 16 --requests 50     # a short look

The client runs in a process of its own. Writes benchmarks/results/serve.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from statistics import median
from typing import Any

import httpx
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from benchmarks.common import in_turn, machine, versions, write
from gearshift.data.chat import render_prompt
from gearshift.engine import Engine, EngineConfig
from gearshift.engine.service import EngineService
from gearshift.models.load import ModelConfig, load_policy, load_tokenizer
from gearshift.serve.app import Server, ServerSettings, make_app
from gearshift.serve.events import EventStream
from gearshift.serve.metrics import Metrics
from gearshift.serve.openai import openai_routes
from gearshift.serve.policies import Policies, Policy
from gearshift.types import SamplingParams

ASK = [{"role": "user", "content": "Name the months of the year, each with its number of days."}]


async def stream(http: httpx.AsyncClient, url: str, body: dict[str, Any]) -> tuple[float, int]:
    """(seconds to the first text, chunks) of one stream."""
    began, first, chunks = time.perf_counter(), 0.0, 0
    async with http.stream("POST", url, json=body) as answer:
        async for line in answer.aiter_lines():
            chunks += line.startswith("data: ")
            if not first and '"content":"' in line and '"content":""' not in line:
                first = time.perf_counter() - began
    return first, chunks


def ask_many(url: str, count: int, body: dict[str, Any]) -> list[tuple[float, int]]:
    """That many streams at once."""

    async def all_of() -> list[tuple[float, int]]:
        limits = httpx.Limits(max_connections=count)
        async with httpx.AsyncClient(limits=limits, timeout=600) as http:
            return list(await asyncio.gather(*(stream(http, url, body) for _ in range(count))))

    return asyncio.run(all_of())


def client(url: str, count: int, body: dict[str, Any]) -> tuple[float, float]:
    """(seconds of all, seconds to the first text of the first stream), by a process of its own, so
    that the client's work is not the server's.
    """
    command = [sys.executable, "-m", "benchmarks.serve", "--client", url, str(count)]
    done = subprocess.run([*command, json.dumps(body)], capture_output=True, check=True, text=True)
    whole, first = json.loads(done.stdout)
    return whole, first


def cost_of_a_chunk(chunks: int) -> float:
    """Microseconds of processor time that the server takes for one streamed chunk, without a
    model.
    """

    async def endless(_: Request) -> Response:
        async def events() -> AsyncGenerator[str, None]:
            for _ in range(chunks):
                yield 'data: {"choices":[{"delta":{"content":"word"}}]}\n\n'
                await asyncio.sleep(0)

        return EventStream(events())

    server = Server(make_app([Route("/events", endless, methods=["POST"])], ServerSettings(port=0)))
    server.start()
    client(f"{server.url}/events", 1, {})
    began = time.process_time()
    client(f"{server.url}/events", 1, {})
    spent = time.process_time() - began
    server.stop()
    return 1e6 * spent / chunks


def resident() -> int:
    """Bytes of memory of this process."""
    words = Path("/proc/self/statm").read_text(encoding="ascii").split()
    return int(words[1]) * 4096


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """All figures."""
    config = ModelConfig(name=given.model)
    tokenizer = load_tokenizer(config)
    engine = Engine(load_policy(config), tokenizer, EngineConfig(max_num_seqs=given.streams))
    own = Engine(load_policy(config), tokenizer, EngineConfig(max_num_seqs=given.streams))
    prompt = render_prompt(tokenizer, ASK)
    params = SamplingParams(n=given.streams, max_new_tokens=given.tokens, bad_words=[
        (token,) for token in sorted(own.end_tokens)])  # fmt: skip
    body = {"model": "policy", "messages": ASK, "max_tokens": given.tokens, "ignore_eos": True}
    with EngineService(engine) as service:
        policy = Policy("policy", service, tokenizer, end_tokens=engine.end_tokens)
        app = make_app(openai_routes(Policies([policy]), Metrics()), ServerSettings(port=0))
        server = Server(app)
        server.start()
        url = f"{server.url}/v1/chat/completions"

        def alone() -> None:
            with own.generating():
                own.generate([prompt], params)

        def prefill() -> None:
            with own.generating():
                own.generate([prompt], SamplingParams(max_new_tokens=1))

        streamed = {**body, "stream": True}
        seconds = in_turn(
            {
                "engine": alone,
                "door": lambda: client(url, given.streams, streamed)[0],
                "prefill": prefill,
                "first_token": lambda: client(url, 1, streamed)[1],
            },
            given.rounds,
        )
        ask_many(url, 1, body)
        before = resident()
        for _ in range(given.requests // given.streams):
            ask_many(url, given.streams, {**body, "max_tokens": 4})
        grown = resident() - before
        server.stop()
    middle = {name: median(values) for name, values in seconds.items()}
    rate = given.streams * given.tokens / middle["door"]
    return {
        "seconds": middle,
        "tokens_per_second_of_door": rate,
        "share_of_engine": middle["engine"] / middle["door"],
        "first_token_over_prefill": middle["first_token"] / middle["prefill"],
        "bytes_grown_over_requests": grown,
    }


def main() -> None:
    """Measure, print, write."""
    if sys.argv[1:2] == ["--client"]:
        began = time.perf_counter()
        found = ask_many(sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4]))
        print(json.dumps([time.perf_counter() - began, found[0][0]]))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    figures = {"chunk_microseconds": cost_of_a_chunk(2000), **measure(given), "asked": vars(given)}
    print(json.dumps(figures, indent=2))
    write("serve", {**figures, "machine": machine(), "versions": versions()})


if __name__ == "__main__":
    main()
