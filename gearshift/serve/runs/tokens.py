"""The text of single tokens, by the tokenizer file of a run. It must not import torch."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gearshift.serve.runs.files import RunFolder


class Pieces:
    """The texts of tokens; tokenizers are loaded once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tokenizers: dict[tuple[Path, int], Any] = {}

    def of(self, run: RunFolder, ids: Sequence[Any]) -> list[str] | None:
        """The text of each token; None if the run has no tokenizer that can be read. A token that
        is only a part of a character is written as the tokenizer names it.
        """
        tokenizer = self._tokenizer(run.tokenizer_file())
        if tokenizer is None:
            return None
        known = {i for i in ids if isinstance(i, int) and 0 <= i < 1 << 32}
        texts = {i: _text(tokenizer, i) for i in known}
        return [texts.get(i, f"[{i}]") for i in ids]

    def _tokenizer(self, path: Path | None) -> Any:
        if path is None:
            return None
        try:
            from tokenizers import Tokenizer

            key = path, path.stat().st_mtime_ns
            with self._lock:
                if key not in self._tokenizers:
                    self._tokenizers = {key: Tokenizer.from_file(str(path))}
                return self._tokenizers[key]
        except Exception:  # the library raises its own errors; ids are shown then
            return None


def _text(tokenizer: Any, token: int) -> str:
    name = tokenizer.id_to_token(token)
    if name is None:
        return f"[{token}]"
    text = str(tokenizer.decode([token], skip_special_tokens=False))
    if not text or "\ufffd" in text:
        return str(name)
    return f" {text}" if name.startswith("\u2581") and not text.startswith(" ") else text
