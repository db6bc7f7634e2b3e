"""Rows of data sets on the Hugging Face hub."""

from __future__ import annotations

import hashlib
import json

from gearshift.data.formats import SourceRow
from gearshift.errors import DataError
from gearshift.runtime.hub import hub_is_reachable
from gearshift.runtime.terminal import one_line

_digests: dict[tuple[str, str], str] = {}
"""Digests of the data sets that the hub gave, by name and split."""


def digest_of_hub(name: str, split: str) -> str:
    """A digest of the rows that the hub gave; they are loaded if they were not yet."""
    if (name, split) not in _digests:
        rows_of_hub(name, split)
    return _digests[name, split]


def rows_of_hub(name: str, split: str) -> list[SourceRow]:
    """All rows of a data set on the hub. Raises `DataError`."""
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"{name} is no file here, and a data set of the hub needs pip install "
            "'gearshift[data]'."
        ) from None
    datasets.config.HF_HUB_OFFLINE = not hub_is_reachable()  # else the library asks for a minute
    try:
        rows = [*datasets.load_dataset(name, split=split)]
        whole = hashlib.blake2b()
        for row in rows:
            whole.update(json.dumps(row, default=lambda value: type(value).__name__).encode())
        _digests[name, split] = whole.hexdigest()
        return [SourceRow(row, f"{name}, row {number}") for number, row in enumerate(rows, start=1)]
    except Exception as error:  # the library raises many kinds of errors
        reason = one_line(next(iter(str(error).strip().splitlines()), type(error).__name__))
        raise DataError(
            f"{name} is neither a file nor a data set that could be loaded ({reason}); "
            "check the name."
        ) from None
