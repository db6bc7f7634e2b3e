"""The door of a real engine: what it says is what the engine says, whatever else happens."""

import asyncio
import json
import os
import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import httpx
import pytest
import torch
from openai import AsyncOpenAI, OpenAI, RateLimitError

from gearshift.batch import pack
from gearshift.data.chat import render_prompt
from gearshift.data.text import decode
from gearshift.engine import Engine, EngineConfig
from gearshift.engine.service import EngineService
from gearshift.models.tiny import tiny_model, tiny_tokenizer
from gearshift.serve.app import Server
from gearshift.serve.metrics import Metrics
from gearshift.serve.openai import openai_routes
from gearshift.serve.policies import Policies, Policy
from gearshift.types import SamplingParams
from tests.serve.raw import request, send, serving

ASK: list[Any] = [{"role": "user", "content": "hi"}]
KEY = "canary-key-7f3a"


def new_engine(**config: Any) -> Engine:
    return Engine(tiny_model(), tiny_tokenizer(), EngineConfig(**config))


@contextmanager
def door(rows: int = 64, **settings: Any) -> Iterator[tuple[Server, Engine, EngineService]]:
    engine = new_engine(max_num_seqs=rows)
    with ExitStack() as stack:
        service = stack.enter_context(EngineService(engine))
        policy = Policy("policy", service, engine.tokenizer, end_tokens=engine.end_tokens)
        metrics = Metrics()
        metrics.serve(policy)
        routes = [*openai_routes(Policies([policy]), metrics), *metrics.routes()]
        server = stack.enter_context(serving(routes, metrics.observe, **settings))
        yield server, engine, service


@pytest.fixture(scope="module")
def opened() -> Iterator[tuple[Server, Engine, EngineService]]:
    with door() as found:
        yield found


def client_of(server: Server, **more: Any) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, **more)


def said(server: Server, **body: Any) -> str:
    given: Any = {"model": "policy", "messages": ASK, "max_tokens": 24, **body}
    with client_of(server) as client:
        return str(client.chat.completions.create(**given).choices[0].message.content)


def idle(service: EngineService) -> bool:
    for _ in range(500):
        if service.running == service.waiting == 0:
            return True
        time.sleep(0.02)
    return False


def test_t6_the_door_says_what_the_engine_says(
    opened: tuple[Server, Engine, EngineService],
) -> None:
    own = new_engine()
    prompt = render_prompt(own.tokenizer, ASK)
    params = SamplingParams(temperature=0, max_new_tokens=24)
    with own.generating():
        [[completion]] = own.generate([prompt], params)
    text = decode(own.tokenizer, completion.token_ids, skip_special_tokens=True)
    assert said(opened[0], temperature=0) == text


def test_t6_a_seed_gives_the_same_text_at_any_load(
    opened: tuple[Server, Engine, EngineService],
) -> None:
    server = opened[0]
    alone = said(server, seed=7)
    assert alone != said(server, seed=8)
    others = [
        threading.Thread(target=said, args=(server,), kwargs={"max_tokens": 40 + i})
        for i in range(15)
    ]
    for other in others:
        other.start()
    among = said(server, seed=7)
    for other in others:
        other.join()
    with door(rows=2) as (restarted, _, _):
        assert alone == among == said(restarted, seed=7)


def test_t7_log_probs_are_those_of_training(
    opened: tuple[Server, Engine, EngineService],
) -> None:
    asked: Any = {"model": "policy", "messages": ASK, "max_tokens": 16, "temperature": 0.5}
    asked |= {"logprobs": True, "top_logprobs": 3, "extra_body": {"gearshift": {"tokens": True}}}
    with client_of(opened[0]) as client:
        [choice] = client.chat.completions.create(**asked, top_p=0.9).choices
    record: Any = choice.model_extra and choice.model_extra["gearshift"]
    assert choice.logprobs and choice.logprobs.content
    given = [token.logprob for token in choice.logprobs.content]
    ids = [*record["prompt_token_ids"], *record["token_ids"]]
    mask = [0] * len(record["prompt_token_ids"]) + [1] * len(record["token_ids"])
    own = new_engine()
    with own.training(), torch.no_grad():
        scores = own.logprobs(pack([(ids, mask)])).logprobs.tolist()
        half = own.logprobs(pack([(ids, mask)]), temperature=0.5).logprobs.tolist()
    assert given == pytest.approx(scores, abs=1e-4)
    assert record["logprobs"] == pytest.approx(half, abs=1e-4)
    for token in choice.logprobs.content:
        best = [top.logprob for top in token.top_logprobs]
        assert best == sorted(best, reverse=True) and best[0] >= token.logprob
    with client_of(opened[0]) as client:
        echoed: Any = client.completions.create(
            model="policy", prompt=ids, echo=True, logprobs=1, max_tokens=1
        ).choices[0].logprobs  # fmt: skip
    first = len(record["prompt_token_ids"])
    assert echoed.token_logprobs[first:-1] == pytest.approx(scores, abs=1e-4)


def test_t10_many_streams_all_end() -> None:
    async def stream(client: AsyncOpenAI, i: int) -> str | None:
        asked: Any = {"model": "policy", "messages": ASK, "max_tokens": 8 + i % 5, "stream": True}
        reason = None
        async for chunk in await client.chat.completions.create(**asked):
            reason = chunk.choices[0].finish_reason if chunk.choices else reason
        return reason

    async def everything(server: Server) -> tuple[list[str | None], list[int]]:
        limits = httpx.Limits(max_connections=64)
        async with (
            httpx.AsyncClient(limits=limits, timeout=120) as http,
            AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", http_client=http) as client,
        ):
            works = asyncio.gather(*(stream(client, i) for i in range(48)))
            healthy = [(await http.get(f"{server.url}/health")).status_code for _ in range(5)]
            return list(await works), healthy

    with door(rows=16) as (server, _, service):
        reasons, healthy = asyncio.run(everything(server))
        assert set(reasons) <= {"stop", "length"} and len(reasons) == 48
        assert healthy == [200] * 5
        assert idle(service)


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_t12_clients_that_leave_give_everything_back(count: int) -> None:
    async def one(http: httpx.AsyncClient, url: str, draw: random.Random) -> None:
        body = {"model": "policy", "messages": ASK, "max_tokens": 60, "ignore_eos": True}
        body["stream"] = draw.random() < 0.5
        patience = draw.choice([0.02, 0.1, 60.0])
        with suppress(httpx.TimeoutException):
            await http.post(f"{url}/v1/chat/completions", json=body, timeout=patience)

    async def all_of(url: str) -> None:
        draw = random.Random(0)
        async with httpx.AsyncClient(limits=httpx.Limits(max_connections=32)) as http:
            await asyncio.gather(*(one(http, url, draw) for _ in range(count)))

    with door(rows=8) as (server, engine, service):
        asyncio.run(all_of(server.url))
        assert idle(service)
        said(server)
        scheduler = engine.loop._scheduler
        assert scheduler and scheduler.idle and not service._guests
        assert scheduler.cache.available == scheduler.cache.blocks


def test_t13_too_many_get_429() -> None:
    with door(rows=1, max_waiting=2) as (server, _, service):
        codes: list[int] = []

        def ask() -> None:
            try:
                said(server, max_tokens=200, extra_body={"ignore_eos": True})
                codes.append(200)
            except RateLimitError as error:
                assert error.response.headers["retry-after"]
                codes.append(error.status_code)

        threads = [threading.Thread(target=ask) for _ in range(12)]
        threads[0].start()
        until = time.monotonic() + 30
        while not service.running and time.monotonic() < until:  # so that two more can wait
            time.sleep(0.001)
        for thread in threads[1:]:
            thread.start()
        for thread in threads:
            thread.join()
        assert set(codes) == {200, 429} and codes.count(200) >= 3
        assert said(server, max_tokens=2) is not None and idle(service)


def test_t15_an_error_in_a_step_ends_each_request_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from gearshift.engine.decoder import Decoder

    run, steps = Decoder.run, []

    def fails_once(self: Decoder, plan: Any) -> Any:
        steps.append(plan)
        if len(steps) == 6:
            raise RuntimeError("no memory for /home/weights")
        return run(self, plan)

    with door() as (server, _, _):
        monkeypatch.setattr(Decoder, "run", fails_once)
        body = json.dumps({"model": "policy", "messages": ASK, "max_tokens": 30, "stream": True,
                           "n": 3, "ignore_eos": True}).encode()  # fmt: skip
        path = "POST /v1/chat/completions HTTP/1.1"
        status, _, answer = send(server, request(body, line=path))
        assert status == 200 and answer.count(b'"error"') == 1 and b"/home" not in answer
        assert b"[DONE]" not in answer
        assert len(said(server, max_tokens=3)) >= 0  # the next request works


def test_t24_t25_no_secret_and_no_path_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CANARY", "canary-value-91b2")
    seen = b""
    with door(key=KEY) as (server, _, _):
        wrong = ({}, {"model": "../../etc/passwd"}, {"model": "policy", "stop": ["x"] * 99})
        bodies = [b"{", *(json.dumps({**body, "messages": ASK}).encode() for body in wrong)]
        for headers in ((f"Authorization: Bearer {KEY}",), (f"X-Api-Key: {KEY}0",), ()):
            for line in ("GET /v1/models/..%2f..%2fetc HTTP/1.1", "GET /metrics HTTP/1.1",
                         "GET /v1/models/%2e%2e HTTP/1.1", "GET /openapi.json HTTP/1.1",
                         "GET /v1/models HTTP/1.1", "GET /tokenizer_info HTTP/1.1"):  # fmt: skip
                status, head, body = send(server, request(b"", *headers, line=line))
                assert status in (200, 401, 404)
                seen += head + body
            for path in ("/v1/chat/completions", "/v1/completions", "/tokenize"):
                for sent in bodies:
                    line = f"POST {path} HTTP/1.1"
                    status, head, body = send(server, request(sent, *headers, line=line))
                    assert status in (200, 400, 401, 404)
                    seen += head + body
    for canary in (KEY, "canary-value-91b2", "Traceback", os.getcwd(), "site-packages", 'File "'):
        assert canary.encode() not in seen


def test_the_engine_is_free_after_a_client_hangs_up(
    opened: tuple[Server, Engine, EngineService],
) -> None:
    server, _, service = opened
    body = json.dumps({"model": "policy", "messages": ASK, "n": 8, "ignore_eos": True}).encode()
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(request(body, line="POST /v1/chat/completions HTTP/1.1"))
        for _ in range(500):
            if service.running or service.waiting:
                break
            time.sleep(0.01)
    assert idle(service)
