"""Philox against its published vectors; what is drawn depends on its counter alone."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch

from gearshift.runtime.seeding import generator, named_seed, philox4x32, philox_uniform

# The known-answer vectors of Random123 (kat_vectors, philox4x32-10).
VECTORS = [
    ("00000000 " * 4, "00000000 " * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "answer"), VECTORS)
def test_philox_gives_the_published_answers(counter: str, key: str, answer: str) -> None:
    k0, k1 = words(key)
    out = philox4x32([torch.tensor([w]) for w in words(counter)], (k0, k1))
    assert [int(w) for w in out] == words(answer)


def draw(seed: int, request: list[int], sample: list[int], position: list[int]) -> torch.Tensor:
    return philox_uniform(seed, *(torch.tensor(x) for x in (request, sample, position)))


def test_uniform_is_made_of_the_first_two_words() -> None:
    # Counter and key of zeros: 53 bits of 6627e8d5 e169c58d.
    bits = 0x6627E8D5E169C58D >> 11
    assert draw(0, [0], [0], [0]).item() == bits / 2**53


def test_uniform_does_not_depend_on_the_batch() -> None:
    request, sample, position = torch.randint(0, 2**31, (3, 64)).unbind()
    request = request << 31
    together = philox_uniform(7, request, sample, position)
    order = torch.randperm(64)
    shuffled = philox_uniform(7, request[order], sample[order], position[order])
    assert torch.equal(together[order], shuffled)
    alone = [
        philox_uniform(7, request[i : i + 1], sample[i : i + 1], position[i : i + 1]) for i in order
    ]
    assert torch.equal(shuffled, torch.cat(alone))


def test_each_part_of_the_counter_and_the_seed_counts() -> None:
    base: dict[str, Any] = dict(seed=1, request=[5], sample=[2], position=[3])
    changes: list[dict[str, Any]] = [
        {}, {"seed": 2}, {"seed": 1 + 2**32}, {"seed": -1}, {"request": [6]},
        {"request": [5 + 2**32]}, {"request": [-5]}, {"sample": [3]}, {"position": [2]},
    ]  # fmt: skip
    drawn = {draw(**{**base, **change}).item() for change in changes}
    assert len(drawn) == len(changes)


def test_uniform_is_uniform_and_stays_inside() -> None:
    n = 200_000
    u = philox_uniform(3, torch.arange(n) // 100, torch.zeros(n), torch.arange(n) % 100)
    assert u.dtype == torch.float64
    assert u.min() > 0 and u.max() < 1
    counts = torch.histc(u, bins=64, min=0, max=1)
    chi2 = ((counts - n / 64) ** 2 / (n / 64)).sum()
    assert chi2 < 110  # 63 degrees of freedom: beyond 110 about once in 5,000 seeds
    lag = torch.corrcoef(torch.stack([u[:-1], u[1:]]))[0, 1]
    assert abs(lag) < 4 / n**0.5


@pytest.mark.parametrize("word", [0, 0xFFFFFFFF])
def test_uniform_is_never_0_or_1(word: int, monkeypatch: pytest.MonkeyPatch) -> None:
    extreme = torch.tensor([word])
    monkeypatch.setattr("gearshift.runtime.seeding.philox4x32", lambda *_: [extreme] * 4)
    assert 0 < draw(0, [0], [0], [0]).item() < 1


def test_named_seeds_are_stable_and_apart() -> None:
    digest = hashlib.blake2b(b"7/sft", digest_size=8).digest()
    assert named_seed(7, "sft") == int.from_bytes(digest, "little") >> 1
    seeds = {named_seed(s, n) for s in range(50) for n in ("sft", "rl", "rl/0")}
    assert len(seeds) == 150
    assert all(0 <= s < 2**63 for s in seeds)


def test_generators_repeat_and_do_not_share() -> None:
    first = torch.rand(4, generator=generator(1, "a"))
    assert torch.equal(first, torch.rand(4, generator=generator(1, "a")))
    assert not torch.equal(first, torch.rand(4, generator=generator(1, "b")))
