"""Whether a contender's runs count: the loss is the one the others get, and gradients are finite and not zero."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Step:
    """What a contender reports of an optimiser step."""

    loss: float
    grad_norm: float
    tokens: float | None = None  # seen so far, where the contender counts them itself


# Relative. All start from the same weights; then their adapters begin at other random values and their formats differ.
FIRST_STEP = 0.005
ANY_STEP = 0.01
MEAN = 0.03  # of the whole run, where packing puts other rows into a step
TOKENS = 0.01

PARITY = (
    f"Loss parity: first step within {FIRST_STEP:.1%} of the reference, every step within {ANY_STEP:.0%}; where "
    f"packing puts other rows into a step, the mean over the same rows within {MEAN:.0%} and as many "
    f"tokens within {TOKENS:.0%}."
)


def void_reason(
    steps: list[Step], reference: list[Step], wanted: int, tokens: int, *, same_rows: bool, exit_code: int = 0
) -> str | None:
    """Return why a run does not count, in words for the table, or None."""
    if exit_code:
        return f"exited with {exit_code}"
    if not steps:
        return "reported no step"
    if not all(math.isfinite(step.loss) and math.isfinite(step.grad_norm) for step in steps):
        return "a loss or gradient norm is not finite"
    if any(step.grad_norm <= 0 for step in steps):
        return "a gradient norm is zero"
    if same_rows and len(steps) != wanted:
        return f"{len(steps)} steps instead of {wanted}"
    counted = steps[-1].tokens
    if counted is not None and abs(counted / tokens - 1) > TOKENS:
        return f"{counted:,.0f} tokens instead of {tokens:,}"
    return _not_alike(steps, reference, same_rows=same_rows)


def _not_alike(steps: list[Step], reference: list[Step], *, same_rows: bool) -> str | None:
    if not same_rows:
        ours, theirs = (statistics.fmean(step.loss for step in part) for part in (steps, reference))
        return None if abs(ours / theirs - 1) <= MEAN else f"mean loss {ours:.3f} instead of {theirs:.3f}"
    for number, (mine, other) in enumerate(zip(steps, reference, strict=False), 1):
        allowed = FIRST_STEP if number == 1 else ANY_STEP
        if abs(mine.loss / other.loss - 1) > allowed:
            return f"loss {mine.loss:.3f} instead of {other.loss:.3f} at step {number}"
    return None


def fall(steps: list[Step]) -> float:
    """How far the loss fell, as a share: parity says little where nobody learnt anything."""
    return 1 - steps[-1].loss / steps[0].loss if steps else 0.0


def speed(marks: list[float], tokens: list[int], warmup: int) -> float:
    """Non-padding tokens per second after `warmup` steps, from the moments at which steps were reported."""
    first = min(warmup, len(marks) - 1) or 1
    seconds = marks[-1] - marks[first - 1]
    return sum(tokens[first : len(marks)]) / seconds if seconds > 0 else 0.0


def summary(values: list[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "runs": len(values)}
