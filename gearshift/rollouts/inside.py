"""What runs inside the sandbox, before and around a program that nobody trusts.

A file of its own because only it is bound into the sandbox: it knows the standard library alone.
Three roles: `run` is the program; `serve` answers calls of the program's functions; `check` holds
the tests, in a sandbox of its own, where of the program there is nothing but plain data.
"""

from __future__ import annotations

import ast
import builtins
import io
import json
import math
import os
import resource
import sys
from types import ModuleType
from typing import Any, BinaryIO

PROGRAM, TESTS = "/box/program.py", "/box/tests.py"
FAILED, UNUSABLE = 1, 3
"""Exit codes of `check`: the program is wrong; the tests cannot be put to any program."""
LINE = 1 << 20
"""The longest answer that is read, in bytes."""


class UnusableError(Exception):
    """The tests ask for what cannot be passed between processes."""


def main() -> None:
    role, *numbers = sys.argv[1:]
    _limit(*map(int, numbers))
    if role == "check":
        sys.exit(_check())
    module = ModuleType("__main__" if role == "run" else "program")
    sys.modules[module.__name__] = module
    sys.argv = [PROGRAM]
    with open(PROGRAM, "rb") as file:
        code = compile(file.read(), PROGRAM, "exec")
    if role == "run":
        exec(code, module.__dict__)
    else:
        requests, answers = _take_pipes()
        exec(code, module.__dict__)
        _serve(module, requests, answers)


def _limit(seconds: int, memory: int, output: int, files: int) -> None:
    """Soft and hard limits alike: without capabilities nobody raises them again."""
    for what, most in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, output),
        (resource.RLIMIT_NOFILE, files),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_CPU, seconds),
    ):
        resource.setrlimit(what, (most, most))


def _take_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Standard input and output, which from here on carry the calls and not what is printed."""
    pipes = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 0)
    os.dup2(2, 1)
    sys.stdin = io.StringIO()
    return pipes


def _serve(module: ModuleType, requests: BinaryIO, answers: BinaryIO) -> None:
    for line in requests:
        name, args, kwargs = _decode(json.loads(line))
        try:
            answer = ["value", _encode(getattr(module, name)(*args, **kwargs))]
        except Exception as error:
            answer = ["raised", type(error).__name__, str(error)[:200]]
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


def _check() -> int:
    gets, asks = _take_pipes()
    sys.stdout = io.StringIO()

    def remote(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                asked = json.dumps(_encode([name, args, kwargs]))
            except TypeError as error:
                raise UnusableError(str(error)) from error
            asks.write(asked.encode() + b"\n")
            asks.flush()
            line = gets.readline(LINE)
            if not line.endswith(b"\n"):
                raise EOFError(f"no answer from {name}")
            kind, *answer = json.loads(line)
            if kind == "value":
                return _decode(answer[0])
            raised = getattr(builtins, str(answer[0]), None)
            if isinstance(raised, type) and issubclass(raised, Exception):
                raise raised(str(answer[1]))
            raise RuntimeError(str(answer[1]))

        return call

    try:
        with open(TESTS, encoding="utf-8") as file:
            tree = ast.parse(file.read())
        code = compile(tree, TESTS, "exec")
    except (SyntaxError, ValueError):
        return UNUSABLE
    named = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    space = {name: remote(name) for name in named if not hasattr(builtins, name)}
    try:
        exec(code, {"math": math, **space, "__name__": "tests"})
    except UnusableError:
        return UNUSABLE
    except BaseException:  # SystemExit too: the tests have not come to their end
        return FAILED
    return 0


def _encode(value: Any) -> Any:
    """Plain data as JSON: containers become `[kind, content]`."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, dict):
        return ["dict", [[_encode(k), _encode(v)] for k, v in value.items()]]
    if isinstance(value, bytes):
        return ["bytes", value.hex()]
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return [kind.__name__, [_encode(v) for v in value]]
    raise TypeError(f"{type(value).__name__} is not plain data")


def _decode(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    kind, content = value
    if kind == "dict":
        return {_decode(k): _decode(v) for k, v in content}
    if kind == "bytes":
        return bytes.fromhex(content)
    kinds = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
    return kinds[kind](map(_decode, content))


if __name__ == "__main__":
    main()
