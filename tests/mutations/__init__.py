"""The quiet failures of this field, put in one at a time: each must make a test fail. A file a
subject; `python -m tests.mutations` runs them.
"""

from typing import NamedTuple


class Mutation(NamedTuple):
    """`old` in `gearshift/file` becomes `new`; `tests` must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: str
    needs: str = ""
    """The module without which it is not run."""
