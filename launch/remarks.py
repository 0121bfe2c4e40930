"""What a report on prepared data remarks, kept for launches that find everything made already."""

from __future__ import annotations

import json
from pathlib import Path

from omegaconf import DictConfig

from tunewright.files import write_json
from tunewright.launch.data.report import Report
from tunewright.launch.data.report_remarks import remarks
from tunewright.trainer.data.token_cache import TokenCache, describe
from tunewright.trainer.model.config_json import known_positions, model_numbers
from tunewright.trainer.model.meta_model import find_architecture
from tunewright.trainer.model.model_folder import cache_folder


def keep_remarks(config: DictConfig, cache: TokenCache, report: Report) -> None:
    """Write down what a report remarks."""
    file = _file(config, cache)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, [[remark.text, *remark.details] for remark in remarks(report)])


def known_figures(config: DictConfig, cache: TokenCache) -> list[str] | None:
    """Return what a launch says of data that was made ready before, its figures and remarks; None without a report."""
    file = _file(config, cache)
    if not file.is_file():
        return None
    found = json.loads(file.read_text(encoding="utf-8"))
    return [*describe(cache), *(f"  ! {text}" + (f" ({details[0]})" if details else "") for text, *details in found)]


def _file(config: DictConfig, cache: TokenCache) -> Path:
    # Another model may have the same tokenizer, an embedding that is too small for it, and fewer positions.
    architecture = find_architecture(config)
    rows, positions = architecture.vocabulary if architecture else None, known_positions(model_numbers(config))
    return cache_folder(config.data.cache_dir) / "remarks" / f"{cache.fingerprint}-{rows}-{positions}.json"
