"""Quiet failures of checkpoints that several ranks write and read."""

from tests.mutations import Mutation

_TESTS = "tests/scale/test_checkpoints.py"

MUTATIONS = (
    Mutation(
        "a rank saves its part from the wrong end",
        "runtime/flat.py",
        "return Part(own[: mine.stop - mine.start], self._numel)",
        "return Part(own[len(own) - (mine.stop - mine.start) :], self._numel)",
        _TESTS,
    ),
    Mutation(
        "each rank takes up the part of the one before",
        "runtime/distributed.py",
        "return slice(min(rows, self.rank * each), min(rows, (self.rank + 1) * each))",
        "return slice(min(rows, (self.rank - 1) * each % rows), min(rows, self.rank * each))",
        _TESTS,
    ),
    Mutation(
        "a part of another checkpoint is read",
        "runtime/checkpoint.py",
        'path.glob("*.safetensors")',
        'path.glob("*.none")',
        _TESTS,
    ),
)
