"""Who is asked what: each item goes to one person, a share of them to two, and nobody is asked the
same thing twice. It knows no HTTP and writes nothing.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from gearshift.data.labels import Item, Labels

LEASE = 900.0
"""For how many seconds an item waits for a person who has gone silent."""
_GOLD_EVERY = 10
_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass
class _Hold:
    tab: str
    until: float


class Dealer:
    """Deals the items of a labelling. Callers take care that one thread at a time is in it."""

    def __init__(
        self,
        labels: Labels,
        seed: int = 0,
        overlap: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`overlap`: the share of items that two people label. `clock`: the time in seconds."""
        self._labels, self._seed, self._overlap, self._clock = labels, seed, overlap, clock
        self._held: dict[str, dict[str, _Hold]] = {}
        self._dealt: dict[str, int] = {}
        self._closed: set[str] = set()

    def deal(self, who: str, tab: str, count: int) -> list[Item]:
        """Up to `count` items for a person's browser tab. Items that the tab has and that the
        person has not answered come first.
        """
        until = self._clock() + LEASE
        mine = []
        for item in [item for item, hold in self._of(who) if hold.tab == tab]:
            if item.gold is None and self._others(item, who) >= self.seats(item):
                self.answered(who, item.id)  # it went to somebody else meanwhile
            else:
                mine.append(item)
        while len(mine) < count and (more := self._next(who)):
            self._held.setdefault(more.id, {})[who] = _Hold(tab, until)
            self._dealt[who] = self._dealt.get(who, 0) + 1
            mine.append(more)
        for item in mine:
            self._held[item.id][who].until = until
        return mine[:count]

    def answered(self, who: str, item: str) -> None:
        """Note that a person has answered an item, or no longer has it."""
        self._held.get(item, {}).pop(who, None)

    def ask_again(self, who: str, tab: str, item: str) -> None:
        """Give an item back to a person who has taken the answer back."""
        self._closed.discard(item)
        others = self._held.pop(item, {})
        hold = {**others, who: _Hold(tab, self._clock() + LEASE)}
        self._held = {item: hold, **self._held}

    def leave(self, who: str) -> None:
        """Free the items of a person who goes."""
        for item in self._held:
            self.answered(who, item)

    def left(self, who: str) -> int:
        """How many items this person could still be asked, without the known ones."""
        held = sum(item.gold is None for item, _ in self._of(who))
        return held + sum(self._open_for(item, who) for item in self._candidates())

    def held_by_others(self, who: str) -> int:
        """How many items may come to this person if others leave them."""
        unseen = (item for item in self._candidates() if not self._seen(item, who))
        return sum(self._others(item, who) >= self.seats(item) for item in unseen)

    def waiting(self) -> int:
        """How many items nobody has got yet."""
        return sum(not self._others(item, "") for item in self._candidates())

    def seats(self, item: Item) -> int:
        """How many people label an item. The share that two people label is spread evenly."""
        place = (item.number + 1) * _GOLDEN + _fraction(f"{self._seed}/overlap")
        return 2 if place % 1 < self._overlap else 1

    def _of(self, who: str) -> list[tuple[Item, _Hold]]:
        items = self._labels.items
        return [(items[name], held[who]) for name, held in self._held.items() if who in held]

    def _next(self, who: str) -> Item | None:
        turn = f"{self._seed}/gold/{who}/{self._dealt.get(who, 0)}"
        if _fraction(turn) < 1 / _GOLD_EVERY:
            known = (i for i in self._labels.items.values() if i.gold is not None)
            if found := next((i for i in known if not self._seen(i, who)), None):
                return found
        return next((i for i in self._candidates() if self._open_for(i, who)), None)

    def _candidates(self) -> list[Item]:
        return [
            item
            for item in self._labels.items.values()
            if item.gold is None and item.id not in self._closed
        ]

    def _open_for(self, item: Item, who: str) -> bool:
        if item.id not in self._held and not self._labels.has_any(item.id):
            return True
        return not self._seen(item, who) and self._others(item, who) < self.seats(item)

    def _seen(self, item: Item, who: str) -> bool:
        hold = self._held.get(item.id, {}).get(who)
        held = hold is not None and hold.until > self._clock()
        return held or who in self._labels.of(item.id)

    def _others(self, item: Item, who: str) -> int:
        """How many other people have answered the item or have it before them."""
        answers = {w for w, e in self._labels.of(item.id).items() if e["kind"] != "skip"}
        if len(answers) >= self.seats(item):
            self._closed.add(item.id)
        now = self._clock()
        holders = {w for w, h in self._held.get(item.id, {}).items() if h.until > now}
        return len((answers | holders) - {who})


def order(seed: int, item: str, who: str) -> int:
    """The number of the answer that is on the left, by chance for each item and person."""
    return int(_fraction(f"{seed}/{item}/{who}") < 0.5)


def _fraction(text: str) -> float:
    """A number in [0, 1) that the text decides."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big") / 2**48
