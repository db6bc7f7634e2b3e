"""`/metrics`: the server's figures in Prometheus' text form. It knows no model but its name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import Scope

from gearshift.serve.exchange import LEFT
from gearshift.serve.policies import Policy

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
_CONTENT = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """What is counted."""

    def __init__(self) -> None:
        self._all, self._now = CollectorRegistry(), CollectorRegistry()
        self._gauges: dict[str, Gauge] = {}
        own: dict[str, Any] = {"registry": self._all}
        self._requests = Counter(
            "gearshift_requests_total", "Answered requests", ["path", "model", "status"], **own
        )
        self._tokens = Counter("gearshift_tokens_total", "Tokens", ["kind"], **own)
        self._aborts = Counter("gearshift_aborts_total", "Requests cut short", ["why"], **own)
        self._ignored = Counter("gearshift_ignored_fields_total", "Unknown fields", **own)
        self._first = Histogram(
            "gearshift_ttft_seconds", "Time to the first token", buckets=_SECONDS, **own
        )
        self._token = Histogram(
            "gearshift_token_seconds", "Time between tokens of a stream", buckets=_SECONDS, **own
        )
        self._whole = Histogram(
            "gearshift_e2e_seconds", "Time of a whole request", buckets=_SECONDS, **own
        )

    def observe(self, scope: Scope, status: int, seconds: float) -> None:
        """Count an answered request. Paths that no route has count as one."""
        route = scope.get("route")
        path = getattr(route, "path", "other")
        model = scope.get("state", {}).get("model", "")
        self._requests.labels(path, model, str(status)).inc()
        if status == LEFT or (model and status >= 500):
            self._aborts.labels("client" if status == LEFT else "error").inc()
        if model:
            self._whole.observe(seconds)

    def tokens(self, kind: str, count: int) -> None:
        """Count tokens: `prompt`, `cached` or `generated`."""
        self._tokens.labels(kind).inc(count)

    def ignored(self, count: int) -> None:
        """Count fields of a request that no code reads."""
        self._ignored.inc(count)

    def token_seconds(self, seconds: float, first: bool) -> None:
        """Count the time that a stream's token took."""
        (self._first if first else self._token).observe(seconds)

    def serve(self, policy: Policy) -> None:
        """Add the figures of a policy's engine."""
        service, model = policy.service, policy.name
        for state in ("running", "waiting"):
            value = partial(getattr, service, state)
            self.gauge("gearshift_requests", "Requests now", value, model=model, state=state)
        version = partial(getattr, service, "weights_version")
        self.gauge("gearshift_weights_version", "The version of the weights", version, model=model)
        text = "1 while the engine generates, 0 while it trains"
        self.gauge("gearshift_gear", text, lambda: service.gear == "generation", model=model)

    def gauge(self, name: str, text: str, value: Callable[[], float], **labels: str) -> None:
        """Add a figure that is read when it is asked for."""
        if name not in self._gauges:
            self._gauges[name] = Gauge(name, text, sorted(labels), registry=self._now)
        known = self._gauges[name]
        (known.labels(**labels) if labels else known).set_function(value)

    def routes(self) -> list[BaseRoute]:
        """The route `/metrics`."""

        async def metrics(_: Request) -> Response:
            # One registry takes no gauge `gearshift_requests` beside `gearshift_requests_total`.
            data = generate_latest(self._all) + generate_latest(self._now)
            return Response(data, headers={"Content-Type": _CONTENT})

        return [Route("/metrics", metrics)]
