"""`POST /score`: a reward model's scores, as `HttpReward` asks for them.

One model answers one request at a time. A wrong request gets a 4xx status and one line of JSON. If
some completions have no score, the answer has the other scores and the places of the missing ones.
This file must not import trainers or the pipeline.
"""

from __future__ import annotations

import asyncio
import math
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import anyio.to_thread
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from gearshift.errors import GearshiftError
from gearshift.rewards.functions import RewardFunction
from gearshift.runtime.terminal import echo, one_line
from gearshift.runtime.user_functions import describe_error
from gearshift.serve.api_error import ApiError
from gearshift.serve.body import json_object
from gearshift.serve.score_request import samples_of
from gearshift.serve.settings import ServerSettings

T = TypeVar("T")
_AGAIN = {"Retry-After": "2"}


def score_routes(reward: RewardFunction) -> list[BaseRoute]:
    """The route `/score`: `{"prompts", "completions"}` gets `{"rewards"}`."""
    one_at_a_time = asyncio.Lock()

    async def score(request: Request) -> Response:
        _check_length(request)
        samples = samples_of(await json_object(request))
        settings: ServerSettings = request.app.state.settings
        try:
            await asyncio.wait_for(one_at_a_time.acquire(), settings.patience)
        except TimeoutError:
            words = "the model is busy with other requests; send it again"
            raise ApiError(503, "server_busy", words, headers=_AGAIN) from None
        try:
            rewards = await _in_thread(partial(_score, reward, **samples))
        finally:
            one_at_a_time.release()
        return _answer(rewards)

    return [Route("/score", score, methods=["POST"])]


async def _in_thread(work: Callable[[], T]) -> T:
    """The result of work in a thread. A client that leaves does not end it: the model stays taken
    until it ends.
    """
    task = asyncio.ensure_future(anyio.to_thread.run_sync(work))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise


def _check_length(request: Request) -> None:
    if "origin" in request.headers:
        raise ApiError(403, "forbidden_origin", "pages in a browser are not answered")
    if "content-length" not in request.headers or "transfer-encoding" in request.headers:
        words = "a Content-Length must be given, and no Transfer-Encoding"
        raise ApiError(411, "length_required", words)


def _score(reward: RewardFunction, **samples: Any) -> list[float | None]:
    try:
        rewards = reward(**samples)
        return [None if r is None else float(r) for r in rewards]  # type: ignore[union-attr]
    except GearshiftError as error:  # for example, the template refuses a conversation
        raise ApiError(400, "invalid_value", one_line(str(error))) from error
    except Exception as error:  # the client made no mistake, so it may send the request again
        echo(f"gearshift: a request failed: {describe_error(error)}", file=sys.stderr)
        words = f"the model failed ({type(error).__name__}); see the server's log"
        raise ApiError(503, "server_error", words, headers=_AGAIN) from error


def _answer(rewards: list[float | None]) -> Response:
    lost = [i for i, r in enumerate(rewards) if r is not None and not math.isfinite(r)]
    if not lost:
        return JSONResponse({"rewards": rewards})
    known = [None if i in lost else r for i, r in enumerate(rewards)]
    words = f"completions[{lost[0]}] is too long for the model, or its score is not finite"
    return JSONResponse({"error": words, "rewards": known, "lost": lost}, 422)
