"""The routes of the run page: metrics, episodes, held-out figures and recipes of the runs that were
named at the start. They only read, and they read files alone. It must not import torch.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import anyio
from anyio import to_thread
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from gearshift.runtime.curves import CURVES, columns, matching
from gearshift.serve.api_error import ApiError
from gearshift.serve.events import EventStream
from gearshift.serve.runs.episodes import Filter, brief, by_token, summary
from gearshift.serve.runs.files import (
    Record,
    RolloutFile,
    RunFolder,
    episodes,
    follows_line,
    parse_record,
    read_lines,
)
from gearshift.serve.runs.heldout import heldout, recipe_differences
from gearshift.serve.runs.marks import marks
from gearshift.serve.runs.tokens import Pieces

_POLL = 0.5
"""Seconds between two looks at a file that grows."""
_SEARCH = 0.7
"""Seconds that one request may search the episodes; the next request goes on."""
_MOST_ROWS = 2000
_Answer = Callable[[RunFolder, str, Request], Any]


def run_routes(folders: Mapping[str, Path]) -> list[BaseRoute]:
    """The routes under `/api/runs` for these runs by their names. No other name is answered."""
    runs = {name: RunFolder(path) for name, path in folders.items()}
    pieces = Pieces()

    def route(path: str, answer: _Answer) -> Route:
        async def handler(request: Request) -> Response:
            run = _run(runs, request)
            stage = request.query_params.get("stage") or (run.stages() or [""])[-1]
            value = await to_thread.run_sync(partial(answer, run, stage, request))
            return value if isinstance(value, Response) else _json(value)

        return Route(f"/api/runs/{{run}}/{path}", handler)

    async def listed(_: Request) -> Response:
        found = await to_thread.run_sync(lambda: [_about(name, runs[name]) for name in runs])
        return _json({"runs": found, "curves": CURVES})

    async def differences(request: Request) -> Response:
        names = request.query_params.getlist("run") or list(runs)
        chosen = {name: runs[name] for name in names if name in runs}
        return _json(await to_thread.run_sync(partial(recipe_differences, chosen)))

    async def live(request: Request) -> Response:
        run = _run(runs, request)
        stage = request.query_params.get("stage") or (run.stages() or [""])[-1]
        path = run.file(stage, "metrics.jsonl")
        if path is None:
            raise _missing("stage")
        given = request.headers.get("last-event-id") or request.query_params.get("from", "0")
        start = int(given) if given.isascii() and given.isdigit() and len(given) < 16 else 0
        return EventStream(_tail(path, start))

    return [
        Route("/api/runs", listed),
        Route("/api/runs-differences", differences),
        Route("/api/runs/{run}/live", live),
        route("metrics", _metrics),
        route("phases", _phases),
        route("steps", _steps),
        route("rollouts", _rollouts),
        route("episode", partial(_episode, pieces)),
        route("group", _group),
        route("export", _export),
        route("heldout", lambda run, _, request: heldout(run, _whole(request, "from", 0))),
    ]


def _run(runs: Mapping[str, RunFolder], request: Request) -> RunFolder:
    name = request.path_params["run"]
    if name not in runs:
        raise _missing("run")
    return runs[name]


def _missing(what: str) -> ApiError:
    return ApiError(404, "not_found", f"there is no such {what}", what)


def _json(value: Any) -> Response:
    """JSON in ASCII: a text may hold half a surrogate pair, which UTF-8 cannot."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return Response(text, media_type="application/json", headers={"Cache-Control": "no-store"})


def _about(name: str, run: RunFolder) -> Record:
    stages = [
        {
            "name": stage,
            "rollouts": run.rollouts(stage) is not None,
            "done": (run.path / stage / "done.json").is_file(),
        }
        for stage in run.stages()
    ]
    return {"name": name, "stages": stages}


def _metrics(run: RunFolder, stage: str, request: Request) -> Record:
    """The columns of the metrics; `keys` names those that are asked for, by default the first
    curves. `offset` is where the live events go on. `marks` are steps at which something happened.
    """
    path = run.file(stage, "metrics.jsonl")
    if path is None:
        raise _missing("stage")
    lines = list(read_lines(path))
    figures = columns(record for _, line in lines if (record := parse_record(line)))
    asked = request.query_params.getlist("keys")
    patterns = asked or [pattern for _, under in CURVES for pattern in under]
    kept = ["step", *matching(figures, patterns)]
    return {
        "offset": lines[-1][0] if lines else 0,
        "names": list(figures),
        "columns": {k: [_short(x) for x in figures[k]] for k in kept if k in figures},
        "marks": marks(figures, run.checkpoints(stage)),
    }


def _short(value: float | None) -> float | None:
    return float(f"{value:.7g}") if isinstance(value, float) else value


def _phases(run: RunFolder, stage: str, request: Request) -> Record:
    """When the phases of each step ran, of the newest steps. A run of an older version has seconds
    by phase; they are laid end to end.
    """
    path = run.file(stage, "metrics.jsonl")
    if path is None:
        raise _missing("stage")
    most = min(_whole(request, "limit", 200), _MOST_ROWS)
    records = [r for _, line in read_lines(path) if (r := parse_record(line))][-most:]
    memory = "memory/peak_gib/"
    return {
        "steps": [
            {
                "step": r.get("step"),
                "seconds": r.get("step_time"),
                "phases": _intervals(r),
                "memory": {k.removeprefix(memory): v for k, v in r.items() if k.startswith(memory)},
            }
            for r in records
        ]
    }


def _intervals(record: Record) -> list[Any]:
    if isinstance(record.get("phases"), list):
        return list(record["phases"])
    found, at = [], 0.0
    for name, value in record.items():
        if name.startswith("seconds/") and isinstance(value, int | float):
            found.append([name.removeprefix("seconds/"), at, at + value])
            at += value
    return found


def _rollout_file(run: RunFolder, stage: str) -> RolloutFile:
    file = run.rollouts(stage)
    if file is None:
        raise _missing("stage")
    return file


def _steps(run: RunFolder, stage: str, _: Request) -> Record:
    return {"steps": [step for _, _, step in _rollout_file(run, stage).lines()]}


def _rollouts(run: RunFolder, stage: str, request: Request) -> Record:
    """The rows of the episodes that a filter finds, in one step or, for as long as a request may
    take, in all of them: `next` is where the next request goes on.
    """
    file, wanted = _rollout_file(run, stage), Filter.of(request.query_params.get("filter", ""))
    lines = file.lines()
    first, last = _whole(request, "from", 0), len(lines)
    if "step" in request.query_params:
        step = _whole(request, "step", 0)
        first = next((i for i in reversed(range(last)) if lines[i][2] == step), last)
        last = min(first + 1, last)
    rows: list[Record] = []
    ends, at = time.monotonic() + _SEARCH, first
    for at in range(first, last):
        if len(rows) >= _MOST_ROWS or (at > first and time.monotonic() > ends):
            break
        rows += [brief(row) for _, row in _found(file, lines[at], wanted)]
    else:
        at = last
    more = at < last
    return {"rows": rows, "next": at if more else None, "share": at / len(lines) if lines else 1.0}


def _found(
    file: RolloutFile, line: tuple[int, int, int], wanted: Filter
) -> Iterator[tuple[Record, Record]]:
    """(the episode, its row) for each episode of a line that the filter finds."""
    text = file.raw(line)
    if not wanted.may_match(text):
        return
    for place, episode in enumerate(episodes(text)):
        row = summary(episode, place, line[2])
        if wanted(episode, row):
            yield episode, row


def _episode(pieces: Pieces, run: RunFolder, stage: str, request: Request) -> Record:
    """All that is known of an episode, with its figures and its text by token."""
    step, place = _whole(request, "step", 0), _whole(request, "episode", 0)
    found = _rollout_file(run, stage).step(step)
    if place >= len(found):
        raise _missing("episode")
    episode, tokens = found[place], by_token(found[place])
    known = {k: v for k, v in episode.items() if k not in tokens and k not in _LISTS}
    return {
        **summary(episode, place, step),
        "record": known,
        "tokens": tokens,
        "pieces": pieces.of(run, tokens["ids"]),
        "count": len(found),
    }


_LISTS = ("prompt_ids", "token_ids")


def _group(run: RunFolder, stage: str, request: Request) -> Record:
    """The episodes of a group of a step, with their conversations."""
    step, group = _whole(request, "step", 0), request.query_params.get("group", "")
    found = [
        {**summary(episode, place, step), "messages": episode.get("messages")}
        for place, episode in enumerate(_rollout_file(run, stage).step(step))
        if str(episode.get("group_id")) == group
    ]
    if not found:
        raise _missing("group")
    return {"step": step, "group": group, "episodes": found}


def _export(run: RunFolder, stage: str, request: Request) -> Response:
    """The records of the episodes that a filter finds, or of those that are named by
    `pick=step.place`, one JSON object a line.
    """
    file, wanted = _rollout_file(run, stage), Filter.of(request.query_params.get("filter", ""))
    picked = set(request.query_params.getlist("pick"))
    steps = {int(p.partition(".")[0]) for p in picked if p.partition(".")[0].isdecimal()}
    lines = [line for line in file.lines() if not picked or line[2] in steps]
    if "step" in request.query_params:
        lines = [line for line in lines if line[2] == _whole(request, "step", 0)]

    def text() -> Iterator[str]:
        for line in lines:
            for episode, row in _found(file, line, wanted):
                if not picked or f"{row['step']}.{row['episode']}" in picked:
                    yield json.dumps({"step": row["step"], **episode}) + "\n"

    name = "episodes.jsonl"
    headers = {"Content-Disposition": f'attachment; filename="{name}"', "Cache-Control": "no-store"}
    return StreamingResponse(text(), media_type="application/x-ndjson", headers=headers)


async def _tail(path: Path, offset: int) -> AsyncGenerator[str, None]:
    """Events for the lines that a file has after this offset, and for those that come:
    `{"record": ...}`; the first event is `{}`. It is `{"reset": true}` where a resumed run has cut
    the file, so that all must be read again.
    """
    reset = 'id: 0\ndata: {"reset": true}\n\n'
    if await to_thread.run_sync(follows_line, path, offset):
        yield f"id: {offset}\ndata: {{}}\n\n"
    else:
        yield reset
        offset = 0
    newest, state = b"", None
    while True:
        now = await to_thread.run_sync(_state, path)
        if now != state:
            state, start = now, offset - len(newest)
            lines = await to_thread.run_sync(lambda at: list(read_lines(path, at)), start)
            if (newest and (not lines or lines.pop(0)[1] != newest)) or now[0] < offset:
                yield reset
                offset, newest, lines, state = 0, b"", [], None
            for offset, newest in lines:
                record = {"record": parse_record(newest) or {}}
                yield f"id: {offset}\ndata: {json.dumps(record, separators=(',', ':'))}\n\n"
        await anyio.sleep(_POLL)


def _state(path: Path) -> tuple[int, int]:
    """The file's size, and when it was changed."""
    try:
        found = path.stat()
    except OSError:
        return 0, 0
    return found.st_size, found.st_mtime_ns


def _whole(request: Request, name: str, default: int) -> int:
    """A whole number of the query. Raises `ApiError`."""
    text = request.query_params.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        raise ApiError(400, "invalid_value", f"`{name}` must be a whole number", name)
    return int(text)


def names_of(folders: Sequence[Path]) -> dict[str, Path]:
    """A name for each run's folder: its last part, with the part before it where two are alike."""
    found: dict[str, Path] = {}
    for folder in folders:
        path = folder.resolve()
        name, number = path.name or "run", 2
        while name in found and found[name].resolve() != path:
            name, number = f"{path.name}-{number}", number + 1
        found[name] = path
    return found
