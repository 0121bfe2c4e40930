"""What became of the rows of a dataset."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tunewright.errors import DataError


@dataclass
class Outcome:
    """What became of the rows of a dataset; kept beside its tokens as JSON."""

    read: int = 0
    kept: int = 0
    examples: int = 0
    tokens: int = 0
    scored: int = 0
    truncated: int = 0
    unended: int = 0
    longest: int = 0
    reasons: list[str] = field(default_factory=list)  # why rows were dropped
    dropped: list[int] = field(default_factory=list)  # how many, for each reason
    excerpts: list[list[dict[str, Any]]] = field(default_factory=list)  # a few of them, for each reason
    columns: list[str] = field(default_factory=list)  # that some row has
    specials: dict[str, int] = field(default_factory=dict)  # special token's string that is learnt as text -> rows
    unread: dict[str, int] = field(default_factory=dict)  # key of a turn that nobody reads -> rows


def no_row_left(name: str, outcome: Outcome) -> DataError:
    """Return the error of a dataset all of whose rows were dropped."""
    reasons = "; ".join(f"{count:,} x {reason}" for reason, count in zip(outcome.reasons, outcome.dropped, strict=True))
    return DataError(f"No row of {name} can be trained on. {reasons}.")


def dropped_lines(outcome: Outcome) -> list[str]:
    """Return a line for each reason of dropping rows, with row numbers and the beginning of one row."""
    lines = []
    for index in np.argsort(outcome.dropped)[::-1]:
        shown = outcome.excerpts[index]
        numbers = ", ".join(str(one["row"]) for one in shown)
        more = ", ..." if outcome.dropped[index] > len(shown) else ""
        what = "row" if outcome.dropped[index] == 1 else "rows"
        lines.append(f"  dropped {outcome.dropped[index]:,}: {outcome.reasons[index]} ({what} {numbers}{more})")
        lines.append(f"    {shown[0]['text']}")
    return lines
