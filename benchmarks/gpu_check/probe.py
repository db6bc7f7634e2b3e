"""What a step of the check is given: the device, timers, and the lines that it reports."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any, TypeVar

import torch

GIB = 2**30
Line = dict[str, Any]
"""{"step", "case", "ok", "want", "got", "unit", "seconds", "peak_gb"}; ok is None where nothing is
asserted. A case that failed in another way has "error", and one that did not run has "why".
"""
T = TypeVar("T")


class Probe:
    """Measures on one device, and sends a line for each case."""

    def __init__(
        self, step: str, device: torch.device, deadline: float, send: Callable[[Line], None]
    ) -> None:
        """`deadline`: the value of `time.monotonic()` at which the step is killed."""
        self.step, self.device, self.deadline, self._send = step, device, deadline, send
        self._began = time.monotonic()

    @property
    def cuda(self) -> bool:
        """Whether this runs on a card, in full sizes."""
        return self.device.type == "cuda"

    def size(self, card: T, tiny: T) -> T:
        """A size on a card, or the one that takes its place on a CPU."""
        return card if self.cuda else tiny

    @property
    def left(self) -> float:
        """Seconds until the step is killed."""
        return self.deadline - time.monotonic()

    def line(self, case: str, ok: bool | None = None, **more: Any) -> None:
        """Send a line; its seconds and its peak are of the time since the last one."""
        now = time.monotonic()
        found = {"step": self.step, "case": case, "ok": ok, "want": None, "got": None, "unit": ""}
        self._send(
            {**found, **more, "seconds": round(now - self._began, 2), "peak_gb": self.peak()}
        )
        self._began = now
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()

    def shows(self, case: str, got: Any, unit: str = "") -> None:
        """A figure of which nothing is asserted."""
        self.line(case, None, got=rounded(got), unit=unit)

    def holds(
        self, case: str, ok: bool, got: Any = None, want: str = "yes", unit: str = ""
    ) -> None:
        """Assert something on every device."""
        self.line(
            case, bool(ok), got=bool(ok) if got is None else rounded(got), want=want, unit=unit
        )

    def at_most(self, case: str, got: float, most: float, unit: str = "") -> None:
        """Assert a bound on every device; a NaN fails."""
        self.holds(case, got <= most, got, f"<= {most:g}", unit)

    def fast(self, case: str, got: float, least: float, unit: str = "") -> None:
        """Assert a speed, which only a card has."""
        ok = got >= least if self.cuda else None
        self.line(case, ok, got=rounded(got), want=f">= {least:g}", unit=unit)

    def quick(self, case: str, got: float, most: float, unit: str = "") -> None:
        """Assert a duration, or another cost, that only a card has."""
        ok = got <= most if self.cuda else None
        self.line(case, ok, got=rounded(got), want=f"<= {most:g}", unit=unit)

    def omits(self, case: str, why: str) -> None:
        """A case that cannot run here, and why."""
        self.line(case, None, why=why)

    @contextmanager
    def case(self, name: str) -> Iterator[None]:
        """What raises inside is this case's failure, and the step goes on."""
        try:
            yield
        except Exception as error:
            self.line(name, False, error=described(error))
        finally:
            self.tidy()

    def sync(self) -> None:
        """Wait until the device has done everything."""
        if self.cuda:
            torch.cuda.synchronize()

    def tidy(self) -> None:
        """Give memory back that nothing uses."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def allocated(self) -> int:
        """Bytes of tensors on the card; 0 on a CPU."""
        return torch.cuda.memory_allocated() if self.cuda else 0

    def peak(self) -> float | None:
        """GiB that tensors took at most since the last line; None on a CPU."""
        return round(torch.cuda.max_memory_allocated() / GIB, 3) if self.cuda else None

    def wall(self, run: Callable[[], object]) -> float:
        """Seconds of one call, until the device is done."""
        self.sync()
        began = time.perf_counter()
        run()
        self.sync()
        return time.perf_counter() - began

    def seconds(self, run: Callable[[], object], repeats: int = 5, warmups: int = 2) -> float:
        """The median duration of a call: by CUDA events on a card."""
        for _ in range(warmups):
            run()
        if not self.cuda:
            return median(self.wall(run) for _ in range(repeats))
        self.sync()
        marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for begin, end in marks:
            begin.record()
            run()
            end.record()
        self.sync()
        return median(begin.elapsed_time(end) / 1e3 for begin, end in marks)

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Random numbers on the device: zeros would be faster than real ones."""
        return torch.randn(*shape, device=self.device, dtype=torch.float32).to(dtype)


def rounded(value: Any) -> Any:
    """A figure with four digits; lists and dicts of them likewise."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {name: rounded(x) for name, x in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [rounded(x) for x in value]
    return value


def described(error: BaseException) -> str:
    """An error in one line."""
    if isinstance(error, ModuleNotFoundError):
        return f"the package {error.name} is missing; install it to run this"
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]
