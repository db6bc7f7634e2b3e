"""OpenAI's wire, by its own library and as bytes, on an engine that answers by a rule."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from gearshift.serve.app import Server
from gearshift.types import Message
from tests.serve.fake import END, TOKENIZER, FakeService, fake_routes
from tests.serve.raw import error_of, request, send, serving

ASK: list[Any] = [{"role": "user", "content": "hi"}]
PROMPT = TOKENIZER.encode("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")


@pytest.fixture
def service() -> FakeService:
    return FakeService()


@pytest.fixture
def server(service: FakeService) -> Iterator[Server]:
    routes, metrics = fake_routes(service)
    with serving(routes, metrics.observe, max_waiting=4) as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def post(server: Server, path: str, **body: Any) -> tuple[int, bytes, Any]:
    data = json.dumps({"model": "policy", **body}).encode()
    status, head, answer = send(server, request(data, line=f"POST {path} HTTP/1.1"))
    return status, head, answer


def metrics_of(server: Server) -> str:
    get = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    return send(server, get)[2].decode()


def chat(server: Server, **body: Any) -> tuple[int, bytes, Any]:
    return post(server, "/v1/chat/completions", **{"messages": ASK, **body})


def test_t1_a_chat_by_openais_library(client: OpenAI, service: FakeService) -> None:
    answer = client.chat.completions.create(model="policy", messages=ASK, n=2, seed=-1)
    assert [c.message.content for c in answer.choices] == ["Hello, wörld!"] * 2
    assert [c.finish_reason for c in answer.choices] == ["stop", "stop"]
    assert answer.usage and answer.usage.prompt_tokens == len(PROMPT)
    assert answer.usage.completion_tokens == 2 * len(TOKENIZER.encode(service.words)) + 2
    assert answer.model == "policy" and answer.system_fingerprint == "v3"
    assert answer.id.startswith("chatcmpl-") and answer._request_id
    # A seed means request id 0; the samples of a group differ by their number.
    assert [(p, i, s) for p, _, i, s in service.asked] == [(PROMPT, 0, 0), (PROMPT, 0, 1)]
    assert service.asked[0][1].seed == 2**63 - 1 and service.asked[0][1].top_logprobs is None


def test_t1_a_stream_by_openais_library(client: OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="default", messages=ASK, n=2, stream=True, stream_options={"include_usage": True}
        )
    )
    for index in (0, 1):
        choices = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == index]
        assert choices[0].delta.role == "assistant" and choices[-1].finish_reason == "stop"
        assert "".join(c.delta.content or "" for c in choices) == "Hello, wörld!"
        assert sum(c.delta.content not in (None, "") for c in choices) > 5  # one chunk a step
    assert all(c.usage is None for c in chunks[:-1])
    assert not chunks[-1].choices and chunks[-1].usage and chunks[-1].usage.total_tokens
    with client.chat.completions.stream(model="policy", messages=ASK) as stream:
        assert stream.get_final_completion().choices[0].message.content == "Hello, wörld!"


def test_usage_and_metrics_have_the_tokens_that_the_cache_held(
    client: OpenAI, server: Server, service: FakeService
) -> None:
    service.cached = 5
    chats, texts = client.chat.completions, client.completions
    stream: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
    prompts = ["one", "two"]
    found = [
        chats.create(model="policy", messages=ASK, n=2).usage,
        list(chats.create(model="policy", messages=ASK, n=2, **stream))[-1].usage,
        texts.create(model="policy", prompt=prompts).usage,
        list(texts.create(model="policy", prompt=prompts, **stream))[-1].usage,
    ]
    assert found[0] == found[1] and found[2] == found[3]
    assert [u.prompt_tokens_details.cached_tokens for u in found] == [5, 5, 10, 10]
    assert 'gearshift_tokens_total{kind="cached"} 30.0' in metrics_of(server)


def test_t1_the_asynchronous_library(server: Server) -> None:
    async def both() -> tuple[str | None, str]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x") as client:
            whole = await client.chat.completions.create(model="policy", messages=ASK)
            stream = await client.chat.completions.create(model="policy", messages=ASK, stream=True)
            pieces = [c.choices[0].delta.content or "" async for c in stream if c.choices]
            return whole.choices[0].message.content, "".join(pieces)

    assert asyncio.run(both()) == ("Hello, wörld!", "Hello, wörld!")


def test_t1_logprobs(client: OpenAI) -> None:
    asked: Any = {"model": "policy", "messages": ASK, "logprobs": True, "top_logprobs": 2}
    [choice] = client.chat.completions.create(**asked).choices
    assert choice.logprobs and choice.logprobs.content
    tokens = choice.logprobs.content
    assert [t.token for t in tokens[:2]] == ["H", "e"] and tokens[0].logprob == -0.5
    assert tokens[8].token == "\\xc3" and tokens[8].bytes == [0xC3]  # half of an ö
    assert len(tokens[0].top_logprobs) == 2
    streamed = []
    for chunk in client.chat.completions.create(**asked, stream=True):
        if chunk.choices and (given := chunk.choices[0].logprobs):
            streamed += given.content or []
    assert [t.token for t in streamed] == [t.token for t in tokens]


def test_t1_stop_strings_are_cut(client: OpenAI, service: FakeService) -> None:
    for stop in ("wör", ["zzz", ", w"], "ö", "H"):
        stops = [stop] if isinstance(stop, str) else stop
        whole = client.chat.completions.create(model="policy", messages=ASK, stop=stop)
        cut = min(at for s in stops if (at := service.words.find(s)) >= 0)
        assert whole.choices[0].message.content == service.words[:cut]
        assert whole.choices[0].finish_reason == "stop"
        pieces = client.chat.completions.create(
            model="policy", messages=ASK, stop=stop, stream=True
        )
        said = [c.choices[0].delta.content or "" for c in pieces if c.choices]
        assert "".join(said) == service.words[:cut]


def test_t1_errors_are_the_librarys(client: OpenAI, service: FakeService) -> None:
    create: Any = client.chat.completions.create
    for body, code, param in (
        ({"temperature": 3}, "invalid_value", "temperature"),
        ({"temperature": "hot"}, "invalid_value", "temperature"),
        ({"n": 129}, "invalid_value", "n"),
        ({"messages": []}, "invalid_value", "messages"),
        ({"messages": [{"role": "robot", "content": ""}]}, "invalid_value", "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
         "invalid_value", "messages"),
        ({"logit_bias": {"a": 1}}, "invalid_value", "logit_bias"),
        ({"logit_bias": {"1": 101}}, "invalid_value", "logit_bias"),
        ({"logit_bias": {"9999": 1}, "stream": True}, "invalid_value", "logit_bias"),
        ({"extra_body": {"stop_token_ids": [9999]}}, "invalid_value", "stop_token_ids"),
        ({"top_logprobs": 21}, "invalid_value", "top_logprobs"),
        ({"max_tokens": 0}, "invalid_value", "max_tokens"),
        ({"max_tokens": 500}, "context_length_exceeded", "messages"),
        ({"messages": [{"role": "user", "content": "x" * 600}]},
         "context_length_exceeded", "messages"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]},
         "unsupported_parameter", "tools"),
        ({"response_format": {"type": "json_object"}}, "unsupported_parameter", "response_format"),
        ({"extra_body": {"functions": [{}]}}, "unsupported_parameter", "functions"),
        ({"modalities": ["audio"]}, "unsupported_parameter", "modalities"),
        ({"extra_body": {"min_tokens": 3}, "max_tokens": 2}, "invalid_value", "min_tokens"),
        ({"extra_body": {"min_tokens": 500}}, "invalid_value", "min_tokens"),
    ):  # fmt: skip
        with pytest.raises(openai.BadRequestError) as caught:
            create(**{"model": "policy", "messages": ASK, **body})
        assert (caught.value.code, caught.value.param) == (code, param), body
    with pytest.raises(openai.NotFoundError) as missing:
        create(model="gpt", messages=ASK)
    assert missing.value.code == "model_not_found"
    service.waiting = 4
    with pytest.raises(openai.RateLimitError) as busy:
        create(model="policy", messages=ASK)
    assert busy.value.code == "server_busy" and busy.value.response.headers["retry-after"] == "2"


def test_t1_an_error_in_a_stream(client: OpenAI, service: FakeService) -> None:
    service.fails_at = 3
    stream = client.chat.completions.create(model="policy", messages=ASK, stream=True)
    said = []
    with pytest.raises(openai.APIError, match="its log has the reason"):
        said += [c.choices[0].delta.content for c in stream]
    with pytest.raises(openai.InternalServerError):
        client.chat.completions.create(model="policy", messages=ASK)
    service.fails_at = None
    assert client.chat.completions.create(model="policy", messages=ASK).choices


def test_what_asks_for_nothing_is_accepted(server: Server) -> None:
    for body in (
        {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}},
        {"tools": [{"type": "function"}], "tool_choice": "none"},
        {"functions": [], "min_tokens": 0, "modalities": ["text"], "audio": None, "user": "me"},
        {"stop": None, "max_tokens": None, "temperature": None, "logprobs": False},
        {"stop": [], "stop_token_ids": []},
        {"metadata": {"a": "b"}, "store": True, "parallel_tool_calls": True},
        {"stream_options": None, "stream": False},
    ):  # fmt: skip
        assert chat(server, **body)[0] == 200, body


def test_the_fields_reach_the_engine(server: Server, service: FakeService) -> None:
    sent = {
        "temperature": 0, "top_p": 0.5, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.5,
        "presence_penalty": 1, "frequency_penalty": -1, "max_tokens": 9,
        "max_completion_tokens": 8, "stop_token_ids": [5], "logit_bias": {"65": -100},
        "ignore_eos": True, "min_tokens": 3,
    }  # fmt: skip
    assert chat(server, **sent)[0] == 200
    _, params, _, _ = service.asked[0]
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0, 0.5, 7, 0.1)
    assert (params.repetition_penalty, params.presence_penalty) == (1.5, 1)
    assert (params.min_new_tokens, params.max_new_tokens) == (3, 8)
    assert (params.frequency_penalty, params.max_new_tokens) == (-1, 8)
    assert params.stop_token_ids == (5,) and params.logit_bias == ((65, -100.0),)
    assert params.bad_words == ((END,),)
    assert chat(server)[0] == 200
    _, params, request_id, _ = service.asked[1]
    assert (params.temperature, params.top_p, params.seed) == (1, 1, None) and request_id > 0
    assert params.max_new_tokens == 512 - len(PROMPT)


def test_unknown_fields_are_counted_or_refused(service: FakeService) -> None:
    routes, _ = fake_routes(service)
    with serving(routes) as server:
        assert chat(server, fancy=1, fancier=None)[0] == 200
        get = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        assert b"gearshift_ignored_fields_total 2.0" in send(server, get)[2]
    with serving(routes, strict=True) as server:
        status, _, body = chat(server, fancy=1)
        assert status == 400 and error_of(body)["param"] == "fancy"
        assert chat(server, user="me")[0] == 200


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([{"role": "developer", "content": "Be."}, *ASK],
         "<|im_start|>system\nBe.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"),
        ([{"role": "user", "content": [{"type": "text", "text": t} for t in "ab"]}],
         "<|im_start|>user\na\nb<|im_end|>\n<|im_start|>assistant\n"),
        ([*ASK, {"role": "assistant", "content": "He"}],
         "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nHe"),
    ],
)  # fmt: skip
def test_a_conversation_as_the_model_reads_it(
    server: Server, service: FakeService, messages: list[Message], text: str
) -> None:
    assert chat(server, messages=messages)[0] == 200
    assert TOKENIZER.decode(service.asked[0][0]) == text


def test_a_system_message_in_the_middle_is_folded_where_the_template_needs_it(
    service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    strict = (
        "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
        "{{ raise_exception('system first') }}{% endif %}[{{ m.role }}:{{ m.content }}]"
        "{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    monkeypatch.setattr(TOKENIZER, "chat_template", strict)
    asked = [{"role": "system", "content": "A"}, *ASK, {"role": "system", "content": "B"}, *ASK]
    routes, _ = fake_routes(service, system="S")
    with serving(routes) as server:
        assert chat(server, messages=asked)[0] == 200
        assert TOKENIZER.decode(service.asked[0][0]) == "[system:A\n\nB][user:hi][user:hi]>"
        assert chat(server)[0] == 200
        assert TOKENIZER.decode(service.asked[1][0]) == "[system:S][user:hi]>"
        status, _, body = chat(server, chat_template_kwargs={"nothing": 1})
        assert status == 400 and error_of(body)["code"] == "template_refused"


def test_completions_of_texts_and_ids(client: OpenAI, service: FakeService) -> None:
    create: Any = client.completions.create
    for prompt, wanted in (
        ("ab", [TOKENIZER.encode("ab")]), (["a", "b"], [*map(TOKENIZER.encode, "ab")]),
        ([5, 6], [[5, 6]]), ([[5], [6, 7]], [[5], [6, 7]]),
    ):  # fmt: skip
        service.asked.clear()
        answer = create(model="policy", prompt=prompt, max_tokens=3)
        assert [asked[0] for asked in service.asked] == wanted
        assert [c.text for c in answer.choices] == ["Hel"] * len(wanted)
        assert [c.index for c in answer.choices] == [*range(len(wanted))]
        assert {c.finish_reason for c in answer.choices} == {"length"}
    stream = create(model="policy", prompt=["a", "b"], stream=True)
    said = {0: "", 1: ""}
    for chunk in stream:
        said[chunk.choices[0].index] += chunk.choices[0].text
    assert said == {0: "Hello, wörld!", 1: "Hello, wörld!"}
    for body in ({"prompt": []}, {"prompt": [[]]}, {"prompt": [999]}, {"prompt": [-1]},
                 {"prompt": "a", "best_of": 2}, {"prompt": "a", "suffix": "b"},
                 {"prompt": "a", "max_tokens": 0}, {"prompt": ["a"] * 65, "n": 16},
                 {"prompt": "a" * 600}):  # fmt: skip
        with pytest.raises(openai.BadRequestError) as caught:
            create(model="policy", **body)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")


def test_echo_gives_the_log_probs_of_the_prompt(client: OpenAI) -> None:
    create: Any = client.completions.create
    asked = {"model": "policy", "prompt": [[70, 71, 72]], "echo": True, "logprobs": 1}
    for most, tail in ((1, 1), (0, 0)):
        [choice] = create(**asked, max_tokens=most).choices
        found = choice.logprobs
        assert found.token_logprobs[:3] == [None, -71.0, -72.0]
        assert len(found.tokens) == len(found.top_logprobs) == len(found.text_offset) == 3 + tail
        assert found.top_logprobs[0] is None and max(found.top_logprobs[1].values()) == -71.0
        assert choice.text == TOKENIZER.decode([70, 71, 72]) + "H" * tail


def test_models_and_their_names(client: OpenAI, server: Server) -> None:
    assert [m.id for m in client.models.list()] == ["policy"]
    assert client.models.retrieve("policy").owned_by == "gearshift"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    get = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    found = json.loads(send(server, get)[2])
    assert found["models"] == found["data"] and found["data"][0]["max_model_len"] == 512


def test_tokens_there_and_back(server: Server) -> None:
    text = "wör <|im_end|>"
    found = json.loads(post(server, "/tokenize", prompt=text, return_token_strs=True)[2])
    assert found["tokens"] == TOKENIZER.encode(text) and found["count"] == len(found["tokens"])
    assert found["max_model_len"] == 512 and found["token_strs"][0] == "w"
    back = json.loads(post(server, "/detokenize", tokens=found["tokens"])[2])
    assert back == {"prompt": text}
    assert json.loads(post(server, "/tokenize", messages=ASK)[2])["tokens"] == PROMPT
    assert post(server, "/tokenize")[0] == 400
    get = b"GET /tokenizer_info HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    info = json.loads(send(server, get)[2])
    assert info["eos_token"] == "<|im_end|>" and "assistant" in info["chat_template"]


def test_the_exact_tokens_on_demand(server: Server) -> None:
    body = json.loads(chat(server, gearshift={"tokens": True})[2])
    record = body["choices"][0]["gearshift"]
    assert record["prompt_token_ids"] == PROMPT and record["token_ids"][-1] == END
    assert record["weights_version"] == 3 and len(record["drawn_logprobs"]) == len(
        record["token_ids"]
    )
    assert b'"gearshift":{"prompt_token_ids"' in chat(
        server, gearshift={"tokens": True}, stream=True
    )[2]  # fmt: skip


def test_a_client_that_leaves_a_stream_ends_it(server: Server, service: FakeService) -> None:
    service.hold = asyncio.Event()
    client = OpenAI(base_url=f"{server.url}/v1", api_key="x")
    stream = client.chat.completions.create(model="policy", messages=ASK, n=3, stream=True)
    next(iter(stream))
    stream.close()
    for _ in range(200):
        if service.left == 3:
            break
        asyncio.run(asyncio.sleep(0.02))
    assert (service.left, service.running) == (3, 0)


def test_the_description_names_each_endpoint(server: Server) -> None:
    get = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    found = json.loads(send(server, get)[2])
    fields = found["components"]["schemas"]["ChatRequest"]["properties"]
    assert fields["temperature"]["anyOf"][0]["maximum"] == 2 and "messages" in fields
    assert {"/v1/chat/completions", "/v1/completions", "/tokenize"} <= found["paths"].keys()


def test_metrics_count_what_was_answered(server: Server) -> None:
    chat(server)
    chat(server, stream=True)
    chat(server, temperature=9)
    text = metrics_of(server)
    path = 'path="/v1/chat/completions"'
    assert f'gearshift_requests_total{{model="policy",{path},status="200"}} 2.0' in text
    assert f'gearshift_requests_total{{model="",{path},status="400"}} 1.0' in text
    assert f'gearshift_tokens_total{{kind="prompt"}} {2.0 * len(PROMPT)}' in text
    assert "gearshift_ttft_seconds_count 1.0" in text
