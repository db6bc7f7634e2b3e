"""The pages of a server with policies, and what they learn of its models."""

from __future__ import annotations

from typing import Any

from starlette.routing import BaseRoute

from gearshift.serve.pages import page_routes
from gearshift.serve.policies import Policies
from gearshift.serve.task_panel import Panel, panel_routes


def policy_page_routes(
    policies: Policies, runs: bool, labels: bool = False, panel: Panel | None = None
) -> list[BaseRoute]:
    """The chat page, with `labels` and `runs` these pages too, and the panel of a task."""

    def about() -> dict[str, Any]:
        models = [{"name": policy.name, "system": policy.system} for policy in policies]
        return {"models": models, "labels": labels, "task": panel.about() if panel else None}

    names = ["chat", *(["labels"] if labels else []), *(["runs"] if runs else [])]
    pages = page_routes(names, about, {"task": panel.folder} if panel else {})
    return [*pages, *(panel_routes(panel) if panel else [])]
