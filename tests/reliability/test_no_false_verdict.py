"""Code is right or wrong as its row's tests say: none of more than a thousand verdicts is false."""

import pytest

from gearshift.errors import ConfigError
from gearshift.rewards.sandbox import run_sandboxed
from tests.rewards.test_verdicts import false_verdicts
from tests.rewards.verdicts import all_cases

try:
    run_sandboxed("")
except ConfigError as error:
    pytestmark = pytest.mark.skip(reason=str(error))


@pytest.mark.slow
def test_no_verdict_is_false() -> None:
    cases = list(all_cases())
    assert len(cases) > 1000 and len({case.name for case in cases}) == len(cases)
    assert false_verdicts(cases) == []
