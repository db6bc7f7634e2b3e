"""What runs inside the sandboxes, around a program that nobody trusts. Only this folder is bound
into them: it knows the standard library alone.
"""

PROGRAM, TESTS = "/box/program.py", "/box/tests.py"
"""Where the two texts stand."""
PASSED, FAILED, UNUSABLE = 0, 1, 3
"""Exit codes of `check`: the program is right; wrong; the tests can be put to no program."""
