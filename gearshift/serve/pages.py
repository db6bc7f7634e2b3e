"""The pages of the server, and their files. A browser gets only what was read at the start, so that
no path of a request reaches the disk. No part of a page comes from another server.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
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


_PAGES = {
    "chat": ("chat", ["/"]),
    "labels": ("label", ["/labels"]),
    "runs": ("run", ["/runs", "/runs/{run}"]),
}
"""Each page's script and style, and its addresses."""


def page_routes(
    names: Sequence[str],
    about: Callable[[], Mapping[str, Any]] = dict,
    further: Mapping[str, Path] | None = None,
) -> list[BaseRoute]:
    """The routes of these pages (`chat`, `labels`, `runs`), of their files under `/web/`, and of
    `/api/served`, which tells a page what this server has: the addresses of `pages`, and what
    `about` gives. `/` shows the first page. `further`: folders with files of a task's own page, by
    their names under `/web/`.
    """
    files = _read(WEB, "/web/")
    for name, folder in (further or {}).items():
        files |= _read(folder, f"/web/{name}/")
    frame = (WEB / "page.html").read_text(encoding="utf-8")
    pages = {name: _PAGES[name] for name in names}
    for script, paths in [(pages[names[0]][0], ["/"]), *pages.values()]:
        content = frame.replace("PAGE", script).encode()
        files |= dict.fromkeys(paths, (content, "text/html"))
    addresses = {name: paths[0] for name, (_, paths) in pages.items()}

    async def served(_: Request) -> Response:
        found = {"pages": addresses, **about()}
        return JSONResponse(found, headers={"Cache-Control": "no-store"})

    own = [Route(path, _File(*file).answer) for path, file in files.items()]
    return [Route("/api/served", served), *own]


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
