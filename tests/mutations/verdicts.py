"""Verdicts on programs that nobody trusts."""

from tests.mutations import Mutation

MUTATIONS = (
    Mutation(
        "a program's StopIteration ends a loop of the tests",
        "rollouts/inside/verdict.py",
        "ends = issubclass(found, _STOPS)",
        "ends = False",
        "tests/rollouts/test_verdicts.py",
    ),
    Mutation(
        "what Python swallows of a program's exceptions is no fault",
        "rollouts/inside/verdict.py",
        'self._unseen = what == "call"',
        "self._unseen = False",
        "tests/rollouts/test_verdicts.py",
    ),
    Mutation(
        "NaN passes a comparison of order by negation",
        "rollouts/inside/verdict.py",
        "x != x for x in (left, right)",
        "False for x in (left, right)",
        "tests/rollouts/test_verdicts.py",
    ),
    Mutation(
        "NaN is an answer where the tests ask for none",
        "rollouts/inside/wire.py",
        'if name == "NaN" and not self._nan:',
        "if False:",
        "tests/rollouts/test_inside.py",
    ),
    Mutation(
        "a builtin's name that is tested alone is Python's where the program has none",
        "rollouts/inside/reading.py",
        "mark = HARD if hard else SOFT",
        "mark = SOFT",
        "tests/rollouts/test_inside.py",
    ),
    Mutation(
        "every argument is watched for changes",
        "rollouts/inside/reading.py",
        "if all(names.builtin(n) or n in names.imported or n in names.clean for n in read):",
        "if True:",
        "tests/rollouts/test_inside.py",
    ),
    Mutation(
        "an object of the program answers `f(2) - 4`",
        "rollouts/inside/things.py",
        "if not is_thing(other) and not self._tester.read.operators:",
        "if False:",
        "tests/rollouts/test_verdicts.py",
    ),
    Mutation(
        "an object of the program says itself what it equals",
        "rollouts/inside/things.py",
        "return self._plain() == other if self._face in _PLAIN else NotImplemented",
        'return self._tester.ask("eq", self, other) is True',
        "tests/rollouts/test_verdicts.py",
    ),
    Mutation(
        "tests that never ask the program pass",
        "rollouts/inside/verdict.py",
        "if not tester.asked:",
        "if False:",
        "tests/rollouts/test_sandbox.py::test_a_row_that_cannot_be_judged_is_lost_and_named",
    ),
    Mutation(
        "a row of tests that cannot be judged ends the run",
        "rollouts/code.py",
        "except (_UnusableError, LostError) as error:",
        "except LostError as error:",
        "tests/rollouts/test_sandbox.py::test_a_row_that_cannot_be_judged_is_lost_and_named",
    ),
    Mutation(
        "a form feed in what is printed is a new line",
        "rollouts/code.py",
        '.rstrip(" \\t\\r\\n").split("\\n")',
        '.rstrip(" \\t\\r\\n").splitlines()',
        "tests/rollouts/test_sandbox.py::test_what_is_printed_is_compared_line_by_line",
    ),
    Mutation(
        "a program's annotations are texts",
        "rollouts/inside/main.py",
        ", dont_inherit=True)",
        ")",
        "tests/rollouts/test_verdicts.py",
    ),
)
