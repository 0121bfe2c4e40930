"""The figures of a comparison: a row for each, a cell for each run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from tunewright.deliver.run_record import Run, lookup, run_labels, series
from tunewright.deliver.scores import score_text
from tunewright.metrics import final_train_loss
from tunewright.text import MISSING, as_number, clock, count, one_line, percent, size

Row = tuple[str, list[str]]
STAGES = (("before", "base"), ("after", "tuned"))


def comparison_rows(runs: Sequence[Run]) -> list[Row]:
    """Return the comparison as (label, [cell per run])."""
    figures: list[tuple[str, Callable[[Run], str]]] = [
        ("status", _status_cell),
        ("strategy", lambda run: _text(lookup(run.manifest, "strategy"))),
        ("method", lambda run: _text(lookup(run.manifest, "method"))),
        ("trainable parameters", _parameters_cell),
        ("world size", _world_cell),
        ("steps", _steps_cell),
        ("wall time", lambda run: clock(lookup(run.manifest, "wall_seconds"))),
        ("tokens/s (non-padding)", lambda run: count(lookup(run.manifest, "tokens_per_second"))),
        ("MFU", lambda run: percent(lookup(run.manifest, "mfu"))),
        ("peak memory (largest rank)", lambda run: size(lookup(run.manifest, "peak_memory_bytes"))),
        ("final train loss", _train_loss_cell),
        ("final eval loss", _eval_loss_cell),
        ("held-out rows", _held_out_cell),
        ("exact match before", lambda run: _score_cell(run, "base")),
        ("exact match after", lambda run: _score_cell(run, "tuned")),
        *((f"{name} {when}", partial(_metric_cell, key, name)) for name in _metrics(runs) for when, key in STAGES),
        ("device", _device_cell),
    ]
    return [(label, [cell(run) for run in runs]) for label, cell in figures]


def warning_notes(runs: Sequence[Run]) -> list[str]:
    """Return what the training of each run warned of at its end, behind the run's name."""
    labelled = zip(run_labels(runs), runs, strict=True)
    return [f"{label}: {one_line(warning)}" for label, run in labelled for warning in _warnings(run)]


def _warnings(run: Run) -> list[str]:
    found = run.manifest.get("warnings")
    return [warning for warning in found if isinstance(warning, str)] if isinstance(found, list) else []


def _status_cell(run: Run) -> str:
    return _text(lookup(run.manifest, "status")) + (", with a warning" if _warnings(run) else "")


def _metrics(runs: Sequence[Run]) -> list[str]:
    """Return the names of the plug-ins' metrics that some run was evaluated by."""
    return sorted({name for run in runs for name in lookup(run.evaluation, "tuned", "metrics") or ()})


def _metric_cell(key: str, name: str, run: Run) -> str:
    value = as_number(lookup(run.evaluation, key, "metrics", name))
    return MISSING if value is None else f"{value:.4g}"


def _text(value: Any) -> str:
    return one_line(str(value)) if value not in (None, "") else MISSING


def _loss(value: Any) -> str:
    number = as_number(value)
    if number is None:
        return MISSING
    return f"{number:.2e}" if 0 < abs(number) < 0.001 else f"{number:.4f}"


def _parameters_cell(run: Run) -> str:
    trainable = as_number(lookup(run.manifest, "parameters", "trainable"))
    total = as_number(lookup(run.manifest, "parameters", "total"))
    if trainable is None or not total:
        return count(trainable)
    return f"{trainable:,.0f} of {total:,.0f} ({trainable / total:.3%})"


def _world_cell(run: Run) -> str:
    distributed = lookup(run.manifest, "distributed")
    world = count(lookup(run.manifest, "distributed", "world_size"))
    if world == MISSING:
        return MISSING
    kind, stage = _text(lookup(distributed, "type")), lookup(distributed, "zero_stage")
    # "NO" is how Accelerate spells "not distributed"; alone in a cell it reads as an error.
    details = [] if kind in (MISSING, "NO") else [kind]
    if stage is not None:
        details.append(f"ZeRO {_text(stage)}")
    return f"{world} ({', '.join(details)})" if details else world


def _steps_cell(run: Run) -> str:
    steps = count(lookup(run.manifest, "steps"))
    if steps != MISSING:
        return steps
    # A crashed or running run has no total yet, but its log says how far it came.
    logged = series(run, "loss")
    return count(logged[-1][0]) if logged else MISSING


def _train_loss_cell(run: Run) -> str:
    return _first_loss(lookup(run.manifest, "final", "train_loss"), final_train_loss(run.metrics), _last(run, "loss"))


def _eval_loss_cell(run: Run) -> str:
    return _first_loss(lookup(run.manifest, "final", "eval_loss"), _last(run, "eval_loss"))


def _first_loss(*values: Any) -> str:
    return next((text for value in values if (text := _loss(value)) != MISSING), MISSING)


def _last(run: Run, key: str) -> float | None:
    logged = series(run, key)
    return logged[-1][1] if logged else None


def _held_out_cell(run: Run) -> str:
    rows, available = count(run.evaluation.get("examples")), count(run.evaluation.get("held_out"))
    return rows if available in (MISSING, rows) else f"first {rows} of {available}"


def _score_cell(run: Run, key: str) -> str:
    """Return the share of right answers with the interval that so many rows leave it."""
    share, rows = as_number(lookup(run.evaluation, key, "exact_match")), as_number(run.evaluation.get("examples"))
    if share is None or not rows or rows < 1 or not 0 <= share <= 1:
        return percent(share)
    return score_text(round(share * rows), round(rows))


def _device_cell(run: Run) -> str:
    kind = _text(lookup(run.manifest, "distributed", "device"))
    name = _text(lookup(run.manifest, "hardware", "device_name"))
    if MISSING in (kind, name) or kind == name:
        return kind if name == MISSING else name
    return f"{name} ({kind})"
