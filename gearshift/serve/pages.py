"""The pages of the server, and their files. A browser gets only what was read at the start, so that
no path of a request reaches the disk. No part of a page comes from another server.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

WEB = Path(__file__).parent / "web"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; media-src 'self' blob:; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'"
)
"""The content security policy: nothing from elsewhere, no script or style in a page, and no text
that becomes markup."""
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
_TYPES = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}


def page_routes(
    pages: Mapping[str, str], further: Mapping[str, Path] | None = None
) -> list[BaseRoute]:
    """The routes of pages by their paths, such as `{"/": "chat", "/runs/{run}": "run"}`, and of the
    files under `/web/`. `further`: folders with files of a task's own page, by their names under
    `/web/`.
    """
    files = _read(WEB, "/web/")
    for name, folder in (further or {}).items():
        files |= _read(folder, f"/web/{name}/")
    frame = (WEB / "page.html").read_text(encoding="utf-8")
    routes: list[BaseRoute] = []
    for path, page in pages.items():
        text = frame.replace("PAGE", page)
        routes.append(Route(path, _File(text.encode(), "text/html").answer))
    return routes + [Route(path, _File(*file).answer) for path, file in files.items()]


def served_route(about: Callable[[], Mapping[str, Any]]) -> BaseRoute:
    """The route that tells a page what this server has. `about` gives `pages` (addresses by name:
    `chat`, `labels`, `runs`), and for the chat page `models` (each with `name` and `system`) and
    `labels` (whether it may send labels).
    """

    async def answer(_: Request) -> Response:
        return JSONResponse(about(), headers={"Cache-Control": "no-store"})

    return Route("/api/served", answer)


def _read(folder: Path, at: str) -> dict[str, tuple[bytes, str]]:
    """The files of a folder that a page may load, by their addresses, with their types."""
    return {
        at + path.relative_to(folder).as_posix(): (path.read_bytes(), _TYPES[path.suffix])
        for path in sorted(folder.rglob("*"))
        if path.suffix in _TYPES and path.is_file() and not path.is_symlink()
    }


class _File:
    """An answer with these bytes, or 304 to a browser that has them."""

    def __init__(self, content: bytes, kind: str) -> None:
        self._content, self._kind = content, kind
        self._tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'

    async def answer(self, request: Request) -> Response:
        headers = {**HEADERS, "ETag": self._tag}
        if request.headers.get("if-none-match") == self._tag:
            return Response(status_code=304, headers=headers)
        return Response(self._content, media_type=f"{self._kind}; charset=utf-8", headers=headers)
