"""The report holds the curves there are figures for, and nothing from outside; text stays text."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import pytest

from gearshift.pipeline.report import write_report

RL = [
    {
        "step": i,
        "reward": i / 50,
        "rewards/$chrF_$/mean": 0.5,
        "kl": None if i == 3 else i * 1e-3,
        "entropy": 1.0,
        "completions/mean_length": 20.0 + i % 7,
        "completions/clipped_ratio": 0.0,
        "grad_norm": None,
        "learning_rate": 1e-5,
        "seconds/generate": 3.0,
        "seconds/update": 1.0,
    }
    for i in range(50)
]
SFT = [{"step": i, "loss": 3.0 - i, "seconds/update": 1.0} for i in range(3)]
REWARD = [{"step": 0, "loss": 0.7, "accuracy": 0.5}]
SAMPLE = {
    "prompt": "turn <script>alert(1)</script> on",
    "gold": {"intent": "Turn<b>On"},
    "stages": {"base": "<img src=x onerror=alert(2)>", "r&l": "done"},
    "rewards": {"base": 0.0, "r&l": 0.98765},
}
HELDOUT = {
    "base": {"metric": "success", "value": 0.025, "interval": [0.009, 0.071], "n": 120},
    "rl": {"metric": "success", "value": 0.84, "interval": [0.764, 0.895], "n": 120, "bleu": 31.5},
}
COMPARED = [
    {"before": "base", "after": "rl", "difference": 0.815, "interval": [0.7, 0.9], "p": 1e-4,
     "told_apart": True, "n": 40, "better": 98, "worse": 0},
]  # fmt: skip


def page(folder: Path, **changes: Any) -> str:
    parts = {
        "title": "voice <1>",
        "metrics": {"sft": SFT, "reward": REWARD, "rl": RL},
        "samples_before_after": [SAMPLE],
        "heldout": HELDOUT,
        "compared": COMPARED,
        "summary": {
            "seed": 7,
            "engine": {"gap": 1.23456e-6, "dtype": None},
            "heldout": {"rl": 0.84},
        },
    }
    path = write_report(folder, **{**parts, **changes})
    assert path == folder / "report.html"
    return path.read_text(encoding="utf-8")


class Tags(HTMLParser):
    """Every tag with its attributes, and all text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data + "\n"


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    return page(tmp_path_factory.mktemp("run"))


def test_every_stage_has_the_curves_it_has_figures_for(html: str) -> None:
    sections = dict(
        re.findall(r"<h2>(\w+)</h2>\s*<div class=.charts.>(.*?)</div>", html, re.DOTALL)
    )
    titles = {
        stage: re.findall(r"<dc:title>(.*?)</dc:title>", charts)
        for stage, charts in sections.items()
    }
    assert titles == {
        "sft": ["Loss", "Seconds by phase"],
        "reward": ["Loss", "Accuracy on pairs"],
        "rl": [
            "Reward",
            "KL to the reference",
            "Entropy",
            "Tokens in a completion",
            "Completions cut short",
            "Learning rate",
            "Seconds by phase",
        ],
    }
    text = Tags(sections["rl"]).text
    assert "rewards/$chrF_$" in text, "the verifier's reward stands beside the whole"
    assert "generate 75%" in text and "update 25%" in text


def test_curves_have_the_colour_of_the_text(html: str) -> None:
    assert "currentColor" in html and "#010203" not in html


def test_nothing_comes_from_outside(html: str) -> None:
    tags = Tags(html).tags
    assert not {"script", "link", "img", "iframe", "image"} & {tag for tag, _ in tags}
    links = [v for _, attrs in tags for k, v in attrs.items() if k in ("src", "href", "xlink:href")]
    assert links and all(link and link.startswith("#") for link in links)
    assert "@import" not in html and "url(http" not in html


def test_what_models_write_stays_text(html: str) -> None:
    text = Tags(html).text
    assert "<script>alert(1)</script>" in text and "<img src=x onerror=alert(2)>" in text
    assert "r&l" in text and '{"intent": "Turn<b>On"}' in text and "reward 0.9877" in text
    assert "voice <1>" in text


def test_a_browser_obeys_the_page_alone(tmp_path: Path) -> None:
    """Its policy allows its one style, by digest: no script, no address, no style of a tag."""
    hostile = (
        '</title></style><style>*{}</style><script>alert(1)</script> style="x" POLICY \x1b\ud800'
    )
    rows = [{"step": i, "reward": 0.1, f"rewards/{hostile}/mean": 0.5} for i in range(3)]
    sample = {"prompt": hostile, "stages": {hostile: hostile}, "rewards": {hostile: 0.1}}
    html = page(
        tmp_path,
        title=hostile,
        metrics={hostile: rows},
        samples_before_after=[sample],
        heldout={hostile: HELDOUT["rl"]},
        summary={hostile: hostile},
    )
    parsed = Tags(html)
    assert [tag for tag, _ in parsed.tags].count("style") == 1
    assert not any(k == "style" or k.startswith("on") for _, a in parsed.tags for k in a)
    assert "script" not in {tag for tag, _ in parsed.tags}
    assert "\x1b" not in html and parsed.text.count("<script>alert(1)</script>") > 8
    metas = {attrs.get("http-equiv") or attrs.get("name"): attrs for _, attrs in parsed.tags}
    style = html.split("<style>", 1)[1].split("</style>", 1)[0]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert metas["Content-Security-Policy"]["content"] == (
        f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    assert metas["referrer"]["content"] == "no-referrer"
    used = {name for _, a in parsed.tags for name in re.findall(r"\bs\d+\b", a.get("class") or "")}
    assert used and all(f".{name} {{" in style for name in used)
    assert ".s0 { left:76.4%;right:10.5% }" in style


def test_heldout_has_intervals(html: str) -> None:
    text = Tags(html).text
    assert "0.025" in text and "0.009 to 0.071" in text
    assert "0.840" in text and "0.764 to 0.895" in text and "31.5" in text
    assert "+0.815" in text and "+0.700 to +0.900" in text and "98" in text


def test_facts_are_flat_and_without_what_the_table_says(html: str) -> None:
    facts = Tags(html.split("<h2>Facts</h2>")[1]).text.split()
    assert facts == ["seed", "7", "engine.gap", "1.235e-06"]


def test_a_run_without_figures_still_has_a_page(tmp_path: Path) -> None:
    nothing: dict[str, Any] = {
        "metrics": {"rl": []},
        "samples_before_after": [],
        "heldout": {},
        "compared": [],
    }
    html = page(tmp_path, **nothing, summary={})
    assert "<h2>" not in html and "voice &lt;1&gt;" in html
    html = page(tmp_path, heldout={"base": {"n": 0, "value": None}}, metrics={})
    assert "base" in Tags(html).text


def test_matplotlib_is_left_as_it_was(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    page(tmp_path, metrics={"sft": SFT})
    assert dict(matplotlib.rcParams) == before
