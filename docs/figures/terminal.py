"""Draws what a terminal showed as an SVG that needs no font file and no network.

    python docs/figures/terminal.py < docs/figures/tutorial.txt > docs/figures/tutorial.svg

A line that begins with `$ ` is a command. The text is what a run of docs/tutorial.md printed.
"""

from __future__ import annotations

import sys
from html import escape

WIDTH, LINE, LEFT, TOP = 7.23, 17, 14, 40
"""The sizes of a character, of a line, and of the frame, in pixels."""


def drawn(lines: list[str]) -> str:
    """The lines as an SVG in a window's frame."""
    width = round(max(map(len, lines)) * WIDTH + 2 * LEFT)
    height = len(lines) * LINE + TOP + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}">',
        "<style>text{font:12px ui-monospace,Menlo,Consolas,'DejaVu Sans Mono',monospace;"
        "fill:#d4d4d4;white-space:pre}.c{fill:#9cdcfe;font-weight:bold}.g{fill:#89d185}</style>",
        f'<rect width="{width}" height="{height}" rx="8" fill="#1e1e1e"/>',
    ]
    for x, colour in ((18, "#ff5f57"), (36, "#febc2e"), (54, "#28c840")):
        parts.append(f'<circle cx="{x}" cy="17" r="5.5" fill="{colour}"/>')
    for i, line in enumerate(lines):
        kind = ' class="c"' if line.startswith("$ ") else ' class="g"' if " -> " in line else ""
        length = f' textLength="{len(line) * WIDTH:.1f}"' if line else ""
        y = TOP + LINE * i + 10
        parts.append(f'<text x="{LEFT}" y="{y}"{kind}{length}>{escape(line)}</text>')
    return "\n".join([*parts, "</svg>\n"])


if __name__ == "__main__":
    sys.stdout.write(drawn(sys.stdin.read().rstrip().splitlines()))
