"""A run folder read back: all that a finished or crashed run says about itself.

It holds `manifest.json`, `metrics.jsonl`, `config.yaml` and, when held-out answers were generated, `evaluation.json`
(`evaluation-N.json` for the first N rows alone). Only the manifest is required: a run that died early is exactly the
one somebody wants to look at.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tunewright.errors import ConfigError, did_you_mean
from tunewright.redaction import redact_tree
from tunewright.text import as_number, listed, one_line

Point = tuple[float, float]


@dataclass(frozen=True)
class Run:
    """Everything one run folder says about itself."""

    path: Path
    name: str
    manifest: Mapping[str, Any] = field(default_factory=dict)
    metrics: tuple[Mapping[str, Any], ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    evaluation: Mapping[str, Any] = field(default_factory=dict)


def load_run(path: Path) -> Run:
    """Read one run folder; raise :class:`ConfigError` when it is not a run folder."""
    path = Path(path)
    if not path.is_dir():
        raise ConfigError(_unknown_run_message(path))
    if not (path / "manifest.json").is_file():
        raise ConfigError(_no_manifest_message(path))
    manifest = _read_mapping(path / "manifest.json", json.loads)
    if manifest is None:
        raise ConfigError(f"{path / 'manifest.json'} is not a readable JSON object")
    name = manifest.get("name")
    manifest = redact_tree(manifest)  # of an earlier version it may hold secrets
    return Run(
        path=path,
        # resolve() so that "." still gives a name
        name=one_line(name) if isinstance(name, str) and name.strip() else one_line(path.resolve().name),
        manifest=manifest,
        metrics=tuple(_read_json_lines(path / "metrics.jsonl")),
        config=redact_tree(_read_mapping(path / "config.yaml", yaml.safe_load) or {}),
        evaluation=_read_evaluation(path),
    )


def _read_evaluation(path: Path) -> dict[str, Any]:
    """Return the answers to all held-out rows, or where there are none those to the most of them."""
    numbered = [(int(file.stem.partition("-")[2]), file) for file in path.glob("evaluation-*.json") if _numbered(file)]
    files = [path / "evaluation.json", *(file for _, file in sorted(numbered, reverse=True))]
    found = (_read_mapping(file, json.loads) for file in files)
    return next((evaluation for evaluation in found if evaluation), {})


def _numbered(file: Path) -> bool:
    return file.stem.partition("-")[2].isdecimal()


def _read_mapping(path: Path, parse: Callable[[str], Any]) -> dict[str, Any] | None:
    """Return the mapping in ``path``, or None when it is missing, torn or something else."""
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):  # JSON and UTF-8 errors are both ValueErrors
        return None
    return content if isinstance(content, dict) else None


def _read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON-lines file, skipping the lines a crash tore."""
    try:
        # "replace": a line torn inside a multi-byte character must not cost us the other lines
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    # Not splitlines(): that also breaks at U+2028 and others, which JSON strings may hold as they are
    for line in text.split("\n"):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            yield record


def _run_folders(parent: Path) -> list[str]:
    """Return the names of the run folders directly inside ``parent``."""
    try:
        return sorted(child.name for child in parent.iterdir() if (child / "manifest.json").is_file())
    except OSError:
        return []


def _unknown_run_message(path: Path) -> str:
    if path.exists():
        return f"{path} is not a folder; a run is the folder that holds manifest.json"
    siblings = _run_folders(path.parent)
    near = did_you_mean(path.name, siblings)
    beside = f" {path.parent} holds {listed(siblings)}." if siblings and not near else ""
    return f"There is no run at {path}.{near}{beside}"


def _no_manifest_message(path: Path) -> str:
    inside = _run_folders(path)
    message = f"{path} has no manifest.json, so it is not a run folder"
    return f"{message}; it holds the runs {listed(inside)}" if inside else message


def lookup(mapping: Mapping[str, Any], *keys: str) -> Any:
    """Follow ``keys`` into nested mappings; None as soon as one is missing."""
    value: Any = mapping
    for key in keys:
        if not isinstance(value, Mapping):
            return None
        value = value.get(key)
    return value


def series(run: Run, key: str) -> list[Point]:
    """Return (step, value) for every logged step with ``key``.

    A resumed run logs the steps after its checkpoint a second time; the later line is the one that
    led to the final weights, so it wins.
    """
    by_step: dict[float, float] = {}
    for record in run.metrics:
        step, value = as_number(record.get("step")), as_number(record.get(key))
        if step is not None and value is not None and math.isfinite(value):  # NaN is what JSON does not know
            by_step[step] = value
    return sorted(by_step.items())


def run_labels(runs: Sequence[Run]) -> list[str]:
    """Return one distinct label per run: its name, plus its folder or a number on a clash."""
    labels: list[str] = []
    names = [run.name for run in runs]
    for run in runs:
        folder = run.path.resolve().name
        clash = names.count(run.name) > 1 and folder != run.name
        base = f"{run.name} ({one_line(folder)})" if clash else run.name
        label, number = base, 2
        while label in labels:
            label, number = f"{base} #{number}", number + 1
        labels.append(label)
    return labels
