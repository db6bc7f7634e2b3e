"""CUDA graphs have one stream and one pool, and nothing is captured that cannot be: with a fake of
`torch.cuda`, and on a card (GEARSHIFT_TEST_DEVICE=cuda) with the real one.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor

from gearshift.errors import KernelError
from gearshift.kernels.cuda_graphs import CudaGraphs, HostWaits
from tests.device import on_card


class FakeCuda:
    """Notes what is asked of `torch.cuda`, and refuses what an allocator refuses."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.streams = 0
        self.current: Any = self.Stream()
        self.live: dict[tuple[int, int], int] = {}
        """Graphs that are alive, by pool; 0: a pool that was used and is closed."""
        self.modes: list[str] = []
        self.collects: list[bool] = []

    def Stream(self) -> Any:
        self.streams += 1
        return FakeStream(self, self.streams)

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def graph_pool_handle(self) -> tuple[int, int]:
        return len(self.live), 1

    def CUDAGraph(self) -> Any:
        return FakeGraph(self)

    def memory_snapshot(self) -> list[dict[str, Any]]:
        used = [{"segment_pool_id": [*pool], "total_size": 100} for pool in self.live]
        return [*used, {"segment_pool_id": (0, 0), "total_size": 7}]

    def note(self, what: str) -> Callable[[], None]:
        return lambda: self.asked.append(f"{what} on {self.current.number}")


class FakeStream:
    def __init__(self, cuda: FakeCuda, number: int) -> None:
        self.cuda, self.number = cuda, number

    def wait_stream(self, other: Any) -> None:
        self.cuda.asked.append(f"{self.number} waits for {other.number}")


class FakeGraph:
    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda, self._pool = cuda, (0, 0)

    def capture_begin(self, pool: tuple[int, int], capture_error_mode: str) -> None:
        if self._cuda.live.get(pool) == 0:
            raise RuntimeError("use_count > 0 INTERNAL ASSERT FAILED")
        self._pool = pool
        self._cuda.live[pool] = self._cuda.live.get(pool, 0) + 1
        self._cuda.modes.append(capture_error_mode)
        self._cuda.collects.append(gc.isenabled())
        self._cuda.note("begin")()

    def capture_end(self) -> None:
        self._cuda.note("end")()

    def replay(self) -> None:
        self._cuda.note("replay")()

    def pool(self) -> tuple[int, int]:
        return self._pool

    def __del__(self) -> None:
        if self._pool in self._cuda.live:
            self._cuda.live[self._pool] -= 1


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    for name in ("Stream", "stream", "graph_pool_handle", "CUDAGraph", "memory_snapshot"):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: fake.current)
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, fake.note(name))
    return fake


def step(cuda: FakeCuda) -> tuple[Callable[[], None], Callable[[], Tensor]]:
    def run() -> Tensor:
        cuda.note("run")()
        return torch.ones(1)

    return cuda.note("prepare"), run


def test_one_stream_warms_up_and_captures(cuda: FakeCuda) -> None:
    graphs = CudaGraphs()
    captured = [graphs.capture(*step(cuda)) for _ in range(2)]
    one = [
        "2 waits for 1", "prepare on 2", "run on 2", "synchronize on 1", "begin on 2",
        "prepare on 2", "run on 2", "end on 2", "1 waits for 2",
    ]  # fmt: skip
    assert cuda.asked == 2 * one
    assert [*cuda.live.values()] == [2] and cuda.streams == 2 and cuda.current.number == 1
    assert cuda.modes == 2 * ["thread_local"] and cuda.collects == 2 * [False] and gc.isenabled()
    assert all(graph is not None and graph().item() == 1 for graph in captured)
    assert cuda.asked[-2:] == 2 * ["replay on 1"]
    assert graphs.bytes() == 100


def test_a_pool_whose_graphs_are_gone_is_not_opened_again(cuda: FakeCuda) -> None:
    graphs = CudaGraphs()
    captured = [graphs.capture(*step(cuda)) for _ in range(2)]
    captured.clear()
    assert graphs.bytes() == 0
    assert graphs.capture(*step(cuda)) is not None
    assert len(cuda.live) == 2
    assert cuda.streams == 2, "the stream stays, and cuBLAS's workspace with it"


def test_a_graph_keeps_the_tensors_of_its_step(cuda: FakeCuda) -> None:
    """It reads them by address, and the memory of a tensor that is gone becomes another's."""

    def capture(x: Tensor, y: Tensor) -> Any:
        def prepare() -> None:
            y.zero_()

        return CudaGraphs().capture(prepare, lambda: x + y)

    held = [torch.ones(3), torch.ones(3)]
    alive = [*map(ref, held)]
    captured = capture(*held)
    held.clear()
    assert all(one() is not None for one in alive)
    del captured
    assert [one() for one in alive] == [None, None]


@pytest.mark.parametrize(
    "wait",
    [
        Tensor.item,
        Tensor.nonzero,
        lambda x: x[x > 0],
        lambda x: x.masked_fill_(x > 0, 1).bincount(),
        lambda x: torch.repeat_interleave(x),
        torch.unique,
        lambda x: torch.empty(4, device="meta")[x],  # the index is copied to the other device
    ],
)
def test_a_step_that_waits_is_known_before_its_capture(
    cuda: FakeCuda, wait: Callable[[Tensor], object]
) -> None:
    def run() -> Tensor:
        wait(torch.ones(1, dtype=torch.int64))
        return torch.ones(1)

    assert CudaGraphs().capture(lambda: None, run) is None
    assert not any(asked.startswith("begin") for asked in cuda.asked)
    assert cuda.asked[-1] == "1 waits for 2" and cuda.current.number == 1


def test_what_does_not_wait_is_let_through() -> None:
    x = torch.ones(4)
    with HostWaits() as waits:
        x[torch.tensor([0, 1])] = x.index_select(0, torch.tensor([1, 2])).to(torch.float64).float()
        torch.where(x > 0, 1.0, x).cumsum(0).clone().copy_(x)
    assert waits.found is None


@pytest.mark.parametrize(
    ("error", "way_out"),
    [
        (RuntimeError("operation not permitted\nwhile capturing"), "engine.capture_steps=false"),
        (torch.OutOfMemoryError("CUDA out of memory"), "engine.gpu_memory_utilization"),
    ],
)
def test_a_capture_that_fails_says_so(cuda: FakeCuda, error: Exception, way_out: str) -> None:
    calls = 0

    def run() -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise error
        return torch.ones(1)

    with pytest.raises(KernelError, match=way_out):
        CudaGraphs().capture(lambda: None, run)
    assert cuda.asked[-2:] == ["end on 2", "1 waits for 2"] and gc.isenabled()
    assert cuda.current.number == 1


@on_card
def test_graphs_on_a_card_compute_what_their_steps_do(device: torch.device) -> None:
    """Also after all graphs of a pool are gone, and while another thread could use the card."""
    x, weight = torch.zeros(8, 64, device=device), torch.randn(64, 64, device=device)
    graphs = CudaGraphs()
    for _ in range(3):
        captured = [graphs.capture(lambda: None, lambda n=n: x[:n] @ weight) for n in (8, 4, 1)]
        x.normal_()
        for n, graph in zip((8, 4, 1), captured, strict=True):
            assert graph is not None
            assert torch.equal(graph(), x[:n] @ weight)
        assert 0 < graphs.bytes() < 2**28
        assert torch.cuda.current_stream() == torch.cuda.default_stream()
        captured.clear()
    assert graphs.bytes() == 0
