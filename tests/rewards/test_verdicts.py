"""Verdicts of `tests/rewards/verdicts.py`: here some of every kind; in `tests/reliability` all."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from gearshift.errors import ConfigError
from gearshift.rewards.sandbox import check_sandboxed, run_sandboxed
from tests.rewards.verdicts import Case, all_cases

try:
    run_sandboxed("")
except ConfigError as error:
    pytestmark = pytest.mark.skip(reason=str(error))

NAMED = (
    "all_map-wrong0", "zip_map-wrong0", "stop_wanted-right0", "not_over-wrong", "nan_wanted-wrong0",
    "own_sum-right0", "own_sum-wrong", "own_max-wrong", "own_abs_near-wrong",
    "counter-right", "generator-right0", "closure-right",
    "callback-right0", "in_place-right", "against_sorted-wrong0", "stack-right",
    "method_near-wrong",
    "forged-wrong", "opened_up-wrong0", "bare_except-wrong0", "except_exception-wrong0",
    "context_swallows-wrong0", "assert_in_callback-wrong", "unusable-numpy-0", "unusable-derived-1",
    "unusable-nothing_asked-0", "swallowed_in_with-wrong0", "swallowed_index-wrong0",
    "equal_to_all-wrong0", "annotations-right0", "exit_name-right",
    "stdlib_given-right",
)  # fmt: skip


def of_each_kind() -> list[Case]:
    cases = list(all_cases())
    named = [case for case in cases if any(name in case.name for name in NAMED)]
    return [*named, *(case for case in cases[::80] if case not in named)]


def false_verdicts(cases: list[Case]) -> list[str]:
    def verdict(case: Case) -> str:
        return check_sandboxed(case.program, case.tests, entry_point=case.entry_point).status

    with ThreadPoolExecutor(4) as pool:
        said = pool.map(verdict, cases)
        return [f"{c.name}: {s}" for c, s in zip(cases, said, strict=True) if s != c.verdict]


def test_no_verdict_is_false() -> None:
    assert false_verdicts(of_each_kind()) == []
