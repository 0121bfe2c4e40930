"""A comparison of runs as one page that needs nothing else."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

from tunewright.deliver.comparison_rows import Row, comparison_rows, warning_notes
from tunewright.deliver.comparison_text import REPORT_PROMPTS
from tunewright.deliver.held_out_answers import MARKS, held_out_answers, score_notes
from tunewright.deliver.run_record import Run, lookup, run_labels
from tunewright.deliver.setting_differences import config_differences
from tunewright.pages import render_page
from tunewright.text import MISSING, clip


def comparison_html(runs: Sequence[Run], curves: bytes) -> str:
    """Return the page, with the PNG of the loss curves inside."""
    names = run_labels(runs)
    return render_page(
        "comparison.html.jinja",
        title=f"Comparison: {clip(', '.join(names), 80)}",
        heading="Comparison of fine-tuning runs",
        summary=", ".join(names),
        names=names,
        notes=[*warning_notes(runs), *score_notes(runs)],
        figures=_lines(comparison_rows(runs)),
        curves=base64.b64encode(curves).decode("ascii"),
        differences=_lines(config_differences(runs)),
        held_out=held_out_answers(runs, REPORT_PROMPTS),
        marks=MARKS,
        environment=_lines([*_mapping_rows(runs, "versions"), *_mapping_rows(runs, "hardware")]),
    )


def _lines(rows: Sequence[Row]) -> list[list[str]]:
    return [[label, *cells] for label, cells in rows]


def _mapping_rows(runs: Sequence[Run], key: str) -> list[Row]:
    """Return (entry, [value per run]) over all entries any run has under `key`."""
    found = [lookup(run.manifest, key) for run in runs]
    mappings: list[Mapping[str, Any]] = [value if isinstance(value, Mapping) else {} for value in found]
    entries = dict.fromkeys(entry for mapping in mappings for entry in mapping)
    values = [[mapping.get(entry) for mapping in mappings] for entry in entries]
    cells = [[MISSING if value is None else str(value) for value in row] for row in values]
    return [(str(entry), row) for entry, row in zip(entries, cells, strict=True)]
