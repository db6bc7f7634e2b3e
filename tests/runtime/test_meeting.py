"""Ranks that torchrun starts again never meet by what an earlier start left."""

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from gearshift.errors import RankError
from gearshift.runtime import meeting


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A store that each thread sees as the rank of its name."""
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=10))

    def seen(patience: timedelta) -> tuple[Any, int, int]:
        return store, int(threading.current_thread().name.rpartition("_")[2]), 3

    monkeypatch.setattr(meeting, "_store", seen)
    return store


def names_of_a_start() -> set[str]:
    """The names that three ranks have; each is a thread."""
    together = threading.Barrier(3)

    def name() -> str:
        together.wait()
        return meeting._start.__wrapped__(timedelta(seconds=10))

    with ThreadPoolExecutor(3) as pool:
        return {call.result() for call in [pool.submit(name) for _ in range(3)]}


def test_all_ranks_of_a_start_have_one_name_and_the_next_start_another(store: Any) -> None:
    first, second = names_of_a_start(), names_of_a_start()
    assert len(first) == len(second) == 1 and first != second


def test_ranks_that_ended_while_they_asked_are_not_waited_for(store: Any) -> None:
    for rank in (1, 2):
        store.set(f"asks/{rank}", "of a rank that has ended")
    assert len(names_of_a_start()) == 1


def test_a_rank_that_does_not_come_is_named(store: Any) -> None:
    store.set_timeout(timedelta(seconds=0.2))
    with ThreadPoolExecutor(1) as pool, pytest.raises(RuntimeError, match="rank 1 did not come"):
        pool.submit(meeting._start.__wrapped__, timedelta(seconds=0.2)).result()


def test_a_store_that_is_gone_is_looked_for_no_longer_than_the_timeout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As where torchrun was killed while its ranks began."""
    asked: list[float] = []

    def gone(url: str, timeout: timedelta) -> Any:
        asked.append(timeout.total_seconds())
        raise RuntimeError("the store is gone")

    monkeypatch.setattr(meeting, "rendezvous", gone)
    monkeypatch.setattr(meeting, "_known", [])
    with pytest.raises(RankError, match="the store is gone"):
        meeting.meet(7.0)
    assert asked == [7.0]
