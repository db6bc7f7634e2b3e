"""Keys and values of live sequences, in blocks of positions that sequences share by reference.

Knows no model and no request. A block is in one of three states: free; in use (references to it
are counted); or kept, because it holds the keys of a run of tokens that a later prompt may begin
with. Kept blocks are given up, the longest unused first, when free ones run out. Everything belongs
to one version of the weights: `forget` makes what another version computed unreachable.

Legend: P positions in a block, K key heads, D head size.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from gearshift.kernels.specs import BLOCK


class KVCache:
    """`[1 + blocks, 2, K, P * D]` for each layer (keys and values of a block lie together),
    allocated when a layer first writes. Keys lie as [D / 2, P, 2] and values as [P / 2, D, 2], as
    attention reads them. Block 0 is nobody's: it takes writes that nobody reads.
    """

    def __init__(self, limit: int | None = None) -> None:
        """`limit`: blocks that it has at most."""
        self.blocks, self._limit = 0, limit
        self.moves = 0
        """Grows when the layers' stores move."""
        self._layers: dict[int, Tensor] = {}
        self._free: list[int] = []
        self._references = [0]
        # A run of tokens from a prompt's start is (serial of the run before, its last P tokens).
        # Serials are never used twice, so a run whose beginning was given up cannot be mistaken.
        self._block_of_run: dict[tuple[int, tuple[int, ...]], int] = {}
        self._run_of_block: dict[int, tuple[int, tuple[int, ...]]] = {}
        self._serial_of_block: dict[int, int] = {}
        self._next_serial = 1
        self._kept: OrderedDict[int, None] = OrderedDict()

    def layer(self, index: int, like: Tensor) -> Tensor:
        """This layer's store; `like` [T, K, D] says of which shape and type, where it is new."""
        if index not in self._layers:
            _, K, D = like.shape
            self._layers[index] = torch.zeros(
                (1 + self.blocks, 2, K, BLOCK * D), dtype=like.dtype, device=like.device
            )
        return self._layers[index]

    def grow(self, blocks: int) -> None:
        """Have at least this many blocks; what is held stays."""
        blocks = blocks if self._limit is None else min(blocks, self._limit)
        more = blocks - self.blocks
        if more <= 0:
            return
        for index, store in self._layers.items():
            self._layers[index] = torch.cat([store, store.new_zeros((more, *store.shape[1:]))])
        self._free += reversed(range(1 + self.blocks, 1 + blocks))
        self._references += [0] * more
        self.blocks = blocks
        self.moves += 1

    @property
    def available(self) -> int:
        """Blocks that `allocate` can give."""
        return len(self._free) + len(self._kept)

    def allocate(self) -> int:
        """A block with one reference. The caller has made sure that one is `available`."""
        if not self._free:
            self._unlearn(next(iter(self._kept)))
        block = self._free.pop()
        self._references[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more reference."""
        if self._references[block] == 0:
            del self._kept[block]
        self._references[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """One reference less on each; the blocks of a sequence in order."""
        for block in reversed(list(blocks)):  # a run's end is given up before its beginning
            self._references[block] -= 1
            if self._references[block] == 0:
                if block in self._serial_of_block:
                    self._kept[block] = None
                else:
                    self._free.append(block)

    def known(self, token_ids: Sequence[int]) -> list[int]:
        """The blocks that hold the longest known beginning, less than all, of these tokens.

        They are not shared by this; `share` each that is used.
        """
        serial, found = 0, []
        for start in range(0, len(token_ids) - BLOCK, BLOCK):
            run = (serial, tuple(token_ids[start : start + BLOCK]))
            block = self._block_of_run.get(run)
            if block is None:
                break
            serial = self._serial_of_block[block]
            found.append(block)
        return found

    def learn(self, blocks: Sequence[int], token_ids: Sequence[int]) -> None:
        """The blocks hold, or in the present forward will hold, the keys of these tokens from a
        prompt's start; full ones can be found by `known` from now on.
        """
        serial = 0
        for i, block in enumerate(blocks[: len(token_ids) // BLOCK]):
            if block not in self._serial_of_block:
                run = (serial, tuple(token_ids[i * BLOCK : (i + 1) * BLOCK]))
                twin = self._block_of_run.get(run)
                if twin is not None:
                    serial = self._serial_of_block[twin]
                    continue
                self._block_of_run[run], self._run_of_block[block] = block, run
                self._serial_of_block[block] = self._next_serial
                self._next_serial += 1
            serial = self._serial_of_block[block]

    def forget(self) -> None:
        """No run is known any more."""
        for block in list(self._serial_of_block):
            self._unlearn(block)

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Blocks `targets` become `sources`."""
        for store in self._layers.values():
            store[torch.tensor(targets, device=store.device)] = store[
                torch.tensor(sources, device=store.device)
            ]

    def bytes(self) -> int:
        """Bytes held."""
        return sum(store.nbytes for store in self._layers.values())

    def _unlearn(self, block: int) -> None:
        del self._block_of_run[self._run_of_block.pop(block)]
        del self._serial_of_block[block]
        if block in self._kept:
            del self._kept[block]
            self._free.append(block)
