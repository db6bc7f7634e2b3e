"""Programs of others get what they expect: `make clients` installs them beside the project."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from gearshift.engine import Engine, EngineConfig
from gearshift.engine.service import EngineService
from gearshift.models.tiny import tiny_model, tiny_tokenizer
from gearshift.serve.app import Server
from gearshift.serve.metrics import Metrics
from gearshift.serve.openai import openai_routes
from gearshift.serve.policies import Policies, Policy
from tests.serve.raw import serving

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # no request to another server
pytestmark = pytest.mark.slow
ASK: list[Any] = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    engine = Engine(tiny_model(), tiny_tokenizer(), EngineConfig())
    with EngineService(engine) as service:
        policy = Policy("policy", service, engine.tokenizer, end_tokens=engine.end_tokens)
        metrics = Metrics()
        routes = [*openai_routes(Policies([policy]), metrics), *metrics.routes()]
        with serving(routes, metrics.observe) as server:
            yield server


@pytest.mark.parametrize("backend", ["huggingface", "remote"])
def test_t3_lm_eval_scores_as_its_own_model_does(
    server: Server, folder: Path, backend: str
) -> None:
    pytest.importorskip("lm_eval", reason="needs lm-eval: make clients")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    pairs = [("the cat sat", " on"), ("a b c d", " e f"), ("1 2 3", " 4 5 6"), ("wör", "ld")]
    asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    far = LocalCompletionsAPI(
        model="policy", base_url=f"{server.url}/v1/completions", tokenizer_backend=backend,
        tokenizer=str(folder) if backend == "huggingface" else None, batch_size=2, max_retries=1,
    )  # fmt: skip
    near = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=1)
    for (ours, greedy), (theirs, flag) in zip(
        far.loglikelihood(asked), near.loglikelihood(asked), strict=True
    ):
        assert ours == pytest.approx(theirs, abs=1e-3) and greedy == flag


def test_t3_lm_eval_generates_from_chats(server: Server) -> None:
    pytest.importorskip("lm_eval", reason="needs lm-eval: make clients")
    from lm_eval.api.instance import Instance
    from lm_eval.models.api_models import JsonChatStr
    from lm_eval.models.openai_completions import LocalChatCompletion

    far = LocalChatCompletion(model="policy", base_url=f"{server.url}/v1/chat/completions")
    asked = [
        Instance("generate_until", {}, (JsonChatStr(json.dumps(ASK)), {"until": ["zz"],
                 "max_gen_toks": 8, "do_sample": False}), i) for i in range(2)
    ]  # fmt: skip
    first, second = far.generate_until(asked)
    assert first == second and isinstance(first, str)


def test_t4_langchain(server: Server) -> None:
    langchain = pytest.importorskip("langchain_openai", reason="needs langchain-openai")
    model = langchain.ChatOpenAI(
        model="policy", base_url=f"{server.url}/v1", api_key="x", seed=3, max_tokens=12
    )
    whole = model.invoke("hi")
    assert "".join(chunk.content for chunk in model.stream("hi")) == whole.content
    assert whole.usage_metadata["total_tokens"] and whole.response_metadata["finish_reason"]


def test_t4_litellm(server: Server) -> None:
    litellm = pytest.importorskip("litellm", reason="needs litellm: make clients")
    asked: Any = {"model": "openai/policy", "messages": ASK, "api_base": f"{server.url}/v1"}
    asked |= {"api_key": "x", "seed": 3, "max_tokens": 12}
    whole = litellm.completion(**asked).choices[0].message.content
    pieces = [c.choices[0].delta.content or "" for c in litellm.completion(**asked, stream=True)]
    assert "".join(pieces) == whole
    with pytest.raises(litellm.BadRequestError):
        litellm.completion(**{**asked, "max_tokens": 10_000})


def test_t20_the_description_holds(server: Server) -> None:
    schemathesis = pytest.importorskip("schemathesis", reason="needs schemathesis: make clients")
    from schemathesis.specs.openapi import checks

    held = [
        schemathesis.checks.not_a_server_error,
        checks.status_code_conformance,
        checks.content_type_conformance,
        checks.response_schema_conformance,
    ]
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    quiet = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
    for found in schema.get_all_operations():
        operation = found.ok()

        @given(case=operation.as_strategy())
        @settings(max_examples=40, deadline=None, suppress_health_check=quiet, database=None)
        def holds(case: Any) -> None:
            case.call_and_validate(base_url=server.url, checks=held)

        holds()
