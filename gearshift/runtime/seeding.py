"""Random numbers without hidden state: counter-based uniforms, and seeds derived from names.

Reproducibility rests on this file: a number depends on (seed, request, sample, position) only,
never on batching, on earlier numbers, or on the device. It must not import anything that knows a
model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


Words = int | Tensor


def philox4x32(counter: Sequence[Tensor], key: tuple[Words, Words]) -> list[Tensor]:
    """Philox4x32-10: four random 32-bit words for each counter of four words, under a key of two
    words.

    `counter` is four int64 tensors of one shape, with values in [0, 2^32), and so is the result. A
    round maps (c0, c1, c2, c3) to (hi(M1 c2) ^ c1 ^ k0, lo(M1 c2), hi(M0 c0) ^ c3 ^ k1, lo(M0 c0)).
    Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The product wraps in int64; its bits are right, and the mask removes the copies of the
        # sign.
        left, right = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = ((right >> 32) & _WORD) ^ c1 ^ k0, right & _WORD
        c2, c3 = ((left >> 32) & _WORD) ^ c3 ^ k1, left & _WORD
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return [c0, c1, c2, c3]


def philox_uniform(
    seed: int | Tensor, request_ids: Tensor, sample: Tensor, positions: Tensor
) -> Tensor:
    """[B] float64, uniform in (0, 1) and never 0 or 1: one number for each (request, sample,
    position).

    request_ids [B] is int64; sample and positions [B] are below 2^32; or all have shapes that
    broadcast. The seed is one number, or [B] of them. The counter is (request low, request high,
    sample, position), and the key is the seed's low 64 bits.
    """
    requests = request_ids.long()
    counter = [requests & _WORD, (requests >> 32) & _WORD, sample.long(), positions.long()]
    high, low, _, _ = philox4x32(counter, (seed & _WORD, (seed >> 32) & _WORD))
    bits = (high << 21) | (low >> 11)
    # 53 bits fill a double exactly, so the largest value stays below 1; a zero becomes the next
    # value.
    return bits.clamp(min=1).double() * 2.0**-53


def named_seed(seed: int, name: str) -> int:
    """A seed in [0, 2^63) for one named use of the run's seed; it is the same on every machine."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator for one named use; two uses never share a stream."""
    return torch.Generator().manual_seed(named_seed(seed, name))
