"""Who is asked what."""

import random

import pytest

from gearshift.data.labels import Item, Labels
from gearshift.serve.labelling.deal import LEASE, Dealer, order


class Desk:
    """Items and people, without a store."""

    def __init__(self, items: int, gold: int = 0, **how: float) -> None:
        self.labels, self.now, self.count = Labels(), 0.0, 0
        seed = int(how.pop("seed", 0))
        self.dealer = Dealer(self.labels, seed, clock=lambda: self.now, **how)
        for i in range(items + gold):
            name = f"{i:016x}"
            known = 0 if i >= items else None
            self.labels.items[name] = Item(name, [], ["a", "b"], gold=known, number=i)

    def answer(self, who: str, item: Item, kind: str = "pair") -> None:
        shown = {"left": 0, "right": 1, "order_seed": 0}
        event = {"id": f"{self.count}", "kind": kind, "item": item.id, "who": who}
        self.count += 1
        self.labels.add({**event, "choice": "left", "shown": shown})
        self.dealer.answered(who, item.id)


@pytest.mark.parametrize("seed", range(5))
def test_overlap_is_as_asked_and_nobody_is_asked_twice(seed: int) -> None:
    desk, draw = Desk(250, overlap=0.2, seed=seed), random.Random(seed)
    people = ["ann", "bob", "cid", "dee", "eve"]
    seen: dict[str, list[str]] = {who: [] for who in people}
    for _ in range(5000):
        who = draw.choice(people)
        if items := desk.dealer.deal(who, "t", draw.randint(1, 3)):
            seen[who].append(items[0].id)
            desk.answer(who, items[0])
    assert all(len(ids) == len(set(ids)) for ids in seen.values())
    times = [len(desk.labels.of(item)) for item in desk.labels.items]
    assert set(times) == {1, 2}
    assert abs(times.count(2) - 50) <= 3


def test_what_a_tab_has_comes_first_and_other_tabs_get_other_items() -> None:
    desk = Desk(10)
    first = desk.dealer.deal("ann", "one", 2)
    assert desk.dealer.deal("ann", "one", 3)[:2] == first
    other = desk.dealer.deal("ann", "two", 2) + desk.dealer.deal("bob", "one", 2)
    assert len({item.id for item in first + other}) == 6


def test_no_item_is_lost_when_a_person_goes() -> None:
    desk = Desk(3)
    taken = desk.dealer.deal("ann", "t", 3)
    assert len(taken) == 3 and not desk.dealer.deal("bob", "t", 1)
    desk.now = LEASE + 1
    [item] = desk.dealer.deal("bob", "t", 1)
    desk.answer("bob", item)
    assert item not in desk.dealer.deal("ann", "t", 3), "it went to bob meanwhile"
    assert len(desk.dealer.deal("ann", "t", 3)) == 2
    desk.dealer.leave("ann")
    assert len(desk.dealer.deal("bob", "t", 3)) == 2


def test_a_skipped_item_goes_to_somebody_else() -> None:
    desk = Desk(1)
    [item] = desk.dealer.deal("ann", "t", 1)
    desk.answer("ann", item, "skip")
    assert not desk.dealer.deal("ann", "t", 1)
    assert desk.dealer.left("ann") == 0 and desk.dealer.left("bob") == 1
    assert desk.dealer.deal("bob", "t", 1) == [item]


def test_an_item_that_is_taken_back_comes_next() -> None:
    desk = Desk(5)
    item, _ = desk.dealer.deal("ann", "t", 2)
    desk.answer("ann", item)
    desk.labels.add({"id": "u", "kind": "undo", "item": item.id, "who": "ann", "undoes": "0"})
    desk.dealer.ask_again("ann", "t", item.id)
    assert desk.dealer.deal("ann", "t", 1) == [item]


def test_known_items_go_to_everybody_now_and_then() -> None:
    desk = Desk(200, gold=5, overlap=0.0)
    for who in ("ann", "bob"):
        asked = []
        for _ in range(90):
            [item] = desk.dealer.deal(who, "t", 1)
            desk.answer(who, item)
            asked.append(item.gold)
        assert 2 <= asked.count(0) <= 5
    last = desk.dealer.deal("ann", "t", 50)
    assert 25 < len(last) < 35


def test_sides_are_by_chance_and_always_the_same() -> None:
    sides = [order(0, f"{i}", "ann") for i in range(1000)]
    assert 430 < sum(sides) < 570
    assert sides == [order(0, f"{i}", "ann") for i in range(1000)]
    assert sides != [order(0, f"{i}", "bob") for i in range(1000)]
