"""The endpoints about tokens, in vLLM's form: `/tokenize`, `/detokenize`, `/tokenizer_info`."""

from __future__ import annotations

from functools import partial
from typing import Any

import anyio.to_thread
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from gearshift.data.text import decode, replace_surrogates
from gearshift.serve.api_error import ApiError
from gearshift.serve.body import json_object
from gearshift.serve.policies import Policies, Policy
from gearshift.serve.wire import DetokenizeRequest, TokenizeRequest, messages_of, parse


def token_routes(policies: Policies) -> list[BaseRoute]:
    """The three endpoints."""

    async def tokenize(http: Request) -> Response:
        request = parse(TokenizeRequest, await json_object(http))
        policy = policies.get(request.model)
        ids = await anyio.to_thread.run_sync(partial(_tokens, request, policy))
        found: dict[str, Any] = {"count": len(ids), "max_model_len": policy.service.max_length}
        found |= {"tokens": ids, "token_strs": None}
        if request.return_token_strs:
            found["token_strs"] = [policy.names.text(token) for token in ids]
        return JSONResponse(found)

    async def detokenize(http: Request) -> Response:
        request = parse(DetokenizeRequest, await json_object(http))
        policy = policies.get(request.model)
        text = await anyio.to_thread.run_sync(partial(decode, policy.tokenizer, request.tokens))
        return JSONResponse({"prompt": text})

    async def info(http: Request) -> Response:
        return JSONResponse(_info(policies.get(http.query_params.get("model", "default"))))

    return [
        Route("/tokenize", tokenize, methods=["POST"]),
        Route("/detokenize", detokenize, methods=["POST"]),
        Route("/tokenizer_info", info),
    ]


def _tokens(request: TokenizeRequest, policy: Policy) -> list[int]:
    if (request.prompt is None) == (request.messages is None):
        raise ApiError(400, "invalid_value", "give either prompt or messages", "prompt")
    if request.messages is not None:
        return policy.prompt(messages_of(request.messages), request.chat_template_kwargs or {})
    text = replace_surrogates(request.prompt or "")
    ids: list[int] = policy.tokenizer.encode(text, add_special_tokens=request.add_special_tokens)
    return ids


def _info(policy: Policy) -> dict[str, Any]:
    """What a client needs to work without a tokenizer of its own; no path of this machine."""
    tokenizer = policy.tokenizer
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    found = {name: getattr(tokenizer, name, None) for name in names}
    template = tokenizer.chat_template
    return {
        **found,
        "tokenizer_class": type(tokenizer).__name__,
        "chat_template": template if isinstance(template, str) else None,
        "vocab_size": len(tokenizer),
        "model_max_length": policy.service.max_length,
        "add_bos_token": bool(getattr(tokenizer, "add_bos_token", False)),
    }
