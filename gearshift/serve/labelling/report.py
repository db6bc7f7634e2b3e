"""What the owner of a labelling sees: the work of each person, how far they agree, and what they
disagree on. It knows no HTTP.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations
from statistics import median
from typing import Any

from gearshift.data.labels import Event, Item, Labels, Verdict, choice_of
from gearshift.rollouts.intervals import wilson
from gearshift.serve.labelling.agreement import (
    Value,
    alpha_interval,
    cohen_kappa,
    krippendorff_alpha,
    percent_agreement,
)

_MOST = 200
"""How many disagreements are listed."""


def report(labels: Labels) -> dict[str, Any]:
    """The owner's view as JSON. Known items count for each person's rate of right answers alone."""
    asked = [item for item in labels.items.values() if item.gold is None]
    votes = {item.id: _votes(labels, item.id) for item in asked}
    units = [list(of.values()) for of in votes.values()]
    return {
        "items": len(asked),
        "labelled": sum(1 for of in votes.values() if of),
        "twice": sum(len(of) > 1 for of in votes.values()),
        "people": [_person(labels, who) for who in sorted(_people(labels))],
        "percent": percent_agreement(units),
        "alpha": _alpha(units, ordinal=False),
        "ratings": {name: _alpha(units, True) for name, units in _ratings(labels, asked).items()},
        "kappa": list(_kappas(votes.values())),
        "left": _left(e for e in labels.live() if e["kind"] == "pair"),
        "disagreements": list(_disagreements(labels, asked, votes))[:_MOST],
    }


def progress(labels: Labels, who: str) -> dict[str, Any]:
    """What a person may know about the own work; nothing here is about others, or about what is
    right.
    """
    given = [e for e in labels.live() if e["who"] == who]
    done = [e for e in given if e["kind"] != "skip"]
    last = max(given, key=lambda e: e["t"], default=None)
    return {
        "labelled": len(done),
        "skipped": len(given) - len(done),
        "seconds": median(e["seconds"] for e in done) if done else None,
        "last": last["id"] if last else None,
    }


def _person(labels: Labels, who: str) -> dict[str, Any]:
    mine = [e for e in labels.live() if e["who"] == who]
    known = [(e, labels.items[e["item"]].gold) for e in mine if e["kind"] == "pair"]
    right = [choice_of(e) == gold for e, gold in known if gold is not None]
    found = progress(labels, who)
    taken_back = sum(labels.events[name]["who"] == who for name in labels.undone)
    return {
        "who": who,
        "labelled": found["labelled"],
        "skipped": found["skipped"],
        "seconds": found["seconds"],
        "taken_back": taken_back,
        "edits": sum(bool(e.get("edit")) for e in mine),
        "left": _left(e for e in mine if e["kind"] == "pair"),
        "known": {"right": sum(right), "of": len(right)} if right else None,
    }


def _people(labels: Labels) -> set[str]:
    return {e["who"] for e in labels.live()}


def _votes(labels: Labels, item: str) -> dict[str, Verdict]:
    """What each person said about an item; ratings are compared by criterion instead."""
    found = {w: e for w, e in labels.of(item).items() if e["kind"] != "rating"}
    return {w: vote for w, e in found.items() if (vote := choice_of(e)) is not None}


def _ratings(labels: Labels, asked: list[Item]) -> dict[str, list[list[Value]]]:
    found: dict[str, list[list[Value]]] = {}
    for item in asked:
        given = [e["choice"] for e in labels.of(item.id).values() if e["kind"] == "rating"]
        for name in {name for choice in given for name in choice}:
            found.setdefault(name, []).append([c[name] for c in given if name in c])
    return found


def _alpha(units: list[list[Value]], ordinal: bool) -> dict[str, Any]:
    interval = alpha_interval(units, ordinal)
    return {
        "value": krippendorff_alpha(units, ordinal),
        "low": interval[0] if interval else None,
        "high": interval[1] if interval else None,
        "items": sum(len(unit) > 1 for unit in units),
    }


def _kappas(votes: Iterable[dict[str, Verdict]]) -> Iterable[dict[str, Any]]:
    """Cohen's kappa of each two people who share items."""
    shared: dict[tuple[str, str], list[tuple[Value, Value]]] = {}
    for of in votes:
        for a, b in combinations(sorted(of), 2):
            shared.setdefault((a, b), []).append((of[a], of[b]))
    for (a, b), pairs in sorted(shared.items()):
        yield {
            "people": [a, b],
            "items": len(pairs),
            "percent": percent_agreement(pairs),
            "kappa": cohen_kappa(pairs),
        }


def _left(pairs: Iterable[Event]) -> dict[str, Any] | None:
    """The share of choices that were on the left, which is near a half where people read both."""
    sides = [e["choice"] == "left" for e in pairs if e["choice"] in ("left", "right")]
    if not sides:
        return None
    share = sum(sides) / len(sides)
    low, high = wilson(share, len(sides))
    return {"share": share, "low": low, "high": high, "of": len(sides)}


def _disagreements(
    labels: Labels, asked: list[Item], votes: dict[str, dict[str, Verdict]]
) -> Iterable[dict[str, Any]]:
    for item in asked:
        of = votes[item.id]
        if len(set(of.values())) < 2 or labels.final(item.id):
            continue
        reasons = {w: e["reason"] for w, e in labels.of(item.id).items() if e.get("reason")}
        yield {
            "item": item.id,
            "prompt": item.prompt,
            "answers": item.answers,
            "sources": item.sources,
            "votes": of,
            "reasons": reasons,
        }
