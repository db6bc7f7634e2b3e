"""Finds a user's function by its name: `package.module:function`, `path/to/file.py:function`, or
`given:function` for one that a Python call passed in.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from gearshift.errors import ConfigError, GearshiftError
from gearshift.runtime.terminal import one_line
from gearshift.runtime.urls import redact_urls

GIVEN = "given:"
"""The beginning of a function's name if there is no module to import it from."""
_given: dict[str, Callable[..., Any]] = {}


def name_of(function: Callable[..., Any]) -> str:
    """The name under which `load_function` finds this function: `module:name` where another process
    can import it, else `given:name`.
    """
    module = getattr(function, "__module__", None) or ""
    name = getattr(function, "__qualname__", None) or type(function).__name__
    if module != "__main__" and getattr(sys.modules.get(module), name, None) is function:
        return f"{module}:{name}"
    short = getattr(function, "__name__", None) or type(function).__name__
    return f"{GIVEN}{short.strip('<>')}"


@contextmanager
def given_functions(functions: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Inside, `load_function` finds these functions by their names, which begin with `given:`.

    Raises `ConfigError` where another run of this process uses one of the names for another
    function.
    """
    for name, function in functions.items():
        if _given.get(name, function) is not function:
            raise ConfigError(
                f"Another run of this process uses the name {name.removeprefix(GIVEN)} for another "
                "function; give this one a name of its own."
            )
    new = functions.keys() - _given.keys()
    _given.update(functions)
    try:
        yield
    finally:
        for name in new:
            del _given[name]


def load_function(spec: str, what: str) -> Callable[..., Any]:
    """The function that `spec` names; errors call it a `what` (for example "reward").

    Raises `ConfigError` when there is no such file, module or function, or its import fails.
    """
    if spec.startswith(GIVEN):
        if spec not in _given:
            raise ConfigError(
                f"The {what} `{spec}` is a function that a Python program gave to its run; start "
                "that program again, or move the function into a module and name it module:name."
            )
        return _given[spec]
    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise ConfigError(
            f"The {what} `{spec}` is not of the form module:function or path/file.py:function."
        )
    file = place.endswith(".py")
    module = _import_file(Path(place), what) if file else _import_module(place, what)
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"{place} has no function `{name}` for a {what}; check the spelling.")
    found: Callable[..., Any] = function
    return found


def describe_error(error: BaseException) -> str:
    """`ValueError: its text` in one line, without a full stop at the end and without the secrets of
    URLs. One of Gearshift's own errors is its text alone, which is a sentence.
    """
    try:
        text = str(error)
    except Exception:  # the class may be the user's own
        text = ""
    name = "" if isinstance(error, GearshiftError) else f"{type(error).__name__}: "
    return one_line(redact_urls(f"{name}{text[:2000]}")).rstrip(".: ")


def _import_file(path: Path, what: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ConfigError(f"There is no {what} file {path}; check the path.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"The {what} file {path} fails on import: {describe_error(error)}."
        ) from error
    return module


def _import_module(name: str, what: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"The {what} module `{name}` needs `{error.name}`, which is not there;"
            " install it or check the spelling."
        ) from error
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"The {what} module {name} fails on import: {describe_error(error)}."
        ) from error
