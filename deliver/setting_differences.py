"""The settings in which runs differ."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tunewright.deliver.run_record import Run
from tunewright.text import MISSING, as_number
from tunewright.trees import flatten

# Settings that say where a run is kept, or who chose, rather than how it trained.
IGNORED_KEYS = frozenset({"name", "run_name", "run.name", "automatic"})
IGNORED_LEAVES = frozenset({"output_root", "output_dir", "run_dir", "logging_dir", "log_dir"})

# YAML 1.1 reads "1e-3" (no dot) as a string; it must still equal 0.001.
_EXPONENT_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")


def config_differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Return (key, [value per run]) for the settings that are not the same in every run.

    A run without a configuration shows ``-`` and does not count: otherwise it would make every
    single key "different".  A key that is absent counts as null, its default in a resolved file.
    """
    flat = [dict(flatten(run.config)) for run in runs]
    known = [settings for settings in flat if settings]
    keys = list(dict.fromkeys(key for settings in known for key in settings))
    return [
        (key, [_setting_text(settings, key) for settings in flat])
        for key in keys
        if not _is_ignored(key) and len({_canonical(settings.get(key)) for settings in known}) > 1
    ]


def _is_ignored(key: str) -> bool:
    return key in IGNORED_KEYS or key.rpartition(".")[2] in IGNORED_LEAVES


def _canonical(value: Any) -> str:
    """Return a string that is equal for equal settings (1 and 1.0, but not 1 and true)."""
    if isinstance(value, str) and _EXPONENT_NUMBER.fullmatch(value):
        value = float(value)
    number = as_number(value)
    return json.dumps(value, sort_keys=True, default=str) if number is None else repr(number)


def _setting_text(settings: Mapping[str, Any], key: str) -> str:
    if key not in settings:
        return MISSING
    value = settings[key]
    if isinstance(value, str) and value.strip():
        return value
    return json.dumps(value, ensure_ascii=False, default=str)
