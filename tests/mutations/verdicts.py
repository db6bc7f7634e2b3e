"""Verdicts on programs that nobody trusts."""

from tests.mutations import Mutation

MUTATIONS = (
    Mutation(
        "a program's StopIteration ends a loop of the tests",
        "rewards/sandbox_child/verdict.py",
        "ends = issubclass(found, _STOPS)",
        "ends = False",
        "tests/rewards/test_verdicts.py",
    ),
    Mutation(
        "what Python swallows of a program's exceptions is no fault",
        "rewards/sandbox_child/verdict.py",
        'self._unseen = what == "call"',
        "self._unseen = False",
        "tests/rewards/test_verdicts.py",
    ),
    Mutation(
        "NaN passes a comparison of order by negation",
        "rewards/sandbox_child/verdict.py",
        "x != x for x in (left, right)",
        "False for x in (left, right)",
        "tests/rewards/test_verdicts.py",
    ),
    Mutation(
        "NaN is an answer where the tests ask for none",
        "rewards/sandbox_child/channel.py",
        'if name == "NaN" and not self._nan:',
        "if False:",
        "tests/rewards/test_sandbox_child.py",
    ),
    Mutation(
        "a builtin's name that is tested alone is Python's where the program has none",
        "rewards/sandbox_child/analysis.py",
        "mark = HARD if hard else SOFT",
        "mark = SOFT",
        "tests/rewards/test_sandbox_child.py",
    ),
    Mutation(
        "every argument is watched for changes",
        "rewards/sandbox_child/analysis.py",
        "if all(names.builtin(n) or n in names.imported or n in names.clean for n in read):",
        "if True:",
        "tests/rewards/test_sandbox_child.py",
    ),
    Mutation(
        "an object of the program answers `f(2) - 4`",
        "rewards/sandbox_child/proxies.py",
        "if not is_proxy(other) and not self._tester.read.operators:",
        "if False:",
        "tests/rewards/test_verdicts.py",
    ),
    Mutation(
        "an object of the program says itself what it equals",
        "rewards/sandbox_child/proxies.py",
        "return self._plain() == other if self._appearance in _PLAIN else NotImplemented",
        'return self._tester.ask("eq", self, other) is True',
        "tests/rewards/test_verdicts.py",
    ),
    Mutation(
        "tests that never ask the program pass",
        "rewards/sandbox_child/verdict.py",
        "if not tester.asked:",
        "if False:",
        "tests/rewards/test_sandbox.py::test_a_row_that_cannot_be_judged_is_lost_and_named",
    ),
    Mutation(
        "a row of tests that cannot be judged ends the run",
        "rewards/code_rewards.py",
        "except (_UnusableError, SandboxFailedError) as error:",
        "except LostError as error:",
        "tests/rewards/test_sandbox.py::test_a_row_that_cannot_be_judged_is_lost_and_named",
    ),
    Mutation(
        "a form feed in what is printed is a new line",
        "rewards/code_rewards.py",
        '.rstrip(" \\t\\r\\n").split("\\n")',
        '.rstrip(" \\t\\r\\n").splitlines()',
        "tests/rewards/test_sandbox.py::test_what_is_printed_is_compared_line_by_line",
    ),
    Mutation(
        "a program's annotations are texts",
        "rewards/sandbox_child/main.py",
        ", dont_inherit=True)",
        ")",
        "tests/rewards/test_verdicts.py",
    ),
)
