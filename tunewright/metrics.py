"""metrics.jsonl read back: what a run's losses come to, whatever the interval at which they were logged.

A log line's `loss` is the mean over the steps since the line before, so the last one depends on `train.logging_steps`;
its `step_losses` holds each of those steps.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

FINAL_STEPS = 10  # one step's loss is that of a few rows; so many are less than any schedule's last phase


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics file that was written to its end."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def step_losses(lines: Iterable[Mapping[str, Any]]) -> list[float]:
    """Return the training loss of each optimiser step that the lines tell of."""
    return [loss for line in lines for loss in line.get("step_losses") or []]


def final_train_loss(lines: Iterable[Mapping[str, Any]]) -> float | None:
    """Return the mean loss of the last FINAL_STEPS optimiser steps, or None when no step was logged."""
    losses = step_losses(lines)[-FINAL_STEPS:]
    return fmean(losses) if losses else None


def mean_train_loss(lines: Iterable[Mapping[str, Any]]) -> float | None:
    """Return the mean loss of all optimiser steps, or None when no step was logged."""
    losses = step_losses(lines)
    return fmean(losses) if losses else None
