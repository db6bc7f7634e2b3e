"""A run of the translation recipe beside Apertium, a rule-based translator, on the same validation
English-Spanish messages: chrF and BLEU of both.

    apt-get install apertium apertium-eng-spa
    python -m benchmarks.apertium runs/translation
"""

from __future__ import annotations

import argparse
import html
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.common import RESULTS
from gearshift.rollouts.evaluate import finite
from gearshift.rollouts.intervals import interval_of_change
from gearshift.tasks.translation.score import (
    PLACEHOLDER,
    chrf,
    corpus_scores,
    keeps_placeholders,
)

PAIR = "eng-spa"
Sample = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="the folder of a run of recipes/translation.yaml")
    parser.add_argument("--out", type=Path, default=RESULTS / "apertium.json")
    options = parser.parse_args()
    if not has_apertium():
        sys.exit("Apertium is not installed; run: apt-get install apertium apertium-eng-spa")
    data = options.run / "data" / "validation.jsonl"
    if not data.is_file():
        sys.exit(f"{options.run} is no run of the translation recipe: it has no {data.name}.")
    lines = data.read_text(encoding="utf-8").splitlines()
    rows = {i: row for i, row in enumerate(map(json.loads, lines)) if row["language"] == "es"}
    answers = translate([row["source"] for row in rows.values()])
    systems = {"copy of the source": as_samples(rows, [r["source"] for r in rows.values()])}
    systems["Apertium"] = as_samples(rows, answers)
    for path in sorted((options.run / "validation").glob("*.json")):
        found = {s["row"]: s["completion"] for s in json.loads(path.read_text())["samples"]}
        if rows.keys() <= found.keys():
            systems[path.stem] = as_samples(rows, [found[i] for i in rows])
    figures = {name: figures_of(samples) for name, samples in systems.items()}
    for name, samples in systems.items():
        pairs = zip(systems["Apertium"], samples, strict=True)
        changes = [b["metrics"]["chrf"] - a["metrics"]["chrf"] for a, b in pairs]
        figures[name]["chrf less Apertium's"] = [
            fmean(changes),
            *finite(interval_of_change(changes, range(len(changes)))),
        ]
    options.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print("\n".join(table(figures, len(rows))))


def has_apertium() -> bool:
    """Whether `apertium` and the pair are there."""
    if shutil.which("apertium") is None:
        return False
    listed = subprocess.run(["apertium", "-l"], capture_output=True, text=True, check=False)
    return PAIR in listed.stdout.split()


def translate(sources: list[str]) -> list[str]:
    """Each message by Apertium. What a program fills in goes through as an HTML tag, which its
    deformatter keeps in place.
    """
    kept: list[list[str]] = [PLACEHOLDER.findall(source) for source in sources]
    page = "\n".join(f"<p>{_tagged(source)}</p>" for source in sources) + "\n"
    command = ["apertium", "-u", "-f", "html-noent", PAIR]
    out = subprocess.run(command, input=page, capture_output=True, text=True, check=True).stdout
    paragraphs = re.findall(r"<p>(.*?)</p>", out, re.DOTALL)
    if len(paragraphs) != len(sources):
        sys.exit(f"Apertium gave {len(paragraphs)} translations of {len(sources)} messages.")
    return [_untagged(text, tags) for text, tags in zip(paragraphs, kept, strict=True)]


def _tagged(source: str) -> str:
    pieces = [html.escape(piece, quote=False) for piece in PLACEHOLDER.split(source)]
    return pieces[0] + "".join(f"<x{i}/>{piece}" for i, piece in enumerate(pieces[1:]))


def _untagged(text: str, tags: list[str]) -> str:
    pieces = re.split(r"<x(\d+)/?>(?:</x\d+>)?", text)
    texts = [html.unescape(piece) for piece in pieces[::2]]
    found = [*(tags[int(number)] for number in pieces[1::2]), ""]
    return "".join(f"{piece}{tag}" for piece, tag in zip(texts, found, strict=True)).strip()


def as_samples(rows: dict[int, Any], answers: list[str]) -> list[Sample]:
    """Records of one system's answers, as an evaluation keeps them."""
    return [
        {
            "row": i,
            "completion": answer.strip(),
            "gold": row["reference"],
            "metrics": {
                "chrf": chrf(answer.strip(), row["reference"]),
                "placeholders": float(keeps_placeholders(row["source"], answer)),
            },
        }
        for (i, row), answer in zip(rows.items(), answers, strict=True)
    ]


def figures_of(samples: list[Sample]) -> dict[str, Any]:
    corpus = corpus_scores([s["completion"] for s in samples], [s["gold"] for s in samples])
    return {
        "sentence chrf": fmean(s["metrics"]["chrf"] for s in samples),
        **corpus,
        "placeholders": fmean(s["metrics"]["placeholders"] for s in samples),
    }


def table(figures: dict[str, Any], rows: int) -> list[str]:
    """Markdown, one line a system."""
    lines = [
        f"{rows} validation messages, English to Spanish",
        "",
        "| system | mean chrF | corpus chrF | BLEU | mean chrF less Apertium's |",
        "|---|---|---|---|---|",
    ]
    for name, row in figures.items():
        difference, low, high = (100 * x for x in row["chrf less Apertium's"])
        means = " | ".join(f"{100 * row[k]:.1f}" for k in ("sentence chrf", "chrf", "bleu"))
        lines.append(f"| {name} | {means} | {difference:+.1f} [{low:+.1f}, {high:+.1f}] |")
    return lines


if __name__ == "__main__":
    main()
