"""Hurts a small run at random moments, and looks whether it still ends as the run that was left
alone: to the bit, with one line for whatever stopped it.

    python -m tests.chaos [--minutes 10] [--seed 0] [--only INJURY] [--keep] [--ranks 2]

Each round is a run in a folder of its own, hurt two to four times and then let go on to its end.
What is done when is a function of the seed; where the run stands by then is not. Prints a line for
each injury; exits non-zero where a round ended otherwise than it must, and then keeps its folder.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.chaos.injuries import INJURIES, Trial
from tests.chaos.rank_injuries import RANK_INJURIES
from tests.chaos.runs import BrokenError, fingerprint, lay_out


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0, help="of the first round")
    parser.add_argument("--only", default="", help="injuries whose name has this in it")
    parser.add_argument("--keep", action="store_true", help="keep the folders of good rounds too")
    parser.add_argument("--ranks", type=int, default=1, help="processes of the run, by torchrun")
    options = parser.parse_args()
    injuries = INJURIES if options.ranks == 1 else RANK_INJURIES
    names = [name for name in injuries if options.only in name]
    top = Path(tempfile.mkdtemp(prefix="gearshift-chaos-"))

    whole = lay_out(top / "uncut")
    began = time.monotonic()
    uncut = Trial(whole, random.Random(seed := options.seed), 0.0, options.ranks).begin()
    uncut.wait()
    uncut.must_have_ended()
    seconds = time.monotonic() - began
    wanted = fingerprint(whole)
    print(f"the run that is left alone takes {seconds:.1f} s; folders in {top}", flush=True)

    until = time.monotonic() + 60 * options.minutes
    done: Counter[str] = Counter()
    failed: list[int] = []
    while time.monotonic() < until:
        folder = top / f"round-{seed}"
        rng = random.Random(seed)
        trial = Trial(lay_out(folder), rng, seconds, options.ranks)
        try:
            for name in rng.choices(names, k=rng.randint(2, 4)):
                message = injuries[name](trial)
                done[name] += 1
                print(f"  {name}: {message}", flush=True)
            trial.goes_on(wanted)
        except BrokenError as error:
            failed.append(seed)
            print(f"round {seed}: FAILED: {error}", flush=True)
        else:
            print(f"round {seed}: as the run that was left alone", flush=True)
        trial.close()
        if not (options.keep or seed in failed):
            shutil.rmtree(folder)
        seed += 1
    rounds = seed - options.seed
    hurt = ", ".join(f"{name} {count}" for name, count in sorted(done.items()))
    print(f"{rounds - len(failed)} of {rounds} rounds ended with the uncut run's bits ({hurt})")
    if failed:
        print(f"failed: rounds {failed}, kept in {top}; repeat one with --seed N --minutes 0.1")
        sys.exit(1)
    if not options.keep:
        shutil.rmtree(top)


if __name__ == "__main__":
    main()
