"""The recipes' figures on their test rows: docs/results.json, the table in docs/results.md, and the
reward curves in docs/results.svg.

    python -m benchmarks.results --run             # run what is missing, three seeds of each recipe
    python -m benchmarks.results [--runs FOLDER]   # gather only

A run lies in FOLDER/<recipe>-<seed>. One run at a time: they are timed. Its policies are evaluated
on the test rows once, for this table; what a setting is chosen by is the run's own table, on the
validation rows. What docs/results.json has of runs that are not in FOLDER stays, but for figures
that are not of test rows.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib

from gearshift.cli.main import main as gearshift
from gearshift.pipeline.records import comparisons, records
from gearshift.rollouts.evaluate import finite, span
from gearshift.runtime.metrics import read_metrics

RECIPES = (
    "voice_assistant", "voice_languages", "customer_service", "customer_service_ppo",
    "translation", "sentiment", "reasoning", "frozen_lake",
)  # fmt: skip
SEEDS = (0, 1, 2)
DOCS = Path("docs")
BEGIN, END = "<!-- table: python -m benchmarks.results -->", "<!-- end of table -->"

Rows = dict[str, dict[int, dict[str, Any]]]
"""By recipe and seed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", action="store_true", help="run the recipes that have not run")
    parser.add_argument("--runs", type=Path, default=Path("runs/results"))
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    options = parser.parse_args()
    names = {(r, s): options.runs / f"{r}-{s}" for r in options.recipes for s in options.seeds}
    if options.run:
        for (recipe, seed), folder in names.items():
            gearshift(["run", recipe, f"run.dir={folder}", f"run.seed={seed}"])
            gearshift(["eval", str(folder), "--split", "test", "--show", "0"])
    found = kept()
    for (recipe, seed), folder in names.items():
        if (folder / "test" / "rl.json").exists():
            found[recipe][seed] = row(folder)
    found = {recipe: dict(sorted(seeds.items())) for recipe, seeds in found.items() if seeds}
    DOCS.joinpath("results.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    text = DOCS.joinpath("results.md").read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    table = "\n".join(lines(found))
    page = f"{before}{BEGIN}\n{table}\n{END}{after}"
    DOCS.joinpath("results.md").write_text(page, encoding="utf-8")
    draw(found)
    print(table)


def kept() -> Rows:
    """What was gathered before, of the recipes that there are, on test rows."""
    path = DOCS / "results.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {
        r: {int(s): row for s, row in before.get(r, {}).items() if row.get("split") == "test"}
        for r in RECIPES
    }


def row(folder: Path) -> dict[str, Any]:
    """One run: each policy on the test rows, and RL less SFT, or less the base model where a recipe
    has no SFT.
    """
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    found = records(folder / "test")
    before = "sft" if "sft" in found else "base"
    compared = next(c for c in comparisons(found) if (c.before, c.after) == (before, "rl"))
    values = {name: record["value"] for name, record in found.items()}
    steps = read_metrics(folder / "rl" / "metrics.jsonl")
    return {
        "split": "test",
        "metric": found["rl"]["metric"],
        "base": values["base"],
        "sft": values.get("sft"),
        "rl": values["rl"],
        "n": found["rl"]["n"],
        "episodes": found["rl"]["episodes"],
        "minutes": sum(summary["seconds"].values()) / 60,
        "intervals": {
            **{name: record["interval"] for name, record in found.items()},
            f"rl-{before}": finite(compared.interval),
        },
        "p": compared.p,
        "told_apart": compared.told_apart,
        "better": len(compared.wins),
        "worse": len(compared.losses),
        "figures": {
            name: {k: v for k, v in record.items() if isinstance(v, float)}
            for name, record in found.items()
        },
        "proxy_gold": proxy_gold(steps),
        "rewards": [round(step["reward"], 4) for step in steps],
    }


def proxy_gold(steps: list[dict[str, float]]) -> dict[str, list[float]] | None:
    """Where a reward model is used: its score and the judge's reward of what was sampled, over the
    first and the last five steps.
    """
    parts = {"proxy": "rewards/model/mean", "gold": "rewards/environment/mean"}
    if not all(name in step for name in parts.values() for step in steps[:1]):
        return None
    return {
        part: [fmean(s[name] for s in steps[:5]), fmean(s[name] for s in steps[-5:])]
        for part, name in parts.items()
    }


def lines(found: Rows) -> list[str]:
    """The table in Markdown, and under it what did not work."""
    table = [
        "| recipe | metric | seed | base | SFT | RL | RL - SFT | p | better / worse "
        "| problems | rows | minutes |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for recipe, seeds in found.items():
        for seed, r in seeds.items():
            shown = [cell(r, name) for name in ("base", "sft", "rl")]
            key = "rl-sft" if r["sft"] is not None else "rl-base"
            gain = r["rl"] - (r["sft"] if r["sft"] is not None else r["base"])
            words = f"{gain:+.3f} {span(r['intervals'][key], '+.3f')}"
            table.append(
                f"| `{recipe}` | {r['metric']} | {seed} | {' | '.join(shown)} | "
                f"{f'**{words}**' if r['told_apart'] and gain > 0 else words} | {r['p']:.2g} | "
                f"{r['better']} / {r['worse']} | {r['n']} | {r['episodes']} | {r['minutes']:.1f} |"
            )
    gaps = [
        f"- `{recipe}`, seed {seed}: reward model {g['proxy'][0]:.2f} -> {g['proxy'][1]:.2f}, "
        f"judge {g['gold'][0]:.3f} -> {g['gold'][1]:.3f}"
        for recipe, seeds in found.items()
        for seed, r in seeds.items()
        if (g := r["proxy_gold"])
    ]
    if gaps:
        gaps = [
            "",
            "The proxy-gold gap, sampled completions, first and last five steps:",
            "",
            *gaps,
        ]
    return [*table, *gaps, "", "![Reward by step](results.svg)"]


def cell(r: dict[str, Any], name: str) -> str:
    """A policy's figure with its interval."""
    if r.get(name) is None:
        return ""
    return f"{r[name]:.3f} {span(r['intervals'][name])}"


def draw(found: Rows) -> None:
    """The reward of each recipe's rollouts by step, a line a seed."""
    matplotlib.use("agg")
    matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text
    import matplotlib.pyplot as plt

    columns = min(4, max(1, len(found)))
    height = max(1, -(-len(found) // columns))
    figure, axes = plt.subplots(
        height, columns, figsize=(2.9 * columns, 2.2 * height), squeeze=False
    )
    for axis in axes.flat[len(found) :]:
        axis.axis("off")
    for axis, (recipe, seeds) in zip(axes.flat, found.items(), strict=False):
        for seed, r in seeds.items():
            axis.plot(r["rewards"], linewidth=1.2, label=f"seed {seed}")
        axis.set_title(recipe, fontsize=9, loc="left")
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    most = max(axes.flat, key=lambda axis: len(axis.lines))
    most.legend(fontsize=7, frameon=False)
    figure.tight_layout()
    figure.savefig(DOCS / "results.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
