"""The pages for users: their fenced blocks, and how a page's files and commands are run.

    python tests/pages.py PAGE...

runs pages with the `gearshift` and `python` that are first in PATH. It needs the standard library
alone.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted(DOCS.rglob("*.md")), *sorted((ROOT / "gearshift").rglob("README.md")),
]  # fmt: skip


Visit = Callable[[str, str], None]
"""What is done with a server: it gets the page's command, and the address."""


@dataclass(frozen=True)
class Block:
    language: str
    title: str
    text: str


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, from its beginning to its end."""
    found = re.findall(
        r'^```(\w*)(?: title="([^"]*)")?\n(.*?)^```$', page.read_text("utf-8"), re.M | re.S
    )
    return [Block(language, title, text) for language, title, text in found]


def programs(folder: Path, words: Mapping[str, Sequence[str]] | None = None) -> dict[str, str]:
    """Write `python` and `gearshift` as an installed checkout has them into the folder; returns an
    environment that finds them. `words`: what each command gets after its first argument, and
    before what the page says.
    """
    module, name = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"][
        "scripts"
    ]["gearshift"].split(":")
    folder.mkdir()
    scripts = {
        "python": f'#!/bin/sh\nexec {sys.executable} "$@"\n',
        "gearshift": f"#!{sys.executable}\nimport sys\n"
        f"sys.argv[3:3] = {dict(words or {})!r}.get(sys.argv[1], [])\n"
        f"from {module} import {name}\n{name}()\n",
    }
    for script, text in scripts.items():
        (folder / script).write_text(text, encoding="utf-8")
        (folder / script).chmod(0o755)
    (folder / "site").mkdir()
    for part in ("gearshift", "recipes"):
        (folder / "site" / part).symlink_to(ROOT / part)
    return {
        **os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": str(folder / "site"),
        "COLUMNS": "200", "OMP_NUM_THREADS": "1",
    }  # fmt: skip


def run_page(
    page: Path, folder: Path, environment: dict[str, str], visit: Visit | None = None
) -> list[str]:
    """Write the titled files of a page and run its commands in `folder`, with the tiny model in
    place of the embedded one; returns what each block of commands printed.

    A block of commands titled "once" installs something, and is left out. One titled "until Ctrl-C"
    is a server, which `visit` visits. A block of text is what the commands before it print on any
    machine, unless its title says otherwise.
    """
    printed = [""]
    for block in blocks(page):
        if block.language in ("python", "yaml", "toml", "markdown") and block.title:
            text = block.text.replace("name: embedded", "name: tiny")
            (folder / block.title).write_text(text, encoding="utf-8")
            if block.title == "pyproject.toml":
                install(folder, tomllib.loads(text)["project"])
                path = os.pathsep.join([str(folder), environment["PYTHONPATH"]])
                environment = {**environment, "PYTHONPATH": path}
        elif block.title == "until Ctrl-C":
            assert visit
            serve(block.text, folder, environment, visit)
        elif block.language == "sh" and block.title != "once":
            done = subprocess.run(
                ["bash", "-e", "-c", block.text], cwd=folder, env=environment, text=True,
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                timeout=600,
            )  # fmt: skip
            assert done.returncode == 0, f"{block.text}\n{done.stdout}"
            printed.append(done.stdout)
        elif block.language == "text" and not block.title:
            for line in block.text.splitlines():
                assert line in printed[-1].splitlines(), f"not printed: {line}\n{printed[-1]}"
    return printed


def serve(command: str, folder: Path, environment: dict[str, str], visit: Visit) -> None:
    """Start the server, visit the address that it prints, and press Ctrl-C."""
    server = subprocess.Popen(
        ["bash", "-c", f"exec {command}"], cwd=folder, env=environment, text=True,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert server.stdout
        visit(command, next(line.strip() for line in server.stdout if line.startswith("http")))
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(60)


def install(folder: Path, project: dict[str, Any]) -> None:
    """What `pip install --editable` writes, into the folder itself: its entry points."""
    info = folder / f"{project['name']}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Name: {project['name']}\nVersion: {project['version']}\n")
    for group, points in project["entry-points"].items():
        lines = [f"[{group}]", *(f"{name} = {value}" for name, value in points.items())]
        (info / "entry_points.txt").write_text("\n".join(lines) + "\n")


def main() -> None:
    environment = {**os.environ, "COLUMNS": "200", "PYTHONPATH": ""}
    for page in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as folder:
            run_page(Path(page), Path(folder), environment)
        print(f"{page}: its files and commands work")


if __name__ == "__main__":
    main()
