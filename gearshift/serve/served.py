"""What the pages of a server with policies ask first: its models, and which pages it has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.routing import BaseRoute

from gearshift.serve.pages import page_routes, served_route
from gearshift.serve.policies import Policies
from gearshift.serve.task_panel import Panel, panel_routes

_PAGES = {
    "chat": {"/": "chat"},
    "labels": {"/labels": "label"},
    "runs": {"/runs": "run", "/runs/{run}": "run"},
}


def page_and_model_routes(
    policies: Policies, runs: bool, labels: bool = False, panel: Panel | None = None
) -> list[BaseRoute]:
    """The chat page, with `labels` and `runs` these pages too, the panel of a task, and
    `/api/served`.
    """
    names = ["chat", *(["labels"] if labels else []), *(["runs"] if runs else [])]
    pages: Mapping[str, str] = {name: next(iter(_PAGES[name])) for name in names}

    def about() -> dict[str, Any]:
        models = [{"name": policy.name, "system": policy.system} for policy in policies]
        task = panel.about() if panel else None
        return {"pages": pages, "models": models, "labels": labels, "task": task}

    paths = {path: page for name in names for path, page in _PAGES[name].items()}
    further = {"task": panel.folder} if panel else {}
    own = panel_routes(panel) if panel else []
    return [served_route(about), *own, *page_routes(paths, further)]
