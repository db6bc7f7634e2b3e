"""How a rank ends on an error in work during which ranks gather layers from each other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gearshift.errors import CapacityError, RankError
from gearshift.runtime.allocator import short_of_memory
from gearshift.runtime.distributed import world
from gearshift.runtime.terminal import one_line


@contextmanager
def ends_alone() -> Iterator[None]:
    """With what is raised inside, this rank ends without a meeting: the others wait for it in a
    layer, and not where ranks meet.
    """
    try:
        yield
    except BaseException as error:
        told: Any = error
        if getattr(error, "ends_alone", False):
            raise
        if reason := one_line(short_of_memory(error), 200):
            told = CapacityError(
                f"Memory ran out in a micro-batch ({reason}), which cannot be done again where "
                "weights are split (scale.strategy); lower micro_batch_tokens."
            )
        elif isinstance(error, RuntimeError):
            told = RankError(
                f"Rank {world().rank} failed in a micro-batch, or another rank did not come to a "
                f"layer ({one_line(str(error), 200)}); the same command goes on from the last "
                "checkpoint."
            )
        told.ends_alone = True
        if told is error:
            raise
        raise told from error
