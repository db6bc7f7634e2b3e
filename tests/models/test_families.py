"""Every type that `AutoModelForCausalLM` knows is right or refused; docs/models.md says which."""

from pathlib import Path

import pytest
import transformers

from tests.models.families import PAGE, Verdict, cases, judge, page

WRITTEN = PAGE.read_text(encoding="utf-8")
found: dict[str, Verdict] = {}


@pytest.mark.parametrize("name", cases())
def test_right_or_refused(name: str, tmp_path: Path) -> None:
    kind, options = cases()[name]
    found[name] = judge(kind, options, tmp_path)
    section = WRITTEN.split("## Right")[1].split("## Refused")[0]
    if transformers.__version__ in WRITTEN:
        right = f"`{name}`" in section or f"| {name} | right" in WRITTEN
        assert found[name].right == right, found[name].how


def test_the_page_says_so() -> None:
    if len(found) < len(cases()) or transformers.__version__ not in WRITTEN:
        pytest.skip("not every type was run, or the page is of another version")
    assert page(found) == WRITTEN, "run python -m tests.models.families"
