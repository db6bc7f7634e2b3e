"""Rewards add up as their docstring says, and the error of a faulty function has its name."""

import asyncio
import itertools
import sys
import threading
import time
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gearshift.errors import ConfigError
from gearshift.rewards.build import load_reward
from gearshift.rewards.functions import combine_rewards, is_usable
from gearshift.runtime.worker_threads import run_with_timeout

PROMPTS = [[{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]]
TEXTS = ["one", "three"]


def length(prompts: Any, completions: list[str], **_: Any) -> list[float | None]:
    return [float(len(c)) for c in completions]


def second_only(prompts: Any, completions: list[str], **_: Any) -> list[float | None]:
    return [None, 10]


async def later(prompts: Any, completions: list[str], *, bonus: list[float], **_: Any) -> Any:
    await asyncio.sleep(0.001)
    return bonus


def run(*functions: Any, columns: Any = None) -> Any:
    named = [(f.__name__, f, weight) for f, weight in functions]
    return combine_rewards(named, PROMPTS, TEXTS, [[1], [2]], columns or {})


def test_weights_and_none() -> None:
    totals, parts = run((length, 0.5), (second_only, 2.0))
    assert totals == [1.5, 22.5]
    assert parts == {"length": [3.0, 5.0], "second_only": [None, 10.0]}


def test_nothing_applies() -> None:
    assert run((second_only, 1.0))[0] == [None, 10.0]


def test_columns_and_async() -> None:
    totals, parts = run((later, 1.0), (length, 1.0), columns={"bonus": [0.25, 0.5]})
    assert totals == [3.25, 5.5]
    assert parts["later"] == [0.25, 0.5]


def test_async_inside_a_running_loop() -> None:
    async def notebook() -> Any:
        return run((later, 1.0), columns={"bonus": [1.0, 2.0]})[0]

    assert asyncio.run(notebook()) == [1.0, 2.0]


def test_not_finite_is_no_reward_and_no_total() -> None:
    def broken(**_: Any) -> list[float]:
        return [float("nan"), float("inf")]

    def endless(**_: Any) -> list[int]:
        return [10**400, -(10**400)]

    assert run((length, 1.0), (endless, 1.0))[0] == [None, None] and not is_usable(10**400)
    totals, parts = run((length, 1.0), (broken, 1.0))
    assert totals == [None, None]
    assert parts == {"length": [3.0, 5.0], "broken": [None, None]}


def test_tensors_and_flags_are_numbers() -> None:
    def tensors(**_: Any) -> Any:
        return torch.tensor([0.5, 2.0])

    def flags(**_: Any) -> Any:
        return (True, False)

    assert run((tensors, 1.0), (flags, 1.0))[0] == [1.5, 2.0]


@pytest.mark.parametrize(
    "values",
    [
        [Decimal("0.5"), Fraction(2, 1)],
        np.array([0.5, 2], dtype=np.float16),
        [np.array([0.5]), np.array(2)],
        torch.tensor([0.5, 2.0], dtype=torch.bfloat16, requires_grad=True),
        torch.tensor([[0.5], [2.0]]),
        (x for x in (0.5, 2)),
    ],
)
def test_numbers_may_be_of_any_type(values: Any) -> None:
    def culprit(**_: Any) -> Any:
        return values

    assert run((culprit, 1.0))[0] == [0.5, 2.0]


def test_a_function_may_change_its_arguments_and_no_other_sees_it() -> None:
    def changes(prompts: Any, completions: Any, completion_ids: Any, rows: Any) -> Any:
        prompts[0][0]["content"] = "changed"
        completions.clear()
        completion_ids[0].append(7)
        rows[1]["gold"] = "changed"
        rows.reverse()
        return [0, 0]

    def reads(prompts: Any, completions: Any, completion_ids: Any, rows: Any) -> Any:
        assert (prompts, completions, completion_ids) == (PROMPTS, TEXTS, [[1], [2]])
        assert rows == [{"gold": "a"}, lock]
        return [1, 2]

    lock = threading.Lock()  # has no copies
    rows: list[Any] = [{"gold": "a"}, {"gold": "b"}]
    with pytest.raises(ConfigError, match=r"reads raised AssertionError"):
        run((changes, 1.0), (reads, 1.0), columns={"rows": rows})
    assert rows == [{"gold": "a"}, {"gold": "b"}] and PROMPTS[0][0]["content"] == "a"
    rows[1] = lock
    assert run((reads, 1.0), columns={"rows": rows})[0] == [1, 2]


def test_two_functions_of_one_name_are_both_reported() -> None:
    _, parts = run((length, 1.0), (length, 2.0))
    assert list(parts.values()) == [[3.0, 5.0], [3.0, 5.0]]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ([1.0], "returned 1 reward for 2"),
        (None, "returned None"),
        (1.0, "returned 1.0"),
        (["1", "2"], "returned '1' as a reward"),
        (torch.zeros(2, 2), "as a reward"),
        ([1j, 1], "returned 1j as a reward"),
        (np.array([1 + 1j, 1]), "as a reward"),
        ({0: 1.0, 1: 2.0}, "returned {0: 1.0, 1: 2.0}; it must return a list"),
        ({1.0, 2.0}, "it must return a list"),
        (b"ab", "it must return a list"),
        (itertools.count(), "returned more than 2 rewards for 2"),
        (torch.tensor(1.0), "raised TypeError: iteration over a 0-d tensor"),
        ([{"a": 10**5000}, 1], "returned a dict as a reward"),
    ],
)
def test_wrong_answers_name_the_function(answer: Any, said: str) -> None:
    def culprit(**_: Any) -> Any:
        return answer

    with pytest.raises(ConfigError, match=f"culprit .*{said}"):
        run((length, 1.0), (culprit, 1.0))


def test_exceptions_name_the_function() -> None:
    def culprit(**_: Any) -> Any:
        raise ZeroDivisionError("by zero")

    async def culprit_later(**_: Any) -> Any:
        raise KeyError("gold")

    def leaves(**_: Any) -> Any:
        raise SystemExit(3)

    async def leaves_later(**_: Any) -> Any:
        raise SystemExit(3)

    def cancelled(**_: Any) -> Any:
        raise asyncio.CancelledError

    def one_by_one(**_: Any) -> Any:
        yield 1.0
        raise ZeroDivisionError("by zero")

    def closes(**_: Any) -> Any:
        raise GeneratorExit

    class Odd(float):
        def item(self) -> Any:
            sys.exit("no")

    def odd(**_: Any) -> Any:
        return [Odd(), 1.0]

    for function, said in ((closes, "closes raised GeneratorExit"), (odd, "odd raised SystemExit")):
        with pytest.raises(ConfigError, match=said):
            run((function, 1.0))
    with pytest.raises(ConfigError, match="cancelled raised CancelledError;"):
        run((cancelled, 1.0))
    with pytest.raises(ConfigError, match="one_by_one raised ZeroDivisionError: by zero"):
        run((one_by_one, 1.0))
    for function in (leaves, leaves_later):
        with pytest.raises(ConfigError, match=f"{function.__name__} raised SystemExit"):
            run((function, 1.0))
    with pytest.raises(ConfigError, match="culprit raised ZeroDivisionError: by zero"):
        run((culprit, 1.0))
    with pytest.raises(ConfigError, match="culprit_later raised KeyError"):
        run((culprit_later, 1.0))
    with pytest.raises(ConfigError, match=r"later raised TypeError.*bonus"):
        run((later, 1.0))


def test_what_looks_like_ctrl_c_is_so_only_in_the_main_thread() -> None:
    def interrupts(**_: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run((interrupts, 1.0))
    with pytest.raises(ConfigError, match="interrupts raised KeyboardInterrupt"):
        run_with_timeout(None, lambda: run((interrupts, 1.0)))


def test_a_coroutine_that_never_ends_can_be_ended() -> None:
    async def never(**_: Any) -> Any:
        await asyncio.Event().wait()

    threads = threading.active_count()
    with pytest.raises(TimeoutError):
        run_with_timeout(0.2, lambda: run((never, 1.0)))
    deadline = time.monotonic() + 10
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.02)
    assert threading.active_count() == threads


def test_load_reward(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def short(completions, **_):\n    return [-len(c) for c in completions]\n")
    assert load_reward(f"{file}:short")(prompts=PROMPTS, completions=TEXTS) == [-3, -5]
    assert load_reward("gearshift.tasks.voice.commands:voice_reward").__name__ == "voice_reward"


def test_load_reward_says_what_is_missing(tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("1 / 0\n")
    leaves = tmp_path / "leaves.py"
    leaves.write_text("raise SystemExit\n")
    for spec, said in (
        ("nothing", "not of the form"),
        (f"{tmp_path}/none.py:f", "no reward file"),
        ("no_such_module.at_all:f", "no_such_module"),
        ("gearshift.rewards.functions:nothing", "no function `nothing`"),
        (f"{broken}:f", "ZeroDivisionError"),
        (f"{leaves}:f", "SystemExit"),
    ):
        with pytest.raises(ConfigError, match=said):
            load_reward(spec)
