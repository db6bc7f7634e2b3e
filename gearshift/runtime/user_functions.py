"""A function of the user's by its name: `package.module:function` or `path/to/file.py:function`."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from gearshift.errors import ConfigError
from gearshift.runtime.terminal import one_line
from gearshift.runtime.urls import redact_urls


def load_function(spec: str, what: str) -> Callable[..., Any]:
    """The function that `spec` names; `what` it is for is said in errors ("reward").

    Raises `ConfigError` when there is no such file, module or function, or its import fails.
    """
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
    """`ValueError: what it says` in one line, without a full stop or the secrets of addresses."""
    try:
        said = str(error)
    except Exception:  # it is of a class of the user's
        said = ""
    return one_line(redact_urls(f"{type(error).__name__}: {said[:2000]}")).rstrip(".: ")


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
