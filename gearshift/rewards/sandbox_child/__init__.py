"""The code that runs inside the sandboxes, around a program that may be malicious. A sandbox sees
this folder and nothing else of gearshift, so these files may import only the standard library.

**What runs where.** To check a program against tests, `sandbox.py` starts two processes (`main`),
each in a sandbox of its own. One runs the program (`program`), the other one the tests (`verdict`).
Two pipes connect them, one in each direction (`channel`). Only plain data crosses: numbers, texts,
lists, dicts and the like. Any other object stays in its process, and its number crosses.

**Why two processes.** A program that shares a process with its tests can cheat: it can read the
expected values, replace `==`, or exit with code 0. Here the program sees only the arguments of its
own functions. The comparison and the verdict are in a process that it cannot reach.

**How the verdict on `assert f(2) == 4` is found.**

1. `program` executes the program's text, then waits for requests.
2. `verdict` analyzes the tests' text (`analysis`, which uses `name_analysis`, `program_imports` and
   `rewrite`): does it parse, which names belong to the program, does it ask the program at all? If
   no program could pass, it ends with `UNUSABLE`. No answer of the program can change this.
3. `verdict` executes the tests. They use `f`, which they do not define, so it requests `f` from
   `program`. A function is not plain data, so the tests get a proxy for it (`proxies`). The call
   `f(2)` crosses the pipe, and so does the answer 4.
4. The tests compare the answer with 4 in their own process. An exception of the program is raised
   in the tests, and they may catch it.
5. If the tests pass a function or an object of their own to the program, it stays in the tests'
   process too, and the program gets a proxy; `access` decides what the program may do with it.
6. `harness` runs functions and classes of tests, as unittest and pytest do.
7. If the tests come to their end, the process exits with `PASSED`; in any other case, an exit or a
   crash included, the program has failed.
"""

PROGRAM, TESTS = "/box/program.py", "/box/tests.py"
"""The paths of the two texts inside a sandbox."""
PASSED, FAILED, UNUSABLE = 0, 1, 3
"""Exit codes of the role `check`: the program is right; it is wrong; no program could pass."""
