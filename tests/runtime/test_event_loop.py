"""A coroutine is run to its end from plain code, and leaves nothing running behind."""

import asyncio
from typing import Any

import pytest

from gearshift.runtime.event_loop import run_coroutine


async def answer() -> int:
    await asyncio.sleep(0)
    return 7


def test_it_runs_also_inside_a_running_loop() -> None:
    async def outer() -> list[Any]:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        found = [run_coroutine(answer()), run_coroutine(answer())]
        with pytest.raises(KeyError):
            run_coroutine(fails())
        assert asyncio.get_running_loop() is loop and asyncio.current_task() is task
        await asyncio.sleep(0)
        return found

    async def fails() -> None:
        raise KeyError

    assert run_coroutine(answer()) == 7 and asyncio.run(outer()) == [7, 7]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_what_still_runs_is_cancelled_and_cleans_up(
    error: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    cleaned: list[int] = []

    async def waits(i: int) -> None:
        try:
            await asyncio.sleep(100)
        finally:
            await asyncio.sleep(0)
            cleaned.append(i)

    async def raises() -> None:
        await asyncio.sleep(0)
        raise error

    async def main() -> None:
        await asyncio.gather(*map(waits, range(3)), raises())

    with pytest.raises(error):
        run_coroutine(main())
    assert sorted(cleaned) == [0, 1, 2] and not caplog.records
