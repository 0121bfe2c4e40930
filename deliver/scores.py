"""What a share of right answers says: its interval, and whether two models are told apart by the same rows."""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import NormalDist

CONFIDENCE = 0.95


def wilson(right: int, rows: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return Wilson's interval for a share: the shares in [0, 1] that `right` of `rows` answers go with.

    Unlike the usual "plus or minus" it stays within 0 and 1, and is not empty at 0 or all of the rows.

    Raises:
        ValueError: there are no rows.
    """
    if rows < 1:
        raise ValueError("a share needs rows")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, spread = right / rows, z * z / rows
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / rows + spread / (4 * rows))
    return (centre - half if right else 0.0), (centre + half if right < rows else 1.0)


def score_text(right: int, rows: int) -> str:
    """Return a share as it is shown, with its interval: 72.5% (61.9 to 81.1)."""
    low, high = wilson(right, rows)
    return f"{right / rows:.1%} ({low * 100:.1f} to {high * 100:.1f})"


def told_apart(pairs: Iterable[tuple[bool, bool]], confidence: float = CONFIDENCE) -> bool:
    """Whether two models differ on the same rows, by more than chance: McNemar's test, exact.

    Each pair says of one row whether the first and whether the second answered it right. Rows that both answer alike
    say nothing about which is better, so this sees more than two intervals beside each other.
    """
    first = second = 0
    for one, other in pairs:
        first, second = first + (one and not other), second + (other and not one)
    rows = first + second
    tail = sum(math.comb(rows, k) for k in range(min(first, second) + 1)) / 2**rows
    return rows > 0 and 2 * tail < 1 - confidence
