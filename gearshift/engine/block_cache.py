"""Keys and values of live sequences, in blocks of positions that sequences share by reference.

Knows no model and no request. A block is in one of three states: free; in use (references to it
are counted); or kept, because it holds the keys of a run of tokens that a later prompt may begin
with. Kept blocks are evicted, the longest unused first, when free ones run out. Everything belongs
to one version of the weights: `reset_prefix_cache` makes what another version computed unreachable.
"""

from __future__ import annotations

import gc
import math
import mmap
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from gearshift.errors import CapacityError
from gearshift.kernels.specs import BLOCK


class KVCache:
    """`[1 + capacity, 2, K, P * D]` for each layer (keys and values of a block lie together), which
    is allocated once, when the layer first writes, and never moves. Keys lie as [D / 2, P, 2] and
    values as [P / 2, D, 2], as attention reads them. Block 0 belongs to no sequence: it takes
    writes that nothing reads.

    On a CPU a block takes memory when it is first written. So that a large capacity costs nothing,
    `allocate` gives only blocks that were opened.
    """

    def __init__(self, capacity: int) -> None:
        """`capacity`: blocks that there can be."""
        self.capacity, self.blocks = capacity, 0
        """Blocks that there can be; blocks that are open."""
        self._layers: dict[int, Tensor] = {}
        self._free: list[int] = []
        self._references = [0]
        # A run of tokens from a prompt's start is (serial of the run before, its last P tokens).
        # Serials are never used twice, so a run whose beginning was evicted cannot be mistaken.
        self._block_of_run: dict[tuple[int, tuple[int, ...]], int] = {}
        self._run_of_block: dict[int, tuple[int, tuple[int, ...]]] = {}
        self._serial_of_block: dict[int, int] = {}
        self._next_serial = 1
        self._kept: OrderedDict[int, None] = OrderedDict()

    def layer(self, index: int, like: Tensor) -> Tensor:
        """This layer's store; `like` [T, K, D] gives its type and sizes when it is new."""
        if index not in self._layers:
            _, K, D = like.shape
            self._layers[index] = _zeros((1 + self.capacity, 2, K, BLOCK * D), like)
        return self._layers[index]

    def open(self, blocks: int) -> None:
        """Open blocks until there are at least this many, or as many as there can be."""
        blocks = min(blocks, self.capacity)
        if blocks > self.blocks:
            self._free += reversed(range(1 + self.blocks, 1 + blocks))
            self._references += [0] * (blocks - self.blocks)
            self.blocks = blocks

    @property
    def available(self) -> int:
        """Blocks that `allocate` can give."""
        return len(self._free) + len(self._kept)

    def allocate(self) -> int:
        """A block with one reference. The caller has made sure that one is `available`."""
        if not self._free:
            self._evict(next(iter(self._kept)))
        block = self._free.pop()
        self._references[block] = 1
        return block

    def share(self, block: int) -> None:
        """Add a reference to the block."""
        if self._references[block] == 0:
            del self._kept[block]
        self._references[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Remove one reference from each of these blocks of a sequence, which are in order."""
        for block in reversed(list(blocks)):  # a run's end is evicted before its beginning
            self._references[block] -= 1
            if self._references[block] == 0:
                if block in self._serial_of_block:
                    self._kept[block] = None
                else:
                    self._free.append(block)

    def match_prefix(self, token_ids: Sequence[int]) -> list[int]:
        """The blocks that hold the longest known beginning of these tokens, but never all of them.
        This call does not share them; call `share` for each block that is used.
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

    def register_prefix(self, blocks: Sequence[int], token_ids: Sequence[int]) -> None:
        """Record that the blocks hold, or will hold after this forward, the keys of these tokens
        from a prompt's start. `match_prefix` finds the full ones from now on.
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

    def reset_prefix_cache(self) -> None:
        """Forget all prefixes."""
        for block in list(self._serial_of_block):
            self._evict(block)

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy the blocks `sources` to the blocks `targets`."""
        pairs = torch.tensor([sources, targets])
        for store in self._layers.values():
            source, target = pairs = pairs.to(store.device)
            store[target] = store[source]

    def bytes(self) -> int:
        """The bytes that the cache takes: on a CPU those of the open blocks, elsewhere those of all
        blocks.
        """
        return sum(
            store.nbytes // len(store) * (1 + self.blocks) if store.is_cpu else store.nbytes
            for store in self._layers.values()
        )

    def _evict(self, block: int) -> None:
        del self._block_of_run[self._run_of_block.pop(block)]
        del self._serial_of_block[block]
        if block in self._kept:
            del self._kept[block]
            self._free.append(block)


def _zeros(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """A tensor of zeros. On a CPU its memory comes from the system, which gives a page when it is
    first written.
    """
    size = math.prod(shape) * like.itemsize
    if not like.is_cpu or not hasattr(mmap, "MAP_ANONYMOUS"):
        return _zeros_on_gpu(shape, like, size)
    try:
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise CapacityError(
            f"The system does not give {size / 2**20:.0f} MiB to each layer of the cache "
            f"({error.strerror}); lower engine.max_num_seqs or set engine.kv_cache_tokens."
        ) from None
    return torch.frombuffer(pages, dtype=like.dtype).view(shape)


def _zeros_on_gpu(shape: tuple[int, ...], like: Tensor, size: int) -> Tensor:
    for again in (True, False):
        with suppress(torch.OutOfMemoryError):
            return torch.zeros(shape, dtype=like.dtype, device=like.device)
        if again:
            gc.collect()  # an engine that nothing uses any more may still have its cache
    raise CapacityError(
        f"The GPU does not give {size / 2**20:.0f} MiB to each layer of the cache; lower "
        "engine.gpu_memory_utilization or set engine.kv_cache_tokens."
    )
