"""The size of a stage's micro-batches, which is halved where memory runs out. It knows no model and
no batch: those who run micro-batches cut their work by it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch

from gearshift.errors import CapacityError
from gearshift.runtime.allocator import give_back_freed_memory, short_of_memory
from gearshift.runtime.distributed import world
from gearshift.runtime.terminal import echo, one_line

Micro = TypeVar("Micro")
Result = TypeVar("Result")


class MicroBatchSize:
    """How many tokens a micro-batch may have. A checkpoint holds the number, so that a stage that
    is resumed cuts its batches as before.
    """

    def __init__(self, tokens: int, key: str = "micro_batch_tokens") -> None:
        """`key` names the key of the recipe that asks for this size."""
        self.tokens, self.key = tokens, key

    def run(
        self,
        cut: Callable[[int, int], Iterable[Micro]],
        work: Callable[[Sequence[Micro]], Sequence[Result]],
        undo: Callable[[], None] = lambda: None,
    ) -> list[Result]:
        """What `work` gives for each of the micro-batches that `cut` makes for a size and a number
        of ranks. Each rank works on its own ones, and gets the results of all, in order.

        Where memory runs out in `work`, on any rank, it is done again, from the same random state,
        with micro-batches of half the size. So `work` must leave nothing behind when it raises,
        `undo` takes back what it left where it did not, and the results are those of a stage that
        had the smaller size from the start. The smaller size stays.

        Raises `CapacityError` where a smaller size would not cut the batch into more parts.
        """
        while True:
            micros, state = list(cut(self.tokens, world().size)), _random_state()
            own = world().share(micros)
            parts = world().each(lambda own=own: _attempt(work, own), "micro-batches")  # type: ignore[misc]
            reason = next((reason for _, reason in parts if reason), "")
            if not reason:
                return world().merged([part for part, _ in parts], len(micros))
            undo()
            del parts
            self._halve(cut, len(micros), reason)
            del micros
            give_back_freed_memory()
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()
            _set_random_state(state)

    def _halve(self, cut: Callable[[int, int], Iterable[Micro]], before: int, reason: str) -> None:
        tokens = self.tokens
        while tokens > 1:
            tokens //= 2
            if sum(1 for _ in cut(tokens, world().size)) > before:
                echo(
                    f"Memory ran out in a micro-batch of up to {self.tokens} tokens ({reason}); "
                    f"its update is done again, and the stage goes on, with {tokens}: "
                    f"{self.key}={tokens} avoids this."
                )
                self.tokens = tokens
                return
        raise CapacityError(
            f"{self.key}={self.tokens}: memory ran out ({reason}), and no smaller micro-batch "
            "exists, as a row and a prompt with one completion are never cut; shorten them, set "
            "engine.recompute=true, or take adapters (model.lora) or a smaller model."
        )

    def state_dict(self) -> dict[str, int]:
        """The size, for a checkpoint."""
        return {"tokens": self.tokens}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take the size of a checkpoint."""
        self.tokens = state["tokens"]


def _attempt(
    work: Callable[[Sequence[Micro]], Sequence[Result]], micros: Sequence[Micro]
) -> tuple[Sequence[Result], str]:
    """What `work` gives; or why memory ran out in it."""
    try:
        return work(micros), ""
    except (MemoryError, RuntimeError) as error:
        # The error holds its frames, and these hold tensors: it must be gone before the work is
        # done again.
        reason = one_line(short_of_memory(error), 200)
        if not reason:
            raise
    return [], reason


def _random_state() -> list[torch.Tensor]:
    """The states of torch's generators: the CPU's, and each GPU's where GPUs are in use."""
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *devices]


def _set_random_state(state: list[torch.Tensor]) -> None:
    torch.set_rng_state(state[0])
    if state[1:]:
        torch.cuda.set_rng_state_all(state[1:])
