"""Every preset on the same exact problem with equal samples: `docs/presets.svg` and a table.

    python -m benchmarks.presets [--seeds N]

The problem is the bandit of `tests/trainers/bandit.py`: one token, an arm for each byte, the best
worth 1. What a policy earns is computed exactly from its probabilities.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import fmean

import matplotlib

from gearshift.trainers import presets

STEPS = 40


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    curves = {name: curve(name, options.seeds) for name in presets.RL if name != "distill"}
    for name, earned in curves.items():
        print(f"{name:24} {earned[0]:.3f} -> {earned[STEPS // 2]:.3f} -> {earned[-1]:.3f}")
    draw(curves, Path("docs/presets.svg"))


def curve(name: str, seeds: int) -> list[float]:
    """Expected reward before the first step and after each, mean over seeds."""
    from tests.trainers import bandit

    runs = []
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as folder:
            runs.append(bandit.run(name, Path(folder), seed=seed, steps=STEPS)[1])
    return [fmean(column) for column in zip(*runs, strict=True)]


def draw(curves: dict[str, list[float]], path: Path) -> None:
    """Small charts, one a preset, the others in grey behind it."""
    matplotlib.use("agg")
    matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text
    import matplotlib.pyplot as plt

    columns = 5
    rows = -(-len(curves) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(11, 2 * rows), sharex=True, sharey=True, squeeze=False
    )
    for axis in axes.flat[len(curves) :]:
        axis.axis("off")
    for axis, (name, own) in zip(axes.flat, curves.items(), strict=False):
        for other in curves.values():
            axis.plot(other, color="#cbd5e1", linewidth=0.7)
        axis.plot(own, color="#2563eb", linewidth=1.8)
        axis.axhline(1.0, color="#94a3b8", linewidth=0.6, linestyle=":")
        axis.set_title(name, fontsize=9)
        axis.tick_params(labelsize=7)
    figure.supxlabel("step of 32 samples", fontsize=9)
    figure.supylabel("expected reward (best arm: 1)", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
