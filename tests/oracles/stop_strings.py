"""Where a completion ends at a stop string, by decoding all of its tokens after each one."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from gearshift.data.text import decode


def first_stop(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], stops: Sequence[str], first: int = 0
) -> int | None:
    """The least number of tokens whose text contains one of the strings after the text of the
    `first` ones; None if there is none.
    """
    before = len(decode(tokenizer, ids[:first]))
    for count in range(first + 1, len(ids) + 1):
        if any(stop in decode(tokenizer, ids[:count])[before:] for stop in stops):
            return count
    return None
