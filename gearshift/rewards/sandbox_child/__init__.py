"""What runs inside the sandboxes, around a program that nobody trusts. Only this folder is bound
into them: it knows the standard library alone.

How the verdict on `assert f(2) == 4` comes about. Two processes start (`main`), each in a sandbox
of its own, with a pipe in each direction (`wire`).

1. `program` executes the program's text, then waits for questions.
2. `verdict` reads the text of the tests (`reading`, `names`, `imports`): is it Python, which names
   are the program's, does it ask the program at all? If not, it ends with `UNUSABLE`.
3. It executes the tests. They use `f`, which they do not define: `program` is asked for it. A
   function stays where it is, so the tests get an object that stands for it (`things`). Its call
   with 2 crosses the pipe, and so does the answer, which is plain data: 4.
4. The tests compare it in their own process; the program never sees what is expected. What the
   program raises is raised in the tests, and they may catch it.
5. A function of the tests that the program is given stays with the tests in the same way (`given`
   says what the program may ask of it). `functions` runs tests as unittest and pytest do.
6. Tests that come to their end say `PASSED`. Whatever else happens says `FAILED`.
"""

PROGRAM, TESTS = "/box/program.py", "/box/tests.py"
"""Where the two texts stand."""
PASSED, FAILED, UNUSABLE = 0, 1, 3
"""Exit codes of `check`: the program is right; wrong; the tests can be put to no program."""
