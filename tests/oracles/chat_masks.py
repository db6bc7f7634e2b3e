"""Which characters of a rendered conversation the assistant wrote, by walking the text itself."""

from transformers import PreTrainedTokenizerBase


def answer_mask(text: str, opening: str, end: str) -> list[bool]:
    """True on what stands between each `opening` and the next `end`, and on that `end`."""
    mask = [False] * len(text)
    at = 0
    while (start := text.find(opening, at)) >= 0:
        first = start + len(opening)
        last = text.find(end, first) + len(end)
        mask[first:last] = [True] * (last - first)
        at = last
    return mask


def chatml_mask(text: str) -> list[bool]:
    """The same for ChatML."""
    return answer_mask(text, "<|im_start|>assistant\n", "<|im_end|>")


def show_mask(tokenizer: PreTrainedTokenizerBase, ids: list[int], mask: list[int]) -> str:
    """The text of the tokens, each run of trained ones between « and »."""
    text = ""
    for i, token in enumerate(ids):
        if mask[i] and (i == 0 or not mask[i - 1]):
            text += "«"
        text += str(tokenizer.decode([token]))
        if mask[i] and (i + 1 == len(ids) or not mask[i + 1]):
            text += "»"
    return text
