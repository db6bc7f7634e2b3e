"""Mutations are of the code as it is. `python -m tests.mutations` runs them, which takes long."""

from collections import Counter

from tests.mutations.__main__ import MUTATIONS, ROOT


def test_every_mutation_finds_its_text_and_its_tests() -> None:
    for mutation in MUTATIONS:
        source = (ROOT / "gearshift" / mutation.file).read_text(encoding="utf-8")
        assert mutation.old in source, mutation.name
        for word in mutation.tests.split():
            if word.startswith("tests"):
                path, _, name = word.partition("::")
                assert (ROOT / path).exists(), mutation.name
                function = f"def {name.partition('[')[0]}("
                assert not name or function in (ROOT / path).read_text("utf-8"), mutation.name


def test_no_two_mutations_have_one_name() -> None:
    assert max(Counter(m.name for m in MUTATIONS).values()) == 1
