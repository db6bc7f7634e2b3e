"""Which characters of a rendered conversation the assistant wrote, by walking the ChatML text
itself.
"""


def chatml_mask(text: str) -> list[bool]:
    """True on the words of each assistant message and on its end marker."""
    opening, end = "<|im_start|>assistant\n", "<|im_end|>"
    mask = [False] * len(text)
    at = 0
    while (start := text.find(opening, at)) >= 0:
        first = start + len(opening)
        last = text.find(end, first) + len(end)
        mask[first:last] = [True] * (last - first)
        at = last
    return mask
