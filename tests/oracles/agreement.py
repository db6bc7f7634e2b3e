"""Agreement of people, from the definitions: every pair of labels, one after another."""

from collections import Counter
from collections.abc import Sequence
from itertools import permutations


def krippendorff_alpha(units: Sequence[Sequence[int]], ordinal: bool = False) -> float | None:
    """1 - (mean difference within items) / (mean difference of any two labels)."""
    used = [unit for unit in units if len(unit) > 1]
    labels = [value for unit in used for value in unit]
    counts = Counter(labels)

    def difference(a: int, b: int) -> float:
        if not ordinal:
            return float(a != b)
        low, high = min(a, b), max(a, b)
        between = sum(counts[value] for value in counts if low <= value <= high)
        return (between - (counts[a] + counts[b]) / 2) ** 2

    within = sum(
        difference(a, b) / (len(unit) - 1) for unit in used for a, b in permutations(unit, 2)
    )
    overall = sum(difference(a, b) for a, b in permutations(labels, 2))
    if not overall:
        return None
    return 1 - (within / len(labels)) / (overall / (len(labels) * (len(labels) - 1)))


def cohen_kappa(pairs: Sequence[tuple[int, int]]) -> float | None:
    """The chance to agree is that of one person's label with any label of the other."""
    by_chance = sum(a == b for a, _ in pairs for _, b in pairs) / len(pairs) ** 2
    agreed = sum(a == b for a, b in pairs) / len(pairs)
    return None if by_chance == 1 else (agreed - by_chance) / (1 - by_chance)
