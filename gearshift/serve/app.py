"""The HTTP app: every part's routes inside one guard, one form of errors, one way to start and end.

    app = make_app([*openai_routes(policies), *page_routes(["chat"])], ServerSettings(port=8000))
    run_app(app)

A part offers a list of starlette routes, and raises `ApiError` for what it refuses. No part checks
keys or hosts itself.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import NoReturn
from urllib.parse import quote

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Scope

from gearshift.runtime.terminal import echo
from gearshift.serve.api_error import ApiError
from gearshift.serve.body import json_object
from gearshift.serve.exchange import ExchangeMiddleware, Observer
from gearshift.serve.guard import EXCHANGE, key_given, page_cookie, person_key
from gearshift.serve.listen import Server
from gearshift.serve.settings import ServerSettings, ServerState

__all__ = ["Server", "ServerSettings", "ServerState", "make_app", "run_app"]


def make_app(
    routes: Sequence[BaseRoute], settings: ServerSettings, observe: Observer | None = None
) -> Starlette:
    """The app of these routes. `observe` gets each answered request. `app.state.server` is the
    `ServerState`: a caller that still loads models sets `loading` in it.
    """
    own = [
        Route("/health", _health),
        Route(EXCHANGE, _exchange_key, methods=["POST"]),
        Route("/", _root),
    ]
    state, exchanges = ServerState(), list[ExchangeMiddleware]()

    def exchange(app: ASGIApp) -> ASGIApp:
        exchanges.append(ExchangeMiddleware(app, settings, state, observe or _ignore))
        return exchanges[-1]

    app = Starlette(
        routes=[*routes, *own],
        middleware=[Middleware(exchange)],
        exception_handlers={HTTPException: _reraise},
    )
    app.router.redirect_slashes = False
    app.state.settings, app.state.server, app.state.exchange = settings, state, exchanges
    return app


def run_app(app: Starlette, path: str = "", load: Callable[[], None] | None = None) -> NoReturn:
    """Print the address, and that of each person who labels; serve until a signal, and exit with
    the signal's code. While `load` loads the models, requests get status 503. Raises `ConfigError`
    if nothing can listen there.
    """
    server = Server(app)
    if load:
        server.state.loading = True
        server.start()
        load()
        server.state.loading = False
    echo(f"{server.url}{path}")
    for name in server.settings.people:
        key = person_key(str(server.settings.key), name)
        echo(f"{name}: {server.url}{path}?who={quote(name)}#key={key}")
    number = server.run()
    echo("gearshift: stopped.", file=sys.stderr)
    sys.exit(128 + number)


async def _health(request: Request) -> Response:
    state: ServerState = request.app.state.server
    if state.draining or state.loading:
        word = "draining" if state.draining else "loading"
        return JSONResponse({"status": word}, 503, headers={"Retry-After": "5"})
    return JSONResponse({"status": "ok"})


async def _root(_: Request) -> Response:
    """What programs that look for a server get; a page's route for the same path comes before."""
    return PlainTextResponse("gearshift\n")


async def _exchange_key(request: Request) -> Response:
    """Give a cookie to a page that knows the key."""
    settings: ServerSettings = request.app.state.settings
    given = (await json_object(request)).get("key")
    if not settings.key:
        return Response(status_code=204)
    key = key_given(given, settings) if isinstance(given, str) else None
    if key is None:
        raise ApiError(401, "invalid_api_key", "the key is wrong")
    return Response(status_code=204, headers={"Set-Cookie": page_cookie(request.scope, key)})


async def _reraise(_: Request, error: Exception) -> Response:
    raise error


def _ignore(_: Scope, __: int, ___: float) -> None:
    pass
