"""Text for single tokens and for growing answers: no half character is ever sent, and no part of a
stop string.
"""

from __future__ import annotations

from functools import lru_cache

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from gearshift.data.text import decode, settled_text

_BYTES = {character: byte for byte, character in bytes_to_unicode().items()}


class TokenNames:
    """The bytes and the text of single tokens, as `logprobs` shows them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._of_bytes = "ByteLevel" in repr(getattr(backend, "decoder", None))
        self._special = set(tokenizer.all_special_ids)
        vocabulary = tokenizer.get_vocab()  # slow, so it is asked once for all answers
        self.count = len(vocabulary)
        """The number of tokens."""
        self.changes_text = bool(tokenizer.clean_up_tokenization_spaces) or "<0x00>" in vocabulary
        """Whether a later token can change the text before it."""
        self.bytes = lru_cache(1 << 16)(self._bytes)
        self.text = lru_cache(1 << 16)(self._text)

    def _bytes(self, token: int) -> bytes:
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if not isinstance(piece, str):  # a row of the embedding that has no token
            return b""
        if token in self._special:
            return piece.encode()
        if self._of_bytes and all(character in _BYTES for character in piece):
            return bytes(_BYTES[character] for character in piece)
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("\u2581", " ").encode()

    def _text(self, token: int) -> str:
        """The token's text; bytes that are no whole characters are written as `\\\\xe4`."""
        return self.bytes(token).decode(errors="backslashreplace")


class TextStream:
    """The text of an answer in pieces, while its tokens arrive. It ends before a stop string."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stops: tuple[str, ...],
        whole: bool,
        first: int = 0,
    ) -> None:
        """`whole`: see `TokenNames.changes_text`. In the text of the `first` tokens, stop strings
        do not count.
        """
        self._first = first
        self._tokenizer, self._stops, self._whole = tokenizer, stops, whole
        self._ids: list[int] = []
        self._start = self._read = 0
        self._before = ""
        self._held = ""
        self.stopped = False
        """Whether a stop string has appeared."""
        self._sent = 0

    def add(self, token: int) -> str:
        """The text that is now sure to stay."""
        self._ids.append(token)
        return "" if self.stopped else self._cut(self._settled())

    def end(self) -> str:
        """The rest of the text."""
        if self.stopped:
            return ""
        if self._whole:
            rest = decode(self._tokenizer, self._ids, skip_special_tokens=True)[self._sent :]
        else:
            rest = self._window()[len(self._before) :]
        text = self._cut(rest)
        held, self._held = self._held, ""
        return text if self.stopped else text + held

    def _settled(self) -> str:
        if self._whole:
            text = settled_text(self._tokenizer, self._ids)[self._sent :]
            self._sent += len(text)
            return text
        text = self._window()
        if text.endswith("\ufffd"):
            return ""
        piece = text[len(self._before) :]
        self._start, self._read = self._read, len(self._ids)
        self._before = self._window()
        return piece

    def _window(self) -> str:
        """The text of the tokens since the last but one place where a character ended."""
        return decode(self._tokenizer, self._ids[self._start :], skip_special_tokens=True)

    def _cut(self, piece: str) -> str:
        """The text without what is, or may become, a stop string."""
        text = self._held + piece
        if not self._stops or len(self._ids) <= self._first:
            return text
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.stopped, self._held = True, ""
            return text[: min(places)]
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of the text begin the stop string."""
    return next((n for n in range(min(len(stop), len(text)), 0, -1) if text.endswith(stop[:n])), 0)
