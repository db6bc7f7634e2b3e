"""The check of a source of rows before anything is trained. It must not import a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gearshift.data.clean import CleanConfig, clean
from gearshift.data.labels import Format
from gearshift.data.sources import SourceConfig, is_on_hub, load_rows

_FIRST = 16
"""How many rows are read as a stage reads them."""


def check_source(
    source: SourceConfig,
    config: CleanConfig,
    read: Callable[[dict[str, Any]], Any],
    answered: bool = False,
    labels: Format | None = None,
) -> None:
    """Raises `DataError` for a file that is missing or cannot be read, and for one of its first
    rows if `read` refuses it once it is cleaned. With `answered`, rows that have only a prompt are
    left out. `labels`: the format of labels of people. A data set on the hub is not loaded.
    """
    if is_on_hub(source.path):
        return
    rows, _ = clean(load_rows(source.path, source.split, labels)[:_FIRST], config, answered)
    for row in rows:
        read(row)
