"""The loop closed: SFT on 64 labels, a person who labels 200 pairs on the page, a reward model from
those labels, RL against it, evaluation.

    python -m benchmarks.closed_loop --seeds 0 1 2    # some twenty minutes a seed on two CPU cores
    python -m benchmarks.closed_loop --small          # the tiny model: each step works, no more

The person is a script that works the page in a browser by its keys: the voice assistant's parser
decides which answer is better, and one answer in ten is the other one. Each step is the command
that a user types, and is printed. Writes benchmarks/results/closed_loop.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.common import machine, versions, write
from gearshift.data.labels import Labels, label_rows, read_events
from gearshift.rollouts.intervals import wilson
from gearshift.tasks.voice.commands import score_command

NOISE = 0.1
KEYS = {"left": "1", "right": "2", "tie": "3"}
JUDGE = ["reward.epochs=6", "reward.optimizer.lr=1e-4"]
"""Some 130 pairs are few: with one epoch at the recipe's rate nothing was learnt."""
POLICY = ["rl.kl.beta=0.05", "rl.update.optimizer.lr=3e-5"]
"""Such a judge is wrong about much that the policy could write, so the policy is to stay near its
start; with seed 0 it still got worse (docs/closed_loop.md).
"""
SMALL = [
    "model.name=tiny", "model.dtype=float32", "task.train=60", "task.labelled=24", "task.pairs=12",
    "task.pairs_heldout=8", "task.validation=12", "task.test=12", "sft.epochs=1",
    "eval.max_new_tokens=8",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--steps", type=int, default=30, help="of RL")
    parser.add_argument("--folder", type=Path, help="the runs' folder; a temporary one")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    if options.small:
        options.seeds, options.pairs, options.steps = [0], 8, 2
    top = options.folder or Path(tempfile.mkdtemp(prefix="gearshift-loop-"))
    results = [loop(top / f"seed-{seed}", seed, options) for seed in options.seeds]
    gains = [r["rl"]["value"] - r["sft"]["value"] for r in results]
    each = ", ".join(f"{gain:+.3f}" for gain in gains)
    print(f"gain of RL over SFT on validation rows: {fmean(gains):+.3f} (by seed {each})")
    if not options.small:
        write("closed_loop", {"machine": machine(), "versions": versions(), "seeds": results})
    if not options.folder:
        shutil.rmtree(top)


def loop(folder: Path, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One seed; returns the held-out records of the policies and the reward model's accuracy."""
    first, second = folder / "first", folder / "second"
    small = SMALL if options.small else []
    common = ["voice_assistant", f"run.seed={seed}", "eval.perplexity=false", *small]
    gearshift("run", *common, "reward=null", "rl=null", f"run.dir={first}")
    labelled = label(first, seed, options)
    policy = [] if options.small else [f"model.name={first / 'sft'}"]
    labels = f'[{{path: "labels:{first}"}}]'
    gearshift(
        "run", *common, *policy, "sft=null", f"reward.data.sources={labels}", *JUDGE,
        "rl.rewards=[{source: model}]", *POLICY, f"rl.steps={options.steps}", f"run.dir={second}",
    )  # fmt: skip
    records = {
        name: json.loads((run / "validation" / f"{name}.json").read_text())
        for run, name in ((first, "base"), (first, "sft"), (second, "rl"))
    }
    figures = {
        name: {key: record[key] for key in ("metric", "value", "interval", "n")}
        for name, record in records.items()
    }
    found = {"seed": seed, **figures, **labelled, "reward_model": accuracy(second)}
    print(json.dumps(found), flush=True)
    return found


def label(run: Path, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Label pairs on the page; returns how many there are of each choice."""
    words = ["label", str(run), "--samples", "2", "--temperature", "1.2", "--max-new-tokens", "48"]
    print("$ gearshift", *words, flush=True)
    server = subprocess.Popen(
        [sys.executable, "-m", "gearshift", *words, "--port", "0", "--seed", str(seed)],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert server.stdout
        url = next(line.strip() for line in server.stdout if line.startswith("http"))
        person(url, options.pairs, random.Random(seed), guesses=options.small)
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)
    labels = Labels(read_events(run / "labels" / "events.jsonl")[0])
    choices = [event["choice"] for event in labels.live() if event["kind"] == "pair"]
    pairs = len(list(label_rows(labels, "preference")))
    return {"labels": {c: choices.count(c) for c in sorted(set(choices))}, "pairs": pairs}


def person(url: str, pairs: int, rng: random.Random, guesses: bool) -> None:
    """Sign in, and answer this many items by the keys. `guesses`: not by the parser, because an
    untrained model writes no command that it could read.
    """
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        chromium = shutil.which("chromium") or shutil.which("chromium-browser")
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        page.set_default_timeout(120_000)
        page.goto(url)
        page.get_by_label("Your name").fill("a script")
        page.locator("#begin").click()
        asked, seen = page.locator("#asked"), None
        for _ in range(pairs):
            while (item := asked.get_attribute("data-item")) == seen:
                page.wait_for_timeout(10)
            seen = item
            found = rng.choice(("left", "right")) if guesses else choice(page, rng)
            page.keyboard.press(KEYS[found])
            page.keyboard.press("Enter")
        while page.locator("#unsent").inner_text():
            page.wait_for_timeout(10)
        browser.close()


def choice(page: Any, rng: random.Random) -> str:
    """What the person says of the two answers."""
    request = page.locator("#asked .words").last.inner_text()
    scores = [
        score_command(page.locator(f"#answer-{side} .words").inner_text(), request)
        for side in ("left", "right")
    ]
    if rng.random() < NOISE:
        scores.reverse()
    return "tie" if scores[0] == scores[1] else "left" if scores[0] > scores[1] else "right"


def accuracy(run: Path) -> dict[str, Any]:
    """How often the reward model orders held-out pairs rightly, with Wilson's interval."""
    done = json.loads((run / "reward" / "done.json").read_text())
    n, value = done["heldout_pairs"], done["accuracy"]
    return {"accuracy": value, "interval": wilson(value, n), "pairs": done["pairs"], "heldout": n}


def gearshift(*words: str) -> None:
    """Run a command as a user does; its last words are printed."""
    print("$ gearshift", *words, flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "gearshift", *words], stdout=subprocess.PIPE, text=True, check=True,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
    )  # fmt: skip
    for line in done.stdout.splitlines():
        if re.match(r"validation |reward model|.* -> ", line):
            print(f"  {line}", flush=True)


if __name__ == "__main__":
    main()
