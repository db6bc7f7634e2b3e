"""The page that a run leaves: curves, the held-out table, samples before and after, facts.

The page is one file that needs nothing outside it, so that it can be mailed, and read in ten years.
Its template is `report.html.j2`.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gearshift.runtime.curves import CURVES, columns, matching
from gearshift.runtime.files import write_text
from gearshift.runtime.terminal import one_line, printable

_COLOURS = ("#3b82f6", "#f59e0b", "#10b981", "#ef4444", "#a855f7", "#14b8a6", "#94a3b8")
_POLICY = "POLICY"
"""Stands for the content security policy, which names a digest of the page's style."""
if TYPE_CHECKING:
    from markupsafe import Markup

_INK = "#010203"
"""Stands for the colour of the page's text, which is not the same by day and by night."""
_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.limits": (-3, 5),
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _INK,
    "grid.alpha": 0.12,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
}
_Floats = NDArray[np.float64]


def write_report(
    run_folder: Path,
    title: str,
    metrics: Mapping[str, Sequence[Mapping[str, Any]]],
    samples_before_after: Sequence[Mapping[str, Any]],
    heldout: Mapping[str, Mapping[str, Any]],
    summary: Mapping[str, Any],
    compared: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """Write `run_folder/report.html`; returns its path. What is missing is left out of the page.

    metrics: each stage's records by step, under TRL's names. samples_before_after: records of
    prompt, stages {stage: text}, rewards {stage: float} and perhaps gold. heldout: for each policy
    metric, value, interval, n and other figures. summary: facts, nested as they come.
    compared: policies row by row: before, after, difference, interval, better, worse.
    """
    from jinja2 import Environment, StrictUndefined

    template = Path(__file__).with_suffix(".html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["plain"] = _plain
    page = environment.from_string(template).render(
        title=title,
        stages={name: list(_charts(records)) for name, records in metrics.items() if records},
        columns=[
            key
            for key in dict.fromkeys(key for row in heldout.values() for key in row)
            if key != "interval"
        ],
        compared=compared,
        heldout=heldout,
        samples=samples_before_after,
        facts=list(_facts(summary)),
    )
    path = run_folder / "report.html"
    write_text(path, _sealed(printable(page)))
    return path


_STYLED = re.compile(r'(<[a-zA-Z][^<>]*) style="([^"]*)"')
"""A tag with a style of its own; a text of the run has neither `<` nor `"`, for it is escaped."""


def _sealed(page: str) -> str:
    """The page with all its styles in one element. Its policy lets a browser obey that element
    alone: no script, no address, and no style from a text of the run.
    """
    classes: dict[str, str] = {}

    def named(found: re.Match[str]) -> str:
        name = classes.setdefault(html.unescape(found[2]), f"s{len(classes)}")
        return f'{found[1]} class="{name}"'

    page = _STYLED.sub(named, page)
    head, style, rest = page.partition("</style>")
    head += "".join(f".{name} {{ {text} }}\n" for text, name in classes.items())
    digest = hashlib.sha256(head.partition("<style>")[2].encode()).digest()
    allowed = f"style-src 'sha256-{base64.b64encode(digest).decode()}'"
    policy = f"default-src 'none'; {allowed}; base-uri 'none'; form-action 'none'"
    return head.replace(_POLICY, policy, 1) + style + rest


def _charts(records: Sequence[Mapping[str, Any]]) -> Iterator[Markup]:
    """The curves that a stage's records have figures for, then its seconds by phase."""
    import matplotlib

    figures = columns(records)
    steps = np.array([record["step"] for record in records], dtype=np.float64)

    def series(patterns: Sequence[str]) -> dict[str, _Floats]:
        # A metric that was not finite is None; numpy makes it a gap.
        return {
            name: np.array(figures[name], dtype=np.float64) for name in matching(figures, patterns)
        }

    with matplotlib.rc_context(_STYLE):
        for title, patterns in CURVES:
            if lines := series(patterns):
                yield _curves(title, steps, lines)
        if phases := series(("seconds/*",)):
            yield _phases(steps, phases)


def _curves(title: str, steps: _Floats, lines: Mapping[str, _Floats]) -> Markup:
    figure, axes = _axes(title)
    for i, (name, values) in enumerate(lines.items()):
        x, y = _thin(steps), _thin(values)
        colour = _COLOURS[i % len(_COLOURS)]
        # Where a curve goes up and down more than anywhere, its moving mean is drawn over it.
        noisy = len(y) >= 40 and np.nansum(np.abs(np.diff(y))) > 3 * (np.nanmax(y) - np.nanmin(y))
        marker = "." if len(y) < 20 else None
        label = one_line(name.removesuffix("/mean"), 80)
        axes.plot(
            x,
            y,
            color=colour,
            marker=marker,
            linewidth=1 if noisy else 1.6,
            alpha=0.3 if noisy else 1,
            label=None if noisy else label,
        )
        if noisy:
            axes.plot(x, _smooth(y), color=colour, linewidth=1.8, label=label)
    if len(lines) > 1:
        axes.legend(fontsize=8)
    return _svg(figure, title)


def _phases(steps: _Floats, phases: Mapping[str, _Floats]) -> Markup:
    """Seconds of a step, one phase on top of the other, their share of the whole in the legend."""
    title = "Seconds by phase"
    figure, axes = _axes(title)
    whole = sum(np.nansum(values) for values in phases.values())
    x = _thin(steps, 60)
    top = np.zeros(len(x))
    for i, (name, values) in enumerate(phases.items()):
        height = np.nan_to_num(_thin(values, 60))
        axes.bar(
            x,
            height,
            width=np.diff(x).max() if len(x) > 1 else 1,
            bottom=top,
            color=_COLOURS[i % len(_COLOURS)],
            label=f"{name.removeprefix('seconds/')} {np.nansum(values) / max(whole, 1e-9):.0%}",
        )
        top += height
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return _svg(figure, title)


def _axes(title: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(5.4, 2.9), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
    return figure, axes


def _thin(values: _Floats, points: int = 300) -> _Floats:
    """At most `points` values: means of equal stretches, gaps left out of them."""
    stretches = np.array_split(values, min(len(values), points))
    return np.array(
        [s[np.isfinite(s)].mean() if np.isfinite(s).any() else np.nan for s in stretches]
    )


def _smooth(values: _Floats) -> _Floats:
    """A centred moving mean over a twentieth of the curve; gaps are left out of it."""
    reach = max(2, len(values) // 40)
    windows = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return np.array([w[np.isfinite(w)].mean() if np.isfinite(w).any() else np.nan for w in windows])


def _svg(figure: Any, title: str) -> Markup:
    """The figure as an inline SVG in the page's own text colour."""
    from markupsafe import Markup

    text = io.StringIO()
    metadata = {"Date": None, "Creator": None, "Title": title}
    figure.savefig(text, format="svg", transparent=True, metadata=metadata)
    svg = text.getvalue()
    svg = re.sub(r"<style.*?</style>", "", svg[svg.index("<svg") :])  # the page has the same
    return Markup(svg.replace(_INK, "currentColor"))


def _facts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """The leaves of nested facts under dotted names; held-out figures have their own table."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if key or not name.startswith("heldout"):
                yield from _facts(inner, f"{key}.{name}" if key else str(name))
    elif value is not None:
        yield key, _plain(value)


def _plain(value: Any) -> str:
    """A figure in four digits, text as it is, anything else as JSON."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
