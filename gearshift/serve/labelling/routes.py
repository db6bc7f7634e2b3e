"""The routes of the labelling page: next items, labels, undo, progress, the owner's view, exports.

The store, the prompts and the sampler come from the caller; keys and hosts are the guard's, except
the owner's own key.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import anyio.to_thread
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Route

from gearshift.data.formats import PromptExample
from gearshift.data.labels import FORMATS, Format, Item, label_rows, rows_text
from gearshift.rewards.http_client import is_loopback
from gearshift.serve.api_error import ApiError
from gearshift.serve.body import json_object
from gearshift.serve.guard import same_key
from gearshift.serve.labelling.deal import Dealer
from gearshift.serve.labelling.events import (
    read_choice,
    read_event,
    read_exchange,
    read_name,
    shown,
)
from gearshift.serve.labelling.report import progress, report
from gearshift.serve.labelling.sampling import Feeder, Sampler
from gearshift.serve.labelling.store import LabelStore

T = TypeVar("T")
_MOST = 50
"""How many items a page may hold at once."""


@dataclass(frozen=True)
class LabelSettings:
    """How a labelling is done."""

    title: str = ""
    """What is labelled, as the page shows it."""
    guidelines: str = ""
    """The text that people read before they begin."""
    tags: tuple[str, ...] = ()
    """Reasons that people can choose."""
    criteria: tuple[str, ...] = ()
    """Single answers are rated from 1 to 5 by each of these; without any they get a thumb."""
    seed: int = 0
    """The seed of the sides, and of the items that two people get."""
    overlap: float = 0.0
    """The share of items that two people label."""
    owner_key: str | None = field(default=None, repr=False)
    """The owner's own key; without one, calls from this machine are the owner's."""


def label_routes(
    store: LabelStore,
    sampler: Sampler | None,
    settings: LabelSettings,
    prompts: Iterable[PromptExample] = (),
) -> list[BaseRoute]:
    """The routes under `/api/labels`. `sampler` answers the prompts; without one, people are asked
    what the store has.
    """
    desk = _Desk(store, sampler, settings, prompts)
    handlers: list[tuple[str, str, Any]] = [
        ("POST", "next", desk.next),
        ("POST", "events", desk.event),
        ("POST", "exchange", desk.exchange),
        ("POST", "leave", desk.leave),
        ("POST", "final", desk.final),
        ("GET", "setup", desk.setup),
        ("GET", "progress", desk.progress),
        ("GET", "owner", desk.owner),
        ("GET", "export", desk.export),
    ]
    return [Route(f"/api/labels/{name}", do, methods=[method]) for method, name, do in handlers]


class _Desk:
    """Handles the requests. One lock keeps store, dealer and figures of one moment together."""

    def __init__(
        self,
        store: LabelStore,
        sampler: Sampler | None,
        settings: LabelSettings,
        prompts: Iterable[PromptExample],
    ) -> None:
        self._store, self._settings = store, settings
        self._labels = store.labels
        self._dealer = Dealer(store.labels, settings.seed, settings.overlap)
        asked = {str((item.prompt, item.options)) for item in store.labels.items.values()}
        new = (p for p in prompts if str((p.prompt, p.options)) not in asked)
        self._feeder = Feeder(new, sampler, self._add)
        self._lock = threading.Lock()

    async def next(self, request: Request) -> Response:
        """Items for a person's browser tab."""
        body = await json_object(request)
        who, tab = _name(request, body.get("who")), str(body.get("tab", ""))[:64]
        count = body.get("count", 1)
        if type(count) is not int or not 1 <= count <= _MOST:
            raise ApiError(400, "invalid_value", f"`count` must be 1 to {_MOST}", "count")

        def deal() -> dict[str, Any]:
            items = [self._shown(item, who) for item in self._dealer.deal(who, tab, count)]
            held = not items and self._dealer.held_by_others(who)
            state = "more" if items else "held" if held else "done"
            return {"items": items, "left": self._dealer.left(who), "state": state}

        found = await self._locked(deal)
        self._feeder.wake(lambda: self._locked(self._dealer.waiting))
        return _json({**found, "state": "more"} if self._feeder.more else found)

    async def event(self, request: Request) -> Response:
        """Store a label or an undo. The answer comes once it is on the disk."""
        body = await json_object(request)
        _name(request, body.get("who"))
        tab = str(body.get("tab", ""))[:64]

        def store() -> dict[str, Any]:
            known = self._labels.events.get(str(body.get("id")))
            event = known or read_event(body, self._labels, self._settings.criteria)
            if known and known["kind"] == "item":
                raise ApiError(400, "invalid_value", "`id` is the name of an item", "id")
            stored = self._store.add(event)
            who, item = event["who"], event["item"]
            if event["kind"] != "undo":
                self._dealer.answered(who, item)
            elif stored and who not in self._labels.of(item):
                self._dealer.ask_again(who, tab, item)
            again = self._shown(self._labels.items[item], who) if event["kind"] == "undo" else None
            return {"id": event["id"], "stored": stored, "item": again}

        return _json(await self._locked(store))

    async def exchange(self, request: Request) -> Response:
        """Store two answers of a chat, and which of them the person finds better."""
        body = await json_object(request)
        _name(request, body.get("who"))
        item, left = read_exchange(body)

        def store() -> bool:
            self._store.add_item(item)
            sides = {"left": left, "right": 1 - left, "order_seed": None}
            event = {**read_choice(body, item), "shown": sides}
            self._dealer.answered(event["who"], item.id)
            return self._store.add(event)

        return _json({"id": body["id"], "stored": await self._locked(store)})

    async def leave(self, request: Request) -> Response:
        """Free the items of a person who goes."""
        who = _name(request, (await json_object(request)).get("who"))
        await self._locked(partial(self._dealer.leave, who))
        return Response(status_code=204)

    async def final(self, request: Request) -> Response:
        """Store the owner's decision on an item; its answers count in the order of the item."""
        self._check_owner(request)
        body = await json_object(request)

        def store() -> bool:
            event = read_event(body, self._labels, self._settings.criteria, final=True)
            return self._store.add(event)

        return _json({"id": body.get("id"), "stored": await self._locked(store)})

    async def setup(self, request: Request) -> Response:
        """What the page shows besides the items."""
        s = self._settings
        found = {"title": s.title, "guidelines": s.guidelines}
        return _json({**found, "tags": list(s.tags), "criteria": list(s.criteria)})

    async def progress(self, request: Request) -> Response:
        """A person's own progress."""
        who = _name(request, request.query_params.get("who"))

        def found() -> dict[str, Any]:
            return {**progress(self._labels, who), "left": self._dealer.left(who)}

        return _json(await self._locked(found))

    async def owner(self, request: Request) -> Response:
        """The owner's view."""
        self._check_owner(request)
        found = await self._locked(lambda: report(self._labels))
        feeder = self._feeder
        sampling = {"failed": feeder.failed, "same": feeder.same, "reason": feeder.reason}
        return _json({**found, "sampling": {**sampling, "more": feeder.more}})

    async def export(self, request: Request) -> Response:
        """The labels as rows of a file."""
        self._check_owner(request)
        asked = request.query_params
        name: Format | None = next((f for f in FORMATS if f == asked.get("format")), None)
        if name is None:
            words = f"`format` must be one of {', '.join(FORMATS)}"
            raise ApiError(400, "invalid_value", words, "format")
        least = _share(asked.get("min_agree", "0"))
        by = [who for who in asked.get("by", "").split(",") if who]
        ties = asked.get("ties") == "1"
        how = partial(label_rows, self._labels, name, least, by, ties)
        text = await self._locked(lambda: rows_text(how()))
        headers = {"Content-Disposition": f'attachment; filename="{name}.jsonl"'}
        return PlainTextResponse(text.encode(errors="backslashreplace"), headers=headers)

    def _shown(self, item: Item, who: str) -> dict[str, Any]:
        """An item as one person sees it: without where its answers come from, and what is known."""
        sides = shown(item, who, self._settings.seed)
        order = [sides[side] for side in ("left", "right") if side in sides]
        found = {"item": item.id, "prompt": item.prompt, "tools": item.options.get("tools")}
        return {**found, "answers": [item.answers[i] for i in order], "shown": sides}

    def _check_owner(self, request: Request) -> None:
        key = self._settings.owner_key
        given = request.headers.get("x-gearshift-owner", "")
        if key and same_key(given, key):
            return
        # A proxy on this machine calls from here for people who are anywhere.
        proxied = {"forwarded", "x-forwarded-for", "x-real-ip", "via"} & set(request.headers)
        if not key and not proxied and request.client and is_loopback(request.client.host):
            return
        words = "only the owner sees this; give the key in GEARSHIFT_OWNER_KEY"
        raise ApiError(403, "forbidden_owner", words)

    async def _add(self, item: Item) -> bool:
        return await self._locked(partial(self._store.add_item, item))

    async def _locked(self, do: Callable[[], T]) -> T:
        def alone() -> T:
            with self._lock:
                return do()

        return await anyio.to_thread.run_sync(alone)


def _json(value: dict[str, Any]) -> Response:
    """The value as JSON in ASCII: texts may have half a surrogate pair, which UTF-8 cannot hold."""
    return Response(json.dumps(value), media_type="application/json")


def _name(request: Request, given: Any) -> str:
    """The name of the person who labels. Who comes with a key of their own has the key's name."""
    name, person = read_name(given), request.scope.get("person")
    if person and name != person:
        raise ApiError(403, "forbidden_person", "this key belongs to another name", "who")
    return name


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0 <= share <= 1:
        raise ApiError(400, "invalid_value", "`min_agree` must be 0 to 1", "min_agree")
    return share
